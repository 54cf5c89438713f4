"""Complete runs, and their exported models loaded in a separate process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sft_recipes import run_dir
from sft_recipes.data.templates import alpaca_prompt
from tests.conftest import ROWS, WriteRecipe, minimal, run, write_rows

# Loads each model/ with plain transformers and records its outputs for a prompt.
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt, out, *folders = sys.argv[1:]
found = {}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    found[folder] = {
        "logits": logits, "ids": ids[0].tolist(), "answer": answer[0, ids.shape[1]:].tolist(),
        "text": tokenizer("Grüße <|end|> {x}")["input_ids"], "pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id,
        "generation": model.generation_config.to_dict(), "dtype": str(model.dtype),
        "rows": model.get_input_embeddings().weight.shape[0], "size": len(tokenizer),
    }
assert "sft_recipes" not in sys.modules
torch.save(found, out)
"""
PROMPT = "Say the word number 5."


METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-bf16": {"model": {"dtype": "bfloat16"}, "train": {"optimizer": "adamw_8bit_sr", "mixed_precision": "bf16"}},
    "lora": {"lora": {"rank": 4}},
    "dora-rslora": {"lora": {"rank": 4, "use_dora": True, "use_rslora": True}},
    "head": {"lora": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "new-tokens": {"lora": {"rank": 4}, "model": {"new_tokens": ["<think>", "<done>"]}},
    "shards": {"export": {"max_shard_size": "500KB"}},
}
Trained = Callable[[str], tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Run directory of a method and the trained model's logits for PROMPT; cached."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(method: str) -> tuple[Path, torch.Tensor]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            write_rows(folder / "train.jsonl")
            recipe = minimal(folder) | {"export": {"dtype": "bfloat16" if method == "full-bf16" else "float32"}}
            steps = 40 if method in ("full", "lora") else 10  # enough to learn the task
            recipe["train"] |= {"max_steps": steps, "learning_rate": 5e-3, "preflight": True}
            for section, values in METHODS[method].items():
                recipe[section] = recipe.get(section, {}) | values
            (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
            made[method] = run_and_watch(folder / "recipe.json")
        return made[method]

    return make


@pytest.fixture(scope="module")
def fresh(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Outputs of all models from one process without this package."""
    folders = {method: str(trained(method)[0] / "model") for method in METHODS}
    out = tmp_path_factory.mktemp("fresh") / "found.pt"
    command = [sys.executable, "-c", FRESH, PROMPT, str(out), *folders.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(out)
    return {method: found[folder] for method, folder in folders.items()}


def run_and_watch(recipe: Path) -> tuple[Path, torch.Tensor]:
    """Run, and capture the logits of the trained model."""
    from sft_recipes.training import trainer

    kept: list[torch.Tensor] = []
    train = trainer.train

    def watched(sft: trainer.Trainer, *args: Any, **kwargs: Any) -> None:
        train(sft, *args, **kwargs)
        ids = sft.processing_class.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            kept.append(sft.model.eval()(input_ids=torch.tensor([ids])).logits.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", watched)
        folder, _ = run(recipe)
    return folder, kept[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_loads_anywhere_and_is_the_one_that_was_trained(
    trained: Trained, fresh: dict[str, dict[str, Any]], method: str
) -> None:
    _, logits = trained(method)
    found = fresh[method]

    tolerance = 5e-2 if method == "full-bf16" else 1e-4
    torch.testing.assert_close(found["logits"].float(), logits.float(), atol=tolerance, rtol=tolerance)
    assert found["dtype"] == ("torch.bfloat16" if method == "full-bf16" else "torch.float32")
    assert found["rows"] >= found["size"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_speaks_the_format_of_the_training_and_stops(fresh: dict[str, dict[str, Any]], method: str) -> None:
    found = fresh[method]
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny")
    assert found["ids"] == base(alpaca_prompt(PROMPT))["input_ids"]
    assert found["text"] == base("Grüße <|end|> {x}")["input_ids"]
    assert found["answer"][-1] == found["eos"]
    assert found["pad"] not in (None, found["eos"])
    assert found["generation"]["eos_token_id"] == found["eos"]
    assert found["generation"]["pad_token_id"] == found["pad"]


def test_the_model_has_learned(trained: Trained) -> None:
    for method in ("full", "lora"):
        folder, _ = trained(method)
        losses = [
            json.loads(line).get("eval_loss") for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        before, *_, after = [loss for loss in losses if loss is not None]
        assert after < before / 3, method


def test_everything_the_design_names_is_there(trained: Trained) -> None:
    folder, _ = trained("lora")
    names = [
        "recipe.resolved.json",
        "manifest.json",
        "data.json",
        "metrics.jsonl",
        "learning_curve.png",
        "report.html",
        "probe.json",
        "reference.safetensors",
    ]

    assert all((folder / name).stat().st_size > 100 for name in names)
    assert {child.name for child in folder.iterdir()} == {*names, "checkpoints", "adapter", "model"}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        child.name for child in (folder / "model").iterdir()
    }
    assert not list(folder.rglob("*.bin.index*")) + [
        file for file in (folder / "model").iterdir() if file.suffix == ".bin"
    ]


def test_a_full_run_has_no_adapter(trained: Trained) -> None:
    assert not (trained("full")[0] / "adapter").exists()


def test_the_resolved_recipe_and_the_manifest(trained: Trained) -> None:
    folder, _ = trained("lora")
    resolved = json.loads((folder / "recipe.resolved.json").read_text("utf-8"))
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))

    assert resolved["lora"]["alpha"] == 32
    assert resolved["data"]["packing"] == "bfd"
    assert resolved["train"]["global_batch_size"] == 4
    assert manifest["versions"]["trl"]
    assert manifest["seed"] == 0
    assert manifest["device"]["name"]
    used = {name: manifest[name] for name in ("attention", "weights", "optimizer", "sequences_per_step")}
    assert used == {
        "attention": "varlen",
        "weights": "float32",
        "optimizer": "adamw_torch_fused",
        "sequences_per_step": 4,
    }
    assert (
        manifest["peak_gib"]
        >= manifest["preflight"]["largest_micro_batch"]["peak_gib"]
        > manifest["preflight"]["predicted_peak_gib"]
        > 0
    )
    assert list(manifest["data_sha256"]) == [str(folder.parent / "train.jsonl")]
    assert all(len(digest) == 64 for digest in manifest["data_sha256"].values())


def test_metrics_have_what_the_design_names(trained: Trained) -> None:
    lines = [json.loads(line) for line in (trained("lora")[0] / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]

    assert [line["step"] for line in steps] == [1, 10, 20, 30, 40]
    for line in steps:
        assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "epoch"} <= line.keys()
        assert "peak_memory_gib" in line
    assert [line["tokens"] for line in steps] == sorted(line["tokens"] for line in steps)


def test_new_tokens_are_saved_with_the_adapter_and_survive_the_merge(
    trained: Trained, fresh: dict[str, dict[str, Any]]
) -> None:
    folder, _ = trained("new-tokens")

    assert fresh["new-tokens"]["size"] == fresh["new-tokens"]["rows"] == 1026
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        [name] = [name for name in file.keys() if "trainable_tokens" in name]  # noqa: SIM118  # no mapping
        rows = file.get_tensor(name)
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        embeddings = file.get_tensor("model.embed_tokens.weight")
    torch.testing.assert_close(embeddings[1024:], rows)


def test_tied_layers_trained_in_full_stay_tied(trained: Trained) -> None:
    folder, _ = trained("head")
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # no mapping
    assert json.loads((folder / "model" / "config.json").read_text("utf-8"))["tie_word_embeddings"]


def test_the_adapter_loads_on_its_base(trained: Trained) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, logits = trained("lora")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny", dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )

    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=torch.tensor([ids])).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_qlora(tmp_path: Path, quantization: str) -> None:
    """With bitsandbytes: quantized base, float32 adapters, merged into the base with the lower loss."""
    write_rows(tmp_path / "train.jsonl")
    recipe = minimal(tmp_path) | {"lora": {"rank": 4}, "export": {"dtype": "float32"}}
    recipe["model"]["quantization"] = quantization
    recipe["train"] |= {"max_steps": 12, "learning_rate": 5e-3, "mixed_precision": "bf16", "preflight": True}
    (tmp_path / "r.json").write_text(json.dumps(recipe), encoding="utf-8")
    folder, said = run(tmp_path / "r.json")

    assert "QLoRA" in said
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        name = next(name for name in file.keys() if name.endswith("up_proj.lora_B.weight"))  # noqa: SIM118
        b, a = file.get_tensor(name), file.get_tensor(name.replace("lora_B", "lora_A"))
    with safe_open(Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny" / "model.safetensors", "pt") as file:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        original = file.get_tensor(f"{layer}.weight").float()
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        merged = file.get_tensor(f"{layer}.weight")
    assert a.dtype == b.dtype == torch.float32
    assert b.abs().max() > 0
    report = json.loads((folder / "model" / "merge.json").read_text("utf-8"))
    figures = report["verification"]
    assert report["merged_into"] == min(figures, key=lambda name: figures[name]["loss"])
    assert "merged into original base: loss" in said
    assert "merged into dequantized base: loss" in said
    exact = torch.equal(merged, original + 32 / 4 * (b @ a))
    assert exact == (report["merged_into"] == "original")
    losses = [json.loads(line).get("eval_loss") for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert losses[-1] < losses[0] / 2


def test_a_recipe_that_names_only_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "r.yaml").write_text("model: {name: builtin:tiny}\ndata: {train: rows.jsonl}\noutput_dir: out\n")
    folder, said = run(tmp_path / "r.yaml")

    assert folder == Path("out")
    assert "lose updates to rounding" in said
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_prompts_answered_with_what_is_expected(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl")
    asked = [{"prompt": "Say the word number 1.", "expected": "word 1"}, "Say the word number 3."]
    recipe = minimal(tmp_path) | {"eval": {"generate": asked, "max_new_tokens": 8}}
    (tmp_path / "r.json").write_text(json.dumps(recipe), encoding="utf-8")
    folder, said = run(tmp_path / "r.json")

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert samples[0]["expected"] == "word 1"
    assert samples[1]["expected"] is None
    assert "exact match:" in said
    assert "Sample answers (2 of 2, all in samples.jsonl)" in said
    assert "before:" in said


def test_prompts_without_validation_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl")
    recipe = minimal(tmp_path) | {"eval": {"generate": str(tmp_path / "train.jsonl"), "every": 2, "max_new_tokens": 4}}
    recipe["data"]["eval"] = None
    (tmp_path / "r.json").write_text(json.dumps(recipe), encoding="utf-8")
    folder, _ = run(tmp_path / "r.json")

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if "eval_exact_match" in line] == [0, 2, 3]


def test_shards(trained: Trained) -> None:
    folder, _ = trained("shards")

    assert len(list((folder / "model").glob("model-0000*-of-0000*.safetensors"))) > 2


def test_what_is_said_at_the_end_fails_no_run(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = run_dir.finish

    def and_lose_the_log(folder: Path, memory: float) -> None:
        finish(folder, memory)
        (folder / "metrics.jsonl").unlink()

    monkeypatch.setattr(run_dir, "finish", and_lose_the_log)
    folder, said = run(write_recipe(train={"max_steps": 1}))

    assert f"warning: cannot create the summary: {folder}: not a run directory (metrics.jsonl is missing)" in said
    assert (folder / "model").is_dir()


def test_a_model_trained_with_tools_is_verified_with_them(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "temperature", "parameters": {}}}
    write_rows(
        tmp_path / "train.jsonl",
        [{"prompt": f"How warm is it at {n}?", "completion": f"{n} degrees", "tools": [tool]} for n in range(12)],
    )
    (tmp_path / "t.jinja").write_text(
        "{{ tools[0].function.name }} {% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "utf-8",
    )
    folder, _ = run(write_recipe(), f"data.template={tmp_path / 't.jinja'}", "train.max_steps=1")

    assert (folder / "model" / "config.json").is_file()
    assert json.loads((folder / "probe.json").read_text("utf-8"))["prompt"]["tools"] == [tool]

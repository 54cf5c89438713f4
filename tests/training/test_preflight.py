import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from sft_recipes.errors import ModelError, RunError
from sft_recipes.training import preflight, trainer
from tests.conftest import WriteRecipe, build, metrics, run, write_rows
from tests.kills import TIMES

ON = {"preflight": True}
TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


@pytest.fixture
def opt(tmp_path: Path) -> str:
    """A small OPT, whose mask reads no positions that start again: with sdpa packed documents see each other."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=1024, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_a_model_that_leaks_between_packed_documents_is_refused(
    write_recipe: WriteRecipe, opt: str, packing: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="documents packed into one sequence see each other in a model of type opt"):
        run(write_recipe(model={"name": opt, "attention": "sdpa"}, train=ON), f"data.packing={packing}")

    assert not (tmp_path / "run").exists()


def test_documents_of_one_micro_batch_share_a_row_too(write_recipe: WriteRecipe, opt: str, tmp_path: Path) -> None:
    """One document a sequence, which packing does not change: the micro-batch is one row all the same."""
    rows = [{"instruction": f"Say {n} times: {'fox ' * 9}", "output": "fox " * 9} for n in range(12)]
    write_rows(tmp_path / "train.jsonl", rows)
    model = {"name": opt, "attention": "sdpa"}
    recipe = write_recipe(model=model, data={"eval": None, "max_length": 100}, train=ON)

    with pytest.raises(ModelError, match="documents packed into one sequence see each other"):
        run(recipe)
    folder, _ = run(recipe, "train.micro_batch_size=1")
    assert (folder / "model").is_dir()


@pytest.mark.parametrize(
    "overrides", [["data.packing=none"], ["data.packing=wrapped", "data.cross_document_attention=true"]]
)
def test_it_trains_where_that_does_no_harm(write_recipe: WriteRecipe, opt: str, overrides: list[str]) -> None:
    folder, _ = run(write_recipe(model={"name": opt}, train=ON), *overrides)

    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_model_that_does_not_leak_passes(write_recipe: WriteRecipe, mixed_precision: str) -> None:
    folder, _ = run(
        write_recipe(model={"dtype": "bfloat16"}, lora={"rank": 1}, train=ON),
        f"train.mixed_precision={mixed_precision}",
    )

    assert (folder / "model").is_dir()


WAYS: dict[str, list[str]] = {
    "full": [],
    "LoRA": ["lora={'rank': 2, 'dropout': 0.1}"],
    "QLoRA": ["lora={'rank': 2, 'dropout': 0.1}", "model.quantization=nf4", "train.mixed_precision=bf16"],
    "embeddings": ["lora={'rank': 2, 'modules_to_save': ['embed_tokens']}"],
    "new tokens": ["lora={'rank': 2}", "model.new_tokens=[<a>]"],
    "padded": ["data.packing=none"],
    "checkpointed": ["lora={'rank': 2, 'dropout': 0.1}", "train.gradient_checkpointing=true"],
    "stochastic rounding": ["model.dtype=bfloat16", "train.optimizer=adamw_8bit_sr", "train.mixed_precision=bf16"],
    **{name: [f"train.optimizer={name}"] for name in ("adamw_bnb_8bit", "lion_8bit", "adafactor")},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_leaves_everything_as_it_was(write_recipe: WriteRecipe, tmp_path: Path, way: str) -> None:
    """With it and without it: the same training, to the bit."""
    weights, lines = [], []
    for name in ("true", "false"):
        sft = build(write_recipe(), tmp_path / name, f"train.preflight={name}", "log.every=1", *WAYS[way])
        assert (sft.preflight is not None) == (name == "true")
        assert not sft.optimizer.state
        trainer.train(sft, None)
        weights.append(sft.model.state_dict())
        lines.append([{key: line[key] for key in line.keys() - TIMES} for line in metrics(tmp_path / name)])

    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert lines[0] == lines[1]


def test_what_it_looked_at_is_written_down(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder, said = run(write_recipe(lora={"rank": 2}, train=ON))
    found = json.loads((folder / "manifest.json").read_text("utf-8"))["preflight"]

    assert found["isolation"]["gradient_to_neighbour"] == 0
    assert 0 < found["base"]["loss"] < found["base"]["loss_of_shuffled_tokens"]
    assert found["longest"]["tokens"] > found["longest"]["eval_tokens"] / 2 > 0
    assert found["longest"]["trained_tensors"] == 56
    assert found["longest"]["without_gradient"] == 0
    assert found["stop"] == {"tokens": ["<|end|>"], "rows_without": 0}
    assert found["longest"]["peak_gib"] > found["predicted_gib"] > 0
    assert "preflight: " in said
    other, _ = run(write_recipe(), "train.preflight=false", f"output_dir={tmp_path / 'other'}")
    assert json.loads((other / "manifest.json").read_text("utf-8"))["preflight"] == "skipped"


def test_memory_that_is_lacking_is_found_before_the_first_step(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the longest rows, wherever they are in the data, of the training or of the validation."""
    rows = [{"instruction": "Say.", "output": "word " * (60 if number in (3, 17) else 2)} for number in range(24)]
    write_rows(tmp_path / "train.jsonl", rows)
    seen: list[int] = []
    compute = trainer.Trainer.compute_loss

    def compute_loss(
        self: trainer.Trainer, network: object, inputs: dict[str, torch.Tensor], *args: object, **kwargs: object
    ) -> object:
        seen.append(inputs["input_ids"].numel())
        torch.empty(2**60 if seen[-1] > 150 else 1, dtype=torch.uint8)
        return compute(self, network, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", compute_loss)
    with pytest.raises(RunError, match=r"out of memory before the first step: .* are predicted, and the device has"):
        run(write_recipe(data={"eval": None, "packing": "none"}, train=ON))
    assert len(seen) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_that_knows_nothing_of_the_language(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.randn_like(value) * 0.02 for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    _, said = run(write_recipe(model={"name": str(folder)}, train=ON))
    assert "not much better than the same tokens in random order" in said
    _, said = run(write_recipe(train=ON), f"output_dir={tmp_path / 'other'}")
    assert "in random order" not in said


def test_weights_that_are_not_numbers(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="before the first step the loss on the data is nan: numbers overflow in"):
        run(write_recipe(model={"name": str(folder)}, train=ON))


def test_what_gets_no_gradient_is_said(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

    sft = build(write_recipe(), tmp_path / "run", "train.preflight=false")
    sft.model.model.layers[1].tower = Idle()
    found = preflight.examine(sft, packed=True)
    assert found.warnings == [
        "these weights are trained, and get no gradient from the data: model.layers.1.tower.weight"
    ]

    frozen = sft.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"model.norm.weight is frozen, and would be trained all the same"):
        preflight.examine(sft, packed=True)
    assert frozen.grad is None

    sft.model.requires_grad_(False)
    idle = sft.model.model.layers[1].tower.weight.requires_grad_(True)
    sft.compute_loss = lambda *_: idle.sum() * 0
    with pytest.raises(ModelError, match="no weight that is to be trained gets a gradient from the data"):
        preflight.examine(sft, packed=True)

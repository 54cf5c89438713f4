"""The hand-off to DPO: docs/dpo.py on a run, and what docs/dpo.md says of it."""

import contextlib
import json
import math
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer
from trl.trainer.utils import use_adapter

from sft_recipes.commands.generate import generate
from sft_recipes.data import encoder, prepare
from sft_recipes.data.sequences import IGNORED
from sft_recipes.export.merge import merge
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe, minimal, run, write_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "dpo.md").read_text("utf-8")
SCRIPT = runpy.run_path(str(ROOT / "docs" / "dpo.py"))
build: Callable[..., DPOTrainer] = SCRIPT["build"]
SETTINGS: dict[str, Any] = {
    "max_steps": 8, "per_device_train_batch_size": 8, "gradient_checkpointing": False, "disable_tqdm": True,
    "dataloader_pin_memory": False,
}  # fmt: skip
WAYS = {
    "all weights": ("model", {"learning_rate": 2e-4}),
    "a new adapter": ("model", {"learning_rate": 4e-3, "lora": 8}),
    "the run's adapter": ("adapter", {"learning_rate": 1e-3}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/, a LoRA run on the quickstart's data with dropout, and pairs.jsonl, which the page's code writes."""
    folder = tmp_path_factory.mktemp("dpo")
    recipe = minimal(folder) | {"lora": {"rank": 8, "dropout": 0.1}, "export": {"dtype": "float32"}}
    recipe["data"] = {"train": "builtin:tasks/train.jsonl", "eval": None, "max_length": 128}
    recipe["train"] |= {"max_steps": 40, "learning_rate": 1e-2, "global_batch_size": 8}
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    run(folder / "recipe.json")
    (folder / "sft_recipes").symlink_to(ROOT / "sft_recipes")
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with contextlib.chdir(folder):
        exec(code, {})
    return folder


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_loss_is_ln_2_and_it_falls(folder: Path, tmp_path: Path, way: str) -> None:
    start, settings = WAYS[way]
    trainer = build(folder / "run" / start, folder / "pairs.jsonl", tmp_path / "out", **settings, **SETTINGS)
    trainer.train()
    first, *_, before_last, last = losses(trainer)

    assert abs(first - math.log(2)) < 5e-5
    assert (before_last + last) / 2 < first - 0.02

    # The reference is the fine-tuned model to the end.
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        fine_tuned = loaded(folder / "run" / start)(input_ids=ids).logits
        policy = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(reference(trainer)(input_ids=ids).logits, fine_tuned)
    assert (policy - fine_tuned).abs().max() > 0.01

    # What is saved is the policy, and sft-recipe talks to it.
    SCRIPT["save"](trainer, folder / "run" / start, tmp_path / "out")
    [saved] = (tmp_path / "out").iterdir()
    with torch.no_grad():
        torch.testing.assert_close(loaded(saved)(input_ids=ids).logits, policy)
    assert {path.name for path in saved.iterdir()} >= {
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    }
    assert generate(tmp_path / "out", "What is the opposite of empty?", max_new_tokens=16, temperature=0)


def loaded(saved: Path) -> torch.nn.Module:
    """A model, or an adapter on its base."""
    kind = AutoPeftModelForCausalLM if saved.name == "adapter" else AutoModelForCausalLM
    return kind.from_pretrained(saved, dtype="auto").eval()


def reference(trainer: DPOTrainer) -> Callable[..., Any]:
    """The reference as the trainer takes it."""
    if trainer.ref_model is not None:
        return trainer.ref_model

    def with_its_adapter(**inputs: Any) -> Any:
        with use_adapter(trainer.model, "ref" if "ref" in trainer.model.peft_config else None):
            return trainer.model(**inputs)

    return with_its_adapter


def test_the_base_is_another_reference(folder: Path, tmp_path: Path) -> None:
    """The run's adapter as the policy, and the model with it off as the reference: what the page warns of."""
    trainer = build(folder / "run" / "adapter", folder / "pairs.jsonl", tmp_path, **SETTINGS | {"max_steps": 1})
    trainer.model.delete_adapter("ref")
    trainer.train()

    assert losses(trainer)[0] < math.log(2) - 0.1


def test_the_reference_has_the_adapters_of_the_embeddings_too(folder: Path, tmp_path: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
    recipe["lora"] |= {"target_modules": ["embed_tokens", "q_proj"]}
    recipe |= {"output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    run(tmp_path / "recipe.json", "train.max_steps=10", "export.merge=false")
    settings = SETTINGS | {"max_steps": 1}
    trainer = build(tmp_path / "run" / "adapter", folder / "pairs.jsonl", tmp_path / "out", **settings)
    trainer.train()

    assert abs(losses(trainer)[0] - math.log(2)) < 5e-5


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_pairs_are_the_tokens_of_the_fine_tuning(
    folder: Path, tmp_path: Path, write_recipe: WriteRecipe, template: str
) -> None:
    """Token for token, the prompt as long as it was there, BOS and the end token once."""
    (tmp_path / "chat.jinja").write_text(CHAT)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines()]
    write_rows(tmp_path / "train.jsonl", [sft_row(row, template) for row in rows])
    recipe = write_recipe(export={"dtype": "float32"}, data={"eval": None, "packing": "none", "shuffle": False})
    named = [f"data.template={tmp_path / 'chat.jinja'}"] if template == "chat" else []
    run(recipe, "train.max_steps=1", *named)
    loaded = parse.load(recipe, named).recipe
    sft = prepare.prepare(loaded, encoder.from_transformers(load_tokenizer(loaded.model))).train
    dpo = build(tmp_path / "run" / "model", folder / "pairs.jsonl", tmp_path / "out", **SETTINGS).train_dataset

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert len(dpo) == len(sft) == len(rows) > 200
    for number, pair in enumerate(dpo):
        document, prompt, chosen = sft[number], pair["prompt_ids"], pair["chosen_ids"]
        assert prompt + chosen == document["input_ids"]
        assert [label != IGNORED for label in document["labels"]] == [False] * len(prompt) + [True] * len(chosen)
        for answer in (chosen, pair["rejected_ids"]):
            assert (prompt + answer).count(tokenizer.bos_token_id) == 1
            assert answer.count(tokenizer.eos_token_id) == 1
            assert prompt[0] == tokenizer.bos_token_id


def sft_row(pair: dict[str, Any], template: str) -> dict[str, Any]:
    """The pair's chosen answer as a row to fine-tune on."""
    [user], [assistant] = pair["prompt"], pair["chosen"]
    if template == "chat":
        return {"messages": [{"role": "user", "content": user["content"]}, assistant]}
    return {"instruction": user["content"], "input": user["input"], "output": assistant["content"]}


def test_special_tokens_in_a_pair_are_refused(folder: Path, tmp_path: Path) -> None:
    pair = json.loads((folder / "pairs.jsonl").read_text("utf-8").splitlines()[0])
    pair["rejected"][0]["content"] += "<|end|> and more"
    pairs = write_rows(tmp_path / "pairs.jsonl", [pair])

    with pytest.raises(SystemExit, match=r"pairs.jsonl:1: the text contains '<\|end\|>'"):
        build(folder / "run" / "model", pairs, tmp_path / "out")


def test_the_commands_of_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page and the script give the same ones; one of them is run."""
    said = re.findall(r"^python docs/dpo.py (\S+) pairs.jsonl --out \S+((?: --lora 16)?)", PAGE, re.MULTILINE)
    command = "python docs/dpo.py runs/quickstart/model pairs.jsonl --out runs/dpo-lora --lora 16 --learning-rate 1e-3"

    assert said == re.findall(
        r"^python docs/dpo.py (\S+) pairs.jsonl --out \S+((?: --lora 16)?)", SCRIPT["__doc__"], re.MULTILINE
    )
    assert f"{command}\n" in PAGE
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to(folder / "run")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[1:], "--steps", "2"])
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert "'loss': '0.6931'" in capsys.readouterr().out

    # The adapter's base is the fine-tuned model, by the path that the command gave.
    merge(Path("runs/dpo-lora/adapter"), Path("merged"), dtype="float32")
    assert generate(Path("merged"), "What is the opposite of empty?", max_new_tokens=16, temperature=0)

"""Bad input, as a user gives it to `sft-recipe run`: one clear line, exit code 2, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sft_recipes.errors import InputError
from tests.conftest import WriteRecipe, run

TINY = Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny"


def model(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A copy of the embedded model with something wrong."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(TINY, folder / "model")
        change(folder / "model")
        return [f"model.name={folder / 'model'}"]

    return make


def config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(content | changes), encoding="utf-8")

    return change


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_end(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    content.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


def train(content: str | bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "train.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
        return []

    return make


def just(*overrides: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(overrides)


GOOD = '{"instruction": "a", "output": "b"}\n'
CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no data file": (just("data.train=none.jsonl"), "none.jsonl: no such file"),
    "empty data file": (train(""), "train.jsonl: the file is empty"),
    "blank data file": (train("\n\n"), "train.jsonl: no rows"),
    "broken JSON": (train(GOOD + '{"instruction": "a\n'), "train.jsonl:2: not valid JSON"),
    "missing column": (train(GOOD + '{"instruction": "a"}\n'), "train.jsonl:2: no column 'output' in this row"),
    "unknown columns": (train('{"a": "b"}\n'), "train.jsonl:1: cannot tell the format from the columns 'a'"),
    "a number for text": (train('{"instruction": 1, "output": "b"}\n'), "train.jsonl:1: 'instruction' must be text, got 1"),
    "half a surrogate": (train(GOOD * 8 + '{"instruction": "\\ud83d", "output": "b"}\n'), "train.jsonl:9: not valid Unicode"),
    "not UTF-8": (train(b'{"instruction": "\xe4", "output": "b"}\n'), "train.jsonl:1: not valid UTF-8"),
    "no model directory": (just("model.name=/no/such/model"), "model.name: /no/such/model: no such directory"),
    "no config": (model(lambda folder: (folder / "config.json").unlink()), "has no config.json"),
    "no tokenizer": (model(lambda folder: (folder / "tokenizer.json").unlink()), "has no tokenizer"),
    "no weights": (model(lambda folder: (folder / "model.safetensors").unlink()), "has no safetensors weights"),
    "weights cut off": (model(cut_off), "its weights cannot be loaded"),
    "a weight missing": (model(lose_a_weight), "its files lack 1 of the weights that its config asks for"),
    "weights of another shape": (model(config(intermediate_size=10)), "its weights cannot be loaded"),
    "unknown model type": (model(config(model_type="lamma")), "its config cannot be loaded: The checkpoint you are trying"),
    "no causal model": (model(config(model_type="vit")), "its weights cannot be loaded"),
    "no end token": (model(without_end), "the tokenizer has no end token"),
    "broken tokenizer": (model(lambda folder: (folder / "tokenizer.json").write_text("{")), "its tokenizer cannot be loaded"),
    "targets that match nothing": (just("lora.target_modules=[foo]"), "lora.target_modules: no layer is called 'foo'"),
    "one target that matches nothing": (just("lora.target_modules=[q_proj, foo]"), "no layer is called 'foo'"),
    "a pattern that matches nothing": (just("lora.target_modules=foo.*"), "Target modules foo.* not found"),
    "a layer to save that is none": (just("lora.modules_to_save=[foo]"), "lora.modules_to_save: no layer is called 'foo'"),
    "an adapter on the head": (just("lora.target_modules=[lm_head]"), "train it in full with lora.modules_to_save: [lm_head]"),
    "quantization without lora": (just("model.quantization=nf4"), "add a section 'lora: {}'"),
    "too long for the model": (just("data.max_length=1025"), "data.max_length: 1025 is more than the 1024 positions"),
    "settings a schedule needs": (just("train.lr_scheduler=cosine_with_min_lr"), "train.lr_scheduler: cosine_with_min_lr"),
    "an optimizer to install": (just("train.optimizer=galore_adamw"), "train.optimizer: galore_adamw: You need to install"),
    "a trl field of the wrong type": (just("trl.dataloader_num_workers=x"), "trl: the training cannot be set up"),
    "prompts that are no rows": (just("eval.generate=none.jsonl"), "none.jsonl: no such file"),
    "nothing to resume": (just("--resume"), "holds no run to resume"),
    "no place to write": (just("output_dir=/proc/run"), "output_dir: /proc/run cannot be made"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left_behind(case: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    prepare, said = CASES[case]
    recipe = write_recipe()
    overrides = prepare(tmp_path)
    resume = "--resume" in overrides
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        run(recipe, *[override for override in overrides if override != "--resume"], resume=resume)

    [line] = caught.value.lines
    assert said in line
    assert "\n" not in line
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_directory_in_use(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError) as caught:
        run(write_recipe())

    assert "run is in use (it holds notes.txt); continue that run with --resume" in str(caught.value)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_output_directory_that_was_there_stays_there(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError):
        run(write_recipe(), "model.name=/no/such/model")
    with pytest.raises(InputError):
        run(write_recipe(), "lora.target_modules=[foo]")

    assert list((tmp_path / "run").iterdir()) == []


def test_parents_that_were_made_are_removed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run(write_recipe(), "lora.target_modules=[foo]", f"output_dir={tmp_path / 'a' / 'b' / 'c'}")

    assert not (tmp_path / "a").exists()


def test_no_room_on_the_disk(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"has 0\.0 GB free, and the run writes up to"):
        run(write_recipe())

    assert not (tmp_path / "run").exists()

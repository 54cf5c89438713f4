"""Load, build and train on the fake GPU, the way a run does."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sft_recipes import model_dir
from sft_recipes.data import encoder, prepare
from sft_recipes.models import model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Recipe, Train
from sft_recipes.training import trainer
from sft_recipes.training.build import build_trainer
from tests.conftest import ROWS, write_rows
from tests.cuda import fake_gpu
from tests.cuda.fake_gpu import GPU


@dataclass
class Built:
    """A trainer on the fake GPU, and what its model was loaded with."""

    trainer: trainer.Trainer
    options: dict[str, Any]
    gpu: GPU

    def train(self) -> None:
        """Train to the end, and count what the training does."""
        self.gpu.syncs.clear()
        self.gpu.attention_calls = 0  # without those that try the kernel
        trainer.train(self.trainer, None)


def settings(**sections: Any) -> dict[str, Any]:
    """Return sections of a recipe as it is trained on a GPU: bf16, packed, nothing saved, no fused kernels of extras."""
    usual: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "train": {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_steps": 1}
        | ({"kernels": "none"} if "kernels" in Train.model_fields else {}),
        "data": {"eval": None},
        "checkpoint": {"every": None},
    }
    for name, section in sections.items():
        usual[name] = {**usual.get(name, {}), **section}
    return usual


@contextmanager
def built(
    file: Path, folder: Path, gpu: GPU, *overrides: str, rows: int | None = None, data: Path | None = None
) -> Iterator[Built]:
    """Build a trainer on fake tensors, within which it can train. Weights have shapes but no values.

    `rows`: repeat the rows of train.jsonl up to so many; it is in `data`, or beside the recipe.
    """
    options: dict[str, Any] = {}

    def from_config(_name: str, **given: Any) -> Any:
        options.update(given)
        wanted = {name: given[name] for name in ("config", "dtype", "attn_implementation")}
        with torch.device("cuda" if "cuda" in _devices(given.get("device_map")) else "cpu"):
            return AutoModelForCausalLM.from_config(**wanted), {"missing_keys": []}

    with fake_gpu.installed(gpu):
        recipe = parse.load(file, overrides).recipe
        if rows is not None:
            write_rows((data or file.parent) / "train.jsonl", (ROWS * rows)[:rows])
        tokenizer = load_tokenizer(recipe.model)
        prepared = prepare.prepare(recipe, encoder.from_transformers(tokenizer))
        folder.mkdir(exist_ok=True)
        with fake_gpu.fake_tensors(gpu), patch.object(model.AutoModelForCausalLM, "from_pretrained", from_config):
            loaded = model.load_model(recipe, tokenizer)
            yield Built(build_trainer(recipe, loaded, tokenizer, prepared, folder, Console(quiet=True)), options, gpu)


def _devices(device_map: Any) -> set[str]:
    """Return the types of the devices that from_pretrained would put weights on."""
    given = device_map.values() if isinstance(device_map, dict) else [] if device_map is None else [device_map]
    return {torch.device(each).type if isinstance(each, str) else "cuda" for each in given}


def write_model(folder: Path, config: PreTrainedConfig) -> str:
    """Write what is read of a model if its weights are not: config and tokenizer."""
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir.BUILTIN / "tiny" / file, folder)
    return str(folder)


def recipe_of(**sections: Any) -> Recipe:
    least: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}
    return Recipe.model_validate(least | {name: {**least.get(name, {}), **each} for name, each in sections.items()})

#!/usr/bin/env python3
"""What each key of speed and memory brings or costs a step: `python benchmarks/dials.py MODEL DATA --method lora`.

The defaults, and each with one thing otherwise, in turns in one process: seconds of the best step, and the memory that is
predicted for it. Prints a table for RESULTS.md.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import measured_on
from peft.tuners.lora import LoraLayer
from train_step import Way, in_turn, ours, recipe_for, release_memory

from sft_recipes import cli
from sft_recipes.memory import autosize, prediction, remedies
from sft_recipes.models import cpu_loss
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import trainer

DEFAULTS = "the defaults"
KEYS: dict[str, dict[str, Any]] = {
    DEFAULTS: {},
    "TRL's loss head": {},
    "`attention: sdpa`": {"model.attention": "sdpa"},
    "`gradient_checkpointing: 2`": {"train.gradient_checkpointing": 2},
    "`gradient_checkpointing: true`": {"train.gradient_checkpointing": True},
    "PEFT's float32 copy of inputs": {},
    "`optimizer: adamw_8bit_sr`, bfloat16 weights": {"train.optimizer": "adamw_8bit_sr", "model.dtype": "bfloat16"},
    "`mixed_precision: no`, float32 weights": {"train.mixed_precision": "no", "model.dtype": "float32"},
    "`compile: true`": {"train.compile": True},
}


def built(recipe: Recipe, name: str, folder: Path) -> trainer.Trainer:
    with pytest.MonkeyPatch.context() as patched:
        if name == "TRL's loss head":
            patched.setattr(cpu_loss, "applies", lambda *_: False)
        sft, _ = ours(recipe, folder)
    if name == "PEFT's float32 copy of inputs":
        for module in sft.model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = True
    return sft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="?", default="builtin:tasks/train.jsonl")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--shape", default="4x512", help="sequences x tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=2, help="of a turn, of which the first is not timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(KEYS)}")
    given = parser.parse_args()
    given.float32 = False
    cli.quiet_libraries(debug=False)
    rows, length = map(int, given.shape.split("x"))
    only_of = {"full": "adamw_8bit_sr", "lora": "PEFT"}
    left_out = [name for name in KEYS for method, word in only_of.items() if word in name and method != given.method]
    print(f"{measured_on()}, {torch.get_num_threads()} threads; {given.method}, {rows} x {length} tokens\n")
    print("| | seconds a step | times the defaults | predicted GiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        ways, peaks = {}, {}
        for name, keys in KEYS.items():
            if name in (*left_out, *given.without):
                continue
            folder = Path(place) / str(len(ways))
            folder.mkdir()
            base = recipe_for(given, given.method, rows, length, given.steps)
            recipe = autosize.resolve_for_run(remedies.applied(base, keys), folder)
            peaks[name] = autosize.predict_here(recipe).peak_bytes / prediction.GIB
            ways[name] = Way(in_turn(built(recipe, name, folder)))
        for _ in range(given.turns):
            for way in ways.values():
                way.seconds += way.turn()[0]
                release_memory()
    for name, way in ways.items():
        best = min(way.seconds)
        print(f"| {name} | {best:.3f} | {best / min(ways[DEFAULTS].seconds):.2f} | {peaks[name]:.2f} |")


if __name__ == "__main__":
    main()

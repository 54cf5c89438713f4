#!/usr/bin/env python3
"""What it costs that a checkpoint is complete, and that each step is watched: `python benchmarks/checkpoints.py MODEL`.

A checkpoint of full fine-tuning in float32 (weights and two moments), as the Trainer writes it in place, and as we do: to a
directory beside, with every file synchronised and hashed, then renamed. In turns, best of several. Then the time of a
training step of builtin:tiny, where a step is shortest, with and without what watches it. Prints tables for RESULTS.md.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from machine import measured_on
from rich.console import Console
from trl import SFTTrainer

from sft_recipes import atomic_files, cli
from sft_recipes.data import encoder, prepare
from sft_recipes.models import model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse
from sft_recipes.training import checkpoint_dirs, guards, trainer
from sft_recipes.training.build import build_trainer

RECIPE = """
model: {name: "%s", dtype: float32}
data: {train: builtin:tasks/train.jsonl, eval: null, max_length: 128, max_train_samples: 400}
train: {max_steps: %d, micro_batch_size: 2, global_batch_size: 2, mixed_precision: no, gradient_checkpointing: false}
checkpoint: {every: null}
log: {every: 1000}
output_dir: unused
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a model, or builtin:tiny")
    parser.add_argument("--times", type=int, default=4)
    arguments = parser.parse_args()
    cli.quiet_libraries(debug=False)
    print(measured_on())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        saving(Path(folder), arguments.model, arguments.times)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        watching(Path(folder), arguments.times)


def saving(folder: Path, name: str, times: int) -> None:
    sft = build(folder, name, steps=1)
    sft.train()
    theirs, ours = folder / "theirs", folder / "ours"
    seconds: dict[str, list[float]] = {"the Trainer, in place": [], "complete or not there": [], "of that, hashes": []}
    seconds["verified before a resume"] = []
    for _ in range(times):
        sft.args.output_dir, sft.run_dir = str(theirs), ours
        shutil.rmtree(theirs, ignore_errors=True)
        shutil.rmtree(ours, ignore_errors=True)
        (ours / "checkpoints").mkdir(parents=True)
        seconds["the Trainer, in place"].append(timed(lambda: SFTTrainer._save_checkpoint(sft, sft.model, None)))
        seconds["complete or not there"].append(timed(sft._save_checkpoint))
        saved = checkpoint_dirs.checkpoint_path(ours, 1)
        seconds["of that, hashes"].append(timed(lambda saved=saved: atomic_files.file_hashes(saved)))
        seconds["verified before a resume"].append(timed(lambda saved=saved: atomic_files.find_corruption(saved)))
    size = sum(file.stat().st_size for file in checkpoint_dirs.checkpoint_path(ours, 1).iterdir())
    print(f"\n| a checkpoint of {name}, {size / 1e9:.2f} GB | seconds |\n|---|---|")
    for what, measured in seconds.items():
        print(f"| {what} | {min(measured):.2f} (best of {times}) |")


def watching(folder: Path, times: int) -> None:
    sft = build(folder, "builtin:tiny", steps=60)
    handler = sft.callback_handler
    kinds = {"watched": handler.callbacks, "not watched": []}
    kinds["not watched"] = [
        each for each in handler.callbacks if not isinstance(each, (guards.NonFiniteGuard, guards.StopOnRequest))
    ]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sft.train()
    for _ in range(times):
        for kind, callbacks in kinds.items():
            handler.callbacks = callbacks
            seconds[kind].append(timed(sft.train))
    ratio = min(seconds["watched"]) / min(seconds["not watched"])
    print("\n| 60 steps of builtin:tiny, a micro-batch each | seconds |\n|---|---|")
    for kind, measured in seconds.items():
        print(f"| {kind} | {min(measured):.2f} (best of {times}) |")
    print(f"\nWatched takes {ratio:.3f} times as long.")


def build(folder: Path, name: str, *, steps: int) -> trainer.Trainer:
    (folder / "recipe.yaml").write_text(RECIPE % (name, steps), encoding="utf-8")
    recipe = parse.load(folder / "recipe.yaml", []).recipe
    tokenizer = load_tokenizer(recipe.model)
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer), cached=False)
    run_dir = folder / "run"
    run_dir.mkdir()
    return build_trainer(recipe, model.load_model(recipe, tokenizer), tokenizer, data, run_dir, Console(quiet=True))


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""An optimizer step of the same work, ours and others': `python benchmarks/train_step.py MODEL DATA --llamafactory PYTHON`.

Plain TRL with its defaults (the model by name: float32 weights, gradient checkpointing, sdpa with its mask), TRL set as well
as its documentation allows on a CPU (frozen weights in bfloat16, no checkpointing), and ours with its defaults, in turns in
one process; LLaMA-Factory, with its defaults and without checkpointing, in processes that work when it is their turn. Same
weights, same rows, same packing, AdamW; LoRA of rank 8 on all linear layers, and full, with float32 weights. Losses have to
agree to 2 digits, with --float32 to 5. Then what our layer costs a step, over the SFTTrainer that it is made of. Prints
tables for RESULTS.md.

LLaMA-Factory wants older libraries, and so an environment of its own:

    python -m venv lf && lf/bin/pip install torch==2.13.0 && lf/bin/pip install --no-deps llamafactory==0.9.5
    lf/bin/pip install torch==2.13.0 transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 \
        torchdata==0.11.0 'tyro<0.9' omegaconf fire einops sentencepiece tiktoken scipy matplotlib pydantic pyyaml protobuf \
        fastapi sse-starlette uvicorn
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from datasets import Dataset
from machine import measured_on
from peft import LoraConfig
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback
from trl import SFTConfig, SFTTrainer

from sft_recipes import cli, model_dir
from sft_recipes.data import encoder, prepare
from sft_recipes.memory import autosize
from sft_recipes.models import model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import trainer
from sft_recipes.training.build import build_trainer

DEFAULT = "TRL, its defaults"
DIGITS = {False: 2, True: 5}  # that losses agree to, in bfloat16 and in float32

Turn = tuple[list[float], list[float]]  # seconds of its steps but the first, and losses of all


@dataclass
class Way:
    """A way to train, a few steps at a time."""

    turn: Callable[[], Turn]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a model, or builtin:tiny")
    parser.add_argument("data", nargs="?", default="builtin:tasks/train.jsonl")
    parser.add_argument("--shapes", nargs="+", default=["4x2048", "8x512"], help="sequences x tokens of a micro-batch")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--float32", action="store_true", help="weights and arithmetic")
    parser.add_argument("--steps", type=int, default=2, help="of a turn, of which the first is not timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--llamafactory", metavar="PYTHON", help="interpreter of its environment")
    parser.add_argument(
        "--overhead", type=int, default=20, metavar="STEPS", help="of a turn, of 1 x 128 tokens; 0: none"
    )
    given = parser.parse_args()
    if given.steps < 2:
        parser.error("--steps: the first of a turn is not timed; at least 2")
    cli.quiet_libraries(debug=False)
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    print(
        f"{measured_on()}, {torch.get_num_threads()} threads; the best step of {given.turns * (given.steps - 1)}, in turns"
    )
    differ = []
    for shape in given.shapes:
        rows, length = map(int, shape.split("x"))
        for method in given.methods:
            differ += compare(given, method, rows, length)
    if given.overhead:
        overhead(given)
    if differ:
        sys.exit("losses differ:\n" + "\n".join(differ))


def compare(given: argparse.Namespace, method: str, rows: int, length: int) -> list[str]:
    """The table of one work. Returns a line for each way whose losses are others than TRL's."""
    recipe = recipe_for(given, method, rows, length, given.steps)
    with ExitStack() as open_until_then:
        folder = Path(open_until_then.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        sft, data = ours(recipe, folder)
        table = Dataset(data.train.table()).select(range(rows * given.steps))
        settings = {"model_init_kwargs": {"dtype": recipe.model.dtype}, "gradient_checkpointing": False}
        ways = {
            DEFAULT: Way(in_turn(plain(recipe, table, folder, sft))),
            "TRL, set by hand": Way(in_turn(plain(recipe, table, folder, sft, **settings))),
            "sft-recipes, its defaults": Way(in_turn(sft)),
        }
        if given.llamafactory:
            for name, checkpoints in (("its defaults", True), ("no checkpointing", False)):
                worker = llamafactory(given, recipe, table, folder, sft, checkpoints=checkpoints)
                ways[f"LLaMA-Factory, {name}"] = Way(open_until_then.enter_context(worker))
        for _ in range(given.turns):
            for way in ways.values():
                seconds, losses = way.turn()
                way.losses += losses
                way.seconds += seconds
                release_memory()
    total = sum(map(len, table["input_ids"])) / given.steps
    trained = sum(label != -100 for row in table["labels"] for label in row) / given.steps
    kind = "float32" if given.float32 else "bfloat16"
    print(
        f"\n{method}, {rows} x {length}, {kind}: {sum(map(len, table['seq_lengths'])) / given.steps:.0f} documents in "
        f"{total:,.0f} tokens a step, {trained:,.0f} of them trained on\n\n| | seconds a step | tokens/s | trained tokens/s | "
        "times TRL's defaults | losses of the first steps |\n|---|---|---|---|---|---|"
    )
    differ, digits = [], DIGITS[given.float32]
    for name, way in ways.items():
        best, theirs = min(way.seconds), ways[DEFAULT].losses
        print(
            f"| {name} | {best:.3f} | {total / best:,.0f} | {trained / best:,.0f} | {min(ways[DEFAULT].seconds) / best:.2f} | "
            f"{', '.join(f'{loss:.{digits + 1}f}' for loss in way.losses[:4])} |",
            flush=True,
        )
        if not agree(way.losses[:4], theirs[:4], digits):
            differ.append(f"{method}, {rows} x {length}: {name}: {way.losses[:4]}, and {DEFAULT}: {theirs[:4]}")
    print()
    if method == "lora" and not given.float32:
        print("Not the same: frozen weights are float32 in TRL's defaults, and bfloat16 in all others.")
    if given.llamafactory:
        print(
            f"Not the same: LLaMA-Factory keeps {rows} rows of {length} tokens with a mask of each, "
            f"{rows * length - total:,.0f} of all tokens a step padding; the others lay them end to end."
        )
    return differ


def agree(losses: list[float], theirs: list[float], digits: int) -> bool:
    """Whether they are the same when rounded to so many digits behind the point, of large ones in all."""
    return all(abs(a - b) <= 0.5 * 10**-digits * max(abs(b), 1) for a, b in zip(losses, theirs, strict=True))


def recipe_for(given: argparse.Namespace, method: str, rows: int, length: int, steps: int) -> Recipe:
    """What all ways do. What it does not say are our defaults, but for what is beside the steps."""
    return Recipe.model_validate(
        {
            # Weights that are trained in bfloat16 lose updates: `check` warns of them, and losses would not be the same.
            "model": {"name": given.model} | ({"dtype": "float32"} if given.float32 or method == "full" else {}),
            "data": {"train": given.data, "eval": None, "max_length": length, "overlong": "drop"},
            "lora": {"rank": 8, "alpha": 16} if method == "lora" else None,
            "train": {
                "micro_batch_size": rows, "global_batch_size": rows, "max_steps": steps, "preflight": False,
                "learning_rate": 1e-4 if method == "lora" else 1e-5, "lr_scheduler": "constant", "warmup_ratio": 0.0,
            } | ({"mixed_precision": "no"} if given.float32 else {}),
            "checkpoint": {"every": None},
            "trl": {"train_sampling_strategy": "sequential"},  # each turn has the same rows
            "output_dir": "unused",
        }
    )  # fmt: skip


def ours(recipe: Recipe, folder: Path) -> tuple[trainer.Trainer, prepare.Prepared]:
    recipe = autosize.resolve_for_run(recipe, folder)
    tokenizer = load_tokenizer(recipe.model)
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer), cached=False)
    network = model.load_model(recipe, tokenizer)
    return build_trainer(recipe, network, tokenizer, data, folder, Console(quiet=True)), data


def plain(recipe: Recipe, table: Dataset, folder: Path, like: trainer.Trainer, **settings: Any) -> SFTTrainer:
    """TRL alone, as its documentation has it; `settings` are beside its defaults. Adapters begin `like` ours."""
    lora = recipe.lora and LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are ours
        padding_free=True,
        max_length=None,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=recipe.train.micro_batch_size,
        max_steps=recipe.train.max_steps,
        learning_rate=recipe.train.learning_rate,
        lr_scheduler_type=recipe.train.lr_scheduler,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **({"bf16": False} if recipe.train.mixed_precision == "no" else {}),
        **settings,
    )
    made = SFTTrainer(str(model_dir.location(recipe.model.name)), config, train_dataset=table, peft_config=lora)
    made.remove_callback(PrinterCallback)
    for name, parameter in made.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(like.model.get_parameter(name))
    return made


class Watch(TrainerCallback):
    """When steps end: from one to the next all that is done for a step is done once."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def in_turn(sft: SFTTrainer) -> Callable[[], Turn]:
    """A turn of a trainer: the same steps each time, with the weights and the optimizer of the last."""
    watch, losses, step = Watch(), list[float](), sft.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    def turn() -> Turn:
        losses.clear()
        train(sft)
        return [end - begin for begin, end in pairwise(watch.ends)], list(losses)

    sft.add_callback(watch)
    sft.training_step = training_step
    return turn


def release_memory() -> None:
    """What a way has used and keeps for itself would be lacking where all of them are large."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def train(sft: SFTTrainer) -> None:
    if isinstance(sft, trainer.Trainer):
        trainer.train(sft, None)
    else:
        sft.train()


@contextmanager
def llamafactory(
    given: argparse.Namespace, recipe: Recipe, table: Dataset, folder: Path, like: trainer.Trainer, *, checkpoints: bool
) -> Iterator[Callable[[], Turn]]:
    """A turn of LLaMA-Factory, in a process that waits for it."""
    home = folder / f"llamafactory-{checkpoints}"
    home.mkdir()
    length, rows = recipe.data.max_length, []
    for row in table:
        lengths, pad = row["seq_lengths"], length - len(row["input_ids"])
        # As its neat_packing has it: the mask is the number of each token's document, 0 for padding.
        columns = {
            "input_ids": (row["input_ids"], 0),
            "labels": (row["labels"], -100),
            "attention_mask": ([number for number, size in enumerate(lengths, 1) for _ in range(size)], 0),
            "position_ids": ([place for size in lengths for place in range(size)], 0),
        }
        padded = {name: values + [filler] * pad for name, (values, filler) in columns.items()}
        rows.append(padded | dict.fromkeys(("images", "videos", "audios")))
    (home / "rows.json").write_text(json.dumps(rows))
    settings = {
        "model_name_or_path": str(model_dir.location(recipe.model.name)),
        "stage": "sft", "do_train": True, "finetuning_type": "full", "template": "empty", "dataset": "rows",
        "tokenized_path": str(home / "rows"), "cutoff_len": length, "packing": True, "neat_packing": True,
        "disable_shuffling": True, "output_dir": str(home / "out"), "save_strategy": "no", "report_to": "none",
        "per_device_train_batch_size": recipe.train.micro_batch_size, "gradient_accumulation_steps": 1,
        "max_steps": given.steps * given.turns, "learning_rate": recipe.train.learning_rate,
        "lr_scheduler_type": recipe.train.lr_scheduler, "bf16": not given.float32, "disable_tqdm": True,
        "disable_gradient_checkpointing": not checkpoints, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    if recipe.trains_adapters:
        like.model.save_pretrained(home / "adapter")
        settings |= {"finetuning_type": "lora", "adapter_name_or_path": str(home / "adapter")}
    (home / "settings.json").write_text(json.dumps(settings))
    command = [given.llamafactory, Path(__file__).with_name("llamafactory.py"), home, str(given.steps)]
    with (home / "log").open("w") as log:
        worker = subprocess.Popen(
            command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=clean()
        )

    def turn() -> Turn:
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(file=worker.stdin, flush=True)
        if not (answer := worker.stdout.readline()):
            sys.exit(f"LLaMA-Factory failed:\n{(home / 'log').read_text()[-3000:]}")
        return tuple(json.loads(answer))

    try:
        yield turn
    finally:
        worker.kill()
        worker.wait()


def clean() -> dict[str, str]:
    """The environment without what leads Python to our libraries."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def overhead(given: argparse.Namespace) -> None:
    """Whole trainings of many short steps by one trainer, as it is and without all that is ours but attention and loss."""
    recipe = recipe_for(given, "lora", 1, 128, given.overhead)
    theirs = {name: getattr(SFTTrainer, name) for name in dir(trainer.Trainer) if is_ours(name)}
    bare = type("Bare", (trainer.Trainer,), theirs)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        sft, _ = ours(recipe, Path(folder))
        callbacks = sft.callback_handler.callbacks
        kinds = {
            "sft-recipes": (trainer.Trainer, callbacks),
            "SFTTrainer, the same settings": (
                bare,
                [each for each in callbacks if isinstance(each, DefaultFlowCallback)],
            ),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(2 * given.turns + 1):
            for kind, (sft.__class__, sft.callback_handler.callbacks) in kinds.items():
                began = time.perf_counter()
                trainer.train(sft, None)
                seconds[kind].append((time.perf_counter() - began) / given.overhead)
    ours_best, theirs_best = (min(measured[1:]) for measured in seconds.values())
    print(f"\n| {given.overhead} steps of 1 x 128 tokens, LoRA | milliseconds a step |\n|---|---|")
    for kind, measured in seconds.items():
        print(f"| {kind} | {min(measured[1:]) * 1000:.2f} |")
    print(f"\nOurs takes {ours_best / theirs_best - 1:+.2%}, best of {2 * given.turns}.", flush=True)


def is_ours(name: str) -> bool:
    """Whether our Trainer has its own where SFTTrainer has one."""
    own, other = (getattr(kind, name, None) for kind in (trainer.Trainer, SFTTrainer))
    return own is not other and other is not None and not name.startswith("__")


if __name__ == "__main__":
    main()

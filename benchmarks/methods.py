#!/usr/bin/env python3
"""Train a model three ways on the same rows: `python benchmarks/methods.py MODEL DATA --steps 60 [--set KEY=VALUE ...]`.

Prints a table for benchmarks/RESULTS.md: validation loss before and after for full fine-tuning, LoRA and QLoRA.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import measured_on

# Adapters learn at higher rates; QLoRA's as LoRA's.
METHODS = {
    "full": ["train.learning_rate=1e-3"],
    "lora": ["lora.rank=8", "train.learning_rate=5e-3"],
    "qlora": ["lora.rank=8", "train.learning_rate=5e-3", "model.quantization=nf4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompt", default="What is the opposite of 'hot'?")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    print(measured_on(), "\n")
    print("| method | steps | validation loss before | after | answer after |\n|---|---|---|---|---|")
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            before, after, answer = train(Path(folder), args, METHODS[method])
        print(f"| {method} | {args.steps} | {before:.4f} | {after:.4f} | {answer!r} |", flush=True)


def train(folder: Path, args: argparse.Namespace, overrides: list[str]) -> tuple[float, float, str]:
    recipe = {
        "model": {"name": args.model, "dtype": "float32"},
        "data": {"train": args.data, "eval": 0.1, "max_eval_samples": 100},
        "train": {"max_steps": args.steps, "gradient_checkpointing": False, "global_batch_size": 8},
        "eval": {"every": None, "generate": [args.prompt], "max_new_tokens": 40},
        "checkpoint": {"every": None},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "sft_recipes.cli", "run", str(folder / "recipe.yaml")]
    for override in [*overrides, *args.overrides]:
        command += ["--set", override]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics, samples = (
        [json.loads(line) for line in (folder / "run" / name).read_text("utf-8").splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    )
    losses = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    return losses[0], losses[-1], samples[-1]["answer"]


if __name__ == "__main__":
    main()

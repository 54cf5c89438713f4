#!/usr/bin/env python3
"""Run the quickstart as a user does, and say how long it took and what it brought: `python benchmarks/quickstart.py`.

Prints a table for benchmarks/RESULTS.md: adapters as in the recipe, and all weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import measured_on

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
METHODS = {"lora": [], "full": ["--set", "lora=null", "--set", "train.learning_rate=2e-3"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="how often each is run")
    args = parser.parse_args()
    print(measured_on(), "\n")
    print(
        "| method | seconds in all | training tokens/s | exact match before | after | validation loss before | after |"
    )
    print("|---|---|---|---|---|---|---|")
    for method, overrides in METHODS.items():
        runs = [measure(overrides) for _ in range(args.times)]
        best = min(runs, key=lambda run: run["seconds"])
        print(
            f"| {method} | {best['seconds']:.0f} (best of {args.times}) | {best['tokens_per_second']:,.0f} | "
            f"{best['match'][0]:.1%} | {best['match'][1]:.1%} | {best['loss'][0]:.3f} | {best['loss'][1]:.3f} |",
            flush=True,
        )


def measure(overrides: list[str]) -> dict[str, float | tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "sft_recipes.cli",
            "run",
            str(RECIPE),
            "--set",
            f"output_dir={out}",
            *overrides,
        ]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    rates = sorted(line["tokens_per_second"] for line in lines if "loss" in line)
    return {
        "seconds": seconds,
        "tokens_per_second": rates[len(rates) // 2],
        "match": (evaluated[0]["eval_exact_match"], evaluated[-1]["eval_exact_match"]),
        "loss": (evaluated[0]["eval_loss"], evaluated[-1]["eval_loss"]),
    }


if __name__ == "__main__":
    main()

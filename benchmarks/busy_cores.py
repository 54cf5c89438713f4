#!/usr/bin/env python3
"""A small model on quiet and on busy cores, by how long torch's threads spin: `python benchmarks/busy_cores.py`.

300000 is libgomp's own GOMP_SPINCOUNT, 5000 what the command line sets where the user has not. Busy is with one other
program of two threads. Prints a table for benchmarks/RESULTS.md.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import measured_on

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
OVERRIDES = ["train.max_steps=41", "data.eval=null", "eval.generate=[]", "eval.every=null", "checkpoint.every=null"]
OTHER = "import torch\na = torch.randn(256, 256)\nwhile True: (a @ a).relu_()"


def main() -> None:
    print(measured_on(), "\n\n| GOMP_SPINCOUNT | quiet, tokens/s | busy, tokens/s |\n|---|---|---|")
    for spin in ("300000", "5000"):
        quiet = tokens_per_second(spin)
        other = subprocess.Popen([sys.executable, "-c", OTHER])
        try:
            busy = tokens_per_second(spin)
        finally:
            other.kill()
        print(f"| {spin} | {quiet} | {busy} |", flush=True)


def tokens_per_second(spin: str) -> str:
    """At step 40 of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sft_recipes.cli", "run", str(RECIPE)]
        for override in [*OVERRIDES, f"output_dir={folder}/run"]:
            command += ["--set", override]
        done = subprocess.run(
            command, env=os.environ | {"GOMP_SPINCOUNT": spin}, capture_output=True, text=True, check=True
        )
    return re.findall(r"step 40/.*?([\d,]+) tokens/s", done.stdout)[0]


if __name__ == "__main__":
    main()

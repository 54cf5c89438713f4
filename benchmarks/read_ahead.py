#!/usr/bin/env python3
"""Seconds from nothing to a loaded model whose weights are not in memory: `python benchmarks/read_ahead.py MODEL_DIRECTORY`.

A fresh process each, in turns, with the weights read while the libraries are imported (as `sft-recipe run` does) and without.
"""

import os
import subprocess
import sys
from pathlib import Path

from machine import measured_on

TURNS = 4
LOADS = """
import sys, time, threading
began = time.perf_counter()
from sft_recipes.recipe import model_dir
if sys.argv[2] == "ahead":
    threading.Thread(target=model_dir.read_ahead, args=(sys.argv[1], None), daemon=True).start()
import sft_recipes.run
from transformers import AutoModelForCausalLM
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
total = sum(float(each.flatten()[::1024].float().sum()) for each in model.parameters())
print("SECONDS", imported - began, time.perf_counter() - began)
"""


def forget(folder: Path) -> None:
    """Take the weights out of the system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder: Path, way: str) -> tuple[float, float]:
    forget(folder)
    done = subprocess.run([sys.executable, "-c", LOADS, folder, way], capture_output=True, text=True, check=True)
    imported, loaded = next(line for line in done.stdout.splitlines() if line.startswith("SECONDS")).split()[1:]
    return float(loaded), float(imported)


model = Path(sys.argv[1])
size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
best: dict[str, tuple[float, float]] = {}
for _ in range(TURNS):
    for name in ("after", "ahead"):
        best[name] = min(best.get(name, (float("inf"), 0.0)), measured(model, name))
print(f"{measured_on()}; weights of {size / 1e9:.2f} GB, not in memory\n")
print("| weights are read | imports, s | to the loaded model, s |\n|---|---|---|")
for name, (seconds, imports) in best.items():
    print(
        f"| {'while the libraries are imported' if name == 'ahead' else 'after that'} | {imports:.1f} | {seconds:.1f} |"
    )

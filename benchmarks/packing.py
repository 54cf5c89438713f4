#!/usr/bin/env python3
"""Best fit decreasing over a million documents: `python benchmarks/packing.py`. Best of three, on one core."""

import time

import numpy as np
from machine import measured_on

from sft_recipes.data import packing

print(measured_on(), "\n\n| documents | capacity | seconds | fill |\n|---|---|---|---|")
lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.7, 1_000_000), 5, 2048).astype(int)
for capacity in (2048, 8192):
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        layout = packing.best_fit_decreasing(lengths, capacity)
        best = min(best, time.perf_counter() - began)
    fill = lengths.sum() / ((layout.sequence[-1] + 1) * capacity)
    print(f"| {len(lengths):,} | {capacity:,} | {best:.1f} | {fill:.4f} |")

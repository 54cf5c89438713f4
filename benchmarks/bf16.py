#!/usr/bin/env python3
"""Products in bfloat16 on CPUs with and without instructions for it: `python benchmarks/bf16.py`.

oneDNN is held to older instructions, in a fresh process each; a product of SmolLM2's size, the best of 20.
"""

import os
import subprocess
import sys

from machine import measured_on

CPUS = {"all of this CPU": "DEFAULT", "AVX-512 without bfloat16": "AVX512_CORE_VNNI", "AVX2": "AVX2"}
TIMES = """
import time, torch
def best(do):
    took = []
    for _ in range(20):
        began = time.perf_counter()
        do()
        took.append(time.perf_counter() - began)
    return min(took)
x, w = torch.randn(1024, 576), torch.randn(1536, 576)
half, weight = x.bfloat16(), w.bfloat16()
print(best(lambda: x @ w.t()), best(lambda: half @ weight.t()))
"""

print(f"{measured_on()}\n\n| instructions | float32, ms | bfloat16, ms | times as long |\n|---|---|---|---|")
for name, isa in CPUS.items():
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", TIMES], env=environment, capture_output=True, text=True, check=True)
    single, half = map(float, done.stdout.split())
    print(f"| {name} | {single * 1000:.2f} | {half * 1000:.2f} | {half / single:.2f} |", flush=True)

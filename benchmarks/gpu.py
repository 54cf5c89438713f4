#!/usr/bin/env python3
"""Check and measure sft-recipes on one NVIDIA GPU, most important items first, within a time budget.

    python benchmarks/gpu.py --minutes 12 --out runs/gpu    # from a checkout; `--list` shows the items
    python benchmarks/gpu.py --only 6,7 --out runs/gpu      # some items; results are appended
    python benchmarks/gpu.py --cpu --tiny                   # try the script itself without a GPU, in minutes

Requirements: an NVIDIA GPU, its driver, a CUDA build of torch, and the project's dependencies (installed, or on PYTHONPATH
together with the checkout). A C compiler is needed for Triton and torch.compile. No network and no downloaded weights:
models have the shapes of Llama 3 and Qwen3 and random weights, which are created on the GPU. Only configs and tokenizers are
written to disk. Items whose packages are missing (bitsandbytes, torchao, liger-kernel, pytest) are skipped.

Each item runs in a process of its own, so that an item that crashes, hangs or fragments memory does not affect the others.
The process of the next item imports the libraries while the current item runs. An item only starts if its estimate fits
into the remaining time, and is killed after three times its estimate. `--out` gets one line per item as soon as the item
ends: results.jsonl, results.md (a table for benchmarks/RESULTS.md), log.txt (output and tracebacks), profile-N.txt.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from machine import measured_on

STARTED = time.monotonic()
RESERVE = 5  # seconds kept back to end cleanly
TINY_SECONDS = 60  # estimate of an item on tiny shapes


@dataclass(frozen=True)
class Item:
    """One line of the results: a function of gpu_items.py and its arguments."""

    number: int
    name: str
    seconds: int  # estimate for an H200; not measured
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


LORA: dict[str, Any] = {"lora": {"rank": 16}}
FULL = {"train.optimizer": "adamw_8bit_sr"}
FLOAT32 = {"model.dtype": "float32"}
NF4 = LORA | {"model.quantization": "nf4"}
CHECKPOINTING = {"train.gradient_checkpointing": True}
# From TRL's defaults to ours; each rung keeps the changes of those before it.
LADDER: dict[str, dict[str, Any]] = {
    "TRL, its defaults": LORA | CHECKPOINTING | {"model.dtype": "float32", "model.attention": "sdpa"},
    "sft-recipes, bfloat16 weights": {"model.dtype": "bfloat16"},
    "varlen attention": {"model.attention": "varlen"},
    "no checkpointing": {"train.gradient_checkpointing": False},
    "compiled": {"train.compile": True},
    "fused kernels": {"train.kernels": "liger"},
}


def training(number: int, name: str, seconds: int, size: str, keys: dict[str, Any], **arguments: Any) -> Item:
    return Item(number, name, seconds, "train", {"size": size, "keys": keys, **arguments})


def ladder() -> list[Item]:
    keys: dict[str, Any] = {}
    items = []
    for name, change in LADDER.items():
        keys = keys | change
        plain = name.startswith("TRL")
        items.append(training(11, f"8B LoRA, 16 x 512: {name}", 60, "8b", keys, micro=16, plain=plain))
    return items


ITEMS = [
    Item(1, "imports and compiler", 30, "machine"),
    Item(2, "attention tests marked gpu", 50, "attention_tests"),
    Item(3, "quickstart in bfloat16, checkpointed", 50, "quickstart"),
    Item(4, "stop and resume", 45, "resume"),
    Item(4, "stop and resume, deterministic", 45, "resume", {"deterministic": True}),
    training(5, "4B LoRA, 1 x 16,384, capped at 24 GB", 50, "4b", {}, recipe="qwen3_4b_long", cap=24e9),
    training(6, "8B LoRA, 32 x 512", 40, "8b", LORA, micro=32, profile=True),
    training(7, "8B LoRA, 32 x 512, compiled", 100, "8b", LORA | {"train.compile": True}, micro=32, profile=True),
    training(
        8, "8B LoRA, 32 x 512, fused kernels", 40, "8b", LORA | {"train.kernels": "liger"}, micro=32, profile=True
    ),
    training(9, "1B nf4, 32 x 512", 20, "1b", NF4, micro=32),
    training(9, "1B full, adamw_8bit_sr, 32 x 512", 30, "1b", FULL, micro=32),
    *(
        training(10, f"1B {method}, 8 x 512, {name}", 15, "1b", keys | checkpointing, micro=8)
        for method, keys in {"LoRA": LORA, "full": FLOAT32, "nf4": NF4}.items()
        for name, checkpointing in {"checkpointed": CHECKPOINTING, "not checkpointed": {}}.items()
    ),
    *ladder(),
]

# Columns of results.md: heading, key in results.jsonl, format.
COLUMNS = [
    ("item", "number", "{}"),
    ("name", "name", "{}"),
    ("result", "result", "{}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("TFLOP/s", "tflops", "{:.1f}"),
    ("seconds per step", "seconds_per_step", "{:.3f}"),
    ("peak GiB", "peak_gib", "{:.2f}"),
    ("predicted GiB", "predicted_gib", "{:.2f}"),
    ("seconds", "seconds", "{:.0f}"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="time budget, imports included (default: 12)")
    parser.add_argument("--only", default="", metavar="N,N", help="numbers of the items to run")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="directory of the results (default: runs/gpu)"
    )
    parser.add_argument("--list", action="store_true", help="print the items with their estimates and exit")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU; items that need CUDA are skipped")
    parser.add_argument("--tiny", action="store_true", help="models and batches that only show that the script runs")
    given = parser.parse_args()
    numbers = {item.number for item in ITEMS}
    try:
        wanted = {int(number) for number in given.only.split(",")} if given.only else numbers
    except ValueError:
        wanted = {-1}
    if not wanted <= numbers:
        parser.error(f"--only: expected numbers from {min(numbers)} to {max(numbers)} (got {given.only})")
    items = [item for item in ITEMS if item.number in wanted]
    if given.list:
        print("\n".join(f"{item.number:>2}  {item.seconds:>4} s  {item.name}" for item in items))
        print(f"    {sum(item.seconds for item in items):>4} s  estimated for an H200, not measured")
        return
    given.device = "cpu" if given.cpu else "cuda"
    given.out = given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is killed as well
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        failed = run(items, given)
    print(f"\n{given.out}/results.md, results.jsonl, log.txt", flush=True)
    sys.exit(1 if failed else 0)


def run(items: list[Item], given: argparse.Namespace) -> bool:
    """Run the items in order and record a row for each. Returns True if one failed."""
    os.environ |= {
        "SFT_RECIPES_CACHE": str(given.folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if given.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import gpu_items  # noqa: F401  # workers are forked and inherit the imported libraries
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    record_header(given)
    states = []
    workers = Workers(given)
    try:
        for item in items:
            estimate = TINY_SECONDS if given.tiny else item.seconds
            left = given.minutes * 60 - (time.monotonic() - STARTED) - RESERVE
            began = time.monotonic()
            if estimate > left:
                row = {"state": "skipped", "result": f"no time left: {max(left, 0):.0f} s, estimate {estimate} s"}
            else:
                row = workers.perform(item, min(left, 3 * estimate))
            name = f"{item.name} (tiny)" if given.tiny else item.name
            row = {"number": item.number, "name": name, **row, "seconds": round(time.monotonic() - began, 1)}
            states.append(row["state"])
            record(row, given)
    finally:
        workers.close()
    return "failed" in states


# --- Worker processes ---


class Workers:
    """The process of the current item, and a spare one that imports the libraries in the meantime.

    On a GPU the processes are spawned rather than forked: importing bitsandbytes or torchao initializes CUDA, which a forked
    process cannot use.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.context: Any = multiprocessing.get_context("fork" if given.cpu else "spawn")
        self.spare = self.start()

    def start(self) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.given))
        process.start()
        theirs.close()
        return process, ours

    def perform(self, item: Item, limit: float) -> dict[str, Any]:
        """Run an item in the spare process, for at most `limit` seconds. Returns its row."""
        process, connection = self.spare
        self.spare = self.start()
        try:
            connection.send(item)
            if connection.poll(limit):
                return dict(connection.recv())
            return {"state": "failed", "result": f"stopped after {limit:.0f} s without a result"}
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join(5)
            return {"state": "failed", "result": f"the process died with exit code {process.exitcode} (see log.txt)"}
        finally:
            kill(process)

    def close(self) -> None:
        kill(self.spare[0])


def kill(process: Any) -> None:
    """Kill a worker and the processes it has started."""
    with suppress(ProcessLookupError, PermissionError):  # it has not become the leader of its group yet, or is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def work(connection: Connection, given: argparse.Namespace) -> None:
    """Import the libraries, wait for an item, run it and send its row."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(given.out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    began = time.monotonic()
    import gpu_items

    given.import_seconds = time.monotonic() - began
    item = connection.recv()
    print(f"\n--- {item.number}. {item.name} ---")
    given.number = item.number
    try:
        gpu_items.prepare(given)
        row = {"state": "done", **getattr(gpu_items, item.function)(given, **item.arguments)}
    except gpu_items.SkipItem as error:
        row = {"state": "skipped", "result": f"skipped: {error}"}
    except Exception as error:
        traceback.print_exc()
        row = {"state": "failed", "result": f"failed: {gpu_items.reason_of(error)}"}
    connection.send(row)


# --- Results ---


def record_header(given: argparse.Namespace) -> None:
    machine = f"{measured_on()}, {'no GPU used' if given.cpu else gpu()}"
    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    append(given.out / "results.jsonl", json.dumps({"command": command, "machine": machine}))
    headings = " | ".join(heading for heading, _, _ in COLUMNS)
    table = f"`{command}`\n\n{machine}\n\n| {headings} |\n|{'---|' * len(COLUMNS)}"
    append(given.out / "results.md", f"\n{table}")
    print(table, flush=True)


def record(row: dict[str, Any], given: argparse.Namespace) -> None:
    """Write one row to the terminal and both result files."""
    append(given.out / "results.jsonl", json.dumps(row))
    cells = (form.format(row[key]) if row.get(key) is not None else "" for _, key, form in COLUMNS)
    line = f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"
    append(given.out / "results.md", line)
    print(line, flush=True)


def append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(f"{text}\n")


def gpu() -> str:
    """Name, memory and driver of the GPU, from nvidia-smi: the parent process leaves CUDA alone."""
    query = "--query-gpu=name,memory.total,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        name, memory, driver = found.stdout.strip().split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):
        return "GPU unknown (nvidia-smi failed)"
    return f"{name}, {memory}, driver {driver}"


if __name__ == "__main__":
    main()

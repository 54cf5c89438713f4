"""Runs that are killed, and killed again, until one comes to its end: it has to be the run that was never killed.

    python -m tests.kills --trials 50 --seed 0

Each trial starts a small run and kills it with SIGKILL, at a random moment or at the n-th time that it touches a file of the
run directory (so within saving, rotating, exporting, merging). What has its final name then has to be whole. The run is
resumed, and killed again; the last resume is left alone. Its weights have to be those of the undisturbed run to the bit, its
metrics the same but for times.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from tests.conftest import minimal, write_rows

TIMES = ("tokens_per_second", "trained_tokens_per_second", "tflops", "mfu", "peak_memory_gib")
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"rank": 2, "dropout": 0.1}},
    "qlora": {"lora": {"rank": 2, "dropout": 0.1}, "model": {"quantization": "nf4"}},
}


def recipe(folder: Path, method: str, **sections: Any) -> Path:
    """A run of 7 steps over two epochs, with accumulation, validation and checkpoints after every 2 steps."""
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl")
    content = minimal(folder) | {"export": {"dtype": "float32"}, "eval": {"every": 3}, "log": {"every": 3}}
    content["checkpoint"] = {"every": 2, "keep": 2, "export_best": True}
    content["train"] |= {"max_steps": 7, "micro_batch_size": 1}
    for section, values in [*METHODS[method].items(), *sections.items()]:
        content[section] = {**content.get(section, {}), **values}
    file = folder / f"{method}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def mend_torch() -> None:
    """In a forked process, before anything else: torch makes its pool of threads anew at the first use, and two threads at
    once, as transformers loads weights with, would find it half made. accelerate forgets that it was one process, alone."""
    torch.set_num_threads(torch.get_num_threads())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def forked(act: Callable[[], object]) -> tuple[int, int]:
    """Do it in a forked process; its number, and a pipe from which "done" or what went wrong can be read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        mend_torch()
        try:
            act()
            said = "done"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    return child, reader


def in_a_child(
    act: Callable[[], object], *, kill_at: int | None = None, kill_after: float | None = None, under: Path
) -> str:
    """Do it in a forked process that is killed at its n-th file operation under a directory, or after some seconds.

    Returns "done", "killed", or what went wrong.
    """

    def watched() -> None:
        if kill_at is not None:  # the kernel gets no chance to tidy up
            at_each_operation(under, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == kill_at else None)
        act()

    child, reader = forked(watched)
    timer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL)) if kill_after is not None else None
    if timer:
        timer.start()
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if timer:
        timer.cancel()
    return "killed" if os.WIFSIGNALED(status) else said


_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}


def at_each_operation(under: Path, act: Callable[[int], object]) -> None:
    """Calls `act` with 1, 2, ... at each event that changes, or may change, a file under the directory."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _EVENTS and isinstance(arguments[0], str) and str(under) in arguments[0]:
            seen += 1
            act(seen)

    sys.addaudithook(hook)


def start(file: Path, *overrides: str, resume: bool, force: bool = False, stop: Any = None) -> None:
    from rich.console import Console

    from sft_recipes.export import verify
    from sft_recipes.run import run

    verify.verify_in_subprocess = verify.compare_outputs  # in this process, which has the libraries loaded
    run(str(file), overrides, resume=resume, force=force, stop=stop, console=Console(quiet=True))


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What a run leaves that must not depend on kills: metrics without times, and weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    weights = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for part in ("adapter", "model")
        for file in sorted((folder / part).rglob("*.safetensors"))
    }
    return metrics, weights


def faults(folder: Path) -> list[str]:
    """Directories that have their final name and are not whole."""
    from sft_recipes import atomic_files

    found = [
        f"{checkpoint.name}: {fault}"
        for checkpoint in (folder / "checkpoints").glob("checkpoint-*")
        if (fault := atomic_files.find_corruption(checkpoint))
    ]
    if (folder / "model").exists():
        report = next(
            folder / "model" / name for name in ("merge.json", "export.json") if (folder / "model" / name).exists()
        )
        listed, there = json.loads(report.read_text("utf-8"))["files"], atomic_files.file_hashes(folder / "model")
        found += [f"model/{name}" for name in listed if there.get(name) != listed[name]]
    if (folder / "adapter").exists() and not (folder / "adapter" / "tokenizer_config.json").exists():
        found.append("adapter: no tokenizer")
    return found


def trial(
    folder: Path, method: str, rng: random.Random, operations: int, seconds: float, expected: Any
) -> Counter[str]:
    """One run, killed up to three times. Raises AssertionError."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    file, happened = folder / f"{method}.json", Counter[str]()
    for attempt in range(rng.randint(1, 3)):
        at_operation = rng.random() < 0.7
        said = in_a_child(
            lambda resume=bool(attempt): start(file, resume=resume),
            kill_at=rng.randint(1, operations) if at_operation else None,
            kill_after=None if at_operation else rng.uniform(0, seconds),
            under=folder / "run",
        )
        assert said in ("killed", "done"), said
        happened[f"{said} {'at an operation' if at_operation else 'at a moment'}"] += 1
        assert not faults(folder / "run"), faults(folder / "run")
    said = in_a_child(lambda: start(file, resume=True), under=folder)
    assert said == "done", said
    metrics, weights = outcome(folder / "run")
    differing = [pair for pair in zip_longest(metrics, expected[0]) if pair[0] != pair[1]]
    assert not differing, differing
    assert weights == expected[1], "other weights"
    assert not [path.name for path in folder.joinpath("run").rglob(".*")], "something is left behind"
    return happened


def trials(folder: Path, methods: list[str], number: int, seed: int, say: Callable[[str], None]) -> Counter[str]:
    """So many trials, of the methods in turns."""
    rng, happened = random.Random(seed), Counter[str]()
    undisturbed: dict[str, tuple[int, float, Any]] = {}
    for count in range(number):
        method = methods[count % len(methods)]
        if method not in undisturbed:
            file = recipe(folder, method)
            operations = _operations(file, folder)
            expected = outcome(folder / "run")
            began = time.monotonic()
            assert _operations(file, folder) > 0
            undisturbed[method] = operations, time.monotonic() - began, expected
            assert outcome(folder / "run") == expected, "two undisturbed runs differ"
        now = trial(folder, method, rng, *undisturbed[method])
        happened += now
        say(f"{count + 1}: {method}: {dict(now)}")
    return happened


def _operations(file: Path, folder: Path) -> int:
    """How many file operations an undisturbed run takes."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    counted = folder / "operations"

    def act() -> None:
        last = [0]
        at_each_operation(folder / "run", lambda number: last.__setitem__(0, number))
        start(file, resume=False)
        counted.write_text(str(last[0]))

    said = in_a_child(act, under=folder)
    assert said == "done", said
    return int(counted.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    from sft_recipes import cli

    cli.quiet_libraries(debug=False)
    import sft_recipes.run  # noqa: F401  # once, and not in each child

    gc.freeze()  # what is loaded is no garbage to be looked for in each training

    with tempfile.TemporaryDirectory() as folder:
        happened = trials(Path(folder), arguments.methods, arguments.trials, arguments.seed, print)
    print(
        f"{arguments.trials} trials, {dict(happened)}: every run came to the same end, nothing half written was found"
    )


if __name__ == "__main__":
    main()

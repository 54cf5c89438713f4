"""Checkpoints to resume from: complete or not there, and never the last of them removed."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sft_recipes import atomic_files

_NAME = re.compile(r"checkpoint-(\d+)")
_WRITTEN = re.compile(r"\.(checkpoint-\d+)\.partial")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after a step is."""
    return run_dir / "checkpoints" / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


def latest_complete(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint of which every file is as it was written, None where there is none; and a line for each later
    one that was passed over, with the reason."""
    folder = run_dir / "checkpoints"
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    passed_over = [
        f"Skipping {folder / found[1]}: incomplete (the run ended while writing it)"
        for found in map(_WRITTEN.fullmatch, names)
        if found
    ]
    for checkpoint in _latest_first(run_dir):
        fault = atomic_files.find_corruption(checkpoint)
        if fault is None:
            return checkpoint, passed_over
        passed_over.append(f"Skipping {checkpoint}: {fault}")
    return None, passed_over


def rotate(newest: Path, keep: int, best: Path | None) -> None:
    """Remove checkpoints before the `newest`, which has just become complete, but the best one and so many of the latest
    that with it there are `keep`."""
    earlier = [folder for folder in _latest_first(newest.parent.parent) if step_of(folder) < step_of(newest)]
    complete = [folder for folder in earlier if atomic_files.find_corruption(folder, thoroughly=False) is None]
    for folder in earlier:
        if folder not in complete[: keep - 1] and folder != best:
            atomic_files.remove(folder)


def discard_after(run_dir: Path, checkpoint: Path | None) -> None:
    """Take back what was logged after the checkpoint, for those steps will be run again, and what was being written."""
    for pattern in ("checkpoints/.checkpoint-*", ".model.*", ".adapter.*"):
        for left in run_dir.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for file in run_dir.glob(".*.json*.partial"):  # what `report` writes may be another process's
        file.unlink()
    last = -1 if checkpoint is None else step_of(checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = run_dir / name
        if file.is_file():
            kept = (line for line in atomic_files.lines(file) if _step(line) <= last)
            atomic_files.write_text(file, "".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a power cut can leave anything
        return math.inf


def _latest_first(run_dir: Path) -> list[Path]:
    found: Iterator[Path] = (run_dir / "checkpoints").glob("checkpoint-*")
    return sorted((folder for folder in found if _NAME.fullmatch(folder.name)), key=step_of, reverse=True)

"""Find, rotate and roll back checkpoint directories."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipes import atomic_files
from sft_recipes.run_dir import ADAPTER, CHECKPOINTS, LOGS, MODEL

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"\.(checkpoint-\d+)\.partial")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step`."""
    return run_dir / CHECKPOINTS / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def latest_complete(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the latest intact checkpoint (or None), and a line with the reason for each later one that is skipped."""
    folder = run_dir / CHECKPOINTS
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    skipped = [
        f"Skipping {folder / match[1]}: incomplete (the run ended while writing it)"
        for match in map(_PARTIAL.fullmatch, names)
        if match
    ]
    for checkpoint in _latest_first(run_dir):
        corruption = atomic_files.find_corruption(checkpoint)
        if corruption is None:
            return checkpoint, skipped
        skipped.append(f"Skipping {checkpoint}: {corruption}")
    return None, skipped


def rotate(newest: Path, keep: int, best: Path | None) -> None:
    """Remove old checkpoints except `best`, keeping the `keep` latest intact ones, `newest` included."""
    earlier = [folder for folder in _latest_first(newest.parent.parent) if step_of(folder) < step_of(newest)]
    complete = [folder for folder in earlier if atomic_files.find_corruption(folder, thoroughly=False) is None]
    for folder in earlier:
        if folder not in complete[: keep - 1] and folder != best:
            atomic_files.remove(folder)


def discard_after(run_dir: Path, checkpoint: Path | None) -> None:
    """Remove partial files, and metrics and samples logged after the checkpoint, because those steps run again."""
    for pattern in (f"{CHECKPOINTS}/.checkpoint-*", f".{MODEL}.*", f".{ADAPTER}.*"):
        for partial in run_dir.glob(pattern):
            shutil.rmtree(partial, ignore_errors=True)
    for file in run_dir.glob(".*.json*.partial"):  # no others: `report` may be writing them in another process
        file.unlink()
    last = -1 if checkpoint is None else step_of(checkpoint)
    for name in LOGS:
        file = run_dir / name
        if file.is_file():
            kept = (line for line, values in intact_lines(file) if values["step"] <= last)
            atomic_files.write_text(file, "".join(f"{line}\n" for line in kept))


def intact_lines(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a log and their values, without what a power loss has damaged."""
    for line in atomic_files.lines(log):
        try:
            values = json.loads(line)
            values["step"] = int(values["step"])
        except (ValueError, KeyError, TypeError):
            continue
        yield line, values


def _latest_first(run_dir: Path) -> list[Path]:
    found: Iterator[Path] = (run_dir / CHECKPOINTS).glob("checkpoint-*")
    return sorted((folder for folder in found if _NAME.fullmatch(folder.name)), key=step_of, reverse=True)

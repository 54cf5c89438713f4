"""The run directory: the names of its files, their readers and writers, and its lock."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft_recipes import atomic_files
from sft_recipes.errors import OutputError, shown

RECIPE = "recipe.resolved.json"
MANIFEST = "manifest.json"
DATA = "data.json"
METRICS, SAMPLES = LOGS = ("metrics.jsonl", "samples.jsonl")  # lines that begin with their step
PROBE, REFERENCE = "probe.json", "reference.safetensors"  # rows, and what the trained model computes from them
CHECKPOINTS, ADAPTER, MODEL = OUTPUTS = ("checkpoints", "adapter", "model")
MERGE, EXPORT = VERIFICATIONS = ("merge.json", "export.json")  # in MODEL: how it was made and verified
CURVE, REPORT = "learning_curve.png", "report.html"
TRACKERS = "trackers.json"  # the run id of each experiment tracker

Lines = list[dict[str, Any]]


# --- Files ---


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OutputError."""
    with _reading(file, "a JSON object"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"got {shown(content)}")
        return content


def read_lines(file: Path) -> Lines:
    """Return the objects of a log, without a partial last line of a killed run; [] if it does not exist."""
    with _reading(file, "valid JSON Lines"):
        return [dict(json.loads(line)) for line in atomic_files.lines(file)] if file.is_file() else []


@contextmanager
def _reading(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{file}: cannot be read: {error.strerror}. Make it readable for this user.") from None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{file}: not {kind}: {error}. Restore the file as the run wrote it.") from None


def append_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines to a log, all or none."""
    atomic_files.append(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_metrics(folder: Path) -> Lines:
    """Return the lines of metrics.jsonl. Raises OutputError if the directory is no run."""
    file = folder / METRICS
    if not file.is_file():
        raise OutputError(f"{folder}: not a run directory ({METRICS} is missing). Pass the output_dir of a run.")
    lines = read_lines(file)
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise OutputError(f"{file}: a line has no 'step'. Restore the file as the run wrote it.")
    return lines


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


# --- The directory ---


def output_dir_problem(output_dir: str, *, resume: bool = False) -> str | None:
    """Return why `output_dir` cannot be used for a new or, with `resume`, a resumed run; None if it can."""
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        return f"output_dir: {folder} is a file. Choose a directory with --set output_dir=DIR."
    names = _names(folder)
    if not names:
        return None
    is_run = any(name == MANIFEST or RECIPE in name for name in names)  # RECIPE may be partially written
    contents = f"(contains {', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
    if resume and is_run:
        return None
    problem, remedy = "has no run to resume" if resume else "is not empty", "Choose another directory"
    if is_run:
        remedy = "Delete it, pass --resume to continue that run, or choose another directory"
    return f"output_dir: {folder} {problem} {contents}. {remedy} with --set output_dir=DIR."


@contextmanager
def open_run_dir(output_dir: str, *, resume: bool, main: bool = True) -> Iterator[Path]:
    """Create and lock the run directory; a no-op on ranks other than `main`.

    If the run ends before its manifest is written (wrong recipe, out of memory in the preflight, signal), the directory
    is removed again. Raises OutputError if it is not empty (with `resume`: has no run) or cannot be created.
    """
    folder = Path(output_dir).expanduser()
    if not main:
        yield folder
        return
    if problem := output_dir_problem(output_dir, resume=resume):
        raise OutputError(problem)
    try:
        created = atomic_files.create_dirs(folder)
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} cannot be created: {error.strerror}. Choose another with --set output_dir=DIR."
        ) from None
    with atomic_files.locked(folder):
        names = _names(folder)
        try:
            yield folder
        except BaseException:
            if not names and not (folder / MANIFEST).exists():
                for child in folder.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                atomic_files.remove_created(created)
            raise


def _names(folder: Path) -> list[str]:
    """Return the sorted names in a directory, [] if it does not exist."""
    try:
        return sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} cannot be read: {error.strerror}. Choose another with --set output_dir=DIR."
        ) from None


def finish(folder: Path, peak_gib: float) -> None:
    """Mark the run as finished in its manifest, with its peak memory in GiB."""
    now = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "peak_gib": round(peak_gib, 3)}
    atomic_files.write_json(folder / MANIFEST, read_json(folder / MANIFEST) | now)


def is_finished(folder: Path) -> bool:
    """Return True if the run is marked as finished and still has its model or adapter."""
    outputs = any((folder / name).is_dir() for name in (MODEL, ADAPTER))
    return outputs and (folder / MANIFEST).exists() and "finished" in read_json(folder / MANIFEST)

"""Create, lock and describe the run directory."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from sft_recipes import atomic_files
from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe import secrets
from sft_recipes.recipe.schema import Recipe

MANIFEST, RESOLVED = "manifest.json", "recipe.resolved.json"
# Keys that do not affect the trained weights.
_HARMLESS = ("checkpoint.", "log.", "export.", "eval.", "train.on_nonfinite", "train.gradient_checkpointing")
# Keys that only change how a step is split across ranks, and with it rounding and dropout. DeepSpeed checkpoints require
# the same number of ranks; those of DDP and FSDP2 can be resharded.
_OVER_RANKS = ("launch.processes", "launch.machines", "launch.cpu_offload")
LIBRARIES = (
    "sft-recipes", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes",
    "safetensors", "numpy", "torchao", "flash-attn", "deepspeed",
)  # fmt: skip


def output_dir_problem(output_dir: str, *, resume: bool = False) -> str | None:
    """Return why `output_dir` cannot be used for a new or, with `resume`, a resumed run; None if it can."""
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        return f"output_dir: {folder} is a file. Choose a directory with --set output_dir=DIR."
    names = _names(folder)
    if not names:
        return None
    is_run = any(name == MANIFEST or RESOLVED in name for name in names)  # RESOLVED may be partially written
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


def start_date(folder: Path, recipe: Recipe) -> str:
    """Return the date that chat templates take for today: that of the recipe, of the run being resumed, or today."""
    with contextlib.suppress(
        OSError, ValueError, LookupError, TypeError
    ):  # a new run, or a damaged manifest, reported later
        return str(recipe.data.date or json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["date"])
    return str(date.today())


def settings_changed(folder: Path, recipe: Recipe, fingerprints: dict[str, str], *, force: bool) -> list[str]:
    """Return a line for each recipe key, data source and library version that changed since the run started.

    Raises RecipeError with these lines, unless there are none or `force` is set and all of them are harmless.
    """
    if not (folder / MANIFEST).exists():  # it ended before it started training
        return []
    before, now = (_flat(values) for values in (_json(folder / RESOLVED), recipe.resolved()))
    manifest = _json(folder / MANIFEST)
    harmful, harmless = list[str](), list[str]()
    same_step = now.get("train.global_batch_size") is not None  # a change of it has a line of its own
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and key != "output_dir":
            old, new = json.dumps(before.get(key)), json.dumps(now.get(key))
            line = f"{key}: changed from {old} to {new} since the run started."
            split_only = key == "train.micro_batch_size" or (
                key in _OVER_RANKS and recipe.launch.strategy in ("ddp", "fsdp2")
            )
            (harmless if key.startswith(_HARMLESS) or (split_only and same_step) else harmful).append(line)
    for path, sha256 in fingerprints.items():
        if sha256 != manifest.get("data_sha256", {}).get(path, sha256):  # a changed path is a changed key
            is_prompts = path == recipe.eval.generate
            (harmless if is_prompts else harmful).append(f"{path}: content changed since the run started.")
    used = manifest.get("versions", {})
    for name, installed in versions().items():
        if installed != used.get(name):
            harmless.append(f"versions: {name} changed from {used.get(name)} to {installed} since the run started.")
    refused = f"{folder}: cannot resume with changed settings. Restore the original values"
    if harmful:
        raise RecipeError(*harmful, *harmless, f"{refused}, or use a new output_dir.")
    if harmless and not force:
        raise RecipeError(*harmless, f"{refused}, use a new output_dir, or pass --force.")
    return harmless


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read: {error}. Use a new output_dir.") from None


def write_metadata(
    folder: Path,
    recipe_file: str,
    recipe: Recipe,
    counted: dict[str, Any],
    used: dict[str, Any],
    checkpoint: Path | None,
    forced: list[str],
) -> None:
    """Write recipe.resolved.json, data.json, and last manifest.json, which marks the run as started.

    `counted` goes to data.json; `used` (device, attention, data fingerprints, preflight results, ...) to the manifest. If
    the run is resumed from `checkpoint`, its manifest is extended instead of replaced; `forced` are the accepted changes.
    """
    command = [secrets.redacted(word) for word in sys.argv]
    now = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, **used}
    if checkpoint is not None:
        manifest = _json(folder / MANIFEST)
        manifest.setdefault("resumed", []).append(now | {"from": checkpoint.name, "changes": forced})
        if forced:
            manifest["versions"] = versions()
    else:
        manifest = now | {
            "recipe": recipe_file,
            "seed": recipe.train.seed,
            "platform": platform.platform(),
            "versions": versions(),
            "git_commit": _git_commit(),
        }
    atomic_files.write_json(folder / RESOLVED, recipe.resolved())
    atomic_files.write_json(folder / "data.json", counted)
    atomic_files.write_json(folder / MANIFEST, manifest)


def finish(folder: Path, peak_gib: float) -> None:
    """Mark the run as finished in its manifest, with its peak memory in GiB."""
    now = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "peak_gib": round(peak_gib, 3)}
    atomic_files.write_json(folder / MANIFEST, _json(folder / MANIFEST) | now)


def is_finished(folder: Path) -> bool:
    """Return True if the run is marked as finished and still has its model or adapter."""
    outputs = any((folder / name).is_dir() for name in ("model", "adapter"))
    return outputs and (folder / MANIFEST).exists() and "finished" in _json(folder / MANIFEST)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the libraries in use; None: not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def source_hash() -> str:
    """Return the SHA-256 of the source of this package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the git commit of the working directory, with `+changes` if files differ from it; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()

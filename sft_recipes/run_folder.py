"""The run directory: opened, described, and given back if a run could not begin."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft_recipes import files
from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe import secrets
from sft_recipes.recipe.schema import Recipe

MANIFEST, RESOLVED = "manifest.json", "recipe.resolved.json"
# Keys that change what is written and said of a training, and not the training.
_HARMLESS = ("checkpoint.", "log.", "export.", "eval.", "train.on_nonfinite", "train.gradient_checkpointing")
# How a step's work is spread: its sums are rounded otherwise, and dropout falls elsewhere. DeepSpeed's checkpoints are for as
# many ranks as wrote them; others can be shared out anew.
_OVER_RANKS = ("launch.processes", "launch.machines", "launch.cpu_offload")
LIBRARIES = (
    "sft-recipes", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes",
    "safetensors", "numpy", "torchao", "flash-attn", "deepspeed",
)  # fmt: skip


def in_the_way(output_dir: str, *, resume: bool = False) -> str | None:
    """What a run directory cannot be, or could only be with `resume`; None where nothing is in the way."""
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        return f"output_dir: {folder} is a file; choose another with --set output_dir=DIR"
    held = _held(folder)
    if resume and held and not any(name == MANIFEST or RESOLVED in name for name in held):  # or a part of it
        return (
            f"output_dir: {folder} holds no run to resume, but {', '.join(held[:4])}{', ...' if len(held) > 4 else ''}; "
            "choose another directory with --set output_dir=DIR"
        )
    if held and not resume:
        return (
            f"output_dir: {folder} is in use (it holds {', '.join(held[:4])}{', ...' if len(held) > 4 else ''}); continue "
            "that run with --resume, choose another directory with --set output_dir=DIR, or remove it"
        )
    return None


@contextmanager
def opened(output_dir: str, *, resume: bool, main: bool = True) -> Iterator[Path]:
    """The run directory, created if it does not exist, and locked against other processes. It is removed again if the run
    ends before it has begun, which is when its manifest is written: a refused recipe, a lack of memory in the preflight, a
    signal. Of several ranks only the `main` one does this.

    Raises OutputError where it is in use (without `resume`), holds something else than a run, or cannot be made.
    """
    folder = Path(output_dir).expanduser()
    if not main:
        yield folder
        return
    if problem := in_the_way(output_dir, resume=resume):
        raise OutputError(problem)
    try:
        made = files.make(folder)
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} cannot be made: {error.strerror}; choose another with --set output_dir=DIR"
        ) from None
    with files.locked(folder):
        held = _held(folder)
        try:
            yield folder
        except BaseException:
            if not held and not (folder / MANIFEST).exists():
                for child in folder.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                files.unmake(made)
            raise


def _held(folder: Path) -> list[str]:
    try:
        return sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} cannot be read: {error.strerror}; choose another with --set output_dir=DIR"
        ) from None


def changes(folder: Path, recipe: Recipe, fingerprints: dict[str, str], *, force: bool) -> list[str]:
    """What is another than when the run began: a line for each key, data source and library version.

    A run is resumed as it was begun: raises RecipeError with these lines where there are any, but where `force` allows
    those that do no harm.
    """
    if not (folder / MANIFEST).exists():  # it did not come to begin
        return []
    before, now = (_flat(values) for values in (_json(folder / RESOLVED), recipe.resolved()))
    manifest = _json(folder / MANIFEST)
    harmful, harmless = list[str](), list[str]()
    same_step = now.get("train.global_batch_size") is not None  # and if it is another, that is said of itself
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and key != "output_dir":
            line = f"{key}: {json.dumps(now.get(key))} now, and {json.dumps(before.get(key))} in the run that is to be resumed"
            spread = key == "train.micro_batch_size" or (
                key in _OVER_RANKS and recipe.launch.strategy in ("ddp", "fsdp2")
            )
            (harmless if key.startswith(_HARMLESS) or (spread and same_step) else harmful).append(line)
    for path, found in fingerprints.items():
        if found != manifest.get("data", {}).get(path, found):  # another path is another key
            asked = path == recipe.eval.generate
            (harmless if asked else harmful).append(f"{path}: its content has changed since the run began")
    used = manifest.get("versions", {})
    for name, installed in versions().items():
        if installed != used.get(name):
            harmless.append(f"versions: {name} {installed} now, and {used.get(name)} when the run began")
    anew = f"{folder} is resumed with what it was begun with, or another output_dir started anew"
    if harmful:
        raise RecipeError(*harmful, *harmless, anew)
    if harmless and not force:
        raise RecipeError(*harmless, f"{anew}; --force resumes it all the same")
    return harmless


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read: {error}; start again in another output_dir") from None


def describe(
    folder: Path,
    recipe_file: str,
    recipe: Recipe,
    counted: dict[str, Any],
    used: dict[str, Any],
    checkpoint: Path | None,
    forced: list[str],
) -> None:
    """Write down what is run: recipe.resolved.json, data.json, and last manifest.json, with which the run has begun.

    `counted` goes to data.json; `used`, which is device, attention, fingerprints of the data and what the preflight found, to
    the manifest. Of a run that is resumed the manifest stays, and says how it went on.
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
    files.write_json(folder / RESOLVED, recipe.resolved())
    files.write_json(folder / "data.json", counted)
    files.write_json(folder / MANIFEST, manifest)


def finish(folder: Path, peak_gib: float) -> None:
    """Write down that the run has come to its end, and the most memory that it took, in GiB."""
    now = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "peak_gib": round(peak_gib, 3)}
    files.write_json(folder / MANIFEST, _json(folder / MANIFEST) | now)


def is_finished(folder: Path) -> bool:
    """Whether the run has come to its end, and what it left is still there."""
    outputs = any((folder / name).is_dir() for name in ("model", "adapter"))
    return outputs and (folder / MANIFEST).exists() and "finished" in _json(folder / MANIFEST)


def versions() -> dict[str, str | None]:
    """Of Python and the libraries that a run rests on; None: not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def code() -> str:
    """SHA-256 of this package's own source."""
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
    """The commit of the working directory, with `+changes` where files differ from it; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()

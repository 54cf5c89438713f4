"""The run directory: opened, described, and given back if a run could not begin."""

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

from sft_recipes.errors import InputError, OutputError, RecipeError
from sft_recipes.recipe.schema import Recipe

LIBRARIES = (
    "sft-recipes", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes",
    "safetensors", "torchao", "flash-attn",
)  # fmt: skip


def in_the_way(output_dir: str, *, resume: bool = False) -> str | None:
    """What a run directory cannot be, or could only be with `resume`; None where nothing is in the way."""
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        return f"output_dir: {folder} is a file; choose another with --set output_dir=DIR"
    held = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    if held and not resume:
        return (
            f"output_dir: {folder} is in use (it holds {', '.join(held[:4])}{', ...' if len(held) > 4 else ''}); continue "
            "that run with --resume, choose another directory with --set output_dir=DIR, or remove it"
        )
    return None


@contextmanager
def opened(output_dir: str, *, resume: bool) -> Iterator[Path]:
    """The run directory, made where it is not there. What was made is removed again where the input turns out wrong
    before the training has begun.

    Raises OutputError where it is in use (without `resume`), where there is nothing to resume, or it cannot be made.
    """
    folder = Path(output_dir).expanduser()
    if problem := in_the_way(output_dir, resume=resume):
        raise OutputError(problem)
    held = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
    if resume and "manifest.json" not in held:
        raise OutputError(f"output_dir: {folder} holds no run to resume; start it without --resume")
    made = next((parent for parent in reversed([folder, *folder.parents]) if not parent.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output_dir: {folder} cannot be made: {error.strerror}") from None
    try:
        yield folder
    except InputError:
        if not held and not (folder / "manifest.json").exists():
            shutil.rmtree(made or folder, ignore_errors=True)
            if made is None:
                folder.mkdir()
        raise


def refuse_changes(folder: Path, recipe: Recipe, fingerprints: dict[str, str]) -> None:
    """A run is resumed as it was begun. Raises RecipeError with every key, and data source, that is another now."""
    before, now = (_flat(values) for values in (_json(folder / "recipe.resolved.json"), recipe.resolved()))
    data = _json(folder / "manifest.json").get("data", {})
    changed = [
        f"{key}: {json.dumps(now.get(key))} now, and {json.dumps(before.get(key))} in the run that is to be resumed"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key != "output_dir"
    ]
    changed += [
        f"{path}: its content has changed since the run began"
        for path in fingerprints
        if fingerprints[path] != data.get(path)
    ]
    if changed:
        raise RecipeError(
            *changed, f"{folder} is resumed with what it was begun with, or another output_dir started anew"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested sections."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read: {error}; start again in another output_dir") from None


def describe(
    folder: Path, recipe_file: str, recipe: Recipe, data: dict[str, Any], fingerprints: dict[str, str], device: Any
) -> None:
    """Write down what is run: recipe.resolved.json, data.json and manifest.json."""
    manifest = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "recipe": recipe_file,
        "seed": recipe.train.seed,
        "data": fingerprints,
        "device": device,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git_commit": _git_commit(),
    }
    contents = {"recipe.resolved": recipe.resolved(), "data": data, "manifest": manifest}
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


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

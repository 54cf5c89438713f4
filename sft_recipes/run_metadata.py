"""Write the metadata of a run, and compare a resumed run's settings with it."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from sft_recipes import atomic_files, run_dir
from sft_recipes.errors import RecipeError
from sft_recipes.recipe import secrets
from sft_recipes.recipe.schema import Recipe

# Keys that do not affect the trained weights.
_HARMLESS = ("checkpoint.", "log.", "export.", "eval.", "train.on_nonfinite", "train.gradient_checkpointing")
# Keys that only change how a step is split across ranks, and with it rounding and dropout. DeepSpeed checkpoints require
# the same number of ranks; those of DDP and FSDP2 can be resharded.
_OVER_RANKS = ("launch.processes", "launch.machines", "launch.cpu_offload")
LIBRARIES = (
    "sft-recipes", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes",
    "safetensors", "numpy", "torchao", "flash-attn", "deepspeed",
)  # fmt: skip


def start_date(folder: Path, recipe: Recipe) -> str:
    """Return the date that chat templates take for today: that of the recipe, of the run being resumed, or today."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # a new run, or a damaged manifest, reported later
        return str(recipe.data.date or json.loads((folder / run_dir.MANIFEST).read_text(encoding="utf-8"))["date"])
    return str(date.today())


def settings_changed(folder: Path, recipe: Recipe, fingerprints: dict[str, str], *, force: bool) -> list[str]:
    """Return a line for each recipe key, data source and library version that changed since the run started.

    Raises RecipeError with these lines, unless there are none or `force` is set and all of them are harmless.
    """
    if not (folder / run_dir.MANIFEST).exists():  # it ended before it started training
        return []
    before, now = (
        run_dir.flatten(values) for values in (run_dir.read_json(folder / run_dir.RECIPE), recipe.resolved())
    )
    manifest = run_dir.read_json(folder / run_dir.MANIFEST)
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


def write(
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
        manifest = run_dir.read_json(folder / run_dir.MANIFEST)
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
    atomic_files.write_json(folder / run_dir.RECIPE, recipe.resolved())
    atomic_files.write_json(folder / run_dir.DATA, counted)
    atomic_files.write_json(folder / run_dir.MANIFEST, manifest)


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the libraries in use; None: not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def source_hash() -> str:
    """Return the SHA-256 of the source of this package: code and chat templates."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".jinja"):
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

"""Compute the disk space of checkpoints and exports, and check that it is free."""

import shutil
from pathlib import Path

from sft_recipes.errors import OutputError
from sft_recipes.recipe.schema import DTYPE_BYTES, Recipe
from sft_recipes.recipe.validate import STOCHASTIC_ROUNDING
from sft_recipes.run_dir import OUTPUTS

_CONFIGS = 100_000  # bytes of files other than weights and tokenizer


def of_checkpoint(recipe: Recipe, trained: int, tokenizer: int) -> int:
    """Return the bytes of a checkpoint: trained weights, optimizer states (weights' dtype or 8 bits), tokenizer."""
    weights = 4 if recipe.trains_adapters else DTYPE_BYTES[recipe.model.dtype]
    optimizer = recipe.train.optimizer
    # bitsandbytes keeps moments in float32 for any weights; its 8-bit optimizers do so for those of the embeddings.
    bitsandbytes = any(name in optimizer for name in ("bnb", "paged", "ademamix", "lion_", "adamw_8bit"))
    bitsandbytes = bitsandbytes and optimizer != STOCHASTIC_ROUNDING
    moment = (1.5 if bitsandbytes else 1) if "8bit" in optimizer else 4 if bitsandbytes else weights
    moments = 3 if "ademamix" in optimizer else 2
    return round(trained * (weights + moments * moment)) + tokenizer + _CONFIGS


def needed(recipe: Recipe, parameters: int, trained: int, tokenizer: int) -> int:
    """Return the bytes of checkpoints and exports, from the numbers of parameters and the tokenizer's bytes.

    While a checkpoint is written, there is one more than are kept. Quantized weights count in the export's dtype.
    """
    kept = recipe.checkpoint.keep + 1 + recipe.checkpoint.export_best if saves(recipe) else 0
    files = tokenizer + _CONFIGS
    exported = trained * 4 + files if recipe.trains_adapters else 0
    if not recipe.trains_adapters or recipe.export.merge:
        # For a quantized base, two candidates are written before one is chosen.
        models = 2 if recipe.model.quantization else 1
        exported += models * (parameters * DTYPE_BYTES[recipe.export.dtype] + files)
    return kept * of_checkpoint(recipe, trained, tokenizer) + exported


def saves(recipe: Recipe) -> bool:
    """Return True if the recipe writes checkpoints, other than on a signal."""
    return recipe.checkpoint.every is not None or recipe.checkpoint.export_best


def check_room(recipe: Recipe, folder: Path, parameters: int, trained: int, tokenizer: int) -> None:
    """Check that the run's files fit on the disk of `folder`; a resumed run replaces its own. Raises OutputError."""
    written = (file for part in OUTPUTS for file in (folder / part).rglob("*"))
    existing = sum(file.stat().st_size for file in written if file.is_file())  # will be replaced
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if short := space_shortage(there, needed(recipe, parameters, trained, tokenizer) - existing):
        raise OutputError(
            f"output_dir: not enough free space in {there} for checkpoints and models{short}. Free some space, choose "
            "another disk with --set output_dir=DIR, or lower checkpoint.keep."
        )


def space_shortage(folder: Path, need: int) -> str:
    """Return " (X needed, Y free)" to append to an error if less than `need` bytes are free, else ""."""
    free = shutil.disk_usage(folder).free
    return f" ({_gigabytes(need)} needed, {_gigabytes(free)} free)" if free < need else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

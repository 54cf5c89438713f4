"""Room on the disk for what a run will write."""

import shutil
from pathlib import Path

from sft_recipes.errors import OutputError
from sft_recipes.recipe.schema import Recipe

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def needed(recipe: Recipe, parameters: int, trained: int) -> int:
    """Bytes that checkpoints and export take, from the number of parameters in all and of those trained.

    A checkpoint holds the trained weights and two moments of each, in the weights' type or in 8 bits; one more than is
    kept is there while it is being written. Quantised weights count as what they are exported as.
    """
    weights = 4 if recipe.lora else BYTES[recipe.model.dtype]
    moments = 2 if "8bit" in recipe.train.optimizer else 2 * weights
    checkpoints = recipe.checkpoint.keep + 1 + recipe.checkpoint.export_best if recipe.checkpoint.every else 0
    exported = trained * weights if recipe.lora else 0
    if recipe.lora is None or recipe.export.merge:
        # Of a quantised base both candidates are written, before one is chosen.
        exported += parameters * BYTES[recipe.export.dtype] * (2 if recipe.model.quantization else 1)
    return checkpoints * trained * (weights + moments) + exported


def check_room(recipe: Recipe, folder: Path, parameters: int, trained: int) -> None:
    """Raises OutputError where the run would not fit."""
    need, free = needed(recipe, parameters, trained), shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            f"output_dir: {folder} has {free / 1e9:.1f} GB free, and the run writes up to {need / 1e9:.1f} GB of checkpoints "
            "and models; free some, choose another disk with --set output_dir=DIR, or lower checkpoint.keep"
        )

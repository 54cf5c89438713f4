"""Room on the disk for what a run will write."""

import shutil
from pathlib import Path

from sft_recipes.errors import OutputError
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import STOCHASTIC_ROUNDING

_WRITTEN = ("checkpoints", "adapter", "model")
_CONFIGS = 100_000  # bytes of what is written beside weights and tokenizer
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def of_checkpoint(recipe: Recipe, trained: int, tokenizer: int) -> int:
    """Bytes of a checkpoint: the trained weights and two moments of each, in the weights' type or in 8 bits; the tokenizer."""
    weights, optimizer = 4 if recipe.lora else BYTES[recipe.model.dtype], recipe.train.optimizer
    # bitsandbytes keeps its moments in float32 whatever the weights are, and of 8-bit ones those of the embeddings.
    bitsandbytes = any(name in optimizer for name in ("bnb", "paged", "ademamix", "lion_", "adamw_8bit"))
    bitsandbytes = bitsandbytes and optimizer != STOCHASTIC_ROUNDING
    moment = (1.5 if bitsandbytes else 1) if "8bit" in optimizer else 4 if bitsandbytes else weights
    moments = 3 if "ademamix" in optimizer else 2
    return round(trained * (weights + moments * moment)) + tokenizer + _CONFIGS


def needed(recipe: Recipe, parameters: int, trained: int, tokenizer: int) -> int:
    """Bytes that checkpoints and export take, from the number of parameters in all, of those trained, and the bytes of the
    tokenizer.

    One checkpoint more than is kept is there while it is being written. Quantised weights count as what they are exported
    as.
    """
    kept = recipe.checkpoint.keep + 1 + recipe.checkpoint.export_best if saves(recipe) else 0
    beside = tokenizer + _CONFIGS
    exported = trained * 4 + beside if recipe.lora else 0
    if recipe.lora is None or recipe.export.merge:
        # Of a quantised base both candidates are written, before one is chosen.
        models = 2 if recipe.model.quantization else 1
        exported += models * (parameters * BYTES[recipe.export.dtype] + beside)
    return kept * of_checkpoint(recipe, trained, tokenizer) + exported


def saves(recipe: Recipe) -> bool:
    """Whether checkpoints are written without being asked for by a signal."""
    return recipe.checkpoint.every is not None or recipe.checkpoint.export_best


def check_room(recipe: Recipe, folder: Path, parameters: int, trained: int, tokenizer: int) -> None:
    """Raises OutputError where the run would not fit, beside what it may have written before it is resumed."""
    written = (file for part in _WRITTEN for file in (folder / part).rglob("*"))
    there = sum(file.stat().st_size for file in written if file.is_file())  # will be replaced
    need, free = needed(recipe, parameters, trained, tokenizer) - there, shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            f"output_dir: {folder} has {_gigabytes(free)} free, and the run writes up to {_gigabytes(need)} of checkpoints "
            "and models; free some, choose another disk with --set output_dir=DIR, or lower checkpoint.keep"
        )


def lacking(folder: Path, need: int) -> str:
    """Words to add to what could not be written where the disk has less room than `need` bytes; else nothing."""
    free = shutil.disk_usage(folder).free
    return f" (it takes {_gigabytes(need)}, and the disk has {_gigabytes(free)} free)" if free < need else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

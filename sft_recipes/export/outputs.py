"""What a run leaves: the adapter and the model."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import peft
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.errors import InputError, RunError
from sft_recipes.export.merge import merge
from sft_recipes.export.save import save_adapter, save_model
from sft_recipes.recipe.schema import Recipe


def export(
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    folder: Path,
) -> None:
    """Write adapter/ and model/ into the run directory.

    Raises RunError where the trained weights are not finite, the merge is impossible, or the disk fails.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad):
        raise RunError(
            f"{folder}: the trained weights are not finite, so nothing is exported: the training diverged; set a lower "
            "train.learning_rate"
        )
    dtype, shard = recipe.export.dtype, recipe.export.max_shard_size
    for earlier in (folder / "adapter", folder / "model"):
        shutil.rmtree(earlier, ignore_errors=True)  # of a run that is resumed after its export
    try:
        if recipe.lora is None:
            save_model(model, tokenizer, folder / "model", dtype=dtype, max_shard_size=shard, stops=stops)
            return
        save_adapter(model, tokenizer, folder / "adapter", stops=stops)
        if recipe.export.merge:
            merge(
                folder / "adapter", folder / "model", dtype=dtype, max_shard_size=shard,
                trust_remote_code=recipe.model.trust_remote_code,
            )  # fmt: skip
    except InputError as error:
        raise RunError(
            f"{folder}: trained, but not merged: {error}; the adapter is whole: sft-recipe merge {folder} --out DIR, when "
            "that is mended"
        ) from error
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{folder}: export failed: {reason}; when that is mended, continue with --resume") from error

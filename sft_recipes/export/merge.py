"""Merging adapters into their base: W' = round(float32(W) + scale · B·A), with one rounding to the output type."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from sft_recipes.errors import ModelError, OutputError, RunError
from sft_recipes.export import load
from sft_recipes.export.save import save_model


def merge(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> None:
    """Write `adapter` merged into its base (its own, or `base`) as a model directory.

    The base is loaded in float32 on the CPU, four bytes a parameter: also for an adapter that was trained on a quantised
    base, which is merged into the original weights. Raises ModelError where adapter and base do not fit or the result is
    not finite, OutputError where `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: in use; choose another --out, or remove it")
    adapted, tokenizer = load.adapted(adapter, torch.float32, base=base, trust_remote_code=trust_remote_code)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT's word for weights that are not finite
        raise ModelError(f"{adapter}: cannot be merged: {' '.join(str(error).split())}") from None
    if (adapter / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(adapter)
    stops = load.stops(adapter, tokenizer)
    try:
        save_model(merged, tokenizer, out, dtype=dtype, max_shard_size=max_shard_size, stops=stops)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: cannot be written: {' '.join(str(error).split())}") from error

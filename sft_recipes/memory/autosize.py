"""Resolve `auto` batch size and checkpointing from predicted memory, and advise what to change if memory runs out."""

import json
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from sft_recipes.errors import ModelError, RecipeError
from sft_recipes.memory import fake_kernels, prediction, remedies
from sft_recipes.memory.memory_trace import MOST_TOKENS, Predictor, load_traceable_config
from sft_recipes.memory.prediction import Footprint
from sft_recipes.models.attention import capability_here
from sft_recipes.planning import flops
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import Recipe
from sft_recipes.run_dir import RECIPE

# Share of host memory that tensors may use: oneDNN allocates buffers outside torch's allocator (SmolLM2 in bfloat16, 4,096
# tokens, checkpointed: 4.3 GiB predicted, 10.2 GiB used by the process).
_SHARE_OF_HOST = 0.4
# Micro-batches of more tokens gain less than the activation checkpointing they require costs (not measured on a GPU).
_ENOUGH = 4096


def resolve_auto(recipe: Recipe, predict: Predictor, capacity: float) -> Recipe:
    """Resolve auto for `capacity` bytes: the largest micro-batch, and checkpointing of as few layers as necessary.

    Raises RecipeError if a single sequence does not fit, ModelError if memory cannot be predicted.
    """
    sizes = recipe.train.micro_batch_size == "auto"
    if recipe.train.gradient_checkpointing == "auto" and recipe.launch.strategy != "ddp":
        # Memory per rank is computed by formulas that have not been compared with a GPU.
        recipe = remedies.applied(recipe, {"train.gradient_checkpointing": True})
    if recipe.train.gradient_checkpointing != "auto":
        return largest_micro_batch(recipe, predict, capacity) if sizes else recipe

    def with_layers(layers: bool | int) -> Recipe:
        return remedies.applied(recipe, {"train.gradient_checkpointing": layers})

    if sizes:
        with suppress(RecipeError):  # no sequence fits without checkpointing
            without = largest_micro_batch(with_layers(False), predict, capacity)
            if without.train.micro_batch_size_or_1 * recipe.data.max_length >= _ENOUGH:
                return without
        recipe = largest_micro_batch(with_layers(True), predict, capacity)
        enough = [size for size in remedies.micro_batch_sizes(recipe) if size * recipe.data.max_length >= _ENOUGH]
        if enough and enough[0] < recipe.train.micro_batch_size_or_1:  # use the memory to checkpoint fewer layers
            smaller = remedies.applied(with_layers(2), {"train.micro_batch_size": enough[0]})
            recipe = smaller if predict.fits(smaller, capacity) else recipe

    # If checkpointing all layers does not fit either, the preflight reports what would.
    options = (False, *remedies.RECOMPUTED)
    first = bisect_left(options[:-1], True, key=lambda layers: predict.fits(with_layers(layers), capacity))
    return with_layers(options[first])


def largest_micro_batch(recipe: Recipe, predict: Predictor, capacity: float) -> Recipe:
    """Set the largest micro_batch_size that fits in `capacity` bytes: a power of two that keeps global_batch_size.

    Raises RecipeError if a single sequence does not fit.
    """
    most = MOST_TOKENS // recipe.data.max_length
    sizes = [size for size in remedies.micro_batch_sizes(recipe) if size <= max(1, most)]
    if not sizes:
        world = recipe.launch.world_size
        raise RecipeError(
            f"train.global_batch_size: {recipe.sequences_per_step} is not divisible by {world} processes. "
            f"Set it to a multiple of {world}."
        )
    sized = [remedies.applied(recipe, {"train.micro_batch_size": size}) for size in sizes]
    fitting = bisect_left(sized, True, key=lambda changed: not predict.fits(changed, capacity))
    if fitting == 0:
        needed = predict.on_rank(sized[0]).peak_bytes
        raise RecipeError(
            "train.micro_batch_size: auto: a single sequence does not fit (predicted "
            f"{prediction.format_bytes(needed)}, available {prediction.format_bytes(capacity)}). "
            "`sft-recipe plan RECIPE --set train.micro_batch_size=1 "
            f"--gpu-memory {capacity / 2**20:.0f}MiB` lists changes that fit."
        )
    return sized[fitting - 1]


def resolve_for_run(recipe: Recipe, run_dir: Path) -> Recipe:
    """Resolve auto as the run in `run_dir` did, else for the memory that is free now.

    All layers are checkpointed if the memory cannot be predicted.
    """
    recipe = _as_resolved_before(recipe, run_dir)
    if "auto" not in (recipe.train.micro_batch_size, recipe.train.gradient_checkpointing):
        return recipe
    try:
        predict = _predictor_here(recipe)
        return resolve_auto(recipe, predict, available_memory(recipe, predict.device))
    except ModelError:
        if recipe.train.micro_batch_size == "auto":
            raise
        return remedies.applied(recipe, {"train.gradient_checkpointing": True})


def _as_resolved_before(recipe: Recipe, run_dir: Path) -> Recipe:
    resolved = run_dir / RECIPE
    with suppress(OSError, ValueError, LookupError, TypeError):  # a damaged file is reported when settings are compared
        used = json.loads(resolved.read_text(encoding="utf-8"))["train"]
        size, layers = used["micro_batch_size"], used["gradient_checkpointing"]
        if recipe.train.micro_batch_size == "auto" and size in remedies.micro_batch_sizes(recipe):
            recipe = remedies.applied(recipe, {"train.micro_batch_size": size})
        if recipe.train.gradient_checkpointing == "auto" and isinstance(layers, int):
            recipe = remedies.applied(recipe, {"train.gradient_checkpointing": layers})
    return recipe


def predict_here(recipe: Recipe) -> Footprint:
    """Predict the memory of one rank on this node. Raises ModelError if it cannot be predicted."""
    return _predictor_here(recipe).on_rank(recipe)


def model_flops_per_token(recipe: Recipe, size: ModelSize, document: float) -> float:
    """Return the model's FLOPs per trained token, for documents of that mean length."""
    text_config = load_traceable_config(recipe).get_text_config()
    return flops.flops_per_token(recipe, size, text_config, document, model_only=True)


def memory_advice(recipe: Recipe) -> str:
    """Describe predicted and device memory, and the single changes that fit, after an out-of-memory error.

    Raises ModelError if memory cannot be predicted.
    """
    predict = _predictor_here(recipe)
    device = predict.device
    total = torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total
    capacity = total if device == "cuda" else _SHARE_OF_HOST * total
    rank = predict.on_rank(recipe)
    memory_used = (
        f"(predicted peak {prediction.format_bytes(rank.peak_bytes)}, device memory {prediction.format_bytes(total)})"
    )
    if prediction.fits(rank, capacity, device):
        return f"{memory_used}. This should fit: stop other processes on the device; otherwise its free memory is fragmented."
    leaner = fake_kernels.lower_memory_attention(recipe, predict.config, device, predict.capability)
    found = remedies.find_remedies(recipe, predict, capacity, device, leaner)
    fitting = "; ".join(str(remedy) for remedy in found if remedy.fits)
    return f"{memory_used}. {f'Any one of these fits: {fitting}' if fitting else 'No single change fits'}."


def _predictor_here(recipe: Recipe) -> Predictor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Predictor(load_traceable_config(recipe), device, capability_here())


def available_memory(recipe: Recipe, device: str) -> float:
    """Return the bytes that a prediction may reach in this process: the same number on all ranks."""
    if recipe.launch.world_size > 1:
        PartialState(cpu=device == "cpu")  # selects each process's device
    if device == "cuda":
        # mem_get_info() creates the CUDA context, so its memory is already gone.
        free = float(torch.cuda.mem_get_info()[0]) + prediction.CONTEXT
    else:
        free = _SHARE_OF_HOST * psutil.virtual_memory().available / recipe.launch.processes
    return min(gather_object([free])) if recipe.launch.world_size > 1 else free

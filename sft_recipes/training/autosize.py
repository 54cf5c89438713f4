"""Predictions where the training is to run: the largest micro-batch that fits, and what to change where none does."""

import json
from bisect import bisect_left
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedConfig

from sft_recipes.errors import ModelError, RecipeError
from sft_recipes.planning import flops, memory, per_rank_memory, remedies
from sft_recipes.planning.memory import Footprint
from sft_recipes.planning.remedies import Predict
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import fake_kernels, memory_trace
from sft_recipes.training.attention import Capability, capability_here

# Of the host's memory that tensors may come to: oneDNN makes buffers of its own beside torch's allocator (SmolLM2 in bfloat16,
# 4,096 tokens, checkpointed: 4.3 GiB predicted, 10.2 in the process).
_SHARE_OF_HOST = 0.4
# Tokens of a micro-batch, from which on more at once bring less than recomputing costs (not measured on a GPU).
_ENOUGH = 4096
# What a footprint does not depend on: changes of it need no other run.
_IRRELEVANT = {"eval", "checkpoint", "log", "export", "output_dir", "launch"}
_PREDICTORS: dict[tuple[str, str, Capability | None], Predict] = {}  # by config, device, and its compute capability


def predictor(config: PreTrainedConfig, device: str, capability: Capability | None = None) -> Predict:
    """Predictions for one model; each is made once in a process. `capability`: the GPU's, None if unknown."""
    key = config.to_json_string(use_diff=False), device, capability
    if key not in _PREDICTORS:
        _PREDICTORS[key] = _predictor(config, device, capability)
    return _PREDICTORS[key]


def _predictor(config: PreTrainedConfig, device: str, capability: Capability | None) -> Predict:
    @cache
    def predicted(relevant: str, accumulates: bool) -> Footprint:
        recipe = Recipe.model_validate(json.loads(relevant) | {"output_dir": "x"})
        # Only whether there is more than one micro-batch matters.
        steps = {"global_batch_size": None, "gradient_accumulation_steps": 2 if accumulates else 1}
        train = recipe.train.model_copy(update=steps)
        return memory_trace.predict(recipe.model_copy(update={"train": train}), config, device, capability)

    def predict(recipe: Recipe) -> Footprint:
        return predicted(recipe.model_dump_json(exclude=_IRRELEVANT), recipe.accumulation > 1)

    return predict


def largest_micro_batch(recipe: Recipe, predict: Predict, capacity: float, device: str) -> Recipe:
    """The recipe with the largest micro_batch_size, of powers of two that keep global_batch_size, that fits into `capacity`
    bytes. Raises RecipeError where a single sequence does not fit."""
    most = memory_trace.MOST_TOKENS // recipe.data.max_length
    sizes = [size for size in remedies.micro_batch_sizes(recipe) if size <= max(1, most)]
    if not sizes:
        raise RecipeError(
            f"train.global_batch_size: {recipe.sequences_per_step} sequences a step do not come out of "
            f"{recipe.launch.world_size} processes; set a multiple of them"
        )

    def with_size(size: int) -> Recipe:
        return remedies.applied(recipe, {"train.micro_batch_size": size})

    def peak(size: int) -> Footprint:
        sized = with_size(size)
        return per_rank_memory.on_rank(predict(sized), sized, device)

    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        if memory.fits(peak(sizes[middle]), capacity, device):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        needed, available = (memory.format_bytes(size) for size in (peak(1).peak_bytes, capacity))
        raise RecipeError(
            f"train.micro_batch_size: auto: a single sequence does not fit (predicted {needed}, available {available}). "
            "`sft-recipe plan RECIPE --set train.micro_batch_size=1 "
            f"--gpu-memory {capacity / 2**20:.0f}MiB` lists changes that fit."
        )
    return with_size(sizes[low - 1])


def resolve_auto(recipe: Recipe, predict: Predict, capacity: float, device: str) -> Recipe:
    """The recipe with what it leaves to auto settled for `capacity` bytes: gradient checkpointing of as few layers as must be,
    the largest micro-batch. Raises RecipeError where a single sequence does not fit, and ModelError where nothing can be
    predicted."""
    sizes = recipe.train.micro_batch_size == "auto"
    if recipe.train.gradient_checkpointing == "auto" and recipe.launch.strategy != "ddp":
        # Memory per rank is predicted by arithmetic that has not been compared with a GPU.
        recipe = remedies.applied(recipe, {"train.gradient_checkpointing": True})
    if recipe.train.gradient_checkpointing != "auto":
        return largest_micro_batch(recipe, predict, capacity, device) if sizes else recipe

    def with_layers(layers: bool | int) -> Recipe:
        return remedies.applied(recipe, {"train.gradient_checkpointing": layers})

    def fits(changed: Recipe) -> bool:
        return memory.fits(per_rank_memory.on_rank(predict(changed), changed, device), capacity, device)

    if sizes:
        with suppress(RecipeError):  # where no sequence fits without recomputing
            without = largest_micro_batch(with_layers(False), predict, capacity, device)
            assert isinstance(without.train.micro_batch_size, int)
            if without.train.micro_batch_size * recipe.data.max_length >= _ENOUGH:
                return without
        recipe = largest_micro_batch(with_layers(True), predict, capacity, device)
        assert isinstance(recipe.train.micro_batch_size, int)
        enough = [size for size in remedies.micro_batch_sizes(recipe) if size * recipe.data.max_length >= _ENOUGH]
        if enough and enough[0] < recipe.train.micro_batch_size:  # if memory is left, it saves recomputing
            smaller = remedies.applied(with_layers(2), {"train.micro_batch_size": enough[0]})
            recipe = smaller if fits(smaller) else recipe

    # Where not even all layers suffice it is left at that: the preflight says what would.
    return with_layers(
        False
        if fits(with_layers(False))
        else remedies.RECOMPUTED[bisect_left(remedies.RECOMPUTED[:-1], True, key=lambda n: fits(with_layers(n)))]
    )


def resolve_for_run(recipe: Recipe, run_dir: Path) -> Recipe:
    """The recipe with what it leaves to auto settled: as a run in `run_dir` was begun, else for the memory that is free now.

    All layers are checkpointed where the memory cannot be predicted.
    """
    recipe = _as_begun(recipe, run_dir)
    if "auto" not in (recipe.train.micro_batch_size, recipe.train.gradient_checkpointing):
        return recipe
    try:
        config, device = memory_trace.config_of(recipe), _device()
        return resolve_auto(
            recipe, predictor(config, device, capability_here()), available_memory(recipe, device), device
        )
    except ModelError:
        if recipe.train.micro_batch_size == "auto":
            raise
        return remedies.applied(recipe, {"train.gradient_checkpointing": True})


def _as_begun(recipe: Recipe, run_dir: Path) -> Recipe:
    begun = run_dir / "recipe.resolved.json"
    with suppress(OSError, ValueError, LookupError, TypeError):  # a damaged file is said when it is compared
        used = json.loads(begun.read_text(encoding="utf-8"))["train"]
        size, layers = used["micro_batch_size"], used["gradient_checkpointing"]
        if recipe.train.micro_batch_size == "auto" and size in remedies.micro_batch_sizes(recipe):
            recipe = remedies.applied(recipe, {"train.micro_batch_size": size})
        if recipe.train.gradient_checkpointing == "auto" and isinstance(layers, int):
            recipe = remedies.applied(recipe, {"train.gradient_checkpointing": layers})
    return recipe


def predict_here(recipe: Recipe) -> Footprint:
    """What one rank is predicted to take on this machine. Raises ModelError where that cannot be said."""
    config, device = memory_trace.config_of(recipe), _device()
    return per_rank_memory.on_rank(predictor(config, device, capability_here())(recipe), recipe, device)


def model_flops_per_token(recipe: Recipe, document: float) -> float:
    """Operations that the model takes to train on a token, of documents of that mean length. Raises ModelError."""
    config, device = memory_trace.config_of(recipe), _device()
    whole = predictor(config, device, capability_here())(recipe)
    return flops.flops_per_token(recipe, whole, config.get_text_config(), document, model_only=True)


def memory_advice(recipe: Recipe) -> str:
    """For one who has run out of memory: what is predicted, and the single changes that would fit.

    Raises ModelError where that cannot be said.
    """
    config, device = memory_trace.config_of(recipe), _device()
    total = torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total
    capacity = total if device == "cuda" else _SHARE_OF_HOST * total
    predict = predictor(config, device, capability_here())
    rank = per_rank_memory.on_rank(predict(recipe), recipe, device)
    memory_used = f"(predicted peak {memory.format_bytes(rank.peak_bytes)}, device memory {memory.format_bytes(total)})"
    if memory.fits(rank, capacity, device):
        return f"{memory_used}. This should fit: stop other processes on the device; otherwise its free memory is fragmented."
    leaner = fake_kernels.lower_memory_attention(recipe, config, device, capability_here())
    found = remedies.find_remedies(recipe, predict, capacity, device, leaner)
    fitting = "; ".join(str(remedy) for remedy in found if remedy.fits)
    return f"{memory_used}. {f'Any one of these fits: {fitting}' if fitting else 'No single change fits'}."


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_memory(recipe: Recipe, device: str) -> float:
    """Bytes that a prediction may come to now in this process, the same number in all that train together."""
    if recipe.launch.world_size > 1:
        PartialState(cpu=device == "cpu")  # which gives each process its device
    if device == "cuda":
        free = float(torch.cuda.mem_get_info()[0]) + memory.CONTEXT  # which asking has taken already
    else:
        free = _SHARE_OF_HOST * psutil.virtual_memory().available / recipe.launch.processes
    return min(gather_object([free])) if recipe.launch.world_size > 1 else free

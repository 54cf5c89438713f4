"""Compute memory per rank under DDP, FSDP2 and ZeRO."""

from collections.abc import Callable
from dataclasses import replace

from sft_recipes.memory import optimizer_states, prediction
from sft_recipes.memory.prediction import Footprint, Part, Phase
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import DTYPE_BYTES, Recipe

_QUANTIZED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}  # bytes per value
# Scales of bitsandbytes' 4-bit weights, which are not sharded: a byte per 64 values, and 4 per 256 of those.
_SCALES = 1 / 64 + 4 / (64 * 256)
_GATHERED_LAYERS = 2  # on each rank: the one that computes, and the next, which is being prefetched
_WITHOUT_WEIGHTS = (Phase.CLIP, Phase.OPTIMIZER)  # phases that do not gather weights
# Phases in which embeddings and LM head are gathered: fsdp2 gathers them only while they are needed.
_WITH_EMBEDDINGS = (
    Phase.PREFLIGHT, Phase.BEFORE_LAYERS, Phase.LOSS_FORWARD, Phase.LOSS_BACKWARD, Phase.BACKWARD_EMBEDDINGS,
)  # fmt: skip
Parts = dict[Part, float]
Rule = Callable[[Parts, Phase], None]  # changes the parts of a phase
# DeepSpeed's defaults, in values: reduce_bucket_size, sub_group_size, stage3_max_live_parameters, stage3_prefetch_bucket_size.
_BUCKET, _SUB_GROUP, _LIVE, _PREFETCH = 500_000_000, 1_000_000_000, 1_000_000_000, 50_000_000


def on_rank(whole: Footprint, recipe: Recipe, device: str) -> Footprint:
    """Return the footprint of one rank, with the workspaces of the device's libraries."""
    return prediction.on_device(per_rank(whole, recipe), device)


def per_rank(whole: Footprint, recipe: Recipe) -> Footprint:
    """Return the footprint of one rank under the recipe's `launch`, for evenly divisible shards.

    ddp: everything, and gradient buckets as large as the gradients (torch's DistributedDataParallel as accelerate creates it,
    without gradient_as_bucket_view).

    fsdp2 (torch 2.13's fully_shard as accelerate 1.15 calls it: per layer, embeddings, norm and LM head, the rest): weights,
    gradients and optimizer states are sharded; with mixed precision, trainable ones are in float32. Gathered: two layers, or
    one layer and everything outside of layers, in the compute dtype; their gradients, one unit at a time, with a copy in the
    reduce dtype, float32, after each micro-batch. Scales of 4-bit weights are on every rank. Parameters outside of layers are
    assumed to be untied embeddings and LM head.

    zero2, zero3 (DeepSpeed 0.19): with mixed precision, weights and gradients in half precision, and sharded float32 copies;
    a step creates float32 gradients of a rank's shard (zero3: of at most 10^9 values at a time). zero2: all weights, the rest
    sharded. zero3: everything sharded, and the larger of two layers and 10^9 values gathered. One gradient bucket.

    cpu_offload: weights and optimizer states (zero2: optimizer states; fsdp2: gradients too) are in host memory.
    """
    launch = recipe.launch
    ranks = launch.world_size
    if ranks == 1 and not launch.cpu_offload:
        return whole
    rule = {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": _zero, "zero3": _zero}[launch.strategy](whole.size, recipe, ranks)
    phases = {}
    for phase, sizes in whole.phases.items():
        parts = {part: sizes.get(part, 0.0) for part in Part}
        rule(parts, phase)
        phases[phase] = parts
    return replace(whole, phases=phases)


def _ddp(size: ModelSize, recipe: Recipe, _ranks: int) -> Rule:
    def rule(parts: Parts, _phase: Phase) -> None:
        parts[Part.BUFFERS] += size.trained * _trained_bytes(recipe)

    return rule


def _fsdp2(size: ModelSize, recipe: Recipe, ranks: int) -> Rule:
    compute, mixed = DTYPE_BYTES[recipe.compute_dtype], recipe.train.mixed_precision != "no"
    reduce = 4 if mixed else compute
    upcast = 4 / _trained_bytes(recipe) if mixed else 1
    grows = {
        Part.WEIGHTS: upcast if recipe.lora is None else 1,
        Part.ADAPTERS: upcast,
        Part.GRADIENTS: upcast,
        Part.OPTIMIZER: upcast if optimizer_states.in_weights_type(recipe.train.optimizer) else 1,
    }
    in_layers = size.parameters - size.trained - (size.rest - size.trained_rest)  # frozen
    scales = in_layers * _SCALES if recipe.model.quantization in ("nf4", "fp4") else 0
    frozen = _QUANTIZED.get(recipe.model.quantization or "", compute)
    layer = (size.layer - size.trained_layer) * frozen + size.trained_layer * compute

    def rule(parts: Parts, phase: Phase) -> None:
        parts[Part.WEIGHTS] -= scales
        for part, growth in grows.items():
            parts[part] *= growth / ranks
        if recipe.launch.cpu_offload:
            parts |= dict.fromkeys(grows, 0.0)
        parts[Part.WEIGHTS] += scales
        if phase in _WITHOUT_WEIGHTS:
            return
        embeds = phase in _WITH_EMBEDDINGS
        layers = min(1 if embeds else _GATHERED_LAYERS, size.layers)
        parts[Part.BUFFERS] = (
            layers * layer + embeds * compute * size.rest + _without_copies(parts[Part.BUFFERS], recipe)
        )
        if phase.is_backward:
            end = 0 if phase is Phase.BACKWARD_LOWER else size.trained_rest / 2  # embeddings or LM head
            parts[Part.GRADIENTS] += (compute + reduce) * max(size.trained_layer, end)

    return rule


def _zero(size: ModelSize, recipe: Recipe, ranks: int) -> Rule:
    launch, all_shared = recipe.launch, recipe.launch.strategy == "zero3"
    compute, trained = DTYPE_BYTES[recipe.compute_dtype], size.trained / ranks
    of_trained = compute / _trained_bytes(recipe) if recipe.train.autocast_dtype else 1.0
    narrower = {
        Part.WEIGHTS: 1.0 if recipe.model.quantization else compute / DTYPE_BYTES[recipe.model.dtype],
        Part.ADAPTERS: of_trained,
        Part.GRADIENTS: of_trained,
    }
    states = 4 / _trained_bytes(recipe) if optimizer_states.in_weights_type(recipe.train.optimizer) else 1
    master = 4 * trained if compute < 4 else 0
    frozen = _QUANTIZED.get(recipe.model.quantization or "", compute)
    live = max(min(_GATHERED_LAYERS, size.layers) * size.layer, min(_LIVE + _PREFETCH, size.parameters))

    def rule(parts: Parts, phase: Phase) -> None:
        for part, growth in narrower.items():
            parts[part] *= growth / (ranks if all_shared or part == Part.GRADIENTS else 1)
        parts[Part.OPTIMIZER] = 0.0 if launch.cpu_offload else parts[Part.OPTIMIZER] * states / ranks + master
        if all_shared and launch.cpu_offload:
            parts[Part.WEIGHTS] = parts[Part.ADAPTERS] = 0.0
        parts[Part.BUFFERS] = _BUCKET * compute + _without_copies(parts[Part.BUFFERS], recipe)
        if phase is Phase.OPTIMIZER and master and not launch.cpu_offload:
            parts[Part.GRADIENTS] += 4 * (min(trained, _SUB_GROUP) if all_shared else trained)
        if all_shared and phase not in _WITHOUT_WEIGHTS:
            parts[Part.BUFFERS] += live * frozen
            if phase.is_backward:
                parts[Part.GRADIENTS] += compute * max(size.trained_layer, size.trained_rest)

    return rule


def _trained_bytes(recipe: Recipe) -> int:
    """Return the bytes per trainable value as loaded: adapters are in float32."""
    return 4 if recipe.lora is not None else DTYPE_BYTES[recipe.model.dtype]


def _without_copies(buffers: float, recipe: Recipe) -> float:
    """Leave out autocast's copies of float32 weights: sharding already gathers them in half precision."""
    copies = recipe.lora is None and recipe.train.mixed_precision != "no" and recipe.model.dtype == "float32"
    return 0.0 if copies else buffers

"""Compute memory per rank under DDP, FSDP2 and ZeRO."""

from collections.abc import Callable
from dataclasses import replace

from sft_recipes.memory import optimizer_states, prediction
from sft_recipes.memory.prediction import PARTS, Footprint
from sft_recipes.recipe.schema import Recipe

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_QUANTIZED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}  # bytes per value
# Scales of bitsandbytes' 4-bit weights, which are not sharded: a byte per 64 values, and 4 per 256 of those.
_SCALES = 1 / 64 + 4 / (64 * 256)
_GATHERED_LAYERS = 2  # on each rank: the one that computes, and the next, which is being prefetched
_WITHOUT_WEIGHTS = ("clip", "optimizer")  # phases that do not gather weights
# Phases in which embeddings and LM head are gathered: fsdp2 gathers them only while they are needed.
_WITH_EMBEDDINGS = ("preflight", "before the layers", "loss, forward", "loss, backward", "backward, embeddings")
Rule = Callable[[dict[str, float], str], None]  # changes the parts of a phase
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
    rule = {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": _zero, "zero3": _zero}[launch.strategy](whole, recipe, ranks)
    phases = {}
    for phase, sizes in whole.phases.items():
        parts = {part: sizes.get(part, 0.0) for part in PARTS}
        rule(parts, phase)
        phases[phase] = parts
    return replace(whole, phases=phases)


def _ddp(whole: Footprint, recipe: Recipe, _ranks: int) -> Rule:
    def rule(parts: dict[str, float], _phase: str) -> None:
        parts["buffers"] += whole.trained * _trained_bytes(recipe)

    return rule


def _fsdp2(whole: Footprint, recipe: Recipe, ranks: int) -> Rule:
    full, mixed = not recipe.trains_adapters, recipe.train.mixed_precision != "no"
    compute = _computed_bytes(recipe)
    reduce = 4 if mixed else compute
    upcast = 4 / _trained_bytes(recipe) if mixed else 1
    grows = {
        "weights": upcast if full else 1,
        "adapters": upcast,
        "gradients": upcast,
        "optimizer": upcast if optimizer_states.in_weights_type(recipe.train.optimizer) else 1,
    }
    in_layers = whole.parameters - whole.trained - (whole.rest - whole.trained_rest)  # frozen
    scales = in_layers * _SCALES if recipe.model.quantization in ("nf4", "fp4") else 0
    frozen = _QUANTIZED.get(recipe.model.quantization or "", compute)
    layer = (whole.layer - whole.trained_layer) * frozen + whole.trained_layer * compute

    def rule(parts: dict[str, float], phase: str) -> None:
        parts["weights"] -= scales
        for part, growth in grows.items():
            parts[part] *= growth / ranks
        if recipe.launch.cpu_offload:
            parts |= dict.fromkeys(grows, 0.0)
        parts["weights"] += scales
        if phase in _WITHOUT_WEIGHTS:
            return
        embeds = phase in _WITH_EMBEDDINGS
        layers = min(1 if embeds else _GATHERED_LAYERS, whole.layers)
        parts["buffers"] = layers * layer + embeds * compute * whole.rest + _without_copies(parts["buffers"], recipe)
        if "backward" in phase:
            end = 0 if phase == "backward, lower layers" else whole.trained_rest / 2  # embeddings or LM head
            parts["gradients"] += (compute + reduce) * max(whole.trained_layer, end)

    return rule


def _zero(whole: Footprint, recipe: Recipe, ranks: int) -> Rule:
    launch, all_shared = recipe.launch, recipe.launch.strategy == "zero3"
    compute, mixed = _computed_bytes(recipe), recipe.train.mixed_precision != "no"
    trained = whole.trained / ranks
    narrower = {"weights": 1.0, "adapters": 1.0, "gradients": 1.0}
    if mixed:
        of_trained = compute / _trained_bytes(recipe)
        narrower = {"weights": compute / _BYTES[recipe.model.dtype], "adapters": of_trained, "gradients": of_trained}
    if recipe.model.quantization:
        narrower["weights"] = 1.0
    states = 4 / _trained_bytes(recipe) if optimizer_states.in_weights_type(recipe.train.optimizer) else 1
    master = 4 * trained if compute < 4 else 0
    frozen = _QUANTIZED.get(recipe.model.quantization or "", compute)
    live = max(min(_GATHERED_LAYERS, whole.layers) * whole.layer, min(_LIVE + _PREFETCH, whole.parameters))

    def rule(parts: dict[str, float], phase: str) -> None:
        for part, growth in narrower.items():
            parts[part] *= growth / (ranks if all_shared or part == "gradients" else 1)
        parts["optimizer"] = 0.0 if launch.cpu_offload else parts["optimizer"] * states / ranks + master
        if all_shared and launch.cpu_offload:
            parts["weights"] = parts["adapters"] = 0.0
        parts["buffers"] = _BUCKET * compute + _without_copies(parts["buffers"], recipe)
        if phase == "optimizer" and master and not launch.cpu_offload:
            parts["gradients"] += 4 * (min(trained, _SUB_GROUP) if all_shared else trained)
        if all_shared and phase not in _WITHOUT_WEIGHTS:
            parts["buffers"] += live * frozen
            if "backward" in phase:
                parts["gradients"] += compute * max(whole.trained_layer, whole.trained_rest)

    return rule


def _trained_bytes(recipe: Recipe) -> int:
    """Return the bytes per trainable value as loaded: adapters are in float32."""
    return 4 if recipe.trains_adapters else _BYTES[recipe.model.dtype]


def _computed_bytes(recipe: Recipe) -> int:
    return 2 if recipe.train.mixed_precision != "no" else _BYTES[recipe.model.dtype]


def _without_copies(buffers: float, recipe: Recipe) -> float:
    """Leave out autocast's copies of float32 weights: sharding already gathers them in half precision."""
    copies = not recipe.trains_adapters and recipe.train.mixed_precision != "no" and recipe.model.dtype == "float32"
    return 0.0 if copies else buffers

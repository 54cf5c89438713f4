"""What one rank takes of a footprint where several share the work."""

from collections.abc import Callable
from dataclasses import replace

from sft_recipes.planning import memory, optimizers
from sft_recipes.planning.memory import PARTS, Footprint
from sft_recipes.recipe.schema import Recipe

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_AT_ONCE = 2  # layers that are whole on each rank: the one that computes, and the next, which is being fetched
_WITHOUT_WEIGHTS = ("clip", "optimizer")  # phases that do not compute with them
_DEEPSPEED_BUCKET = 500_000_000  # values; reduce_bucket_size and allgather_bucket_size, DeepSpeed's defaults


def on_rank(whole: Footprint, recipe: Recipe, device: str) -> Footprint:
    """The footprint of one rank, with what the device's own libraries take of what its allocator counts."""
    return memory.on_device(per_rank(whole, recipe), device)


def per_rank(whole: Footprint, recipe: Recipe) -> Footprint:
    """The footprint of one rank under the recipe's `launch`, where nothing is left over by an uneven split.

    ddp: everything, and buckets of gradients as large as the gradients (torch's DistributedDataParallel, as accelerate
    makes it, without gradient_as_bucket_view). fsdp2 and zero3: a share of weights, gradients and optimizer, beside two
    layers, and all that is in no layer, whole; fsdp2 holds what is trained in float32 where there is mixed precision, as
    accelerate does. zero2: weights whole, a share of gradients and optimizer. zero2 and zero3 hold float32 copies of what is
    trained in half precision, in shares. cpu_offload: weights and optimizer (zero2: the optimizer) are in host memory.
    """
    launch = recipe.launch
    ranks = launch.processes * launch.machines
    strategy = launch.strategy
    if ranks == 1 and not launch.cpu_offload:
        return whole
    rule: Callable[[dict[str, float], str], None]
    compute = 2 if recipe.train.mixed_precision != "no" else _BYTES[recipe.model.dtype]
    trained_bytes = 4 if recipe.lora is not None else _BYTES[recipe.model.dtype]
    gathered = compute * (min(_AT_ONCE, whole.layers) * whole.layer + whole.rest)
    of_gradients = compute * (min(_AT_ONCE, whole.layers) * whole.trained_layer + whole.trained_rest)
    deepspeed = strategy in ("zero2", "zero3")
    master = 4 * whole.trained / ranks if deepspeed and trained_bytes < 4 else 0
    # States that were found in the weights' type are in float32 where what is trained is.
    wider = 4 / trained_bytes if deepspeed or (strategy == "fsdp2" and recipe.train.mixed_precision != "no") else 1
    wider = wider if optimizers.in_weights_type(recipe.train.optimizer) else 1

    def ddp(parts: dict[str, float], _phase: str) -> None:
        parts["buffers"] += whole.trained * trained_bytes

    def sharded(parts: dict[str, float], phase: str) -> None:
        full = recipe.lora is None
        for part in ("weights", "adapters", "gradients", "optimizer"):
            grows = strategy == "fsdp2" and (part != "weights" or full)
            parts[part] *= (wider if part == "optimizer" or grows else 1) / ranks
        parts["optimizer"] += master
        if launch.cpu_offload:
            for part in ("weights", "adapters", "optimizer", *(("gradients",) if strategy == "fsdp2" else ())):
                parts[part] = 0
        if phase not in _WITHOUT_WEIGHTS:
            # A weight's copy for autocast is that which is gathered.
            parts["buffers"] = max(parts["buffers"], gathered)
            parts["gradients"] += of_gradients if "backward" in phase else 0

    def zero2(parts: dict[str, float], _phase: str) -> None:
        for part in ("gradients", "optimizer"):
            parts[part] *= (wider if part == "optimizer" else 1) / ranks
        parts["optimizer"] = 0 if launch.cpu_offload else parts["optimizer"] + master
        parts["buffers"] += 2 * min(whole.trained, _DEEPSPEED_BUCKET) * trained_bytes

    rule = {"ddp": ddp, "zero2": zero2}.get(strategy, sharded)
    phases = {}
    for phase, found in whole.phases.items():
        parts = {part: found.get(part, 0.0) for part in PARTS}
        rule(parts, phase)
        phases[phase] = parts
    return replace(whole, phases=phases)

"""Represent, extrapolate and format the memory of a training step, by part and phase."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from sft_recipes.planning.model_size import ModelSize

GIB = 2**30


class Part(StrEnum):
    """What memory is used for."""

    WEIGHTS = "weights"  # of the model, as loaded
    ADAPTERS = "adapters"  # trainable parameters of LoRA
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"  # states of the optimizer
    ACTIVATIONS = "activations"  # kept for the backward pass, and temporary tensors of layers
    HEAD = "head"  # LM head and loss
    BUFFERS = "buffers"  # the model's own, and copies of weights in the compute dtype


class Phase(StrEnum):
    """Consecutive sections of a training step, each with a peak of its own."""

    PREFLIGHT = "preflight"  # its check of isolation; the rest of it is a training step, or less
    BEFORE_LAYERS = "before the layers"
    FORWARD = "forward"
    LOSS_FORWARD = "loss, forward"
    LOSS_BACKWARD = "loss, backward"
    BACKWARD_UPPER = "backward, upper layers"
    BACKWARD_LOWER = "backward, lower layers"
    BACKWARD_EMBEDDINGS = "backward, embeddings"
    CLIP = "clip"
    OPTIMIZER = "optimizer"

    @property
    def is_backward(self) -> bool:
        return "backward" in self.value


Phases = Mapping[Phase, Mapping[Part, float]]


@dataclass(frozen=True)
class Footprint:
    """Bytes of each part at the peak of each phase of a step, and the size of the model."""

    phases: Phases
    size: ModelSize

    @property
    def peak(self) -> dict[Part, float]:
        """The parts in the phase with the largest peak."""
        largest = max(self.phases.values(), key=lambda parts: sum(parts.values()))
        return {part: largest.get(part, 0) for part in Part}

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak.values())


def extrapolate(few: Footprint, more: Footprint, layers: int) -> Footprint:
    """Extrapolate to `layers` layers from footprints with fewer layers of the same kinds.

    At any fixed point of a step (the loss, the first or middle or last layer's backward pass, the optimizer) memory is linear
    in the number of layers, and so is the peak of each phase, which begins and ends at such a point.
    """
    share = (layers - few.size.layers) / (more.size.layers - few.size.layers)

    def at(low: float, high: float) -> float:
        return low + share * (high - low)

    phases = {
        phase: {part: at(few.phases[phase].get(part, 0), parts.get(part, 0)) for part in Part}
        for phase, parts in more.phases.items()
    }
    linear = ("parameters", "trained", "experts")
    counts = {name: round(at(getattr(few.size, name), getattr(more.size, name))) for name in linear}
    return Footprint(phases, replace(more.size, layers=layers, **counts))


# Memory of the CUDA libraries. Counted by torch's allocator: a cuBLAS workspace for each of the two computing threads
# (forward, backward; 32 MiB each on Hopper, ATen/cuda/CUDABlas.cpp). Not counted: the CUDA context with its kernels.
WORKSPACES = 2 * 32 * 2**20
CONTEXT = 2**29
SHARE = 0.95  # usable share of GPU memory; the margin is for what is not predicted, such as fragmentation


def on_device(footprint: Footprint, device: str) -> Footprint:
    """Add the workspaces of the device's libraries that its allocator counts."""
    if device != "cuda":
        return footprint
    phases = {
        phase: {**parts, Part.BUFFERS: parts.get(Part.BUFFERS, 0) + WORKSPACES}
        for phase, parts in footprint.phases.items()
    }
    return replace(footprint, phases=phases)


def fits(footprint: Footprint, memory: float, device: str) -> bool:
    """Return True if the footprint, the CUDA context and a margin fit on a device of `memory` bytes."""
    return footprint.peak_bytes <= (SHARE * memory - CONTEXT if device == "cuda" else memory)


def format_bytes(size: float) -> str:
    """Format a number of bytes in GiB, MiB or KiB."""
    unit, name = next((unit for unit in ((GIB, "GiB"), (2**20, "MiB")) if size >= unit[0]), (2**10, "KiB"))
    return f"{size / unit:.1f} {name}"

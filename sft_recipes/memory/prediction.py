"""Represent, extrapolate and format the memory of a training step, by part and phase."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "buffers")
GIB = 2**30
Phases = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Footprint:
    """Bytes of each part at the peak of each phase of a step, and the numbers of parameters.

    weights: of the model, as loaded. adapters: the trainable parameters of LoRA. gradients, optimizer: of trainable
    parameters. activations: tensors kept for the backward pass, and temporary ones of layers. head: of LM head and loss.
    buffers: the model's own, and copies of weights in the compute dtype. `layer` and `rest` are the parameters of the largest
    layer and of everything outside of layers; `trained_layer` and `trained_rest` the trainable ones of these.
    """

    phases: Phases
    parameters: int
    trained: int
    layers: int
    layer: int
    rest: int
    trained_layer: int
    trained_rest: int
    experts: int = 0  # parameters of mixture-of-experts layers, of which each token uses a part

    @property
    def peak(self) -> dict[str, float]:
        """The parts in the phase with the largest peak."""
        largest = max(self.phases.values(), key=lambda parts: sum(parts.values()))
        return {part: largest.get(part, 0) for part in PARTS}

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak.values())


def extrapolate(few: Footprint, more: Footprint, layers: int) -> Footprint:
    """Extrapolate to `layers` layers from footprints with fewer layers of the same kinds.

    At any fixed point of a step (the loss, the first or middle or last layer's backward pass, the optimizer) memory is linear
    in the number of layers, and so is the peak of each phase, which begins and ends at such a point.
    """
    share = (layers - few.layers) / (more.layers - few.layers)

    def at(low: float, high: float) -> float:
        return low + share * (high - low)

    def parts(phase: str) -> dict[str, float]:
        low, high = few.phases[phase], more.phases[phase]
        return {part: at(low.get(part, 0), high.get(part, 0)) for part in PARTS}

    return replace(
        more,
        phases={phase: parts(phase) for phase in more.phases},
        parameters=round(at(few.parameters, more.parameters)),
        trained=round(at(few.trained, more.trained)),
        experts=round(at(few.experts, more.experts)),
        layers=layers,
    )


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
        name: {**parts, "buffers": parts.get("buffers", 0) + WORKSPACES} for name, parts in footprint.phases.items()
    }
    return replace(footprint, phases=phases)


def fits(footprint: Footprint, memory: float, device: str) -> bool:
    """Return True if the footprint, the CUDA context and a margin fit on a device of `memory` bytes."""
    return footprint.peak_bytes <= (SHARE * memory - CONTEXT if device == "cuda" else memory)


def format_bytes(size: float) -> str:
    """Format a number of bytes in GiB, MiB or KiB."""
    unit, name = next((unit for unit in ((GIB, "GiB"), (2**20, "MiB")) if size >= unit[0]), (2**10, "KiB"))
    return f"{size / unit:.1f} {name}"

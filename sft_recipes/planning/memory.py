"""Memory of a training step, by part and phase: what one process takes, and what a rank does where several share the work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "buffers")
GIB = 2**30
Phases = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Footprint:
    """Bytes of each part at the largest moment of each phase of a step, and the parameters they are of.

    weights: of the model, as loaded. adapters: what LoRA trains beside it. gradients, optimizer: of what is trained.
    activations: what the backward pass needs, and what layers make on the way. head: of the loss. buffers: the model's own,
    and copies of weights in the type that is computed in. `layer` and `rest` are parameters of the largest layer and of all
    that is in none; `trained_layer` and `trained_rest` those of them that are trained.
    """

    phases: Phases
    parameters: int
    trained: int
    layers: int
    layer: int
    rest: int
    trained_layer: int
    trained_rest: int
    experts: int = 0  # parameters of layers of which a token passes a few

    @property
    def peak(self) -> dict[str, float]:
        """The parts at the largest moment of all."""
        largest = max(self.phases.values(), key=lambda parts: sum(parts.values()))
        return {part: largest.get(part, 0) for part in PARTS}

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak.values())


def extrapolate(few: Footprint, more: Footprint, layers: int) -> Footprint:
    """The footprint with `layers` layers, from those with few and with more of the same.

    At any fixed place in a step (the loss, the first or middle or last layer's backward pass, the optimizer) memory is linear
    in the number of layers, and so is each phase, which begins and ends at such a place.
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


# What the CUDA libraries take besides: in the allocator's count, a workspace of cuBLAS for each of the two threads that
# compute (forward, backward; 32 MiB each on Hopper, ATen/cuda/CUDABlas.cpp); outside of it, context and kernels.
WORKSPACES = 2 * 32 * 2**20
CONTEXT = 2**29
SHARE = 0.95  # of a GPU's memory; the rest is left to what a prediction cannot see, such as gaps between blocks


def on_device(footprint: Footprint, device: str) -> Footprint:
    """The footprint with what the device's own libraries take of what its allocator counts."""
    if device != "cuda":
        return footprint
    phases = {
        name: {**parts, "buffers": parts.get("buffers", 0) + WORKSPACES} for name, parts in footprint.phases.items()
    }
    return replace(footprint, phases=phases)


def fits(footprint: Footprint, memory: float, device: str) -> bool:
    """Whether a device of `memory` bytes has room, with what is outside of its allocator's count."""
    return footprint.peak_bytes <= (SHARE * memory - CONTEXT if device == "cuda" else memory)


def format_bytes(size: float) -> str:
    """A size in bytes, in GiB or what is smaller."""
    unit, name = next((each for each in ((GIB, "GiB"), (2**20, "MiB")) if size >= each[0]), (2**10, "KiB"))
    return f"{size / unit:.1f} {name}"

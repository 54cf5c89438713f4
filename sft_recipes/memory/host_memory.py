"""Predict the host memory of a node: to load the model, gather a sharded one, export it, and verify the export."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from sft_recipes import model_dir
from sft_recipes.memory.prediction import GIB, format_bytes
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import DTYPE_BYTES, Recipe

_QUANTIZED = {"nf4": 0.57, "fp4": 0.57, "int8": 1.01}  # bytes per value, including scales
PROCESS = GIB  # a process with the libraries imported
_MERGING = GIB // 4  # rows of two tensors and their adapters
_LOGITS = GIB // 2  # of the probe rows
_CGROUP = "/sys/fs/cgroup/memory.max"


@dataclass(frozen=True)
class HostMemory:
    """Bytes of all processes on one node, by stage; None if the run has no such stage.

    Memory-mapped files, such as a model verified on a CPU, are not counted: the system can reclaim their memory.
    """

    load: float
    gather: float | None
    merge: float | None
    verify: float | None

    @property
    def stages(self) -> dict[str, float]:
        named = {"load": self.load, "gather": self.gather, "merge": self.merge, "verify": self.verify}
        return {name: size for name, size in named.items() if size is not None}

    def __str__(self) -> str:
        return ", ".join(f"{format_bytes(size)} to {name}" for name, size in self.stages.items())


def predict(recipe: Recipe, size: ModelSize, device: str) -> HostMemory:
    """Predict the host memory of the node of rank 0. `device` is "cuda" or "cpu"."""
    launch, quantized = recipe.launch, recipe.model.quantization
    ranks, sharded = launch.processes, launch.strategy in ("fsdp2", "zero3")
    largest = max(size.layer, size.embeddings)
    processes = ranks * PROCESS
    weights: float = size.parameters * DTYPE_BYTES[recipe.model.dtype]
    if quantized:
        ends = min(2 * size.embeddings, size.parameters)
        weights = (size.parameters - ends) * _QUANTIZED[quantized] + ends * DTYPE_BYTES[recipe.model.dtype]
    if device == "cpu":
        held = weights / (ranks if launch.strategy == "zero3" else 1) * ranks
        load = held if not sharded else max(held, weights)
    elif sharded and not quantized:  # by rank 0, which broadcasts them
        load = weights * (ranks if launch.strategy == "fsdp2" and recipe.trains_layers_in_full else 1)
    else:  # each tensor on its way to the GPU
        load = ranks * largest * DTYPE_BYTES[recipe.model.dtype]
    resident = processes + (weights if device == "cpu" and not sharded else 0)
    export = DTYPE_BYTES[recipe.export.dtype]
    gather = None
    if sharded:
        gather = resident + (size.trained * 4 if recipe.trains_adapters else largest * (4 + export))
    merge = verify = None
    if not recipe.trains_adapters or recipe.export.merge:
        if not recipe.trains_adapters:
            merge = resident + largest * export
        else:
            merge = resident + _MERGING + (2 * largest * 10 if quantized else 0)
        verify = resident + PROCESS + _LOGITS + 4 * largest
        if quantized == "int8":
            verify += 5 * size.parameters  # in 8 bits, and dequantized
        elif quantized:
            verify += weights
    return HostMemory(processes + load, gather, merge, verify)


def of_files(recipe: Recipe) -> ModelSize | None:
    """Read a local model's sizes without torch; None if its files do not contain them, or it is on the Hub."""
    parameters = model_dir.parameters(recipe.model.name)
    folder = model_dir.directory(recipe.model.name)
    if parameters is None or folder is None:
        return None
    config = model_dir.config(folder)
    names = (("vocab_size",), ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"))
    values = [next((config[name] for name in keys if type(config.get(name)) is int), 0) for keys in names]
    if not all(values):
        return None
    vocab_size, width, layers = values
    embeddings = vocab_size * width
    trained, layer = 0 if recipe.trains_adapters else parameters, (parameters - embeddings) // layers
    return ModelSize(parameters, trained, layers, layer, rest=embeddings, embeddings=embeddings)


def memory_shortage(needed: HostMemory, *, adapters: bool) -> str | None:
    """Return a warning that names the stages for which this node has too little memory; None if it has enough."""
    total = total_memory()
    short = {name: size for name, size in needed.stages.items() if size > total}
    if not short:
        return None
    stages = ", ".join(f"{format_bytes(size)} to {name}" for name, size in short.items())
    remedy = "Use a node with more memory"
    if adapters and short.keys() <= {"merge", "verify"}:
        remedy += ", or set export.merge: false and merge the adapter elsewhere with `sft-recipe merge`"
    elif "load" in short:
        remedy += ", or set model.dtype: bfloat16 if it is float32"
    return f"host memory: the run needs {stages} (this node has {format_bytes(total)}). {remedy}."


def total_memory() -> float:
    """Return the bytes of memory of this node, or of this process's container."""
    total = float(psutil.virtual_memory().total)
    try:
        return min(total, float(Path(_CGROUP).read_text("utf-8")))
    except (OSError, ValueError):  # "max", or no cgroup v2
        return total

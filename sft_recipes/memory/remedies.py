"""Find single recipe changes that reduce memory, smallest slowdown first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sft_recipes.errors import ModelError
from sft_recipes.memory import per_rank_memory, prediction
from sft_recipes.memory.prediction import Footprint
from sft_recipes.recipe.schema import DEFAULT_GLOBAL_BATCH_SIZE, Recipe
from sft_recipes.recipe.validate import validate

Change = dict[str, Any]  # dotted keys and values, as for --set
Predict = Callable[[Recipe], Footprint]  # for one process with the whole model
_MOST_GPUS = 64
RECOMPUTED: tuple[int | bool, ...] = (4, 3, 2, True)  # train.gradient_checkpointing, fastest first


@dataclass(frozen=True)
class Remedy:
    """A single change, and the peak memory with it."""

    kind: str
    change: Change
    peak: float  # bytes on a rank
    fits: bool

    def __str__(self) -> str:
        options = " ".join(f"--set {key}={_yaml(value)}" for key, value in self.change.items())
        return f"{options}: {prediction.format_bytes(self.peak)}"


def find_remedies(
    recipe: Recipe, predict: Predict, capacity: float, device: str, attention: str | None
) -> list[Remedy]:
    """Find the mildest change of each kind that fits a rank in `capacity` bytes; the strongest if none fits.

    `attention`: an implementation that needs less memory, if there is one.
    """
    found = []
    for kind, options in candidates(recipe, attention):

        def try_change(change: Change, kind: str = kind) -> Remedy:
            changed = applied(recipe, change)
            if problems := validate(changed, to_run=False).problems:  # such as an optimizer that fsdp2 does not support
                raise ModelError(*problems)
            rank = per_rank_memory.on_rank(predict(changed), changed, device)
            return Remedy(kind, change, rank.peak_bytes, prediction.fits(rank, capacity, device))

        try:
            best = try_change(options[-1])
            low, high = 0, len(options) - 1
            while best.fits and low < high:  # bisection, since a prediction takes a second
                middle = (low + high) // 2
                milder = try_change(options[middle])
                if milder.fits:
                    best, high = milder, middle
                else:
                    low = middle + 1
        except ModelError:  # not possible for this recipe or model, or not predictable
            continue
        found.append(best)
    return found


def candidates(recipe: Recipe, attention: str | None) -> Iterator[tuple[str, list[Change]]]:
    """Yield each kind of change with its changes, mildest first."""
    model, train, launch = recipe.model, recipe.train, recipe.launch
    if attention is not None:
        yield "attention", [{"model.attention": attention}]
    if train.recomputed != 1:
        more = [n for n in RECOMPUTED if train.recomputed == 0 or n < train.recomputed]  # True is 1
        yield "checkpointing", [{"train.gradient_checkpointing": n} for n in more]
    assert isinstance(train.micro_batch_size, int)
    if smaller := [size for size in micro_batch_sizes(recipe) if size < train.micro_batch_size]:
        yield "micro-batch", [{"train.micro_batch_size": size} for size in reversed(smaller)]
    elif accumulated := train.gradient_accumulation_steps:
        halves = range(1, (train.micro_batch_size & -train.micro_batch_size).bit_length())
        if whole := [(train.micro_batch_size >> k, accumulated << k) for k in halves]:
            keys = "train.micro_batch_size", "train.gradient_accumulation_steps"
            yield "micro-batch", [dict(zip(keys, sizes, strict=True)) for sizes in whole]
    if not recipe.trains_adapters:
        yield "LoRA", [{"lora": {}}]
    if model.quantization is None:
        yield "nf4", [{"model.quantization": "nf4"} | ({"lora": {}} if not recipe.trains_adapters else {})]
    if "8bit" not in train.optimizer and "4bit" not in train.optimizer:
        yield "8-bit optimizer", [{"train.optimizer": "adamw_8bit_sr"}]
    ranks = launch.world_size
    more = [n for n in (2, 4, 8, 16, 32, _MOST_GPUS) if n > ranks or (n == ranks and launch.strategy == "ddp")]
    if launch.machines == 1 and model.quantization != "int8" and (possible := [n for n in more if _divides(recipe, n)]):
        yield "fsdp2", [{"launch.strategy": "fsdp2", "launch.processes": n} for n in possible]
    if not launch.cpu_offload and model.quantization is None:
        yield "CPU offload", [{"launch.strategy": "fsdp2", "launch.cpu_offload": True}]


def micro_batch_sizes(recipe: Recipe) -> list[int]:
    """Return the powers of two that keep global_batch_size on this number of processes, smallest first."""
    train, world = recipe.train, recipe.launch.world_size
    if train.gradient_accumulation_steps is not None:
        return []
    whole = train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
    return [2**k for k in range(whole.bit_length()) if whole % (2**k * world) == 0]


def _divides(recipe: Recipe, processes: int) -> bool:
    train = recipe.train
    if train.gradient_accumulation_steps is not None:
        return True
    assert isinstance(train.micro_batch_size, int)
    return (train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE) % (train.micro_batch_size * processes) == 0


def applied(recipe: Recipe, change: Change) -> Recipe:
    """Return the recipe with a change."""
    values = recipe.model_dump(exclude_unset=True)
    for key, value in change.items():
        section, _, name = key.partition(".")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return Recipe.model_validate(values)


def _yaml(value: Any) -> str:
    return "'{}'" if value == {} else str(value).lower() if isinstance(value, bool) else str(value)

"""Implement `sft-recipe plan`: predict memory, steps and time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes import model_dir
from sft_recipes.data import encoder, prepare, readers
from sft_recipes.errors import DataError, RecipeError, one_line
from sft_recipes.memory import host_memory, prediction, remedies
from sft_recipes.memory.prediction import GIB, Footprint
from sft_recipes.memory.remedies import Remedy
from sft_recipes.planning import flops
from sft_recipes.planning.steps import count
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import validate

_SECONDS = 2.0  # time limit for tokenizing each source; totals are extrapolated from its first rows
# TRL options whose effect on memory is not predicted.
_NOT_PREDICTED = {
    "activation_offloading", "gradient_checkpointing_kwargs", "label_smoothing_factor", "loss_type", "optim_target_modules",
}  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """Amount of training; None: unknown."""

    steps: int | None
    tokens: int | None
    document: float  # mean document length in tokens, weighted by token
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """Predicted memory and time of a run. Memory in bytes per rank."""

    recipe: Recipe
    device: str
    gpu: flops.GPU | None
    capacity: float | None  # bytes of memory of a device
    attention: str
    kernels: str
    footprint: Footprint
    host: host_memory.HostMemory  # of the node of rank 0
    amount: Amount
    flops_per_token: float
    remedies: list[Remedy]

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else prediction.fits(self.footprint, self.capacity, self.device)

    @property
    def ranks(self) -> int:
        return self.recipe.launch.world_size

    @property
    def flops(self) -> float | None:
        return None if self.amount.tokens is None else self.flops_per_token * self.amount.tokens

    def times(self) -> dict[str, tuple[float, float]]:
        """Return (low, high) hours by GPU name: for the given GPU, else for GPUs with that memory, else for all."""
        if self.flops is None or self.device != "cuda":
            return {}
        same_memory = flops.gpus_of(self.capacity / 1e9) if self.capacity else []
        chosen = [self.gpu] if self.gpu else same_memory or list(flops.GPUS)
        return {gpu.name: flops.hours(self.flops, gpu, self.ranks) for gpu in chosen}

    def as_dict(self) -> dict[str, Any]:
        """Return the output of --json. Memory in GiB (2^30 bytes), time in hours."""
        train, launch = self.recipe.train, self.recipe.launch
        return {
            "model": self.recipe.model.name,
            "parameters": self.footprint.size.parameters,
            "trainable_parameters": self.footprint.size.trained,
            "device": self.device,
            "processes": self.ranks,
            "strategy": launch.strategy,
            "attention": self.attention,
            "kernels": self.kernels,
            "micro_batch_size": train.micro_batch_size,
            "gradient_checkpointing": train.gradient_checkpointing,
            "gradient_accumulation_steps": self.recipe.accumulation,
            "sequences_per_step": self.recipe.sequences_per_step,
            "peak_gib": round(self.footprint.peak_bytes / GIB, 3),
            "parts_gib": {part: round(size / GIB, 3) for part, size in self.footprint.peak.items()},
            "phases_gib": {name: round(sum(parts.values()) / GIB, 3) for name, parts in self.footprint.phases.items()},
            "host_memory_gib": {stage: round(size / GIB, 3) for stage, size in self.host.stages.items()},
            "memory_gib": None if self.capacity is None else round(self.capacity / GIB, 3),
            "fits": self.fits,
            "remedies": [
                {
                    "kind": remedy.kind,
                    "set": remedy.change,
                    "peak_gib": round(remedy.peak / GIB, 3),
                    "fits": remedy.fits,
                }
                for remedy in self.remedies
            ],
            "steps": self.amount.steps,
            "tokens": self.amount.tokens,
            "flops": self.flops,
            "flops_per_token": self.flops_per_token,
            "hours": {name: [round(hour, 3) for hour in span] for name, span in self.times().items()},
            "notes": self.amount.notes,
        }

    def lines(self) -> list[str]:
        """Return the console output."""
        recipe, footprint = self.recipe, self.footprint
        unit = "GPU" if self.device == "cuda" else "process"
        ranks = f"; {self.ranks} ranks, {recipe.launch.strategy}" if self.ranks > 1 else ""
        lines = [
            f"model: {recipe.model.name}; {recipe.method}; trainable parameters {footprint.size.trained:,} of "
            f"{footprint.size.parameters:,}; weights {recipe.model.quantization or recipe.model.dtype}; attention "
            f"{self.attention}; kernels {self.kernels}{ranks}",
            f"step: {recipe.sequences_per_step} sequences of {recipe.data.max_length:,} tokens (micro-batch "
            f"{recipe.train.micro_batch_size} x accumulation {recipe.accumulation}); gradient checkpointing "
            f"{recipe.train.checkpointing_summary}",
            f"peak memory: {prediction.format_bytes(footprint.peak_bytes)} per {unit}: "
            + ", ".join(f"{part} {prediction.format_bytes(size)}" for part, size in footprint.peak.items() if size),
        ]
        if self.capacity is not None:
            reserved = f" ({prediction.CONTEXT / 2**20:.0f} MiB CUDA context, {1 - prediction.SHARE:.0%} margin)"
            fits = "fits" if self.fits else "does not fit"
            lines.append(
                f"{fits} in {prediction.format_bytes(self.capacity)}{reserved if self.device == 'cuda' else ''}"
            )
        if self.remedies:
            lines.append("single changes that reduce memory, smallest slowdown first:")
            for remedy in self.remedies:
                lines.append(f"  {remedy.kind}, {'fits' if remedy.fits else 'does not fit'}: {remedy.__str__()}")
        lines += [f"host memory: {self.host}", *self.amount.notes]
        if self.amount.steps is not None and self.amount.tokens is not None and self.flops is not None:
            lines.append(
                f"schedule: about {self.amount.steps:,} steps, {self.amount.tokens:,} tokens, {self.flops:.2e} FLOPs "
                f"({self.flops_per_token:.2e} per token)"
            )
        if times := self.times():
            number = f"{self.ranks} x " if self.ranks > 1 else ""
            slow, fast = (f"{share:.0%}" for share in flops.REACHED)
            lines.append(f"time, estimated at {slow} to {fast} of the peak FLOP/s:")
            lines += [
                f"  {number}{name}: {format_duration(low)} to {format_duration(high)}"
                for name, (low, high) in times.items()
            ]
        return [one_line(line) for line in lines]


def plan(
    recipe_file: str,
    overrides: Sequence[str] = (),
    *,
    gpu_memory: str | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    cpu: bool = False,
) -> Plan:
    """Predict memory and time of a run. Raises InputError with all problems of the recipe and the model's config."""
    capacity, card = _capacity(gpu_memory, gpu, cpu)
    more = [] if gpus is None else [f"launch.processes={gpus}"]
    loaded, problems = parse.parse_recipe(recipe_file, [*overrides, *more])
    if loaded is None or problems:
        raise RecipeError(*problems)
    if problems := validate(loaded.recipe, to_run=False).problems:
        raise RecipeError(*(loaded.with_location(line) for line in problems))
    device = "cpu" if cpu else "cuda"
    with loaded.locate_errors():
        recipe = loaded.recipe
        if folder := model_dir.directory(recipe.model.name):
            model_dir.config(folder)  # report errors before torch is imported, which takes seconds
        if recipe.train.micro_batch_size == "auto" and capacity is None and not cpu:
            raise RecipeError(
                "train.micro_batch_size: unknown GPU memory, so the largest size that fits cannot be computed (got auto). "
                "Pass --gpu-memory 24GB or --gpu NAME."
            )
        amount = _amount(recipe)
        from sft_recipes.memory import autosize, fake_kernels, memory_trace
        from sft_recipes.models import kernels
        from sft_recipes.models.attention import AMPERE

        config = memory_trace.load_traceable_config(recipe)
        capability = card.capability if card else None  # if no GPU is named, Ampere or later is assumed
        predict = memory_trace.Predictor(config, device, capability)
        if capacity is not None or cpu:
            recipe = autosize.resolve_auto(recipe, predict, capacity or autosize.available_memory(recipe, device))
        elif recipe.train.gradient_checkpointing == "auto":
            recipe = remedies.applied(recipe, {"train.gradient_checkpointing": True})
            amount.notes.append(
                "train.gradient_checkpointing: auto is assumed to be true (least memory); --gpu-memory or --gpu resolves it"
            )
        attention = fake_kernels.named(recipe, config, device, capability) or "eager"
        if cpu and attention not in ("varlen", "sdpa", "eager"):
            raise RecipeError(
                f"model.attention: not supported for training on CPUs (got {attention}). Set sdpa or auto."
            )
        fused = kernels.select_kernels(recipe, config, device)
        masked = fake_kernels.masks_all_pairs(recipe, config, device, capability)
        rank = predict.on_rank(recipe)
        found = list[Remedy]()
        if capacity is not None and not prediction.fits(rank, capacity, device):
            leaner = fake_kernels.lower_memory_attention(recipe, config, device, capability)
            found = remedies.find_remedies(recipe, predict, capacity, device, leaner)
        if ignored := [
            *(f"trl.{key}" for key in sorted(_NOT_PREDICTED & recipe.trl.keys())),
            *["train.compile"] * recipe.train.compile,
        ]:
            amount.notes.append(f"not included in the prediction: {', '.join(ignored)}")
        earlier = [gpu.name for gpu in flops.gpus_of((capacity or 0) / 1e9) if gpu.capability < AMPERE]
        if attention == "varlen" and card is None and earlier and not cpu:
            amount.notes.append(
                f"attention varlen: a GPU of compute capability 8.0 or later is assumed; --gpu {earlier[0]} is an earlier one"
            )
        per_token = flops.flops_per_token(recipe, rank.size, config.get_text_config(), amount.document, dense=masked)
        host = host_memory.predict(recipe, rank.size, device)
    return Plan(recipe, device, card, capacity, attention, fused.name, rank, host, amount, per_token, found)


def _capacity(gpu_memory: str | None, gpu: str | None, cpu: bool) -> tuple[float | None, flops.GPU | None]:
    card = flops.gpu_named(gpu) if gpu is not None else None
    if gpu is not None and card is None:
        raise RecipeError(
            f"--gpu: unknown GPU (got '{gpu}'). Choose one of {', '.join(g.name for g in flops.GPUS)}, or pass --gpu-memory."
        )
    if gpu and cpu:
        raise RecipeError("--gpu and --cpu: mutually exclusive. Pass one of them.")
    if gpu_memory is None:
        return (card.gigabytes * 1e9 if card else None), card
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB)?\s*", gpu_memory, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e9:
        raise RecipeError(
            f"--gpu-memory: not a size (got '{gpu_memory}'). Pass for example 24GB (10^9 bytes) or 24GiB (2^30 bytes)."
        )
    unit = {"gib": 2**30, "mib": 2**20, "mb": 1e6}.get((match[2] or "GB").lower(), 1e9)
    return float(match[1]) * unit, card


def _amount(recipe: Recipe) -> Amount:
    """Count steps and tokens, or estimate them if data or tokenizer is not available locally."""
    longest = recipe.data.max_length
    try:
        folder = model_dir.directory(recipe.model.name)
        tokenizer = encoder.from_directory(folder, recipe.model.new_tokens) if folder else None
        if tokenizer is not None:
            return _counted(recipe, prepare.prepare(recipe, tokenizer, seconds=_SECONDS))
        why = f"{recipe.model.name} has no tokenizer.json" if folder else "the tokenizer is on the Hub"
        sources = readers.every_source(recipe.data)[: len(readers.train_sources(recipe.data))]
        rows = sum(readers.look_through(source, recipe.data, _SECONDS)[1] for source in sources)
        steps: int | None = count(recipe, rows).total
    except DataError as error:
        why, steps = f"the data cannot be read ({error.lines[0]})", recipe.train.max_steps
    if steps is None:
        return Amount(None, None, longest, [f"steps and tokens unknown: {why}"])
    bound = "at most" if recipe.data.packing != "none" and recipe.train.max_steps is None else "about"
    note = f"tokens not counted: {why}; assumed: {bound} {steps:,} steps of full sequences of {longest:,} tokens"
    return Amount(steps, steps * recipe.sequences_per_step * longest, longest, [note])


def _counted(recipe: Recipe, data: prepare.Prepared) -> Amount:
    """Extrapolate from the sample of rows that was tokenized."""
    stats = data.train.stats
    steps = count(recipe, round(len(data.train) * data.scale(recipe.data.max_train_samples))).total
    sequence_tokens = stats.tokens / max(1, len(data.train))
    return Amount(steps, round(steps * recipe.sequences_per_step * sequence_tokens), data.train.mean_document())


def format_duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"

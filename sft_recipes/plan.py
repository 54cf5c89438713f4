"""`sft-recipe plan`: the memory, steps and time of a run, from the recipe and the model's config alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.data import prepare, reading, tokens
from sft_recipes.errors import DataError, RecipeError, one_line
from sft_recipes.planning import changes, host_memory, memory, sharding, speed
from sft_recipes.planning.memory import GIB, Footprint
from sft_recipes.planning.steps import count
from sft_recipes.recipe import load, model_files
from sft_recipes.recipe.check import judge
from sft_recipes.recipe.schema import Recipe

_SECONDS = 2.0  # of tokenising a source; tokens and steps are those of its first rows, taken for all
# Keys of TRL that change a step's memory in ways that are not traced.
_UNSEEN = {
    "activation_offloading", "gradient_checkpointing_kwargs", "label_smoothing_factor", "loss_type", "optim_target_modules",
}  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """How much is trained on; what is None is not known."""

    steps: int | None
    tokens: int | None
    document: float  # mean length, in tokens, of the document that a token is in
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a run would take. Memory in bytes, of one rank."""

    recipe: Recipe
    device: str
    gpu: speed.GPU | None
    capacity: float | None  # bytes of memory of a device
    attention: str
    kernels: str
    found: Footprint
    host: host_memory.HostMemory  # of the machine that rank 0 is on
    amount: Amount
    flops_per_token: float
    remedies: list[changes.Remedy]

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else memory.fits(self.found, self.capacity, self.device)

    @property
    def ranks(self) -> int:
        return self.recipe.launch.processes * self.recipe.launch.machines

    @property
    def flops(self) -> float | None:
        return None if self.amount.tokens is None else self.flops_per_token * self.amount.tokens

    def times(self) -> dict[str, tuple[float, float]]:
        """Hours by the GPU's name: of the one that was asked for, of those with that much memory, or else of all."""
        if self.flops is None or self.device != "cuda":
            return {}
        like = speed.gpus_of(self.capacity / 1e9) if self.capacity else []
        chosen = [self.gpu] if self.gpu else like or list(speed.GPUS)
        return {gpu.name: speed.hours(self.flops, gpu, self.ranks) for gpu in chosen}

    def as_dict(self) -> dict[str, Any]:
        """For --json. Memory in GiB (2^30 bytes), time in hours."""
        train, launch = self.recipe.train, self.recipe.launch
        return {
            "model": self.recipe.model.name,
            "parameters": self.found.parameters,
            "trained_parameters": self.found.trained,
            "device": self.device,
            "processes": self.ranks,
            "strategy": launch.strategy,
            "attention": self.attention,
            "kernels": self.kernels,
            "micro_batch_size": train.micro_batch_size,
            "gradient_checkpointing": train.gradient_checkpointing,
            "gradient_accumulation_steps": self.recipe.accumulation,
            "sequences_per_step": self.recipe.sequences_per_step,
            "peak_gib": round(self.found.peak_bytes / GIB, 3),
            "parts_gib": {part: round(size / GIB, 3) for part, size in self.found.peak.items()},
            "phases_gib": {name: round(sum(parts.values()) / GIB, 3) for name, parts in self.found.phases.items()},
            "host_memory_gib": {stage: round(size / GIB, 3) for stage, size in self.host.stages.items()},
            "memory_gib": None if self.capacity is None else round(self.capacity / GIB, 3),
            "fits": self.fits,
            "changes": [
                {
                    "kind": each.kind,
                    "set": each.change,
                    "peak_gib": round(each.peak / GIB, 3),
                    "fits": each.fits,
                }
                for each in self.remedies
            ],
            "steps": self.amount.steps,
            "tokens": self.amount.tokens,
            "flops": self.flops,
            "flops_per_token": self.flops_per_token,
            "hours": {name: [round(hour, 3) for hour in span] for name, span in self.times().items()},
            "notes": self.amount.notes,
        }

    def lines(self) -> list[str]:
        """In words, a line each."""
        recipe, found = self.recipe, self.found
        method = "full fine-tuning" if recipe.lora is None else "QLoRA" if recipe.model.quantization else "LoRA"
        place = "GPU" if self.device == "cuda" else "process"
        several = f", {self.ranks} ranks with {recipe.launch.strategy}" if self.ranks > 1 else ""
        lines = [
            f"model: {recipe.model.name}, {method}, {found.trained:,} of {found.parameters:,} parameters trained, weights in "
            f"{recipe.model.quantization or recipe.model.dtype}, attention {self.attention}, kernels {self.kernels}{several}",
            f"step: {recipe.sequences_per_step} sequences of {recipe.data.max_length:,} tokens, "
            f"{recipe.train.micro_batch_size} at once, {recipe.accumulation} times, gradient checkpointing "
            f"{recipe.train.recomputed_in_words}",
            f"peak memory: {memory.in_words(found.peak_bytes)} a {place}: "
            + ", ".join(f"{part} {memory.in_words(size)}" for part, size in found.peak.items() if size),
        ]
        if self.capacity is not None:
            kept = f", of which {memory.in_words(memory.CONTEXT)} are CUDA's own and {1 - memory.SHARE:.0%} stay free"
            beside = kept if self.device == "cuda" else ""
            verdict = "fits into" if self.fits else "does not fit into"
            lines.append(f"{verdict} {memory.in_words(self.capacity)}{beside}")
        if self.remedies:
            lines.append("single changes, cheapest in speed first:")
            for each in self.remedies:
                lines.append(f"  {each.kind}, {'fits' if each.fits else 'does not fit'}: {each.in_words()}")
        lines += [f"host memory: {self.host}", *self.amount.notes]
        if self.amount.steps is not None and self.amount.tokens is not None and self.flops is not None:
            lines.append(
                f"steps: about {self.amount.steps:,}, {self.amount.tokens:,} tokens, {self.flops:.2e} floating-point "
                f"operations ({self.flops_per_token:.2e} a token)"
            )
        if times := self.times():
            number = f"{self.ranks} x " if self.ranks > 1 else ""
            slow, fast = (f"{share:.0%}" for share in speed.REACHED)
            lines.append(f"time, an estimate at {slow} to {fast} of the peak rate:")
            lines += [f"  {number}{name}: {_spoken(low)} to {_spoken(high)}" for name, (low, high) in times.items()]
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
    """Predict a run. Raises InputError with every problem of the recipe, or where the model's config cannot be had."""
    capacity, card = _capacity(gpu_memory, gpu, cpu)
    more = [] if gpus is None else [f"launch.processes={gpus}"]
    loaded, problems = load.examine(recipe_file, [*overrides, *more])
    if loaded is None or problems:
        raise RecipeError(*problems)
    if found := judge(loaded.recipe, to_run=False).problems:
        raise RecipeError(*(loaded.placed(line) for line in found))
    device = "cpu" if cpu else "cuda"
    with loaded.placing_errors():
        recipe = loaded.recipe
        if folder := model_files.directory(recipe.model.name):
            model_files.config(folder)  # before the seconds that importing torch takes
        if recipe.train.micro_batch_size == "auto" and capacity is None and not cpu:
            raise RecipeError(
                "train.micro_batch_size: auto is the largest that fits, and how much memory there is is not known; say "
                "--gpu-memory 24GB, or --gpu NAME"
            )
        amount = _amount(recipe)
        from sft_recipes.training import fitting, footprint, kernels, stand_ins
        from sft_recipes.training.attention import AMPERE

        config = footprint.config_of(recipe)
        capability = card.capability if card else None  # if no GPU is named, Ampere or later is assumed
        predict = fitting.predictor(config, device, capability)
        if capacity is not None or cpu:
            recipe = fitting.settled(recipe, predict, capacity or fitting.room(recipe, device), device)
        elif recipe.train.gradient_checkpointing == "auto":
            recipe = changes.applied(recipe, {"train.gradient_checkpointing": True})
            amount.notes.append(
                "train.gradient_checkpointing: auto is taken for true, with which a step takes least; with --gpu-memory or "
                "--gpu it is what fits"
            )
        attention = stand_ins.named(recipe, config, device, capability) or "eager"
        if cpu and attention not in ("varlen", "sdpa", "eager"):
            raise RecipeError(f"model.attention: {attention} does not train on CPUs; set sdpa, or auto")
        fused = kernels.select_kernels(recipe, config, device)
        masked = stand_ins.masks_all_pairs(recipe, config, device, capability)
        whole = predict(recipe)
        rank = sharding.on_rank(whole, recipe, device)
        remedies: list[changes.Remedy] = []
        if capacity is not None and not memory.fits(rank, capacity, device):
            leaner = stand_ins.leaner_attention(recipe, config, device, capability)
            remedies = changes.remedies(recipe, predict, capacity, device, leaner)
        if unseen := [
            *(f"trl.{key}" for key in sorted(_UNSEEN & recipe.trl.keys())),
            *["train.compile"] * recipe.train.compile,
        ]:
            amount.notes.append(f"not in the prediction: {', '.join(unseen)}")
        earlier = [gpu.name for gpu in speed.gpus_of((capacity or 0) / 1e9) if gpu.capability < AMPERE]
        if attention == "varlen" and card is None and earlier and not cpu:
            amount.notes.append(
                f"attention varlen: a GPU of compute capability 8.0 or later is assumed; --gpu {earlier[0]} is an earlier one"
            )
        flops = speed.flops_per_token(recipe, whole, config.get_text_config(), amount.document, dense=masked)
        text = config.get_text_config()
        model = host_memory.of_footprint(whole, text.vocab_size * text.hidden_size)
        host = host_memory.predict(recipe, model, device)
    return Plan(recipe, device, card, capacity, attention, fused.name, rank, host, amount, flops, remedies)


def _capacity(gpu_memory: str | None, gpu: str | None, cpu: bool) -> tuple[float | None, speed.GPU | None]:
    card = speed.gpu_named(gpu) if gpu is not None else None
    if gpu is not None and card is None:
        raise RecipeError(
            f"--gpu: '{gpu}' is not in the table; expected one of {', '.join(g.name for g in speed.GPUS)}"
        )
    if gpu and cpu:
        raise RecipeError("--gpu and --cpu: a run is on one or the other; give one")
    if gpu_memory is None:
        return (card.gigabytes * 1e9 if card else None), card
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MB|MiB)?\s*", gpu_memory, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e9:
        raise RecipeError(
            f"--gpu-memory: '{gpu_memory}' is no size; expected such as 24GB (10^9 bytes) or 24GiB (2^30)"
        )
    unit = {"gib": 2**30, "mib": 2**20, "mb": 1e6}.get((match[2] or "GB").lower(), 1e9)
    return float(match[1]) * unit, card


def _amount(recipe: Recipe) -> Amount:
    """Steps and tokens, as far as the data and the tokenizer are there to count them."""
    longest = recipe.data.max_length
    try:
        folder = model_files.directory(recipe.model.name)
        tokenizer = tokens.from_directory(folder, recipe.model.new_tokens) if folder else None
        if tokenizer is not None:
            return _counted(recipe, prepare.prepare(recipe, tokenizer, seconds=_SECONDS))
        why = f"{recipe.model.name} has no tokenizer.json" if folder else "the tokenizer is on the hub"
        sources = reading.every_source(recipe.data)[: len(reading.train_sources(recipe.data))]
        rows = sum(reading.look_through(source, recipe.data, _SECONDS)[1] for source in sources)
        steps: int | None = count(recipe, rows).total
    except DataError as error:
        why, steps = f"the data cannot be read ({error.lines[0]})", recipe.train.max_steps
    if steps is None:
        return Amount(None, None, longest, [f"steps and tokens are not known: {why}"])
    bound = "at most" if recipe.data.packing != "none" and recipe.train.max_steps is None else "about"
    note = f"tokens are not counted: {why}; taken are {bound} {steps:,} steps of full sequences of {longest:,} tokens"
    return Amount(steps, steps * recipe.sequences_per_step * longest, longest, [note])


def _counted(recipe: Recipe, data: prepare.Prepared) -> Amount:
    """From a sample of the rows, taken for all."""
    account = data.train.stats
    rows = sum(source.rows for source in account.sources)
    larger = 1 / data.share
    if recipe.data.max_train_samples:
        larger = min(larger, recipe.data.max_train_samples / rows)
    steps = count(recipe, round(len(data.train) * larger)).total
    of_sequence = account.tokens / max(1, len(data.train))
    return Amount(steps, round(steps * recipe.sequences_per_step * of_sequence), data.train.mean_document())


def _spoken(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"

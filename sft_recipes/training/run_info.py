"""Summarize the run for console and manifest."""

from typing import Any

import torch

from sft_recipes.models import attention
from sft_recipes.models.model import count_parameters
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training.trainer import Trainer
from sft_recipes.upstream import attention_of


def summary_lines(recipe: Recipe, trainer: Trainer) -> list[str]:
    """Return the `model:` and `schedule:` lines of the console."""
    total, trained = count_parameters(trainer.model)
    steps = trainer.args.max_steps
    micro, accumulation, world = recipe.train.micro_batch_size, recipe.accumulation, trainer.args.world_size
    processes = f" x {world} processes" if world > 1 else ""
    precision = "off" if recipe.train.mixed_precision == "no" else recipe.train.mixed_precision
    on_gpu, deterministic = torch.cuda.is_available(), ""
    if recipe.train.deterministic:
        on_cpu = "" if on_gpu else " (train.deterministic has no effect on CPUs)"
        deterministic = f"; deterministic algorithms only{on_cpu}"
    _, reason = attention.select_here(recipe, trainer.model.config)
    return [
        f"model: {recipe.model.name}; {recipe.method}; trainable parameters {trained:,} of {total:,} ({trained / total:.2%}); "
        f"weights {recipe.model.quantization or recipe.model.dtype}; "
        f"attention {attention_of(trainer.model.config)}{f' ({reason})' if reason else ''}; "
        f"{f'kernels {trainer.kernels}; ' if on_gpu else ''}device {device()['name']}",
        f"schedule: {steps:,} steps; {recipe.sequences_per_step} sequences per step (micro-batch {micro} x accumulation "
        f"{accumulation}{processes}); peak learning rate {recipe.train.learning_rate:g}, {recipe.train.lr_scheduler}, "
        f"{int(trainer.args.warmup_steps):,} warmup steps; {recipe.train.optimizer}; mixed precision {precision}; "
        f"gradient checkpointing {recipe.train.checkpointing_summary}{deterministic}",
    ]


def preflight_line(results: dict[str, Any]) -> str:
    """Return the `preflight:` line of the console."""
    largest, base, predicted = results["largest_micro_batch"], results["base"], results["predicted_peak_gib"]
    # On a CPU the whole process is measured, including the libraries, which are large.
    measured, scope = ([], "") if torch.cuda.is_available() else (["whole process"], " for tensors")
    details = "; ".join([*measured, *([] if predicted is None else [f"predicted{scope} {predicted:.1f}"])])
    parts = [
        f"passed in {results['seconds']} s",
        f"largest micro-batch {largest['tokens']:,} tokens" if "tokens" in largest else "no micro-batch tried",
        f"peak memory {largest['peak_gib']:.1f} GiB{f' ({details})' if details else ''}",
        f"base loss {base['loss']:.2f} per token ({base['shuffled_loss']:.2f} with shuffled tokens)",
        *(["packed documents isolated"] if results.get("isolation") else []),
    ]
    return f"preflight: {'; '.join(parts)}"


def settings_in_effect(trainer: Trainer) -> dict[str, Any]:
    """Return the settings in effect, with defaults and auto resolved, for the manifest."""
    (total, trained), recipe = count_parameters(trainer.model), trainer.recipe
    return {
        "device": device(),
        "weights": recipe.model.quantization or recipe.model.dtype,
        "mixed_precision": recipe.train.mixed_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "optimizer": recipe.train.optimizer,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "micro_batch_size": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "sequences_per_step": recipe.sequences_per_step,
        "attention": attention_of(trainer.model.config),
        "kernels": trainer.kernels.name,
        "parameters": {"total": total, "trainable": trained},
    }


def device() -> dict[str, Any]:
    """Describe the device."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return {"name": "mps" if torch.backends.mps.is_available() else "cpu", "threads": torch.get_num_threads()}

"""What is about to run, and what it runs on: for the console and for the manifest."""

from typing import Any

import torch

from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import attention
from sft_recipes.training.model import count_parameters


def in_words(recipe: Recipe, trainer: Any) -> list[str]:
    """What is about to run, in words."""
    total, trained = count_parameters(trainer.model)
    method = "full fine-tuning" if recipe.lora is None else "QLoRA" if recipe.model.quantization else "LoRA"
    steps = trainer.args.max_steps
    micro, accumulation, world = recipe.train.micro_batch_size, recipe.accumulation, trainer.args.world_size
    processes = f" x {world} processes" if world > 1 else ""
    _, why = attention.select_here(recipe, trainer.model.config)
    lines = [
        f"model: {recipe.model.name}, {method}, {trained:,} of {total:,} parameters trained ({trained / total:.2%}), "
        f"weights in {recipe.model.quantization or recipe.model.dtype}, "
        f"attention {trainer.model.config._attn_implementation}{f' ({why})' if why else ''}, on {device()['name']}",
        f"steps: {steps:,} of {recipe.sequences_per_step} sequences ({micro} x {accumulation} accumulated{processes}), "
        f"{int(trainer.args.warmup_steps):,} of them warmup, {recipe.train.lr_scheduler} to a learning rate of "
        f"{recipe.train.learning_rate:g}, {recipe.train.optimizer}, mixed precision {recipe.train.mixed_precision}, "
        f"gradient checkpointing {recipe.train.recomputed_in_words}",
    ]
    if trainer.preflight is not None:
        lines += _found(trainer.preflight.figures)
    return lines


def _found(figures: dict[str, Any]) -> list[str]:
    """What the preflight found."""
    predicted = figures["predicted_gib"]
    if "longest" not in figures:
        return [] if predicted is None else [f"memory: {predicted:.1f} GiB a process are predicted"]
    # What is measured on a CPU is the process, and libraries are large.
    of = "" if torch.cuda.is_available() else " for tensors"
    line = (
        f"preflight: {figures['seconds']} s; the longest micro-batch, of {figures['longest']['tokens']:,} tokens, trains in "
        f"{figures['longest']['peak_gib']:.1f} GiB{'' if predicted is None else f' ({predicted:.1f}{of} were predicted)'}; "
        f"loss of the base {figures['base']['loss']:.2f} a token, shuffled {figures['base']['loss_of_shuffled_tokens']:.2f}"
    )
    return [line + ("; packed documents do not see each other" if figures.get("isolation") else "")]


def used(trainer: Any) -> dict[str, Any]:
    """What is used, also where the recipe leaves that open, and what was found before the first step, for the manifest."""
    (total, trained), recipe = count_parameters(trainer.model), trainer.recipe
    return {
        "device": device(),
        "weights": recipe.model.quantization or recipe.model.dtype,
        "mixed_precision": recipe.train.mixed_precision,
        "optimizer": recipe.train.optimizer,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "micro_batch_size": recipe.train.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "sequences_per_step": recipe.sequences_per_step,
        "attention": trainer.model.config._attn_implementation,
        "parameters": {"all": total, "trained": trained},
        "preflight": trainer.preflight.figures if trainer.preflight else "skipped",
    }


def device() -> dict[str, Any]:
    """What it runs on."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return {"name": "mps" if torch.backends.mps.is_available() else "cpu", "threads": torch.get_num_threads()}

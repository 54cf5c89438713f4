"""Translate a recipe into TRL's SFTConfig."""

from pathlib import Path
from typing import Any

import torch

from sft_recipes.models import strategies
from sft_recipes.planning import disk
from sft_recipes.planning.steps import Steps
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import STOCHASTIC_ROUNDING
from sft_recipes.run_dir import CHECKPOINTS
from sft_recipes.trackers.base import PROJECT
from sft_recipes.upstream import CHECKPOINTING


def sft_config(recipe: Recipe, steps: Steps, run_dir: Path, *, validates: bool) -> dict[str, Any]:
    """Return the SFTConfig arguments for a recipe. TRL's data preparation is off, because the data is prepared already."""
    train, checkpoint = recipe.train, recipe.checkpoint
    on_gpu = torch.accelerator.is_available()
    optimizer = {"optim": train.optimizer}
    if train.optimizer == STOCHASTIC_ROUNDING:
        optimizer = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
    config = {
        "output_dir": str(run_dir / CHECKPOINTS),
        # data
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "padding_free": recipe.padding_free,
        "train_sampling_strategy": "random" if recipe.data.shuffle else "sequential",
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": strategies.accelerator(recipe)
        | {"non_blocking": on_gpu},  # copy the next micro-batch while computing
        # steps
        "max_steps": steps.total,
        "per_device_train_batch_size": train.micro_batch_size,
        "per_device_eval_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": steps.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        **optimizer,
        # precision and memory
        "bf16": train.mixed_precision == "bf16",
        "fp16": train.mixed_precision == "fp16",
        CHECKPOINTING: train.recomputed > 0,
        f"{CHECKPOINTING}_kwargs": {"every_n_layers": train.recomputed} if train.recomputed > 1 else None,
        "use_cpu": not on_gpu,
        "seed": train.seed,
        # evaluation, checkpoints, log
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": steps.every(recipe.eval.every) or steps.total,
        "eval_on_start": validates,
        "prediction_loss_only": True,
        "save_strategy": "steps" if disk.saves(recipe) else "no",
        "save_steps": steps.every(checkpoint.every) or steps.total,
        "save_total_limit": None,  # CheckpointMixin rotates instead: transformers also counts incomplete checkpoints
        "metric_for_best_model": "eval_loss" if checkpoint.export_best else None,
        "greater_is_better": False if checkpoint.export_best else None,
        "logging_steps": recipe.log.every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # log NaN and Inf instead of the last finite loss
        "report_to": "none",  # trackers of log.to are added as NonFatalTracker callbacks
        "run_name": recipe.log.name or run_dir.name,
        "project": recipe.log.project or PROJECT,
        "disable_tqdm": True,
    }
    config |= strategies.arguments(recipe) | recipe.trl
    if torch.distributed.is_initialized():  # set up by distributed.ranks
        config["accelerator_config"] = {**config.get("accelerator_config", {}), "use_configured_state": True}
    return config

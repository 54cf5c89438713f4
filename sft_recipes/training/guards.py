"""Callbacks that check each step for NaN and Inf and stop the run on request."""

from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from sft_recipes.errors import RunError
from sft_recipes.training.trainer import Trainer
from sft_recipes.upstream import averages, set_averages

_IN_A_ROW = 20  # consecutive bad steps after which the run stops


class NonFiniteGuard(TrainerCallback):
    """Callback that stops the run, or skips the step, before a NaN or Inf in loss or gradient reaches the weights.

    It checks once per optimizer step, so that the device is synchronized once. With fp16, overflowing gradients are expected:
    the loss scaler skips the step and lowers its scale, so these steps are only counted.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.skips = trainer.recipe.train.on_nonfinite == "skip"
        self.in_a_row = 0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.losses.clear()
        self.before = averages(trainer)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        scaler = trainer.accelerator.scaler is not None
        losses, gradient = torch.stack(trainer.losses).float(), torch.as_tensor(trainer.grad_norm)
        finite = losses.isfinite().all() & (gradient.isfinite().to(losses.device) | scaler)
        if trainer.any_rank(not finite):
            self._fail(losses, gradient.item())
        elif not scaler:
            self.in_a_row = 0

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self._count(self._message("gradient norm is NaN or Inf", None))
        elif self.trainer.accelerator.scaler is not None:
            self.in_a_row = 0

    def _fail(self, losses: torch.Tensor, gradient: float) -> None:
        trainer = self.trainer
        bad = losses.isfinite().logical_not().nonzero().flatten().tolist()  # micro-batches
        # Only the rank with the bad loss knows its rows; the gradient norm is the same on all ranks.
        message = self._message(f"loss is {losses[bad[0]].item()}", bad[:1]) if bad else None
        if not trainer.any_rank(bool(bad)):
            message = self._message(f"gradient norm is {gradient}", None)
        message = trainer.first_message(message)
        if not self.skips:
            raise RunError(message)
        self._count(message)
        trainer.optimizer.zero_grad(set_to_none=True)  # so that the optimizer skips every weight
        set_averages(trainer, replace(self.before, steps=self.before.steps - 1))  # they cover only applied steps

    def _count(self, message: str) -> None:
        self.trainer.skipped_steps += 1
        self.in_a_row += 1
        if self.in_a_row == _IN_A_ROW:
            raise RunError(message)

    def _message(self, problem: str, micro_batches: list[int] | None) -> str:
        """Format the error. `micro_batches`: those of this rank whose rows are named; None: all."""
        trainer, step = self.trainer, self.trainer.state.global_step
        # DeepSpeed applies its step within the backward pass.
        applied = "was applied but not saved" if trainer.is_deepspeed_enabled else "was not applied"
        last = self.in_a_row + 1 == _IN_A_ROW
        if last:
            problem = f"{problem}, after {_IN_A_ROW - 1} skipped steps in a row"
        skip = "" if last or self.skips else "resume with `--resume --force --set train.on_nonfinite=skip`; "
        return (
            f"{trainer.run_dir}: step {step + 1}: {problem}. The step {applied}. {trainer.describe_last_checkpoint()} "
            f"Inspect {trainer.describe_rows(step, micro_batches)}; {skip}or restart with a lower train.learning_rate."
        )


class StopOnRequest(TrainerCallback):
    """Callback that stops the run after the current step and saves a checkpoint. All ranks stop at the same step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.stop = trainer, trainer.stop

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop.waits = "finishing this step and saving a checkpoint"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop_if_requested(control, save=True)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.waits:  # not before the first step
            self._stop_if_requested(control, save=True)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop_if_requested(control, save=False)

    def _stop_if_requested(self, control: TrainerControl, *, save: bool) -> None:
        if self.trainer.any_rank(self.stop.reason is not None):
            self.trainer.stopped = True
            control.should_training_stop = True
            control.should_save = control.should_save or save

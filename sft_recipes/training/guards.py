"""What watches each step: that its numbers are finite, and whether the run is to end."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_recipes.errors import RunError
from sft_recipes.stopping import Stop

_IN_A_ROW = 20  # skipped steps after which no other outcome is to be expected


class NonFiniteGuard(TrainerCallback):
    """A loss or gradient that is not finite stops the run before it reaches the weights, or the step is skipped.

    Looked at once an optimizer step, so that the device is waited for once. With fp16 a gradient that overflows is part of
    the method: the loss scaler skips the step and scales less; that is only counted.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.skips = trainer.recipe.train.on_nonfinite == "skip"
        self.in_a_row = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.losses.clear()
        # What a skipped step leaves in the averages is taken out again.
        self.loss_before = trainer._tr_loss.clone()
        self.counts = {name: len(values) for name, values in trainer._metrics["train"].items()}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        scaler = trainer.accelerator.scaler is not None
        losses, gradient = torch.stack(trainer.losses).float(), torch.as_tensor(trainer.grad_norm)
        finite = losses.isfinite().all() & (gradient.isfinite().to(losses.device) | scaler)
        if trainer.any_rank(not finite):
            self._fail(losses, gradient.item())
        elif not scaler:
            self.in_a_row = 0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self._count(f"the norm of the gradient is not finite; {self._rows(None)}")
        elif self.trainer.accelerator.scaler is not None:
            self.in_a_row = 0

    def _fail(self, losses: torch.Tensor, gradient: float) -> None:
        trainer = self.trainer
        bad = losses.isfinite().logical_not().nonzero().flatten().tolist()  # micro-batches
        # Of several processes those at fault know which rows it was; the gradient is the same in all.
        mine = f"the loss is {losses[bad[0]].item()}; {self._rows(bad[:1])}" if bad else None
        here = f"the norm of the gradient is {gradient}; {self._rows(None)}"
        what = trainer.first_message(mine or here) if not trainer.any_rank(bool(bad)) else trainer.first_message(mine)
        if not self.skips:
            raise RunError(self._message(what))
        self._count(what)
        trainer.optimizer.zero_grad(set_to_none=True)  # so that the optimizer passes over every weight
        trainer._tr_loss.copy_(self.loss_before)
        trainer._globalstep_last_logged += 1  # the average is over the steps that were taken
        for name, values in trainer._metrics["train"].items():
            del values[self.counts.get(name, 0) :]

    def _count(self, what: str) -> None:
        self.trainer.skipped_steps += 1
        self.in_a_row += 1
        if self.in_a_row == _IN_A_ROW:
            raise RunError(self._message(f"{what}; the {_IN_A_ROW - 1} steps before it were skipped"))

    def _rows(self, micro_batches: list[int] | None) -> str:
        return str(self.trainer.describe_rows(self.trainer.state.global_step, micro_batches))

    def _message(self, what: str) -> str:
        trainer = self.trainer
        # DeepSpeed takes its step within the backward pass.
        taken = "it was taken, and is not saved" if trainer.is_deepspeed_enabled else "the step was not taken"
        return (
            f"{trainer.run_dir}: step {trainer.state.global_step + 1}: {what}; {taken}, and "
            f"{trainer.describe_last_checkpoint()}; look at these rows, skip such steps with --resume --force "
            "--set train.on_nonfinite=skip, or train anew with a lower train.learning_rate"
        )


class StopOnRequest(TrainerCallback):
    """Ends the run after the step that is being made, with a checkpoint. All processes agree on the step."""

    def __init__(self, trainer: Any, stop: Stop) -> None:
        self.trainer, self.stop = trainer, stop

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop.waits = "finishing this step and saving a checkpoint"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_if_asked(control, save=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.waits:  # not before the first step
            self._end_if_asked(control, save=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_if_asked(control, save=False)

    def _end_if_asked(self, control: TrainerControl, *, save: bool) -> None:
        if self.trainer.any_rank(self.stop.reason is not None):
            self.trainer.stopped = True
            control.should_training_stop = True
            control.should_save = control.should_save or save

"""Trainer mixin: save and restore complete training state."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from sft_recipes import atomic_files
from sft_recipes.errors import RunError, reason_of
from sft_recipes.models.model import count_parameters, tokenizer_bytes
from sft_recipes.planning import disk
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import checkpoint_dirs

_WRITING_FAILED = (OSError, RuntimeError, SafetensorError)  # torch raises RuntimeError on a full disk


class CheckpointMixin(transformers.Trainer):
    """Trainer mixin with atomic checkpoints. transformers writes to the final directory, so a crash leaves a broken one."""

    recipe: Recipe
    run_dir: Path
    warn: Callable[[str], None]
    any_rank: Callable[[bool], bool]  # whether a condition holds on any rank
    skipped_steps: int
    trained_tokens: torch.Tensor | int
    tokens: torch.Tensor | int
    stopped: bool  # by a signal or time limit
    saved: Path | None = None  # the last complete checkpoint
    best: tuple[float | None, int | None] = (None, None)  # eval loss and step of the best one

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        """Save everything that an exact resume needs, atomically."""
        folder, state = checkpoint_dirs.checkpoint_path(self.run_dir, self.state.global_step), self.state
        state.num_input_tokens_seen = int(self.tokens)
        best_before = state.best_model_checkpoint
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        self.store_flos()
        error = self._write(folder)
        if error is not None:
            state.best_model_checkpoint = best_before
            state.best_metric, state.best_global_step = self.best
            self._report_failure(folder, error)
            return
        self.saved, self.best = folder, (state.best_metric, state.best_global_step)
        best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        if self.is_world_process_zero():
            checkpoint_dirs.rotate(folder, self.recipe.checkpoint.keep, best)

    def _write(self, folder: Path) -> Exception | None:
        """Write a checkpoint. If any rank fails, return the error and leave no checkpoint."""
        main = self.is_world_process_zero()
        partial_folder = folder.with_name(f".{folder.name}.partial")

        def begin() -> None:
            if main:
                atomic_files.remove(folder)  # corrupt, skipped on resume
                directory.enter_context(atomic_files.atomic_dir(folder))

        def write() -> None:
            self.save_model(str(partial_folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(partial_folder))
            self._save_scaler(str(partial_folder))
            self._save_rng_state(str(partial_folder))
            atomic_files.write_json(partial_folder / self._averages_file, self._averages())

        def end() -> None:
            if main:
                (partial_folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, not needed to resume
                self.state.save_to_json(str(partial_folder / "trainer_state.json"))
                atomic_files.write_checksums(partial_folder)
                directory.close()

        directory = ExitStack()
        for phase in (begin, write, end):
            error: Exception | None = None
            try:
                phase()
            except _WRITING_FAILED as failed:
                error = failed
            if self.any_rank(error is not None):
                error = error or OSError("another process failed to write")
                with suppress(OSError):
                    directory.__exit__(type(error), error, None)
                return error
        return None

    def _report_failure(self, folder: Path, error: Exception) -> None:
        trained, tokenizer = count_parameters(self.model)[1], tokenizer_bytes(self.processing_class)
        lacking = disk.lacking(self.run_dir, disk.of_checkpoint(self.recipe, trained, tokenizer))
        line = f"{folder}: checkpoint not saved: {reason_of(error)}{lacking}. {self.describe_last_checkpoint()}"
        if self.recipe.checkpoint.on_failure == "stop":
            raise RunError(
                f"{line} {'Free disk space and continue' if lacking else 'Continue'} with --resume."
            ) from error
        self.warn(f"{line} Training continues.")

    def describe_last_checkpoint(self) -> str:
        return f"Last checkpoint: {self.saved or 'none'}."

    @property
    def _averages_file(self) -> str:
        return f"trainer_metrics_{self.args.process_index}.json"

    def _averages(self) -> dict[str, Any]:
        """Return the running averages since the last log, which transformers and TRL do not save."""
        return {
            "loss": self._tr_loss.item(),
            "steps": self.state.global_step - self._globalstep_last_logged,
            "averages": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
            "skipped_steps": self.skipped_steps,
            "processes": self.args.world_size,
            "trained_tokens": int(self.trained_tokens),
        }

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore random states and the running averages: the last hook before the first step."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / self._averages_file
        if file.is_file():  # not if there are more processes now
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["processes"] != self.args.world_size:
                return  # averages over a different number of processes cannot continue
            self._tr_loss.fill_(saved["loss"])
            self._globalstep_last_logged = self.state.global_step - saved["steps"]
            self._metrics["train"].update(saved["averages"])
            self._total_train_tokens, self.skipped_steps = saved["tokens"], saved["skipped_steps"]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:  # not by its saved path: the run directory may have been moved
            best = checkpoint_dirs.checkpoint_path(self.run_dir, self.state.best_global_step)
            corruption = atomic_files.find_corruption(best) if best.is_dir() else "missing"
            self.state.best_model_checkpoint = None if corruption else str(best)
            if corruption:
                self.state.best_metric = self.state.best_global_step = None
                self.warn(
                    f"{best}: the checkpoint with the lowest eval loss so far cannot be used: {corruption}. "
                    "The best later checkpoint is exported instead."
                )
        self.best = (self.state.best_metric, self.state.best_global_step)
        self.tokens = self.state.num_input_tokens_seen
        if self.saved is not None and (file := self.saved / self._averages_file).is_file():
            self.trained_tokens = json.loads(file.read_text(encoding="utf-8"))["trained_tokens"]
        return trained

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skip the epoch if no step is left: resumed after its last step, transformers 5.23 would run one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_best_model(self) -> None:
        if self.stopped:
            return
        best = Path(self.state.best_model_checkpoint)
        if corruption := atomic_files.find_corruption(best):
            raise RunError(
                f"{best}: the best checkpoint cannot be exported: {corruption}. "
                "Pass --resume to export the last step instead."
            )
        super()._load_best_model()

"""Trainer mixin: save and restore complete training state."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from sft_recipes import atomic_files, upstream
from sft_recipes.errors import RunError, reason_of
from sft_recipes.models.model import count_parameters
from sft_recipes.models.tokenizer import tokenizer_bytes
from sft_recipes.planning import disk
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import checkpoint_dirs

_WRITING_FAILED = (OSError, RuntimeError, SafetensorError)  # torch raises RuntimeError on a full disk


class CheckpointMixin(upstream.SaveHook, transformers.Trainer):
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

    def save_checkpoint(self) -> None:
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
            upstream.save_training_state(self, partial_folder)
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
        lacking = disk.space_shortage(self.run_dir, disk.of_checkpoint(self.recipe, trained, tokenizer))
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
        now = upstream.averages(self)
        return {
            "loss": float(now.loss),
            "steps": now.steps,
            "averages": now.values["train"],
            "tokens": now.tokens,
            "skipped_steps": self.skipped_steps,
            "processes": self.args.world_size,
            "trained_tokens": int(self.trained_tokens),
        }

    def resume_counts(self) -> None:
        """Continue counts and the best checkpoint of a resumed run. Call it when training begins."""
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

    def resume_averages(self) -> None:
        """Continue the running averages of a resumed run. Call it after the preflight."""
        if self.saved is None or not (file := self.saved / self._averages_file).is_file():  # more processes now
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        self.trained_tokens = saved["trained_tokens"]
        if saved["processes"] == self.args.world_size:  # averages over a different number of processes cannot continue
            train = {"train": saved["averages"]}
            upstream.set_averages(self, upstream.Averages(saved["loss"], saved["steps"], train, saved["tokens"]))
            self.skipped_steps = saved["skipped_steps"]

    def check_best(self) -> None:
        """Check at the end of training that the best checkpoint can be exported. Raises RunError."""
        best = self.state.best_model_checkpoint
        if best and (corruption := atomic_files.find_corruption(Path(best))):
            raise RunError(
                f"{best}: the best checkpoint cannot be exported: {corruption}. "
                "Pass --resume to export the last step instead."
            )

"""The trainer: SFTTrainer with what a run needs. Of the package, only this, cpu_loss and the memory prediction import trl."""

import math
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import EvalLoopOutput, unwrap_peft_model
from trl import SFTTrainer

from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED
from sft_recipes.errors import RunError, SFTRecipeError, Stopped, reason_of
from sft_recipes.memory import autosize
from sft_recipes.models import cpu_loss
from sft_recipes.models.kernels import Kernels
from sft_recipes.models.library_errors import is_out_of_memory
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import TORCHAO
from sft_recipes.stopping import Stop
from sft_recipes.training import checkpoint_dirs
from sft_recipes.training.checkpoint_mixin import CheckpointMixin
from sft_recipes.training.metrics import Metrics, ProgressDisplay
from sft_recipes.training.nonfatal_trackers import NonFatalTracker
from sft_recipes.training.sampler import SamplerMixin
from sft_recipes.training.samples import Samples
from sft_recipes.upstream import drop_average

_MOST_ROWS = 20  # named in an error


@dataclass
class Preflight:
    """Results of the preflight for the manifest, and warnings."""

    results: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Trainer(CheckpointMixin, SamplerMixin, SFTTrainer):
    """SFTTrainer with a token-weighted eval loss, atomic checkpoints, a guard against NaN and Inf, and stop on request."""

    samples: Samples | None = None
    preflight: Preflight | None = None  # None without train.preflight and before training starts
    on_begin: Callable[[], None] | None = None  # called once, after the preflight and before the first step
    aux_loss_enabled: bool  # of SFTTrainer: whether the load-balancing loss of a mixture of experts is added

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        data: Prepared,
        metrics: Metrics,
        warn: Callable[[str], None],
        stop: Stop,
        **arguments: Any,
    ) -> None:
        """Set up SFTTrainer with its `arguments`."""
        self.recipe, self.run_dir, self.data, self.rows = recipe, run_dir, data, data.train
        self.metrics, self.warn, self.stop = metrics, warn, stop
        self.losses: list[torch.Tensor] = []  # one per micro-batch of this step
        self.grad_norm: torch.Tensor | float = 0.0  # of this step
        self.skipped_steps = 0
        # Summed over all processes. Tensors, so that counting does not synchronize the device.
        self.trained_tokens: torch.Tensor | int = 0
        self.tokens: torch.Tensor | int = 0
        self.stopped = False  # by a signal or time limit
        self.kernels = Kernels()
        self._losses_and_counts = list[torch.Tensor]()  # one [loss, tokens] per evaluation micro-batch
        text_config = arguments["model"].config.get_text_config()
        names = ("output_router_logits", "router_aux_loss_coef")
        routing = {name: getattr(text_config, name) for name in names if hasattr(text_config, name)}
        super().__init__(**arguments)
        text_config.update(routing)  # undo what SFTTrainer sets, which must not be exported
        self.own_head = cpu_loss.applies(self.args.device.type, self.args.loss_type)
        if self.own_head:
            cpu_loss.replace_fused_lm_head(unwrap_peft_model(self.model))
        # TRL gathers sums. gather_for_metrics would drop some at the end of an epoch, so that averages over several processes
        # would depend on where the run was resumed.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        clip = self.accelerator.clip_grad_norm_

        def clip_and_keep(*args: Any, **kwargs: Any) -> Any:
            self.grad_norm = clip(*args, **kwargs)
            return self.grad_norm

        self.accelerator.clip_grad_norm_ = clip_and_keep

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.kernels.active(), _uncompiled_optimizer(self.recipe):
            return super().train(*args, **kwargs)

    # --- Each step ---

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # transformers runs one more, resumed after the last step
            self.control.should_training_stop = True
            return [], None
        self.metrics.begin(self.tokens, self.trained_tokens)
        batches, trained_tokens = super().get_batch_samples(*args, **kwargs)
        if trained_tokens is not None:
            self.trained_tokens = self.trained_tokens + trained_tokens
        self.tokens = self.tokens + self._count_tokens(batches)
        return batches, trained_tokens

    def _count_tokens(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor | int:
        """Count the non-padding tokens of these micro-batches over all processes, without synchronizing the device."""
        pad = self.processing_class.pad_token_id
        masks = [
            batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] != pad for batch in batches
        ]
        count = sum(mask.sum() for mask in masks)
        return self.accelerator.reduce(count, "sum") if self.args.world_size > 1 and batches else count

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def get_train_dataloader(self) -> Any:
        return _shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return _shield_workers(super().get_eval_dataloader(*args, **kwargs))

    def any_rank(self, mine: torch.Tensor | bool) -> bool:
        """Return True if the condition holds on any rank (collective call)."""
        if self.args.world_size == 1:
            return bool(mine)
        return bool(self.accelerator.reduce(torch.as_tensor(mine, device=self.args.device).long(), "sum").item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.skipped_steps and "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps
        if "loss" in logs:
            logs["trained_tokens"] = int(self.trained_tokens)
        self.state.num_input_tokens_seen = logs["num_input_tokens_seen"] = int(self.tokens)
        if self.own_head:
            drop_average(self, "entropy")  # which cpu_loss does not compute
        super().log(logs, start_time)

    def first_message(self, mine: str | None) -> str:
        """Return the message of the lowest rank that has one, on every rank (collective call)."""
        return next(message for message in gather_object([mine]) if message is not None)

    def describe_rows(self, step: int, micro_batches: list[int] | None = None) -> str:
        """List the rows of this rank in step `step` + 1, of all or only the given `micro_batches`."""
        loader, accumulation = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        if loader is None:
            return "none"
        epoch, before = divmod(step, math.ceil(len(loader) / accumulation))
        loader.set_epoch(epoch)
        batches = list(islice(loader.batch_sampler, before * accumulation, (before + 1) * accumulation))
        selected = batches if micro_batches is None else [batches[number] for number in micro_batches]
        numbers = (number for number in chain.from_iterable(selected) if number < len(self.rows))  # without padding
        places = [place for source in self.rows.places(numbers) for place in source.values()]
        more = f" and {len(places) - _MOST_ROWS:,} more" if len(places) > _MOST_ROWS else ""
        return ", ".join(places[:_MOST_ROWS]) + more

    # --- Validation ---

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with the loss per token. transformers' mean over batches depends on the micro-batch size."""
        self._losses_and_counts.clear()
        aux_loss_enabled = self.aux_loss_enabled
        self.aux_loss_enabled = False  # the load-balancing loss is not part of the loss on the data
        output = super().evaluation_loop(*args, **kwargs)
        self.aux_loss_enabled = aux_loss_enabled
        losses, counts = torch.stack(self._losses_and_counts).cpu().double().unbind(1)
        total = torch.stack([(losses * counts).sum(), counts.sum()])
        loss, tokens = self.accelerator.reduce(
            total.to(self.args.device) if self.args.world_size > 1 else total
        ).tolist()
        output.metrics["eval_loss"] = loss / max(tokens, 1)
        if not math.isfinite(loss):
            bf16 = " or train.mixed_precision: bf16" if self.recipe.train.mixed_precision == "fp16" else ""
            raise RunError(
                f"{self.run_dir}: step {self.state.global_step}: eval loss is {loss}. {self.describe_last_checkpoint()} "
                f"Restart with a lower train.learning_rate{bf16}."
            )
        output.metrics["eval_perplexity"] = math.exp(min(output.metrics["eval_loss"], 700))
        if self.samples is not None:
            output.metrics.update(self.generate_samples())
        return output

    def generate_samples(self) -> dict[str, float]:
        """Answer the sample prompts and record the answers. Returns eval_exact_match if any answer is expected."""
        assert self.samples is not None
        with self.accelerator.autocast():  # the precision of training and evaluation
            return self.samples.take(self.model, self.state.global_step)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        # The mean over a micro-batch of padding rows is NaN. Values stay on the device until the end of the evaluation.
        safe_loss = torch.where(tokens > 0, loss.float(), 0.0)
        self._losses_and_counts.append(torch.stack([safe_loss, tokens.float()]))
        return loss, logits, labels

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: the run directory documents the run."""


def train(trainer: Trainer, checkpoint: Path | None, on_begin: Callable[[], None] | None = None) -> None:
    """Train to the end, from a checkpoint if there is one.

    `on_begin` is called after setup and preflight. Raises InputError if the preflight rejects the run, RunError if training
    fails, Stopped on a signal or time limit.
    """
    run_dir, stop = trainer.run_dir, trainer.stop

    def begin() -> None:
        if trainer.is_world_process_zero():
            checkpoint_dirs.discard_after(run_dir, checkpoint)
        if on_begin is not None:
            on_begin()

    trainer.on_begin = begin
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # already done before the first step
        trainer.saved = checkpoint
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except SFTRecipeError:
        raise
    except Exception as error:
        raise _run_error(trainer, error) from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressDisplay | NonFatalTracker):
                callback.close()
    state = trainer.state
    saved = trainer.saved == checkpoint_dirs.checkpoint_path(run_dir, state.global_step)
    if trainer.stopped or (saved and trainer.any_rank(stop.signal is not None)):
        raise Stopped(
            f"{run_dir}: {stop.reason or 'stopped'} after step {state.global_step:,} of {state.max_steps:,}. "
            f"{trainer.describe_last_checkpoint()}"
        )
    stop.waits = None if saved else "finishing the export, because the last step has no checkpoint"


def _run_error(trainer: Trainer, error: Exception) -> RunError:
    """Describe a failed training: the error, the last checkpoint and the rows of the step."""
    step, rows = trainer.state.global_step, "unknown"
    with suppress(Exception):  # describing the rows may fail for the same reason
        rows = trainer.describe_rows(step)
    if is_out_of_memory(error):
        problem = f"out of memory after step {step} {memory_advice(trainer.recipe, error)}"
    else:
        problem = f"training failed after step {step}: {reason_of(error)}."
    return RunError(f"{trainer.run_dir}: {problem} {trainer.describe_last_checkpoint()} Rows in this step: {rows}.")


def _uncompiled_optimizer(recipe: Recipe) -> AbstractContextManager[Any]:
    """Keep torchao from compiling its step on a CPU, which needs a C++ compiler and takes minutes."""
    if recipe.train.optimizer in TORCHAO and not recipe.train.compile and not torch.cuda.is_available():
        return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
    return nullcontext()


def _shield_workers(loader: Any) -> Any:
    """Make the loader's workers ignore signals, because the process needs them to finish its step."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper does not forward worker_init_fn
    inner.worker_init_fn = partial(_ignore_signals, inner.worker_init_fn)
    return loader


def _ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def memory_advice(recipe: Recipe, error: Exception) -> str:
    """Return the predicted memory in parentheses and the changes that fit; general advice if prediction fails too."""
    try:
        return autosize.memory_advice(recipe)
    except Exception:  # predicting needs memory on the same device
        return (
            f"({reason_of(error)}). Set a smaller train.micro_batch_size or data.max_length, "
            "train.gradient_checkpointing: true, an optimizer with 8-bit states, lora or model.quantization."
        )

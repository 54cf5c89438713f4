"""Set up and run SFTTrainer. Of the package, only this, cpu_loss and the memory prediction import trl."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import datasets
import peft
import torch
from accelerate.utils import gather_object
from datasets.table import InMemoryTable
from rich.console import Console
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from sft_recipes import model_dir
from sft_recipes.data.eval_prompts import eval_prompts
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import RecipeError, RunError, SFTRecipeError, Stopped, reason_of
from sft_recipes.memory import autosize
from sft_recipes.models import cpu_loss, strategies
from sft_recipes.models.kernels import Kernels, apply_kernels
from sft_recipes.models.model import (
    compile_layers,
    count_parameters,
    is_out_of_memory,
    settle_types,
    tokenizer_bytes,
)
from sft_recipes.planning import disk
from sft_recipes.planning.steps import count
from sft_recipes.recipe.library_names import imitates_bf16
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import TORCHAO
from sft_recipes.run_dir import METRICS, SAMPLES
from sft_recipes.stopping import Stop
from sft_recipes.training import checkpoint_dirs, run_info
from sft_recipes.training.checkpoint_mixin import CheckpointMixin
from sft_recipes.training.guards import NonFiniteGuard, StopOnRequest
from sft_recipes.training.metrics import Metrics, ProgressDisplay
from sft_recipes.training.preflight import Preflight, run_preflight
from sft_recipes.training.sampler import SamplerMixin, pad_to_multiple
from sft_recipes.training.samples import Samples, SampleWithoutValidation
from sft_recipes.training.sft_config import sft_config
from sft_recipes.training.trackers import NonFatalTracker, trackers

_ROWS = 20  # maximum number of rows named in an error
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # config keys of mixture-of-experts models


class Trainer(CheckpointMixin, SamplerMixin, SFTTrainer):
    """SFTTrainer with a token-weighted eval loss, atomic checkpoints, a guard against NaN and Inf, and stop on request."""

    metrics: Metrics
    samples: Samples | None = None
    kernels: Kernels
    preflight: Preflight | None = None  # None without train.preflight and before training starts
    on_begin: Callable[[], None] | None = None  # called once, after the preflight and before the first step
    aux_loss_enabled: bool  # of SFTTrainer: whether the load-balancing loss of a mixture of experts is added

    def attach_run(
        self,
        recipe: Recipe,
        run_dir: Path,
        data: Prepared,
        metrics: Metrics,
        print_line: Callable[[str], None],
        warn: Callable[[str], None],
        stop: Stop,
    ) -> None:
        """Attach what a run needs beyond the arguments of SFTTrainer."""
        self.recipe, self.run_dir, self.data, self.metrics = recipe, run_dir, data, metrics
        self.rows, self.print_line, self.warn, self.stop = data.train, print_line, warn, stop
        self.losses: list[torch.Tensor] = []  # one per micro-batch of this step
        self.grad_norm: torch.Tensor | float = 0.0  # of this step
        self.skipped_steps = 0
        # Summed over all processes. Tensors, so that counting does not synchronize the device.
        self.trained_tokens: torch.Tensor | int = 0
        self.tokens: torch.Tensor | int = 0
        self.stopped = False  # by a signal or time limit
        self._losses_and_counts = list[torch.Tensor]()  # one [loss, tokens] per evaluation micro-batch
        self.own_head = cpu_loss.applies(self.args.device.type, self.args.loss_type)
        # TRL gathers sums. gather_for_metrics would drop some at the end of an epoch, so that averages over several processes
        # would depend on where the run was resumed.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        self.add_callback(NonFiniteGuard(self))
        self.add_callback(StopOnRequest(self, stop))

    def begin(self) -> None:
        """Run the preflight, then call `on_begin`. From here on the run is recorded and can be resumed."""
        recipe = self.recipe
        if recipe.train.preflight:
            with _as_recipe_error(
                recipe, f"model.name: {recipe.model.name}: forward and backward pass on the data failed"
            ):
                self.preflight = run_preflight(self, packed=recipe.padding_free)
            self.metrics.flops_per_token = self.preflight.results["flops_per_token"]
            for warning in self.preflight.warnings:
                self.warn(warning)
            self.print_line(run_info.preflight_line(self.preflight.results))
        if self.on_begin is not None:
            self.on_begin()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.kernels.active(), _uncompiled_optimizer(self.recipe):
            return super().train(*args, **kwargs)

    # --- Each step ---

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
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

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with cpu_loss.in_place_of_trls() if self.own_head else nullcontext():
            return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.grad_norm

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
            self._metrics["train" if self.model.training else "eval"].pop(
                "entropy", None
            )  # cpu_loss does not compute it
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
        more = f" and {len(places) - _ROWS:,} more" if len(places) > _ROWS else ""
        return ", ".join(places[:_ROWS]) + more

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

    def _send_telemetry(self) -> None:
        """Send nothing. TRL sends model type and device to the Hub, unless HF_HUB_DISABLE_TELEMETRY is set before
        huggingface_hub is imported, which a library cannot ensure."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: the run directory documents the run."""


def build(
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    run_dir: Path,
    console: Console,
    stop: Stop | None = None,
) -> Trainer:
    """Build the trainer. Raises OutputError if the run does not fit on the disk."""
    disk.check_room(recipe, run_dir, *count_parameters(model), tokenizer_bytes(tokenizer))
    steps = count(recipe, len(data.train))
    keep_seq_lengths = recipe.padding_free

    def print_line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(text: str) -> None:
        print_line(f"warning: {text}", "yellow")

    display = ProgressDisplay(console)
    metrics = Metrics(run_dir / METRICS, warn, display.show)
    before_all = _BeforeAll()
    text_config = model.config.get_text_config()
    routing = {
        n: getattr(text_config, n) for n in ("output_router_logits", "router_aux_loss_coef") if hasattr(text_config, n)
    }
    with _as_recipe_error(recipe, "trl: cannot set up SFTTrainer"):
        arguments = SFTConfig(**sft_config(recipe, steps, run_dir, validates=data.eval is not None))
        strategies.configure_fsdp(arguments, recipe, model)
        # With several visible GPUs, transformers uses nn.DataParallel, which TRL rejects. One process trains on one device.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        at_once = arguments.per_device_train_batch_size * arguments.world_size if arguments.world_size > 1 else 1
        if arguments.ddp_find_unused_parameters is None:  # experts that receive no token get no gradient
            arguments.ddp_find_unused_parameters = any(hasattr(text_config, name) for name in _EXPERTS)
        guarded = trackers(recipe, run_dir, print_line, warn) if arguments.process_index == 0 else []
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(data.train, keep_seq_lengths, at_once, tokenizer.pad_token_id),
            eval_dataset=_dataset(data.eval, keep_seq_lengths, at_once, tokenizer.pad_token_id) if data.eval else None,
            processing_class=tokenizer,
            callbacks=[before_all, metrics, display, *guarded],
        )
    before_all.trainer = trainer
    trainer.attach_run(recipe, run_dir, data, metrics, print_line, warn, stop or Stop())
    text_config.update(routing)  # undo what SFTTrainer sets, which must not be exported
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    if recipe.lora is not None:
        settle_types(trainer.model, recipe)
    trainer.kernels = apply_kernels(trainer.model, recipe)
    if recipe.train.compile:
        with _as_recipe_error(recipe, "train.compile"):
            compile_layers(trainer.model, warn)
    # Created before the first step, so that invalid names fail early.
    with _as_recipe_error(recipe, f"train.optimizer: {recipe.train.optimizer}"):
        trainer.create_optimizer()
    with _as_recipe_error(
        recipe, f"train.lr_scheduler: {recipe.train.lr_scheduler} (configured by trl.lr_scheduler_kwargs)"
    ):
        trainer.create_scheduler(steps.total)
    if arguments.device.type == "cpu" and recipe.train.mixed_precision == "bf16" and imitates_bf16(torch):
        warn(
            "train.mixed_precision: bf16 is emulated on this CPU and slower than float32. Set train.mixed_precision: no and "
            "model.dtype: float32."
        )
    if recipe.checkpoint.export_best:
        # Set after construction, where transformers would require save_steps to match eval_steps: _SaveBest handles that.
        trainer.args.load_best_model_at_end = True
        trainer.add_callback(_SaveBest())
    if prompts := eval_prompts(recipe):
        main_warn = warn if trainer.is_world_process_zero() else None
        tables = [tracker.table for tracker in guarded]
        trainer.samples = Samples(prompts, tokenizer, recipe, data, run_dir / SAMPLES, main_warn, tables)
        _check_room_for_answers(recipe, trainer)
        if data.eval is None:
            trainer.add_callback(SampleWithoutValidation(trainer, steps.every(recipe.eval.every)))
    return trainer


def _check_room_for_answers(recipe: Recipe, trainer: Trainer) -> None:
    assert trainer.samples is not None
    longest, most = max(map(len, trainer.samples.prompts)), recipe.eval.max_new_tokens
    limit = model_dir.positions(trainer.model.config.to_dict())
    if limit is not None and longest + most > limit:
        fits = limit - longest
        fix = f"Set eval.max_new_tokens to {fits} or less" if fits > 0 else "Shorten the prompts in eval.generate"
        raise RecipeError(
            f"eval.max_new_tokens: with a prompt of {longest} tokens exceeds the context length of {recipe.model.name}, "
            f"{limit} (got {most}). {fix}."
        )


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
        step, rows = trainer.state.global_step, "unknown"
        with suppress(Exception):  # describing the rows may fail for the same reason
            rows = trainer.describe_rows(step)
        if is_out_of_memory(error):
            problem = f"out of memory after step {step} {_memory_advice(trainer.recipe, error)}"
        else:
            problem = f"training failed after step {step}: {reason_of(error)}."
        raise RunError(
            f"{run_dir}: {problem} {trainer.describe_last_checkpoint()} Rows in this step: {rows}."
        ) from error
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


def _uncompiled_optimizer(recipe: Recipe) -> AbstractContextManager[Any]:
    """Keep torchao from compiling its step on a CPU, which needs a C++ compiler and takes minutes."""
    if recipe.train.optimizer in TORCHAO and not recipe.train.compile and not torch.cuda.is_available():
        return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
    return nullcontext()


@contextmanager
def _as_recipe_error(recipe: Recipe, what: str) -> Iterator[None]:
    """Convert errors of the libraries to a one-line RecipeError, or RunError if out of memory."""
    try:
        yield
    except SFTRecipeError:
        raise
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory before the first step {_memory_advice(recipe, error)}") from error
        raise RecipeError(f"{what}: {reason_of(error)}") from error


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


def _memory_advice(recipe: Recipe, error: Exception) -> str:
    """Return the predicted memory in parentheses and the changes that fit; general advice if prediction fails too."""
    try:
        return autosize.memory_advice(recipe)
    except Exception:  # predicting needs memory on the same device
        return (
            f"({reason_of(error)}). Set a smaller train.micro_batch_size or data.max_length, "
            "train.gradient_checkpointing: true, an optimizer with 8-bit states, lora or model.quantization."
        )


class _BeforeAll(TrainerCallback):
    """Callback that calls `Trainer.begin` once transformers and accelerate have set up everything.

    It has to be the first callback, because trackers and the progress bar start in the same event.
    """

    trainer: Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin()


class _SaveBest(TrainerCallback):
    """Callback that saves a checkpoint at each new lowest eval loss."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if state.global_step and (state.best_metric is None or metrics["eval_loss"] < state.best_metric):
            control.should_save = True


def _dataset(sequences: Sequences, keep_seq_lengths: bool, at_once: int, pad: int) -> datasets.Dataset:
    table = pad_to_multiple(sequences, at_once, pad)
    return datasets.Dataset(InMemoryTable(table if keep_seq_lengths else table.drop_columns(["seq_lengths"])))

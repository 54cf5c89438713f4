"""SFTTrainer, made ready and run. Beside it only its loss (head) and what predicts its memory import trl."""

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

from sft_recipes.data.eval_prompts import eval_prompts
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import RecipeError, RunError, SFTRecipeError, Stopped
from sft_recipes.planning import disk
from sft_recipes.planning.steps import count
from sft_recipes.recipe import model_dir
from sft_recipes.recipe.library_names import imitates_bf16
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import TORCHAO
from sft_recipes.stopping import Stop
from sft_recipes.training import autosize, checkpoint_dirs, cpu_loss, run_info, strategies
from sft_recipes.training.checkpoint_mixin import CheckpointMixin
from sft_recipes.training.guards import NonFiniteGuard, StopOnRequest
from sft_recipes.training.kernels import Kernels, apply_kernels
from sft_recipes.training.metrics import Metrics, ProgressDisplay
from sft_recipes.training.model import (
    compile_layers,
    count_parameters,
    is_out_of_memory,
    reason_of,
    settle_types,
    tokenizer_bytes,
)
from sft_recipes.training.preflight import Preflight, run_preflight
from sft_recipes.training.sampler import SamplerMixin, pad_to_multiple
from sft_recipes.training.samples import Samples, SampleWithoutValidation
from sft_recipes.training.sft_config import padding_free, sft_config
from sft_recipes.training.trackers import NonFatalTracker, trackers

_ROWS = 20  # that are named in an error
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as configs of mixtures call them


class Trainer(CheckpointMixin, SamplerMixin, SFTTrainer):
    """SFTTrainer, but for what it leaves to chance: the weighting of the validation loss, the completeness of checkpoints
    (Saving), numbers that are not finite, and the end on request."""

    metrics: Metrics
    samples: Samples | None = None
    kernels: Kernels
    preflight: Preflight | None = None  # None without train.preflight, and before training begins
    on_begin: Callable[[], None] | None = None  # called once when training begins, after the preflight
    aux_loss_enabled: bool  # SFTTrainer's own: whether a mixture of experts also learns to balance them

    def attach_run(
        self,
        recipe: Recipe,
        run_dir: Path,
        data: Prepared,
        metrics: Metrics,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        stop: Stop,
    ) -> None:
        """What a run needs beyond SFTTrainer's own arguments."""
        self.recipe, self.run_dir, self.data, self.metrics = recipe, run_dir, data, metrics
        self.rows, self.say, self.warn, self.stop = data.train, say, warn, stop
        self.losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self.grad_norm: torch.Tensor | float = 0.0  # of this step
        self.skipped_steps = 0
        # In all processes; tensors, so that no device is waited for.
        self.trained_tokens: torch.Tensor | int = 0
        self.tokens: torch.Tensor | int = 0
        self.stopped = False  # on request
        self._losses_and_counts = list[torch.Tensor]()  # of the validation's micro-batches
        self.own_head = cpu_loss.applies(self.args.device.type, self.args.loss_type)
        # TRL gathers sums, of which nothing is to be cut off at the end of an epoch; else its averages over several processes
        # depend on where the run was resumed.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        self.add_callback(NonFiniteGuard(self))
        self.add_callback(StopOnRequest(self, stop))

    def begin(self) -> None:
        """Run the preflight, then let the run begin: from here on it is recorded, and can be resumed."""
        recipe = self.recipe
        if recipe.train.preflight:
            with _as_recipe_error(recipe, f"model.name: {recipe.model.name}: cannot run on the data"):
                self.preflight = run_preflight(self, packed=padding_free(recipe))
            self.metrics.flops_per_token = self.preflight.results["flops_per_token"]
            for warning in self.preflight.warnings:
                self.warn(warning)
            self.say(run_info.preflight_line(self.preflight.results))
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
        """Return how many tokens of these micro-batches, in all processes, are not padding, without a synchronization."""
        pad = self.processing_class.pad_token_id
        real = [
            batch["attention_mask"] if "attention_mask" in batch else batch["input_ids"] != pad for batch in batches
        ]
        count = sum(mask.sum() for mask in real)
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
        """Whether it holds in any of the processes."""
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
            self._metrics["train" if self.model.training else "eval"].pop("entropy", None)  # is not computed
        super().log(logs, start_time)

    def first_message(self, mine: str | None) -> str:
        """What the first process has to say that says something; none says it twice."""
        return next(said for said in gather_object([mine]) if said is not None)

    def describe_rows(self, step: int, micro_batches: list[int] | None = None) -> str:
        """The rows that this process trains on in the step after `step` steps, or in some of its micro-batches."""
        loader, accumulation = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        if loader is None:
            return "it was not at any row yet"
        epoch, before = divmod(step, math.ceil(len(loader) / accumulation))
        loader.set_epoch(epoch)
        batches = list(islice(loader.batch_sampler, before * accumulation, (before + 1) * accumulation))
        chosen = batches if micro_batches is None else [batches[number] for number in micro_batches]
        numbers = (number for number in chain.from_iterable(chosen) if number < len(self.rows))  # no filling
        places = [place for source in self.rows.places(numbers) for place in source.values()]
        more = f" and {len(places) - _ROWS:,} more" if len(places) > _ROWS else ""
        return f"it was at {', '.join(places[:_ROWS])}{more}"

    # --- Validation ---

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Validation loss per token. The Trainer's own is a mean over batches, and moves with the micro-batch size."""
        self._losses_and_counts.clear()
        balances = self.aux_loss_enabled
        self.aux_loss_enabled = False  # a mixture's loss on its routing is none of the data's
        output = super().evaluation_loop(*args, **kwargs)
        self.aux_loss_enabled = balances
        losses, counts = torch.stack(self._losses_and_counts).cpu().double().unbind(1)
        total = torch.stack([(losses * counts).sum(), counts.sum()])
        loss, tokens = self.accelerator.reduce(
            total.to(self.args.device) if self.args.world_size > 1 else total
        ).tolist()
        output.metrics["eval_loss"] = loss / max(tokens, 1)
        if not math.isfinite(loss):
            raise RunError(
                f"{self.run_dir}: the validation loss after step {self.state.global_step} is {loss}; "
                f"{self.describe_last_checkpoint()}; train anew with a lower train.learning_rate, or with "
                "train.mixed_precision: bf16 where it is fp16"
            )
        output.metrics["eval_perplexity"] = math.exp(min(output.metrics["eval_loss"], 700))
        if self.samples is not None:
            output.metrics.update(self.generate_samples())
        return output

    def generate_samples(self) -> dict[str, float]:
        """Answer the prompts now, and write the answers down; how many are right, where that is known."""
        assert self.samples is not None
        with self.accelerator.autocast():  # as the model is trained and validated
            return self.samples.take(self.model, self.state.global_step)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        # Where rows only fill the last batch up, a mean is of nothing. Read at the end: no device is waited for.
        loss_here = torch.where(tokens > 0, loss.float(), 0.0)
        self._losses_and_counts.append(torch.stack([loss_here, tokens.float()]))
        return loss, logits, labels

    def _send_telemetry(self) -> None:
        """Nothing is reported. TRL would ping the hub with model type and device, unless HF_HUB_DISABLE_TELEMETRY was set
        before the first import of huggingface_hub, which a library cannot see to."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: the run directory says what was done."""


def build(
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    run_dir: Path,
    console: Console,
    stop: Stop | None = None,
) -> Trainer:
    """A trainer that is ready to run. Raises OutputError where the run would not fit on the disk."""
    disk.check_room(recipe, run_dir, *count_parameters(model), tokenizer_bytes(tokenizer))
    steps = count(recipe, len(data.train))
    keep_seq_lengths = padding_free(recipe)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(text: str) -> None:
        say(f"warning: {text}", "yellow")

    display = ProgressDisplay(console)
    metrics = Metrics(run_dir / "metrics.jsonl", warn, display.show)
    before_all = _BeforeAll()
    text_config = model.config.get_text_config()
    routing = {
        n: getattr(text_config, n) for n in ("output_router_logits", "router_aux_loss_coef") if hasattr(text_config, n)
    }
    with _as_recipe_error(recipe, "trl: the training cannot be set up"):
        arguments = SFTConfig(**sft_config(recipe, steps, run_dir, validates=data.eval is not None))
        strategies.configure_fsdp(arguments, recipe, model)
        # One process trains on one device; the Trainer would take all it sees for nn.DataParallel, which TRL refuses.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        at_once = arguments.per_device_train_batch_size * arguments.world_size if arguments.world_size > 1 else 1
        if arguments.ddp_find_unused_parameters is None:  # experts that no token was sent to get no gradient
            arguments.ddp_find_unused_parameters = any(hasattr(text_config, name) for name in _EXPERTS)
        told = trackers(recipe, run_dir, say, warn) if arguments.process_index == 0 else []
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(data.train, keep_seq_lengths, at_once, tokenizer.pad_token_id),
            eval_dataset=_dataset(data.eval, keep_seq_lengths, at_once, tokenizer.pad_token_id) if data.eval else None,
            processing_class=tokenizer,
            callbacks=[before_all, metrics, display, *told],
        )
    before_all.trainer = trainer
    trainer.attach_run(recipe, run_dir, data, metrics, say, warn, stop or Stop())
    text_config.update(routing)  # SFTTrainer asks for what it needs; the exported model is not to
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    if recipe.lora is not None:
        settle_types(trainer.model, recipe)
    trainer.kernels = apply_kernels(trainer.model, recipe)
    if recipe.train.compile:
        with _as_recipe_error(recipe, "train.compile"):
            compile_layers(trainer.model, warn)
    # Made here rather than with the first step, so that a name that cannot be used costs nothing.
    with _as_recipe_error(recipe, f"train.optimizer: {recipe.train.optimizer}"):
        trainer.create_optimizer()
    with _as_recipe_error(
        recipe, f"train.lr_scheduler: {recipe.train.lr_scheduler} (trl.lr_scheduler_kwargs sets it up)"
    ):
        trainer.create_scheduler(steps.total)
    if arguments.device.type == "cpu" and recipe.train.mixed_precision == "bf16" and imitates_bf16(torch):
        warn(
            "train.mixed_precision: bf16 is imitated by this CPU, and slower than float32; set no, and model.dtype: float32"
        )
    if recipe.checkpoint.export_best:
        # Set after construction, where transformers would ask that checkpoints fall on evaluations: _SaveBest sees to that.
        trainer.args.load_best_model_at_end = True
        trainer.add_callback(_SaveBest())
    if asked := eval_prompts(recipe):
        heard = warn if trainer.is_world_process_zero() else None
        tables = [tracker.table for tracker in told]
        trainer.samples = Samples(asked, tokenizer, recipe, data, run_dir / "samples.jsonl", heard, tables)
        _check_room_for_answers(recipe, trainer)
        if data.eval is None:
            trainer.add_callback(SampleWithoutValidation(trainer, steps.every(recipe.eval.every)))
    return trainer


def _check_room_for_answers(recipe: Recipe, trainer: Trainer) -> None:
    assert trainer.samples is not None
    longest, most = max(map(len, trainer.samples.prompts)), recipe.eval.max_new_tokens
    limit = model_dir.positions(trainer.model.config.to_dict())
    if limit is not None and longest + most > limit:
        raise RecipeError(
            f"eval.max_new_tokens: {most} tokens after a prompt of {longest} are more than the {limit} positions of "
            f"{recipe.model.name}; set at most {limit - longest}"
        )


def train(trainer: Trainer, checkpoint: Path | None, on_begin: Callable[[], None] | None = None) -> None:
    """Train to the end, from a checkpoint if there is one.

    `on_begin` is called when everything is set up and the preflight has passed. Raises InputError if the preflight refuses the
    run, RunError if training fails, Stopped if it was asked to end.
    """
    run_dir, stop = trainer.run_dir, trainer.stop

    def begin() -> None:
        if trainer.is_world_process_zero():
            checkpoint_dirs.discard_after(run_dir, checkpoint)
        if on_begin is not None:
            on_begin()

    trainer.on_begin = begin
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # that was before the first step
        trainer.saved = checkpoint
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except SFTRecipeError:
        raise
    except Exception as error:
        step, rows = trainer.state.global_step, "its rows cannot be told"
        with suppress(Exception):  # what failed may be what is asked
            rows = trainer.describe_rows(step)
        remedy = _memory_remedy(trainer.recipe, error)
        raise RunError(
            f"{run_dir}: training failed after step {step}: {reason_of(error)}{remedy}; {rows}, and "
            f"{trainer.describe_last_checkpoint()}"
        ) from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressDisplay | NonFatalTracker):
                callback.close()
    state = trainer.state
    saved = trainer.saved == checkpoint_dirs.checkpoint_path(run_dir, state.global_step)
    if trainer.stopped or (saved and trainer.any_rank(stop.signal is not None)):
        raise Stopped(
            f"{run_dir}: {stop.reason or 'stopped'} after step {state.global_step:,} of {state.max_steps:,}; "
            f"{trainer.describe_last_checkpoint()}"
        )
    stop.waits = None if saved else "finishing the export, because the last step has no checkpoint"


def _uncompiled_optimizer(recipe: Recipe) -> AbstractContextManager[Any]:
    """Keep torchao from compiling its step on a CPU, which takes a C++ compiler and minutes."""
    if recipe.train.optimizer in TORCHAO and not recipe.train.compile and not torch.cuda.is_available():
        return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
    return nullcontext()


@contextmanager
def _as_recipe_error(recipe: Recipe, what: str) -> Iterator[None]:
    """What the libraries refuse of the recipe, in one line; RunError where it is memory that is lacking."""
    try:
        yield
    except SFTRecipeError:
        raise
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory before the first step: {reason_of(error)}{_memory_remedy(recipe, error)}"
            ) from error
        raise RecipeError(f"{what}: {reason_of(error)}") from error


def _shield_workers(loader: Any) -> Any:
    """Its workers leave signals to the process that they work for, which needs them for the step that it finishes."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's own passes the attribute over
    inner.worker_init_fn = partial(_ignore_signals, inner.worker_init_fn)
    return loader


def _ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _memory_remedy(recipe: Recipe, error: Exception) -> str:
    if not is_out_of_memory(error):
        return ""
    try:
        said = autosize.memory_advice(recipe)
    except Exception:  # of what is left of a device; the error that is told is the one before
        said = (
            "what takes less: a smaller train.micro_batch_size or data.max_length, train.gradient_checkpointing: true, an "
            "optimizer with 8-bit states, lora, model.quantization"
        )
    return f"; {said}"


class _BeforeAll(TrainerCallback):
    """Lets a run begin when transformers and accelerate have set up everything.

    It has to be the first callback, since trackers and the progress bar start in the same event; the first evaluation comes
    after it.
    """

    trainer: Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin()


class _SaveBest(TrainerCallback):
    """Saves a checkpoint at each new lowest validation loss."""

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

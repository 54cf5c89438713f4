"""Build the trainer of a run: its arguments, the trainer with its optimizer, and its callbacks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import peft
import torch
from datasets.table import InMemoryTable
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig

from sft_recipes import model_dir
from sft_recipes.data.eval_prompts import EvalPrompt, eval_prompts
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import Sequences
from sft_recipes.errors import RecipeError, RunError, SFTRecipeError, reason_of
from sft_recipes.models import strategies
from sft_recipes.models.adapters import settle_types
from sft_recipes.models.compiled_layers import compile_layers
from sft_recipes.models.kernels import apply_kernels
from sft_recipes.models.library_errors import is_out_of_memory
from sft_recipes.models.model import count_parameters
from sft_recipes.models.tokenizer import tokenizer_bytes
from sft_recipes.planning import disk
from sft_recipes.planning.steps import Steps, count
from sft_recipes.recipe.library_names import imitates_bf16
from sft_recipes.recipe.schema import Recipe
from sft_recipes.run_dir import METRICS, SAMPLES
from sft_recipes.stopping import Stop
from sft_recipes.training import run_info
from sft_recipes.training.guards import NonFiniteGuard, StopOnRequest
from sft_recipes.training.metrics import Metrics, ProgressDisplay
from sft_recipes.training.nonfatal_trackers import NonFatalTracker, start_trackers
from sft_recipes.training.preflight import run_preflight
from sft_recipes.training.sampler import pad_to_multiple
from sft_recipes.training.samples import Samples
from sft_recipes.training.sft_config import sft_config
from sft_recipes.training.trainer import Trainer, memory_advice

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # config keys of mixture-of-experts models


def build_trainer(
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    run_dir: Path,
    console: Console,
    stop: Stop | None = None,
) -> Trainer:
    """Build the trainer. Raises OutputError if the run does not fit on the disk, RecipeError for what a library rejects."""
    disk.check_room(recipe, run_dir, *count_parameters(model), tokenizer_bytes(tokenizer))

    def print_line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(text: str) -> None:
        print_line(f"warning: {text}", "yellow")

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would send model type and device
    steps, display = count(recipe, len(data.train)), ProgressDisplay(console)
    metrics = Metrics(run_dir / METRICS, warn, display.show)
    with _as_recipe_error(recipe, "trl: cannot set up SFTTrainer"):
        arguments = _arguments(recipe, model, steps, run_dir, validates=data.eval is not None)
        trainer = Trainer(
            recipe, run_dir, data, metrics, warn, stop or Stop(),
            model=model,
            args=arguments,
            train_dataset=_dataset(data.train, arguments, recipe, tokenizer),
            eval_dataset=_dataset(data.eval, arguments, recipe, tokenizer) if data.eval else None,
            processing_class=tokenizer,
        )  # fmt: skip
    _prepare_model(trainer, steps)
    _add_callbacks(trainer, steps, display, print_line)
    return trainer


class _Arguments(SFTConfig):
    @property
    def n_gpu(self) -> int:
        """One process trains on one device; for several, transformers uses nn.DataParallel, which TRL rejects."""
        return min(super().n_gpu, 1)


def _arguments(recipe: Recipe, model: Any, steps: Steps, run_dir: Path, *, validates: bool) -> SFTConfig:
    arguments = _Arguments(**sft_config(recipe, steps, run_dir, validates=validates))
    strategies.configure_fsdp(arguments, recipe, model)
    if arguments.ddp_find_unused_parameters is None:  # experts that receive no token get no gradient
        config = model.config.get_text_config()
        arguments.ddp_find_unused_parameters = any(hasattr(config, name) for name in _EXPERTS)
    return arguments


def _dataset(
    sequences: Sequences, arguments: SFTConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    at_once = arguments.per_device_train_batch_size * arguments.world_size if arguments.world_size > 1 else 1
    table = pad_to_multiple(sequences, at_once, tokenizer.pad_token_id)
    return datasets.Dataset(InMemoryTable(table if recipe.padding_free else table.drop_columns(["seq_lengths"])))


def _prepare_model(trainer: Trainer, steps: Steps) -> None:
    """Set dtypes and kernels, compile, and create optimizer and schedule, so that wrong names fail before the first step."""
    recipe = trainer.recipe
    if recipe.trains_adapters:
        settle_types(trainer.model, recipe)
    trainer.kernels = apply_kernels(trainer.model, recipe)
    if recipe.train.compile:
        with _as_recipe_error(recipe, "train.compile"):
            compile_layers(trainer.model, trainer.warn)
    with _as_recipe_error(recipe, f"train.optimizer: {recipe.train.optimizer}"):
        trainer.create_optimizer()
    with _as_recipe_error(
        recipe, f"train.lr_scheduler: {recipe.train.lr_scheduler} (configured by trl.lr_scheduler_kwargs)"
    ):
        trainer.create_scheduler(steps.total)
    if trainer.args.device.type == "cpu" and recipe.train.mixed_precision == "bf16" and imitates_bf16(torch):
        trainer.warn(
            "train.mixed_precision: bf16 is emulated on this CPU and slower than float32. Set train.mixed_precision: no and "
            "model.dtype: float32."
        )


def _add_callbacks(trainer: Trainer, steps: Steps, display: ProgressDisplay, print_line: Callable[[str], None]) -> None:
    """Add callbacks in the order in which they run: trackers receive what the metrics add to a record."""
    recipe, main = trainer.recipe, trainer.is_world_process_zero()
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    trackers = start_trackers(recipe, trainer.run_dir, print_line, trainer.warn) if main else []
    callbacks = [_BeforeTraining(trainer, print_line), trainer.metrics, display, *trackers]
    callbacks += [NonFiniteGuard(trainer), StopOnRequest(trainer)]
    if recipe.checkpoint.export_best:
        # Set after construction, where transformers would require save_steps to match eval_steps: _SaveBest handles that.
        trainer.args.load_best_model_at_end = True
        callbacks.append(_SaveBest(trainer))
    if prompts := eval_prompts(recipe):
        trainer.samples = _samples(trainer, prompts, trackers)
        if trainer.data.eval is None:
            callbacks.append(_SampleWithoutValidation(trainer, steps.every(recipe.eval.every)))
    for callback in callbacks:
        trainer.add_callback(callback)


def _samples(trainer: Trainer, prompts: list[EvalPrompt], trackers: list[NonFatalTracker]) -> Samples:
    """Prepare the prompts of eval.generate. Raises RecipeError if an answer would exceed the model's context length."""
    recipe, file = trainer.recipe, trainer.run_dir / SAMPLES
    warn = trainer.warn if trainer.is_world_process_zero() else None
    tables = [tracker.table for tracker in trackers]
    samples = Samples(prompts, trainer.processing_class, recipe, trainer.data, file, warn, tables)
    longest, most = max(map(len, samples.prompts)), recipe.eval.max_new_tokens
    limit = model_dir.positions(trainer.model.config.to_dict())
    if limit is not None and longest + most > limit:
        fits = limit - longest
        fix = f"Set eval.max_new_tokens to {fits} or less" if fits > 0 else "Shorten the prompts in eval.generate"
        raise RecipeError(
            f"eval.max_new_tokens: with a prompt of {longest} tokens exceeds the context length of {recipe.model.name}, "
            f"{limit} (got {most}). {fix}."
        )
    return samples


class _BeforeTraining(TrainerCallback):
    """Callback that runs the preflight, then calls `on_begin`: from there on the run is recorded and can be resumed.

    It has to be the first callback, because trackers and the progress bar start in the same event.
    """

    def __init__(self, trainer: Trainer, print_line: Callable[[str], None]) -> None:
        self.trainer, self.print_line = trainer, print_line

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer, recipe = self.trainer, self.trainer.recipe
        trainer.resume_counts()
        if recipe.train.preflight:
            with _as_recipe_error(
                recipe, f"model.name: {recipe.model.name}: forward and backward pass on the data failed"
            ):
                trainer.preflight = run_preflight(trainer, packed=recipe.padding_free)
            trainer.metrics.flops_per_token = trainer.preflight.results["flops_per_token"]
            for warning in trainer.preflight.warnings:
                trainer.warn(warning)
            self.print_line(run_info.preflight_line(trainer.preflight.results))
        trainer.resume_averages()
        if trainer.on_begin is not None:
            trainer.on_begin()


class _SampleWithoutValidation(TrainerCallback):
    """Callback that answers the prompts every `every` steps if there is no evaluation data to trigger it."""

    def __init__(self, trainer: Trainer, every: int | None) -> None:
        self.trainer, self.every = trainer, every

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:  # not on resume
            self._take()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every is not None and state.global_step % self.every == 0
        if due or state.global_step >= state.max_steps:
            self._take()

    def _take(self) -> None:
        if metrics := self.trainer.generate_samples():
            self.trainer.log(metrics)


class _SaveBest(TrainerCallback):
    """Callback that saves a checkpoint at each new lowest eval loss, and checks the best before transformers loads it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if state.global_step and (state.best_metric is None or metrics["eval_loss"] < state.best_metric):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        args.load_best_model_at_end = not self.trainer.stopped
        if args.load_best_model_at_end and state.global_step >= state.max_steps:
            self.trainer.check_best()


@contextmanager
def _as_recipe_error(recipe: Recipe, what: str) -> Iterator[None]:
    """Convert errors of the libraries to a one-line RecipeError, or RunError if out of memory."""
    try:
        yield
    except SFTRecipeError:
        raise
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory before the first step {memory_advice(recipe, error)}") from error
        raise RecipeError(f"{what}: {reason_of(error)}") from error

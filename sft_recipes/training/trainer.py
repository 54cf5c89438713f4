"""SFTTrainer, made ready and run. The only file that imports trl."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import peft
import torch
from accelerate.utils import gather_object
from datasets.table import InMemoryTable
from rich.console import Console
from safetensors import SafetensorError
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

from sft_recipes import files
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import RecipeError, RunError, SFTRecipeError, Stopped
from sft_recipes.planning import disk
from sft_recipes.planning.steps import count
from sft_recipes.recipe import model_files
from sft_recipes.recipe.check import TORCHAO
from sft_recipes.recipe.schema import Recipe
from sft_recipes.stopping import Stop
from sft_recipes.training import checkpoints, preflight
from sft_recipes.training.arguments import padding_free, sft_config
from sft_recipes.training.guards import Finite, Stops
from sft_recipes.training.logging import Display, Metrics, trackers
from sft_recipes.training.model import count_parameters, is_out_of_memory, keep_trainable_in_float32
from sft_recipes.training.preflight import Preflight
from sft_recipes.training.samples import Samples, SampleWithoutValidation, questions


class Trainer(SFTTrainer):
    """SFTTrainer, but for what it leaves to chance: the weighting of the validation loss, the completeness of checkpoints
    and of what they hold, numbers that are not finite, and the end on request."""

    samples: Samples | None = None
    preflight: Preflight | None = None  # None where the recipe goes without
    aux_loss_enabled: bool  # SFTTrainer's own: whether a mixture of experts also learns to balance them

    def set_up(self, recipe: Recipe, run_dir: Path, rows: Sequences, warn: Callable[[str], None], stop: Stop) -> None:
        """What a run needs beyond SFTTrainer's own arguments."""
        self.recipe, self.run_dir, self.rows, self.warn, self.stop = recipe, run_dir, rows, warn, stop
        self.losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self.grad_norm: torch.Tensor | float = 0.0  # of this step
        self.skipped_steps = 0
        self.saved: Path | None = None  # the last complete checkpoint
        self.best: tuple[float | None, int | None] = (None, None)  # validation loss and step of the best one
        self.stopped = False  # on request
        # TRL gathers sums, of which nothing is to be cut off at the end of an epoch; else its averages over several processes
        # depend on where the run was resumed.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        self.add_callback(Finite(self))
        self.add_callback(Stops(self, stop))

    # --- Each step ---

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.grad_norm

    def agree(self, mine: torch.Tensor | bool) -> bool:
        """Whether it holds in any of the processes."""
        if self.args.world_size == 1:
            return bool(mine)
        return bool(self.accelerator.reduce(torch.as_tensor(mine, device=self.args.device).long(), "sum").item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.skipped_steps and "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)

    def first(self, mine: str | None) -> str:
        """What the first process has to say that says something; none says it twice."""
        return next(said for said in gather_object([mine]) if said is not None)

    def rows_in_words(self, step: int, micro_batches: list[int] | None = None) -> str:
        """The rows that this process trains on in the step after `step` steps, or in some of its micro-batches."""
        loader, accumulation = self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps
        if loader is None:
            return "it was not at any row yet"
        epoch, before = divmod(step, math.ceil(len(loader) / accumulation))
        loader.set_epoch(epoch)
        batches = list(islice(loader.batch_sampler, before * accumulation, (before + 1) * accumulation))
        chosen = batches if micro_batches is None else [batches[number] for number in micro_batches]
        places = [place for source in self.rows.places(chain.from_iterable(chosen)) for place in source.values()]
        more = f" and {len(places) - _ROWS:,} more" if len(places) > _ROWS else ""
        return f"it was at {', '.join(places[:_ROWS])}{more}"

    # --- Checkpoints ---

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        """All that an exact continuation takes, complete or not there."""
        folder, state = checkpoints.place(self.run_dir, self.state.global_step), self.state
        best_before = state.best_model_checkpoint
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        self.store_flos()
        try:
            with self._complete_or_not_there(folder) as partial:
                self.save_model(str(partial), _internal_call=True)
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
                files.write_json(partial / self._running_file, self._running())
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's own word for a full disk is RuntimeError
            state.best_model_checkpoint = best_before
            state.best_metric, state.best_global_step = self.best
            self._not_saved(folder, error)
            return
        self.saved, self.best = folder, (state.best_metric, state.best_global_step)
        best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        if self.is_world_process_zero():
            checkpoints.rotate(folder, self.recipe.checkpoint.keep, best)

    @contextmanager
    def _complete_or_not_there(self, folder: Path) -> Iterator[Path]:
        """A directory that all processes write to, and that gets its name when none of them failed."""
        error: Exception | None = None
        with ExitStack() as stack:
            partial = folder.with_name(f".{folder.name}.partial")
            if self.is_world_process_zero():
                files.remove(folder)  # passed over when the run was resumed
                stack.enter_context(files.complete_or_not_there(folder))
            self.accelerator.wait_for_everyone()
            try:
                yield partial
            except (OSError, RuntimeError, SafetensorError) as failed:
                error = failed
            if not self.agree(error is not None) and self.is_world_process_zero():
                try:
                    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
                    self.state.save_to_json(str(partial / "trainer_state.json"))
                    files.seal(partial)
                except OSError as failed:
                    error = failed
            if self.agree(error is not None):
                raise error or OSError("another process could not write")

    def _not_saved(self, folder: Path, error: Exception) -> None:
        trained, tokenizer = count_parameters(self.model)[1], _bytes_of(self.processing_class)
        lacking = disk.lacking(self.run_dir, disk.of_checkpoint(self.recipe, trained, tokenizer))
        line = f"{folder}: not saved: {_line(error)}{lacking}; {self.last_checkpoint_in_words()}"
        if self.recipe.checkpoint.on_failure == "stop":
            raise RunError(f"{line}; make room and continue with --resume") from error
        self.warn(f"{line}; the run goes on")

    def last_checkpoint_in_words(self) -> str:
        return f"the last checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"

    @property
    def _running_file(self) -> str:
        return f"running_{self.args.process_index}.json"

    def _running(self) -> dict[str, Any]:
        """The averages that are being taken, which transformers and TRL forget: the loss is logged every so many steps."""
        return {
            "loss": self._tr_loss.item(),
            "steps": self.state.global_step - self._globalstep_last_logged,
            "averages": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
            "skipped_steps": self.skipped_steps,
        }

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last that is restored before the first step: random states, and here the running averages too."""
        super()._load_rng_state(checkpoint)
        file = Path(str(checkpoint)) / self._running_file
        if file.is_file():  # not where the number of processes is another
            running = json.loads(file.read_text(encoding="utf-8"))
            self._tr_loss.fill_(running["loss"])
            self._globalstep_last_logged = self.state.global_step - running["steps"]
            self._metrics["train"].update(running["averages"])
            self._total_train_tokens, self.skipped_steps = running["tokens"], running["skipped_steps"]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:  # by its step: the run directory may have been moved
            best = checkpoints.place(self.run_dir, self.state.best_global_step)
            fault = files.fault(best) if best.is_dir() else "it is missing"
            self.state.best_model_checkpoint = None if fault else str(best)
            if fault:
                self.state.best_metric = self.state.best_global_step = None
                self.warn(
                    f"{best}, with the lowest validation loss so far, cannot be used: {fault}; a later one will be"
                )
        self.best = (self.state.best_metric, self.state.best_global_step)
        return trained

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Where a run is resumed after its last step, transformers 5.23 would make one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _load_best_model(self) -> None:
        if not self.stopped:
            super()._load_best_model()

    # --- Validation ---

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Validation loss per token. The Trainer's own is a mean over batches, and moves with the micro-batch size."""
        self._loss_and_count = torch.zeros(2, dtype=torch.float64)
        balances = self.aux_loss_enabled
        self.aux_loss_enabled = False  # a mixture's loss on its routing is none of the data's
        output = super().evaluation_loop(*args, **kwargs)
        self.aux_loss_enabled = balances
        total = self._loss_and_count.to(self.args.device) if self.args.world_size > 1 else self._loss_and_count
        loss, tokens = self.accelerator.reduce(total).tolist()
        output.metrics["eval_loss"] = loss / max(tokens, 1)
        if not math.isfinite(loss):
            raise RunError(
                f"{self.run_dir}: the validation loss after step {self.state.global_step} is {loss}; "
                f"{self.last_checkpoint_in_words()}; train anew with a lower train.learning_rate, or with "
                "train.mixed_precision: bf16 where it is fp16"
            )
        output.metrics["eval_perplexity"] = math.exp(min(output.metrics["eval_loss"], 700))
        if self.samples is not None:
            output.metrics.update(self.answers())
        return output

    def answers(self) -> dict[str, float]:
        """Answer the prompts now, and write the answers down; how many are right, where that is known."""
        assert self.samples is not None
        return self.samples.take(self.model, self.state.global_step, write=self.is_world_process_zero())

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().item()
        self._loss_and_count += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
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
    disk.check_room(recipe, run_dir, *count_parameters(model), _bytes_of(tokenizer))
    steps = count(recipe, len(data.train))
    keep_seq_lengths = padding_free(recipe)
    display = Display(console)

    def warn(text: str) -> None:
        console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    text_config = model.config.get_text_config()
    routing = {
        n: getattr(text_config, n) for n in ("output_router_logits", "router_aux_loss_coef") if hasattr(text_config, n)
    }
    with _as_recipe_error("trl: the training cannot be set up"):
        arguments = SFTConfig(**sft_config(recipe, steps, run_dir, validates=data.eval is not None))
        # One process trains on one device; the Trainer would take all it sees for nn.DataParallel, which TRL refuses.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(data.train, keep_seq_lengths),
            eval_dataset=_dataset(data.eval, keep_seq_lengths) if data.eval else None,
            processing_class=tokenizer,
            callbacks=[
                Metrics(run_dir / "metrics.jsonl", warn, display.show),
                display,
                *trackers(recipe.log.to, run_dir, warn),
            ],
        )
    trainer.set_up(recipe, run_dir, data.train, warn, stop or Stop())
    text_config.update(routing)  # SFTTrainer asks for what it needs; the exported model is not to
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    if recipe.lora is not None:
        keep_trainable_in_float32(trainer.model, autocast=recipe.train.mixed_precision != "no")
    if recipe.train.optimizer in TORCHAO and not torch.cuda.is_available():
        # torchao compiles its step, which on a CPU takes a C++ compiler and minutes.
        torch.compiler.set_stance("force_eager")
    # Made here rather than with the first step, so that a name that cannot be used costs nothing.
    with _as_recipe_error(f"train.optimizer: {recipe.train.optimizer}"):
        trainer.create_optimizer()
    with _as_recipe_error(f"train.lr_scheduler: {recipe.train.lr_scheduler} (trl.lr_scheduler_kwargs sets it up)"):
        trainer.create_scheduler(steps.total)
    if recipe.train.preflight:
        with _as_recipe_error(f"model.name: {recipe.model.name}: it cannot run on the data"):
            trainer.preflight = preflight.examine(trainer, packed=keep_seq_lengths)
        for warning in trainer.preflight.warnings:
            warn(warning)
    if recipe.checkpoint.export_best:
        # Set after construction, where transformers would ask that checkpoints fall on evaluations: _SaveBest sees to that.
        trainer.args.load_best_model_at_end = True
        trainer.add_callback(_SaveBest())
    if asked := questions(recipe):
        trainer.samples = Samples(asked, tokenizer, recipe, data, run_dir / "samples.jsonl")
        _check_room_for_answers(recipe, trainer)
        if data.eval is None:
            trainer.add_callback(SampleWithoutValidation(trainer, steps.every(recipe.eval.every)))
    return trainer


def _bytes_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())


def _check_room_for_answers(recipe: Recipe, trainer: Trainer) -> None:
    assert trainer.samples is not None
    longest, most = max(map(len, trainer.samples.prompts)), recipe.eval.max_new_tokens
    limit = model_files.positions(trainer.model.config.to_dict())
    if limit is not None and longest + most > limit:
        raise RecipeError(
            f"eval.max_new_tokens: {most} tokens after a prompt of {longest} are more than the {limit} positions of "
            f"{recipe.model.name}; set at most {limit - longest}"
        )


def facts(recipe: Recipe, trainer: Trainer) -> list[str]:
    """What is about to run, in words."""
    total, trained = count_parameters(trainer.model)
    method = "full fine-tuning" if recipe.lora is None else "QLoRA" if recipe.model.quantization else "LoRA"
    steps, layers = trainer.args.max_steps, recipe.train.gradient_checkpointing
    recomputed = "off" if not layers else "every layer" if layers in (True, 1) else f"every {layers} layers"
    micro, accumulation, world = recipe.train.micro_batch_size, recipe.accumulation, trainer.args.world_size
    processes = f" x {world} processes" if world > 1 else ""
    lines = [
        f"model: {recipe.model.name}, {method}, {trained:,} of {total:,} parameters trained ({trained / total:.2%}), "
        f"weights in {recipe.model.quantization or recipe.model.dtype}, "
        f"attention {trainer.model.config._attn_implementation}, on {device()['name']}",
        f"steps: {steps:,} of {recipe.sequences_per_step} sequences ({micro} x {accumulation} accumulated{processes}), "
        f"{int(trainer.args.warmup_steps):,} of them warmup, {recipe.train.lr_scheduler} to a learning rate of "
        f"{recipe.train.learning_rate:g}, {recipe.train.optimizer}, mixed precision {recipe.train.mixed_precision}, "
        f"gradient checkpointing {recomputed}",
    ]
    if trainer.preflight is not None:
        found = trainer.preflight.figures
        lines.append(
            f"preflight: {found['seconds']} s; the longest micro-batch, of {found['longest']['tokens']:,} tokens, trains in "
            f"{found['longest']['peak_gib']:.1f} GiB; loss of the base {found['base']['loss']:.2f} a token, shuffled "
            f"{found['base']['loss_of_shuffled_tokens']:.2f}"
        )
        if found.get("isolation"):
            lines[-1] += "; packed documents do not see each other"
    return lines


def used(trainer: Trainer) -> dict[str, Any]:
    """What a run takes beyond its recipe, and what was found before its first step, for the manifest."""
    total, trained = count_parameters(trainer.model)
    return {
        "device": device(),
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


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one. Raises RunError where training fails, Stopped where it was
    asked to end."""
    run_dir, stop = trainer.run_dir, trainer.stop
    if trainer.is_world_process_zero():
        checkpoints.rewind(run_dir, checkpoint)
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # that was before the first step
        trainer.saved = checkpoint
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except SFTRecipeError:
        raise
    except Exception as error:
        step = trainer.state.global_step
        raise RunError(
            f"{run_dir}: training failed after step {step}: {_line(error)}{_memory_remedy(error)}; "
            f"{trainer.rows_in_words(step)}, and {trainer.last_checkpoint_in_words()}"
        ) from error
    finally:
        stop.waits = None
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Display):
                callback.close()
    state = trainer.state
    if trainer.stopped:
        raise Stopped(
            f"{run_dir}: {stop.reason or 'stopped'} after step {state.global_step:,} of {state.max_steps:,}; "
            f"{trainer.last_checkpoint_in_words()}"
        )
    if trainer.saved != checkpoints.place(run_dir, state.global_step):
        stop.waits = "the export is finished first, as there is no checkpoint of the last step"


@contextmanager
def _as_recipe_error(what: str) -> Iterator[None]:
    """What the libraries refuse of the recipe, in one line; RunError where it is memory that is lacking."""
    try:
        yield
    except SFTRecipeError:
        raise
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory before the first step: {_line(error)}{_memory_remedy(error)}") from error
        raise RecipeError(f"{what}: {_line(error)}") from error


_ROWS = 20  # that are named


def _line(error: Exception) -> str:
    if isinstance(error, UnpicklingError):  # torch's own words advise to read it all the same
        return (
            "a file of the checkpoint holds more than tensors and numbers, or is damaged; as it could run code, it was not "
            "read; remove that checkpoint to continue from the one before it"
        )
    return " ".join(str(error).split())[:400] or type(error).__name__


def _memory_remedy(error: Exception) -> str:
    if not is_out_of_memory(error):
        return ""
    return (
        "; what takes less memory: a smaller train.micro_batch_size or data.max_length, train.gradient_checkpointing: true, "
        "an optimizer with 8-bit states, lora, model.quantization"
    )


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


def _dataset(sequences: Sequences, keep_seq_lengths: bool) -> datasets.Dataset:
    table = sequences.table()
    return datasets.Dataset(InMemoryTable(table if keep_seq_lengths else table.drop_columns(["seq_lengths"])))

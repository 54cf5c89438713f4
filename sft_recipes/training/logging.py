"""What is said and recorded while training: metrics.jsonl, samples.jsonl, the console, experiment trackers."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from sft_recipes import files
from sft_recipes.planning import speed

# Names of the Trainer's log, and of metrics.jsonl.
_NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "num_input_tokens_seen": "tokens",
    "trained_tokens": "trained_tokens",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "eval_loss": "eval_loss",
    "eval_perplexity": "eval_perplexity",
    "eval_mean_token_accuracy": "eval_token_accuracy",
    "eval_exact_match": "eval_exact_match",
    "skipped_steps": "skipped_steps",
}


def peak_memory() -> float:
    """The most memory used so far, in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, one object a line, and hands each to those who show it. What of that fails is a warning."""

    def __init__(self, file: Path, warn: Callable[[str], None], *shows: Callable[[dict[str, Any]], None]) -> None:
        self.file = file
        self.warn = warn
        self.shows = shows
        self.seconds = 0.0  # in training steps since the last record, data included, without evaluation and saving
        self.before: dict[str, Any] = {}  # tokens up to the last record
        self.began = 0.0
        self.flops_per_token: float | None = None  # of the model, where that is known

    def begin(self, tokens: int, trained_tokens: torch.Tensor | int) -> None:
        """A step begins after so many tokens: its data is about to be asked for."""
        self.began = time.monotonic()
        self.before = self.before or {"tokens": tokens, "trained_tokens": int(trained_tokens)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step is logged, whatever log.every
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # the log waits for the step's last work anyway; its time is the step's
        self.seconds += time.monotonic() - self.began

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not ({"loss", "eval_loss", "eval_exact_match"} & logs.keys()):
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {ours: logs[theirs] for theirs, ours in _NAMES.items() if theirs in logs}
        if "loss" in logs:
            line |= self._speed(line, args.world_size)
        line["memory"] = round(peak_memory(), 3)
        try:
            files.append(self.file, json.dumps(line) + "\n")
            for show in self.shows:
                show(line)
        except Exception as error:
            self.warn(_first_line(f"{self.file}: step {state.global_step} is not recorded: {error!r}"))

    def _speed(self, line: dict[str, Any], devices: int) -> dict[str, float | None]:
        """Tokens a second, of all and of those trained on, over all devices. Per device the model's operations, in 10^12 a
        second, and of a GPU's peak rate the share that they are."""
        seconds, before = self.seconds, self.before
        self.seconds, self.before = 0.0, line
        if not seconds:
            return dict.fromkeys(("tokens_per_second", "trained_tokens_per_second"))
        rate = (line["tokens"] - before["tokens"]) / seconds
        found: dict[str, float | None] = {
            "tokens_per_second": round(rate, 1),
            "trained_tokens_per_second": round((line["trained_tokens"] - before["trained_tokens"]) / seconds, 1),
        }
        if self.flops_per_token is not None:
            flops = rate * self.flops_per_token / devices
            found["tflops"] = round(flops / 1e12, 3)
            if peak := speed.peak_rate(torch.cuda.get_device_name()) if torch.cuda.is_available() else None:
                found["mfu"] = round(flops / peak, 4)
        return found


class Display(TrainerCallback):
    """The console: a progress bar on a terminal, a sober line a record elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.total = 0
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.total, self.first_step, self.started = state.max_steps, state.global_step, time.monotonic()
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console, transient=True,
            )  # fmt: skip
            self.progress.start()
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def show(self, line: dict[str, Any]) -> None:
        parts = [f"step {line['step']}/{self.total}"]
        if "loss" in line:
            parts += [f"loss {line['loss']:.4f}", f"lr {line['learning_rate']:.2e}"]
            if line["tokens_per_second"]:
                parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{line['memory']:.1f} GiB")
            if done := line["step"] - self.first_step:
                left = (time.monotonic() - self.started) / done * (self.total - line["step"])
                parts.append(f"{_duration(left)} left")
        if "eval_loss" in line:
            parts += [f"eval loss {line['eval_loss']:.4f}", f"perplexity {line['eval_perplexity']:.2f}"]
        if "eval_exact_match" in line:
            parts.append(f"exact match {line['eval_exact_match']:.1%}")
        if self.progress and "eval_loss" not in line and "eval_exact_match" not in line:
            self.progress.update(self.task, description="  ".join(parts[1:]))
        else:
            self.console.print("  ".join(parts), highlight=False, soft_wrap=True)


class Guarded:
    """A tracker's callback that can fail without stopping the run: it is then left alone, with one warning."""

    def __init__(self, name: str, callback: TrainerCallback, warn: Callable[[str], None]) -> None:
        self._name, self._callback, self._warn = name, callback, warn
        self._failed = False

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)

        def call(*args: Any, **kwargs: Any) -> None:
            if self._failed:
                return
            try:
                getattr(self._callback, event)(*args, **kwargs)
            except Exception as error:
                self._failed = True
                self._warn(_first_line(f"log.to: {self._name} failed and is left out from here on: {error!r}"))

        return call


class _FinishWandb(TrainerCallback):
    """Closes the run at the end, where transformers leaves it open for the life of the process."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        import wandb

        wandb.finish()


def trackers(names: Sequence[str], run_dir: Path, warn: Callable[[str], None]) -> list[Guarded]:
    """Callbacks of the experiment trackers. What they write locally goes into the run directory, unless the user said
    otherwise by the tracker's own variables."""
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    os.environ.setdefault("WANDB_PROJECT", "sft-recipes")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / "tensorboard"))
    os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))
    guarded = []
    for name in names:
        try:
            if name == "trackio":
                import trackio.run

                # It asks the hub for the name behind the token, where there is one, also for runs that stay here.
                setattr(trackio.run.Run, "_get_username", lambda _: None)  # noqa: B010
            [callback] = get_reporting_integration_callbacks([name])
            guarded.append(Guarded(name, callback(), warn))
            if name == "wandb":
                guarded.append(Guarded(name, _FinishWandb(), warn))
        except Exception as error:
            warn(_first_line(f"log.to: {name} cannot be started and is left out: {error!r}"))
    return guarded


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]

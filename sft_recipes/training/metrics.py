"""What is recorded and said while training: metrics.jsonl, and the console."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_recipes import atomic_files
from sft_recipes.training.trackers import in_short

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
# What is found out here, and trackers are told too.
_FIGURES = ("tokens_per_second", "trained_tokens_per_second", "tflops", "mfu", "peak_memory_gib")


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

    def begin(self, tokens: torch.Tensor | int, trained_tokens: torch.Tensor | int) -> None:
        """A step begins after so many tokens: its data is about to be asked for."""
        self.began = time.monotonic()
        self.before = self.before or {"tokens": int(tokens), "trained_tokens": int(trained_tokens)}

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
        line["peak_memory_gib"] = round(peak_memory(), 3)
        if "loss" in logs:  # of which the trackers hear next
            logs.update({name: line[name] for name in _FIGURES if line.get(name) is not None})
        try:
            atomic_files.append(self.file, json.dumps(line) + "\n")
            for show in self.shows:
                show(line)
        except Exception as error:
            self.warn(in_short(f"{self.file}: step {state.global_step} is not recorded: {error!r}"))

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
            if peak := flops.peak_rate(torch.cuda.get_device_name()) if torch.cuda.is_available() else None:
                found["mfu"] = round(flops / peak, 4)
        return found


class ProgressDisplay(TrainerCallback):
    """The console: a progress bar with the latest figures on a terminal, a sober line a record elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # Not a file, also where colours are forced into it (FORCE_COLOR); no notebook, no terminal that cannot move back.
        self.moves = console.is_interactive and console.file.isatty() and not console.quiet
        self.progress: Progress | None = None
        self.validation: TaskID | None = None
        self.figures: list[str] = []  # the latest; the last have no place on a narrow terminal
        self.total = 0
        self.started: float | None = None
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.total, self.first_step, self.started = state.max_steps, state.global_step, None
        if self.moves:
            self.progress = Progress(
                BarColumn(self._bar()), MofNCompleteColumn(), TextColumn("{task.description}"),
                console=self.console, transient=True, refresh_per_second=4,
            )  # fmt: skip
            self.progress.start()
            self.training = self.progress.add_task("", total=self.total)
            self._update(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = self.started or time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._update(state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.progress and self.validation is None:
            self.validation = self.progress.add_task("evaluation", total=len(eval_dataloader))
        if self.progress and self.validation is not None:
            self.progress.advance(self.validation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress and self.validation is not None:
            self.progress.remove_task(self.validation)
        self.validation = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def show(self, line: dict[str, Any]) -> None:
        evaluated = "eval_loss" in line or "eval_exact_match" in line
        parts = []
        if "loss" in line:
            parts += [f"loss {line['loss']:.4f}", f"lr {line['learning_rate']:.2e}"]
            if line["tokens_per_second"]:
                parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"peak {line['peak_memory_gib']:.1f} GiB")
        if "eval_loss" in line:
            parts += [f"eval loss {line['eval_loss']:.4f}", f"perplexity {line['eval_perplexity']:.2f}"]
        if "eval_exact_match" in line:
            parts.append(f"exact match {line['eval_exact_match']:.1%}")
        if self.progress and not evaluated:
            self.figures = parts
            self._update(line["step"])
            return
        if not evaluated and (left := self._left(line["step"])):
            parts.append(left)
        self.console.print("  ".join([f"step {line['step']}/{self.total}", *parts]), highlight=False, soft_wrap=True)

    def _update(self, step: int) -> None:
        if self.progress:
            figures = [*self.figures[:1], *filter(None, [self._left(step)]), *self.figures[1:]]
            room = self.console.width - self._bar() - len(f"  {self.total}/{self.total}")
            while figures and len("  ".join(figures)) > room:
                figures.pop()
            self.progress.update(self.training, completed=step, description="  ".join(figures))

    def _bar(self) -> int:
        """Columns of the bar, which leaves room for the figures."""
        return min(40, max(8, self.console.width - 90))

    def _left(self, step: int) -> str | None:
        """The time that is left, by what the steps so far have taken, validation and checkpoints between them included."""
        done = step - self.first_step
        if not done or self.started is None:
            return None
        return f"ETA {_duration((time.monotonic() - self.started) / done * (self.total - step))}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

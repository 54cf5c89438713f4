"""Record metrics.jsonl and display progress."""

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

from sft_recipes.errors import reason_of
from sft_recipes.planning.flops import peak_rate
from sft_recipes.run_dir import append_lines

# Keys of metrics.jsonl, in order, and those that have another name in the Trainer's log.
_KEYS = ("loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "token_accuracy", "entropy", "eval_loss",
         "eval_perplexity", "eval_token_accuracy", "eval_exact_match", "skipped_steps")  # fmt: skip
_IN_LOG = {
    "tokens": "num_input_tokens_seen",
    "token_accuracy": "mean_token_accuracy",
    "eval_token_accuracy": "eval_mean_token_accuracy",
}
# Computed here and added to the log for the trackers.
_COMPUTED = ("tokens_per_second", "trained_tokens_per_second", "tflops", "mfu", "peak_memory_gib")


def peak_memory() -> float:
    """Return the peak memory so far in GiB: allocated on the GPU, or the resident set of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


class Metrics(TrainerCallback):
    """Callback that appends records to metrics.jsonl and passes them to `show`. Failures are warnings."""

    def __init__(
        self, file: Path, warn: Callable[[str], None], show: Callable[[dict[str, Any]], object] = lambda _: None
    ) -> None:
        self.file, self.warn, self.show = file, warn, show
        self.seconds = 0.0  # since the last record: data loading and training steps, without evaluation and saving
        self.before: dict[str, Any] = {}  # the last record
        self.began = 0.0
        self.flops_per_token: float | None = None  # None if unknown

    def begin(self, tokens: torch.Tensor | int, trained_tokens: torch.Tensor | int) -> None:
        """Start timing a step, before its data is loaded, with the token counts so far."""
        self.began = time.monotonic()
        self.before = self.before or {"tokens": int(tokens), "trained_tokens": int(trained_tokens)}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # log the last step, regardless of log.every
        if control.should_log and torch.cuda.is_available():
            torch.cuda.synchronize()  # logging synchronizes anyway; count that time as part of the step
        self.seconds += time.monotonic() - self.began

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not ({"loss", "eval_loss", "eval_exact_match"} & logs.keys()):
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {key: logs[name] for key in _KEYS if (name := _IN_LOG.get(key, key)) in logs}
        if "loss" in logs:
            line |= self._speed(line, args.world_size)
        line["peak_memory_gib"] = round(peak_memory(), 3)
        if "loss" in logs:  # trackers receive the same dict next
            logs.update({name: line[name] for name in _COMPUTED if line.get(name) is not None})
        try:
            append_lines(self.file, [line])
            self.show(line)
        except Exception as error:
            self.warn(f"{self.file}: cannot write metrics of step {state.global_step}: {reason_of(error)}")

    def _speed(self, line: dict[str, Any], devices: int) -> dict[str, float | None]:
        """Return tokens/s over all devices, and per device the model's TFLOP/s and their share of the GPU's peak (MFU)."""
        seconds, before = self.seconds, self.before
        self.seconds, self.before = 0.0, line
        if not seconds:
            return dict.fromkeys(("tokens_per_second", "trained_tokens_per_second"))
        rate = (line["tokens"] - before["tokens"]) / seconds
        speed: dict[str, float | None] = {
            "tokens_per_second": round(rate, 1),
            "trained_tokens_per_second": round((line["trained_tokens"] - before["trained_tokens"]) / seconds, 1),
        }
        if self.flops_per_token is not None:
            flops = rate * self.flops_per_token / devices
            speed["tflops"] = round(flops / 1e12, 3)
            if peak := peak_rate(torch.cuda.get_device_name()) if torch.cuda.is_available() else None:
                speed["mfu"] = round(flops / peak, 4)
        return speed


class ProgressDisplay(TrainerCallback):
    """Callback that shows a progress bar with the latest metrics on a terminal, else one line per record."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # Not for files (even with FORCE_COLOR), notebooks and terminals that cannot move the cursor.
        self.show_bar = console.is_interactive and console.file.isatty() and not console.quiet
        self.progress: Progress | None = None
        self.validation: TaskID | None = None
        self.latest: list[str] = []  # metrics of the last record, most important first
        self.total = 0
        self.started: float | None = None
        self.first_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.total, self.first_step, self.started = state.max_steps, state.global_step, None
        if self.show_bar:
            self.progress = Progress(
                BarColumn(self._bar()), MofNCompleteColumn(), TextColumn("{task.description}"),
                console=self.console, transient=True, refresh_per_second=4,
            )  # fmt: skip
            self.progress.start()
            self.training = self.progress.add_task("", total=self.total)
            self._update(state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = self.started or time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._update(state.global_step)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.progress and self.validation is None:
            self.validation = self.progress.add_task("evaluation", total=len(eval_dataloader))
        if self.progress and self.validation is not None:
            self.progress.advance(self.validation)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress and self.validation is not None:
            self.progress.remove_task(self.validation)
        self.validation = None

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
            self.latest = parts
            self._update(line["step"])
            return
        if not evaluated and (eta := self._eta(line["step"])):
            parts.append(eta)
        self.console.print("  ".join([f"step {line['step']}/{self.total}", *parts]), highlight=False, soft_wrap=True)

    def _update(self, step: int) -> None:
        if self.progress:
            parts = [*self.latest[:1], *filter(None, [self._eta(step)]), *self.latest[1:]]
            width = self.console.width - self._bar() - len(f"  {self.total}/{self.total}")
            while parts and len("  ".join(parts)) > width:
                parts.pop()
            self.progress.update(self.training, completed=step, description="  ".join(parts))

    def _bar(self) -> int:
        """Return the width of the bar in columns."""
        return min(40, max(8, self.console.width - 90))

    def _eta(self, step: int) -> str | None:
        """Estimate the remaining time from the mean time per step, evaluation and checkpoints included."""
        done = step - self.first_step
        if not done or self.started is None:
            return None
        return f"ETA {_duration((time.monotonic() - self.started) / done * (self.total - step))}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

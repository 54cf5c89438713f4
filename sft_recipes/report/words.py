"""What a run says on the console before and after the training."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sft_recipes.report.curve import read_metrics, whole_lines

_SAMPLES = 5  # answers that are shown; samples.jsonl has all


class Voice(Console):
    """A console that falls silent, and ends no run, when nobody listens any more (`sft-recipe run r.yaml | head`)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@contextmanager
def no_more_than_a_warning(console: Console, what: str) -> Iterator[None]:
    """What is only shown must not fail a run."""
    try:
        yield
    except Exception as error:
        warn(console, [f"{what} could not be made: {' '.join(str(error).split())[:300] or type(error).__name__}"])


def say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def conclude(console: Console, folder: Path) -> None:
    """What has become better, what it took, where everything is, and what can be done with it next."""
    metrics = read_metrics(folder)
    say(console, ["", *_answers(folder), *_before_and_after(metrics), *_cost(metrics), ""])
    outputs = {
        "model": "the model: loads with AutoModelForCausalLM.from_pretrained",
        "adapter": "the adapter",
        "report.html": "the report, with the learning curve",
    }
    say(console, [f"{folder / name}  {what}" for name, what in outputs.items() if (folder / name).exists()])
    say(console, ["", *_next(folder)])


def samples(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The first and the last answer to each prompt of the run."""
    file = folder / "samples.jsonl"
    lines = whole_lines(file) if file.is_file() else []
    if not lines:
        return []
    first, last = lines[0]["step"], lines[-1]["step"]
    before = [line for line in lines if line["step"] == first]
    after = [line for line in lines if line["step"] == last]
    return list(zip(before, after, strict=False))


def _answers(folder: Path) -> Iterable[str]:
    for before, after in samples(folder)[:_SAMPLES]:
        question = before["messages"][-1]
        yield "prompt:  " + _one_line(" | ".join(filter(None, [question["content"], question.get("input", "")])))
        if before["expected"] is not None:
            yield "  expected: " + _one_line(before["expected"])
        yield "  before:   " + _one_line(before["answer"])
        yield "  after:    " + _one_line(after["answer"])


def _before_and_after(metrics: list[dict[str, Any]]) -> Iterable[str]:
    names = {"eval_exact_match": ("exact match", "{:.1%}"), "eval_loss": ("validation loss", "{:.4f}")}
    for key, (name, form) in names.items():
        values = [line[key] for line in metrics if key in line]
        if values:
            yield f"{name}: {form.format(values[0])} before, {form.format(values[-1])} after"


def _cost(metrics: list[dict[str, Any]]) -> Iterable[str]:
    """What it was trained on, how fast (validation, answers and checkpoints aside), and the most memory."""
    seen, timed, seconds = 0, 0, 0.0
    for line in metrics:
        if "loss" in line:
            tokens, seen = line["tokens"] - seen, line["tokens"]
            if rate := line.get("tokens_per_second"):
                timed, seconds = timed + tokens, seconds + tokens / rate
    if metrics:
        speed = f" at {timed / seconds:,.0f} a second" if seconds else ""
        yield f"trained on {seen:,.0f} tokens{speed}, peak memory {max(line['memory'] for line in metrics):.2f} GiB"


def _next(folder: Path) -> Iterable[str]:
    """Commands that go on with what the run has left."""
    run, merged = shlex.quote(str(folder)), (folder / "model").exists()
    yield f'Talk to it: sft-recipe generate {run} --prompt "..."'
    if not merged:
        yield f"Merge it: sft-recipe merge {run} --out {shlex.quote(str(folder / 'model'))}"
    trained = shlex.quote(str(folder / ("model" if merged else "adapter")))
    yield f"Train it on preferences (DPO, docs/dpo.md): python docs/dpo.py {trained} pairs.jsonl --out {run}-dpo"


def _one_line(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= 100 else line[:97] + "..."

"""Print messages, warnings and the final summary."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sft_recipes.errors import reason_of
from sft_recipes.report.curves import positions
from sft_recipes.run_dir import ADAPTER, MODEL, REPORT, SAMPLES, Lines, read_lines, read_metrics

_SAMPLES = 5  # printed sample answers


class PipeSafeConsole(Console):
    """Console that ignores broken pipes, e.g. when output is piped to `head`."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@contextmanager
def warn_on_error(console: Console, what: str) -> Iterator[None]:
    """Turn an exception into a warning: a failing report or summary must not fail the run."""
    try:
        yield
    except Exception as error:
        warn(console, [f"cannot create {what}: {reason_of(error)}"])


def print_lines(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def print_summary(console: Console, folder: Path) -> None:
    """Print sample answers, improvement, throughput, output files and next commands."""
    metrics = read_metrics(folder)
    print_lines(console, ["", *_answers(folder), *_before_and_after(metrics), *_throughput(metrics), ""])
    outputs = {
        MODEL: f"{'merged ' if (folder / ADAPTER).exists() else ''}model (load with AutoModelForCausalLM.from_pretrained)",
        ADAPTER: "LoRA adapter",
        REPORT: "report with learning curves",
    }
    saved = [f"{folder / name}  {what}" for name, what in outputs.items() if (folder / name).exists()]
    print_lines(console, ["Saved:", *saved, "", "Next:", *_next(folder)])


def samples(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the first and the last answer to each prompt of the run."""
    lines = read_lines(folder / SAMPLES)
    if not lines:
        return []
    first, last = lines[0]["step"], lines[-1]["step"]
    before = [line for line in lines if line["step"] == first]
    after = [line for line in lines if line["step"] == last]
    return list(zip(before, after, strict=False))


def _answers(folder: Path) -> Iterable[str]:
    pairs = samples(folder)
    if pairs:
        yield f"Sample answers ({min(len(pairs), _SAMPLES)} of {len(pairs):,}, all in {SAMPLES})"
    for before, after in pairs[:_SAMPLES]:
        question = before["messages"][-1]
        yield "prompt:  " + _one_line(" | ".join(filter(None, [question["content"], question.get("input", "")])))
        if before["expected"] is not None:
            yield "  expected: " + _one_line(before["expected"])
        yield "  before:   " + _one_line(before["answer"])
        yield "  after:    " + _one_line(after["answer"])


def _before_and_after(metrics: Lines) -> Iterable[str]:
    names = {"eval_exact_match": ("exact match", "{:.1%}"), "eval_loss": ("eval loss", "{:.4f}")}
    for key, (name, form) in names.items():
        values = [line[key] for line in metrics if key in line]
        if values:
            yield f"{name}: {form.format(values[0])} → {form.format(values[-1])}"


def _throughput(metrics: Lines) -> Iterable[str]:
    """Return tokens, tokens/s (without evaluation and checkpoints) and peak memory as a line."""
    if metrics:
        _, tokens, seconds = positions(metrics)[-1]
        rate = f" at {tokens / seconds:,.0f} tokens/s" if seconds else ""
        peak = max(line["peak_memory_gib"] for line in metrics)
        yield f"throughput: {tokens:,.0f} tokens{rate}; peak memory {peak:.2f} GiB"


def _next(folder: Path) -> Iterable[str]:
    """Return commands that use the outputs of the run."""
    run, merged = shlex.quote(str(folder)), (folder / MODEL).exists()
    yield f'generate  sft-recipe generate {run} --prompt "..."'
    if not merged:
        yield f"merge  sft-recipe merge {run} --out {shlex.quote(str(folder / MODEL))}"
    trained = shlex.quote(str(folder / (MODEL if merged else ADAPTER)))
    yield f"DPO  python docs/dpo.py {trained} pairs.jsonl --out {run}-dpo (see docs/dpo.md)"


def _one_line(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= 100 else line[:97] + "..."

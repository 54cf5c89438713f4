"""The learning curve as a picture."""

import json
from pathlib import Path
from typing import Any

from sft_recipes import files
from sft_recipes.errors import OutputError


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises OutputError where there is no run."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise OutputError(f"{run_dir}: no run here (metrics.jsonl is missing)")
    lines = whole_lines(file)
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise OutputError(f"{file}: a line without 'step', so it is not the log of a run")
    return lines


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; the last may be half written, where a run was killed."""
    try:
        return [dict(json.loads(line)) for line in files.lines(file)]
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{file}: not a file of one object a line: {error}; it is not as the run wrote it") from None


def learning_curve(metrics: list[dict[str, Any]], out: Path, title: str) -> None:
    """Training and validation loss over the steps, with the learning rate below, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    trained = [line for line in metrics if "loss" in line]
    evaluated = [line for line in metrics if "eval_loss" in line]
    loss.plot([line["step"] for line in trained], [line["loss"] for line in trained], label="training", color="#7c9cc9")
    loss.plot(
        [line["step"] for line in evaluated], [line["eval_loss"] for line in evaluated],
        label="validation", color="#c0392b", marker="o", markersize=4,
    )  # fmt: skip
    loss.set_ylabel("loss per token")
    loss.set_title(title)
    if trained or evaluated:
        loss.legend()
    rate.plot([line["step"] for line in trained], [line["learning_rate"] for line in trained], color="#555555")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150, format="png")

"""Read, smooth, downsample and plot metrics with matplotlib."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import atomic_files
from sft_recipes.errors import OutputError

Metrics = list[dict[str, Any]]

SMOOTHED_FROM = 10  # minimum number of points to smooth
_PART, _LEAST = 1 / 20, 3  # smoothing window: share of all points, and minimum number
_STRETCHES, _KEPT = 200, 5  # downsampling: number of segments, and maximum points kept of each
_COLORS = ("#2f6fb5", "#c8501e", "#1a8a66", "#8a4fa8", "#a87a00", "#0e8fa3", "#b8326e", "#5d6370")  # as on the page


class Position(NamedTuple):
    """Position of a line of metrics.jsonl: optimizer steps, tokens, and seconds in training steps so far.

    The seconds include data loading, but not evaluation and saving.
    """

    step: int
    tokens: float
    seconds: float


class Point(NamedTuple):
    """A value with its position."""

    step: int
    tokens: float
    seconds: float
    value: float


def read_metrics(run_dir: Path) -> Metrics:
    """Return the lines of metrics.jsonl. Raises OutputError if the directory is no run."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise OutputError(f"{run_dir}: not a run directory (metrics.jsonl is missing). Pass the output_dir of a run.")
    lines = whole_lines(file)
    if not all(isinstance(line.get("step"), int) for line in lines):
        raise OutputError(f"{file}: a line has no 'step'. Restore the file as the run wrote it.")
    return lines


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, without a partial last line left by a killed run."""
    try:
        return [dict(json.loads(line)) for line in atomic_files.lines(file)]
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{file}: not valid JSON Lines: {error}. Restore the file as the run wrote it.") from None


def positions(metrics: Metrics) -> list[Position]:
    """Return the position of each line. Seconds are derived from the logged rates: tokens / (tokens/s)."""
    found, tokens, logged, seconds = list[Position](), 0.0, 0.0, 0.0
    for line in metrics:
        tokens = line.get("tokens", tokens)
        if "tokens_per_second" in line:
            if rate := line["tokens_per_second"]:
                seconds += (tokens - logged) / rate
            logged = tokens
        found.append(Position(line["step"], tokens, seconds))
    return found


def curve(metrics: Metrics, where: Sequence[Position], name: str) -> list[Point]:
    """Return one metric over the run. Values may be NaN or Inf."""
    return [
        Point(*position, float(line[name]))
        for line, position in zip(metrics, where, strict=True)
        if line.get(name) is not None
    ]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean of a forward and a backward exponential moving average, which has no lag.

    Fewer than SMOOTHED_FROM points are returned unchanged. NaN and Inf are kept and do not enter the averages.
    """
    if len(points) < SMOOTHED_FROM:
        return list(points)
    share = 2 / (max(_LEAST, len(points) * _PART) + 1)
    values = [point.value for point in points]
    forward, backward = _averages(values, share), _averages(values[::-1], share)[::-1]
    return [Point(*point[:3], (a + b) / 2) for point, a, b in zip(points, forward, backward, strict=True)]


def _averages(values: Sequence[float], share: float) -> list[float]:
    """Return the exponential moving average with weight `share`, bias-corrected as in Adam."""
    mean, weight, found = 0.0, 0.0, list[float]()
    for value in values:
        if math.isfinite(value):
            mean += share * (value - mean)
            weight += share * (1 - weight)
        found.append(mean / weight if math.isfinite(value) else value)
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """Downsample: keep the first, last, lowest, highest and one non-finite point of each segment."""
    size = math.ceil(len(points) / _STRETCHES)
    if size <= _KEPT:
        return list(points)
    return [points[number] for start in range(0, len(points), size) for number in _marks(points, start, size)]


def _marks(points: Sequence[Point], start: int, size: int) -> list[int]:
    numbers = range(start, min(start + size, len(points)))
    finite = [number for number in numbers if math.isfinite(points[number].value)]
    marks = {numbers[0], numbers[-1]}
    if finite:
        marks |= {pick(finite, key=lambda number: points[number].value) for pick in (min, max)}
    if len(finite) < len(numbers):
        marks.add(next(number for number in numbers if not math.isfinite(points[number].value)))
    return sorted(marks)


def learning_curve(metrics: Metrics, out: Path, title: str) -> None:
    """Plot training loss, eval loss and learning rate of a run over its steps as a PNG."""
    learning_curves({title: metrics}, out)


def learning_curves(runs: Mapping[str, Metrics], out: Path) -> None:
    """Plot the learning curves of several runs, by name; of a single run also the raw training loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    alone, lines = len(runs) == 1, list[tuple[str, Any]]()

    def draw(axes: Any, points: Sequence[Point], label: str | None, **style: Any) -> None:
        mark = {"marker": "o", "markersize": 4} if len(points) == 1 else {}
        [line] = axes.plot(*_drawn(points), **mark | style)
        if label and points:
            lines.append((label, line))

    for number, (name, metrics) in enumerate(runs.items()):
        where, color = positions(metrics), _COLORS[number % len(_COLORS)]
        trained, evaluated, rates = (curve(metrics, where, key) for key in ("loss", "eval_loss", "learning_rate"))
        if alone and len(trained) >= SMOOTHED_FROM:
            draw(loss, trained, "training", color=color, alpha=0.35, linewidth=0.8)
            draw(loss, smoothed(trained), "training, smoothed", color=color)
        else:
            draw(loss, smoothed(trained), "training" if alone else name, color=color)
        eval_color = _COLORS[1] if alone else color
        label = None if number else "eval"
        draw(loss, evaluated, label, color=eval_color, linestyle="--", linewidth=1, marker="o", markersize=4)
        draw(rate, rates, None, color=color, linewidth=1)
    loss.set_ylabel("loss per token")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    title = loss.set_title(next(iter(runs)) if alone else "")
    legend = loss.legend([line for _, line in lines], ["-"] * len(lines), fontsize="small")
    for text, (label, _) in zip(legend.get_texts(), lines, strict=True):
        text.set_text(label)  # set afterwards, because matplotlib skips labels that begin with _
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a directory may be named $x^$
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=200, format="png")


def _drawn(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    points = thinned(points)
    return [point.step for point in points], [
        point.value if math.isfinite(point.value) else math.nan for point in points
    ]

"""The curves of a run: read from its metrics, smoothed, thinned out, and drawn as a picture for a paper."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import files
from sft_recipes.errors import OutputError

Metrics = list[dict[str, Any]]

SMOOTHED_FROM = 10  # points on: of fewer, nothing is to be seen that the points themselves do not show
_PART, _LEAST = 1 / 20, 3  # of a run's points, about so many have a say in a smoothed one, and not fewer
_STRETCHES, _KEPT = 200, 5  # that a long curve is thinned out by, and points that stay of each, at most
_COLOURS = ("#2f6fb5", "#c8501e", "#1a8a66", "#8a4fa8", "#a87a00", "#0e8fa3", "#b8326e", "#5d6370")  # as on the page


class Position(NamedTuple):
    """Where a line of metrics.jsonl stands in its run: after so many optimizer steps, tokens, and seconds in training steps
    (data included, without evaluation and saving)."""

    step: int
    tokens: float
    seconds: float


class Point(NamedTuple):
    """A figure, and where it stands."""

    step: int
    tokens: float
    seconds: float
    value: float


def read_metrics(run_dir: Path) -> Metrics:
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


def positions(metrics: Metrics) -> list[Position]:
    """Where each line stands. The seconds are those that its rates were taken over: tokens / (tokens a second)."""
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
    """One figure of metrics.jsonl over the run. Values may be NaN or infinite."""
    return [
        Point(*position, float(line[name]))
        for line, position in zip(metrics, where, strict=True)
        if line.get(name) is not None
    ]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of two exponential moving averages, one from either end, so that the curve does not lag behind; points of which
    there are fewer than SMOOTHED_FROM as they are. Values that are not finite stay where they are, and are in no mean."""
    if len(points) < SMOOTHED_FROM:
        return list(points)
    share = 2 / (max(_LEAST, len(points) * _PART) + 1)
    values = [point.value for point in points]
    ahead, back = _averages(values, share), _averages(values[::-1], share)[::-1]
    return [Point(*point[:3], (one + other) / 2) for point, one, other in zip(points, ahead, back, strict=True)]


def _averages(values: Sequence[float], share: float) -> list[float]:
    """Each with its `share`; the first ones weigh as if there was nothing before them (as in Adam)."""
    mean, weight, found = 0.0, 0.0, list[float]()
    for value in values:
        if math.isfinite(value):
            mean += share * (value - mean)
            weight += share * (1 - weight)
        found.append(mean / weight if math.isfinite(value) else value)
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """Few enough to draw: of each stretch the first, the last, the lowest, the highest, and one that is not finite."""
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
    """Training and validation loss of a run over its steps, with the learning rate below, as a PNG."""
    learning_curves({title: metrics}, out)


def learning_curves(runs: Mapping[str, Metrics], out: Path) -> None:
    """The learning curves of several runs, by name, in one picture; of a single one the loss as it was logged, too."""
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
        where, colour = positions(metrics), _COLOURS[number % len(_COLOURS)]
        trained, evaluated, rates = (curve(metrics, where, key) for key in ("loss", "eval_loss", "learning_rate"))
        if alone and len(trained) >= SMOOTHED_FROM:
            draw(loss, trained, "training", color=colour, alpha=0.35, linewidth=0.8)
            draw(loss, smoothed(trained), "training, smoothed", color=colour)
        else:
            draw(loss, smoothed(trained), "training" if alone else name, color=colour)
        other = _COLOURS[1] if alone else colour
        validation = None if number else "validation"
        draw(loss, evaluated, validation, color=other, linestyle="--", linewidth=1, marker="o", markersize=4)
        draw(rate, rates, None, color=colour, linewidth=1)
    loss.set_ylabel("loss per token")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    title = loss.set_title(next(iter(runs)) if alone else "")
    legend = loss.legend([line for _, line in lines], ["-"] * len(lines), fontsize="small")
    for text, (label, _) in zip(legend.get_texts(), lines, strict=True):
        text.set_text(label)  # matplotlib would leave out one that begins with _
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a directory may be called $x^$
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=200, format="png")


def _drawn(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    few = thinned(points)
    return [point.step for point in few], [point.value if math.isfinite(point.value) else math.nan for point in few]

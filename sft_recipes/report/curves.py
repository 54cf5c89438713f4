"""Compute the curves of a run, or of several: positions, smoothing, downsampling."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_recipes.run_dir import Lines

SMOOTHED_FROM = 10  # minimum number of points to smooth
_PART, _LEAST = 1 / 20, 3  # smoothing window: share of all points, and minimum number
_SEGMENTS, _KEPT = 200, 5  # downsampling: number of segments, and maximum points kept of each
# Colors of the curves, safe for color-blind readers; the page has lighter ones for its dark mode.
COLORS = ("#2f6fb5", "#c8501e", "#1a8a66", "#8a4fa8", "#a87a00", "#0e8fa3", "#b8326e", "#5d6370")
LOSS, RATE = "Loss per token", "Learning rate"
# By title: keys of training and of evaluation in metrics.jsonl, drawing options.
_CHARTS: dict[str, tuple[str | None, str | None, set[str]]] = {
    LOSS: ("loss", "eval_loss", {"smooth"}),
    RATE: ("learning_rate", None, {"from_zero"}),
    "Gradient norm": ("grad_norm", None, {"smooth", "from_zero"}),
    "Tokens/s": ("tokens_per_second", None, {"smooth", "from_zero"}),
    "Peak memory (GiB)": ("peak_memory_gib", None, {"from_zero"}),
    "Token accuracy": ("token_accuracy", "eval_token_accuracy", {"smooth"}),
    "Exact match": (None, "eval_exact_match", {"from_zero"}),
}


class Position(NamedTuple):
    """Position of a line of metrics.jsonl: optimizer steps, tokens, and seconds in training steps so far.

    The seconds include data loading, but not evaluation and saving.
    """

    step: int
    tokens: float
    seconds: float


class Point(NamedTuple):
    """A value with its position. The value may be NaN or Inf."""

    step: int
    tokens: float
    seconds: float
    value: float


class Series(NamedTuple):
    """A curve in one of COLORS: `solid`, `faint` (raw values behind the smoothed line), or connected `dots`."""

    name: str
    style: str
    color: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """Curves that share axes; `note` is printed below the title."""

    title: str
    series: Sequence[Series]
    from_zero: bool = False
    note: str = ""

    def description(self) -> str:
        """Describe where each curve begins and ends, for screen readers."""
        parts = [self.title]
        for series in self.series:
            finite = [point.value for point in series.points if math.isfinite(point.value)]
            if finite and series.style != "faint":
                parts.append(f"{series.name} from {finite[0]:.4g} to {finite[-1]:.4g}")
        return "; ".join(parts)


def charts(runs: Mapping[str, Lines]) -> list[Chart]:
    """Return all charts that have data, from the metrics of runs by name."""
    return [found for title in _CHARTS if (found := chart(runs, title)).series]


def chart(runs: Mapping[str, Lines], title: str) -> Chart:
    """Return a chart; several runs share it, with one color per run."""
    trained, evaluated, options = _CHARTS[title]
    series, notes, alone = list[Series](), list[str](), len(runs) == 1
    for number, (run, metrics) in enumerate(runs.items()):
        color, eval_color = number % len(COLORS), (number + alone) % len(COLORS)
        points = curve(metrics, trained) if trained else []
        eval_points = curve(metrics, evaluated) if evaluated else []
        smooth = "smooth" in options and len(points) >= SMOOTHED_FROM
        if smooth and alone:
            series.append(Series("as logged", "faint", color, downsampled(points)))
        if points:
            name = "training" if not smooth else "training, smoothed" if evaluated else "smoothed"
            line = smoothed(points) if smooth else points
            series.append(Series(name if alone else run, "solid", color, downsampled(line)))
        if eval_points:
            series.append(Series("eval" if alone else f"{run}, eval", "dots", eval_color, downsampled(eval_points)))
        if steps := sorted(point.step for point in (*points, *eval_points) if not math.isfinite(point.value)):
            values = "1 value is" if len(steps) == 1 else f"{len(steps):,} values are"
            notes.append(f"{'' if alone else f'{run}: '}{values} NaN or Inf, first at step {steps[0]:,}")
    return Chart(title, series, "from_zero" in options, "; ".join(notes))


def positions(metrics: Lines) -> list[Position]:
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


def curve(metrics: Lines, name: str) -> list[Point]:
    """Return one metric over the run."""
    pairs = zip(metrics, positions(metrics), strict=True)
    return [Point(*position, float(line[name])) for line, position in pairs if line.get(name) is not None]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean of a forward and a backward exponential moving average, which has no lag.

    Fewer than SMOOTHED_FROM points are returned unchanged. NaN and Inf are kept and do not enter the averages.
    """
    if len(points) < SMOOTHED_FROM:
        return list(points)
    share = 2 / (max(_LEAST, len(points) * _PART) + 1)
    values = [point.value for point in points]
    forward, backward = _averages(values, share), _averages(values[::-1], share)[::-1]
    return [point._replace(value=(a + b) / 2) for point, a, b in zip(points, forward, backward, strict=True)]


def _averages(values: Sequence[float], share: float) -> list[float]:
    """Return the exponential moving average with weight `share`, bias-corrected as in Adam."""
    mean, weight, found = 0.0, 0.0, list[float]()
    for value in values:
        if math.isfinite(value):
            mean += share * (value - mean)
            weight += share * (1 - weight)
        found.append(mean / weight if math.isfinite(value) else value)
    return found


def downsampled(points: Sequence[Point]) -> list[Point]:
    """Downsample: keep the first, last, lowest, highest and one non-finite point of each segment."""
    size = math.ceil(len(points) / _SEGMENTS)
    if size <= _KEPT:
        return list(points)
    return [point for start in range(0, len(points), size) for point in _marks(points[start : start + size])]


def _marks(points: Sequence[Point]) -> list[Point]:
    finite = [point for point in points if math.isfinite(point.value)]
    lost = [point for point in points if not math.isfinite(point.value)]
    extremes = [pick(finite, key=lambda point: point.value) for pick in (min, max) if finite]
    return sorted({points[0], points[-1], *extremes, *lost[:1]}, key=lambda point: point.step)

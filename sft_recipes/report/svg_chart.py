"""Compute the geometry of the report's SVG charts, over steps, tokens and time."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sft_recipes.report.curves import Chart, Point

AXES = {"steps": "optimizer step", "tokens": "tokens", "time": "time in training steps"}
_SIZE = 1000  # width and height of a drawing, scaled by the page
_TICKS = 4
_MARGIN = 0.05  # above and below the curves, relative to the height
_FLAT = 1e-9  # relative difference of values that are drawn as equal
# Of numbers and of times: minimum, divisor, unit.
_SIZES = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))
_UNITS = ((2 * 3600, 3600, " h"), (120, 60, " min"), (0, 1, " s"))


class Tick(NamedTuple):
    """A label on an axis, at a percentage of its length."""

    at: float
    text: str


class Path(NamedTuple):
    """An SVG path: class names and the attribute `d`."""

    css: str
    d: str


class Frame(NamedTuple):
    """A chart over one of AXES, from 0 to `end` (steps, tokens or seconds)."""

    axis: str
    end: float
    across: list[Tick]
    up: list[Tick]
    paths: list[Path]


def frames(chart: Chart) -> list[Frame]:
    """Return a chart over each of AXES."""
    return [_frame(chart, number, axis) for number, axis in enumerate(AXES)]


def tooltips(chart: Chart) -> list[dict[str, Any]]:
    """Return name and points of each curve: [step, tokens, seconds, value or null]."""
    return [{"name": series.name, "points": [_rounded(point) for point in series.points]} for series in chart.series]


def _frame(chart: Chart, number: int, axis: str) -> Frame:
    end = max((point[number] for series in chart.series for point in series.points), default=0) or 1
    low, high = _range(chart)

    def place(point: Point) -> str:
        return f"{point[number] / end * _SIZE:.1f} {(high - point.value) / (high - low) * _SIZE:.1f}"

    size, unit = _unit(_UNITS, end) if axis == "time" else (1, None)
    across = [
        Tick(round(100 * tick * size / end, 2), f"{tick:g}{unit}" if unit else _format_number(tick))
        for tick in _ticks(0, end / size, whole=unit is None)
    ]
    up = [Tick(round(100 * (tick - low) / (high - low), 2), _format_number(tick)) for tick in _ticks(low, high)]
    paths = [Path("grid", "".join(f"M0 {_SIZE - 10 * tick.at:.1f}h{_SIZE}" for tick in up))]
    for series in chart.series:
        if series.style == "dots":
            dots = "".join(f"M{place(point)}h0" for point in series.points if math.isfinite(point.value))
            paths.append(Path(f"dots c{series.color}", dots))
        paths.append(Path(f"{series.style} line c{series.color}", _line(series.points, place)))
    return Frame(axis, end, across, up, paths)


def _range(chart: Chart) -> tuple[float, float]:
    values = [point.value for series in chart.series for point in series.points if math.isfinite(point.value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if chart.from_zero:
        low = min(low, 0.0)
    span = high - low
    if span <= _FLAT * abs(high):  # equal except for rounding, e.g. of a smoothed constant
        span = abs(high) or 1.0
    return low if chart.from_zero else low - _MARGIN * span, high + _MARGIN * span


def _line(points: Sequence[Point], place: Any) -> str:
    """Return the path through finite points, with gaps at NaN and Inf; an isolated point is a dot."""
    parts, gap = list[str](), True
    for point in points:
        if math.isfinite(point.value):
            parts.append(f"M{place(point)}h0" if gap else f"L{place(point)}")
        gap = not math.isfinite(point.value)
    return "".join(parts)


def _unit(units: Sequence[tuple[float, float, str]], number: float) -> tuple[float, str]:
    return next((size, unit) for least, size, unit in units if abs(number) >= least)


def _format_number(number: float) -> str:
    size, unit = _unit(_SIZES, number)
    return f"{number / size:g}{unit}"


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(_TICKS, integer=whole, steps=[1, 2, 2.5, 5, 10])
    # Ticks are accumulated sums: 0.30000000000000004 becomes 0.3.
    return [float(f"{tick:.6g}") for tick in locator.tick_values(low, high) if low <= tick <= high]


def _rounded(point: Point) -> list[float | None]:
    value = float(f"{point.value:.6g}") if math.isfinite(point.value) else None
    return [point.step, round(point.tokens), round(point.seconds, 1), value]

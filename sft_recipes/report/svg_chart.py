"""Compute the geometry of the report's SVG charts, over steps, tokens and time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft_recipes.report.learning_curve import Point

AXES = {"steps": "optimizer step", "tokens": "tokens", "time": "time in training steps"}
COLORS = 8  # defined by the page
_SIZE = 1000  # width and height of a drawing, scaled by the page
_TICKS = 4
_MARGIN = 0.05  # above and below the curves, relative to the height
_SIZES = (
    (1e12, 1e12, "T"),
    (1e9, 1e9, "B"),
    (1e6, 1e6, "M"),
    (1e4, 1e3, "k"),
    (0, 1, ""),
)  # of a number: minimum, divisor, suffix
_UNITS = ((2 * 3600, 3600, "h"), (120, 60, "min"), (0, 1, "s"))  # of a time axis: minimum seconds, divisor, unit


@dataclass(frozen=True)
class Series:
    """A curve: `solid`, `faint` (raw values behind the smoothed line), or connected `dots`."""

    name: str
    style: str
    color: int
    points: Sequence[Point]


class Tick(NamedTuple):
    """A label on an axis, at a percentage of its length."""

    at: float
    text: str


class Path(NamedTuple):
    """An SVG path: class names and the attribute `d`."""

    css: str
    d: str


@dataclass(frozen=True)
class Frame:
    """A chart over one of AXES, from 0 to `end` (steps, tokens or seconds)."""

    axis: str
    end: float
    across: list[Tick]
    up: list[Tick]
    paths: list[Path]


@dataclass(frozen=True)
class Chart:
    """Curves that share axes; `note` is printed below them."""

    title: str
    series: Sequence[Series]
    from_zero: bool = False
    note: str = ""

    def frames(self) -> list[Frame]:
        return [self._frame(number, axis) for number, axis in enumerate(AXES)]

    def values(self) -> list[dict[str, Any]]:
        """Return name and points of each curve for tooltips: [step, tokens, seconds, value or null]."""
        return [{"name": series.name, "points": [_rounded(point) for point in series.points]} for series in self.series]

    def description(self) -> str:
        """Describe where each curve begins and ends, for screen readers."""
        parts = [self.title]
        for series in self.series:
            finite = [point.value for point in series.points if math.isfinite(point.value)]
            if finite and series.style != "faint":
                parts.append(f"{series.name} from {finite[0]:.4g} to {finite[-1]:.4g}")
        return "; ".join(parts)

    def _frame(self, number: int, axis: str) -> Frame:
        end = max((point[number] for series in self.series for point in series.points), default=0) or 1
        low, high = self._range()

        def place(point: Point) -> str:
            return f"{point[number] / end * _SIZE:.1f} {(high - point.value) / (high - low) * _SIZE:.1f}"

        across = [Tick(round(100 * tick / end, 2), text) for tick, text in _labelled(axis, end)]
        up = [Tick(round(100 * (tick - low) / (high - low), 2), _counted(tick)) for tick in _ticks(low, high)]
        paths = [Path("grid", "".join(f"M0 {_SIZE - 10 * tick.at:.1f}h{_SIZE}" for tick in up))]
        for series in self.series:
            color = f"c{series.color % COLORS}"
            if series.style == "dots":
                dots = "".join(f"M{place(point)}h0" for point in series.points if math.isfinite(point.value))
                paths.append(Path(f"dots {color}", dots))
            paths.append(Path(f"{series.style} line {color}", _line(series.points, place)))
        return Frame(axis, end, across, up, paths)

    def _range(self) -> tuple[float, float]:
        values = [point.value for series in self.series for point in series.points if math.isfinite(point.value)]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if self.from_zero:
            low = min(low, 0.0)
        span = high - low or abs(high) or 1.0
        return low if self.from_zero else low - _MARGIN * span, high + _MARGIN * span


def _line(points: Sequence[Point], place: Any) -> str:
    """Return the path through finite points, with gaps at NaN and Inf; an isolated point is a dot."""
    parts, gap = list[str](), True
    for point in points:
        if math.isfinite(point.value):
            parts.append(f"M{place(point)}h0" if gap else f"L{place(point)}")
        gap = not math.isfinite(point.value)
    return "".join(parts)


def _labelled(axis: str, end: float) -> list[tuple[float, str]]:
    if axis == "time":
        size, unit = next((size, unit) for least, size, unit in _UNITS if end >= least)
        return [(tick * size, f"{tick:g} {unit}") for tick in _ticks(0, end / size)]
    return [(tick, _counted(tick)) for tick in _ticks(0, end, whole=True)]


def _counted(number: float) -> str:
    size, unit = next((size, unit) for least, size, unit in _SIZES if abs(number) >= least)
    return f"{number / size:g}{unit}"


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(_TICKS, integer=whole, steps=[1, 2, 2.5, 5, 10])
    # Ticks are accumulated sums: 0.30000000000000004 becomes 0.3.
    return [float(f"{tick:.6g}") for tick in locator.tick_values(low, high) if low <= tick <= high]


def _rounded(point: Point) -> list[float | None]:
    value = float(f"{point.value:.6g}") if math.isfinite(point.value) else None
    return [point.step, round(point.tokens), round(point.seconds, 1), value]

"""Plot learning_curve.png with matplotlib."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.report import curves
from sft_recipes.run_dir import Lines

_STYLES: dict[str, dict[str, Any]] = {
    "solid": {},
    "faint": {"alpha": 0.35, "linewidth": 0.8},
    "dots": {"linestyle": "--", "linewidth": 1, "marker": "o", "markersize": 4},
}


def learning_curve(runs: Mapping[str, Lines], out: Path) -> None:
    """Plot loss and learning rate over the steps, from the metrics of one or several runs by name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    legend = list[tuple[Any, str]]()
    for axes, chart in ((loss, curves.chart(runs, curves.LOSS)), (rate, curves.chart(runs, curves.RATE))):
        for series in chart.series:
            style = _STYLES[series.style] | ({"marker": "o", "markersize": 4} if len(series.points) == 1 else {})
            values = [point.value if math.isfinite(point.value) else math.nan for point in series.points]
            steps = [point.step for point in series.points]
            [line] = axes.plot(steps, values, color=curves.COLORS[series.color], **style)
            if axes is loss:
                legend.append((line, series.name))
        axes.set_ylabel(chart.title.lower())
        axes.grid(alpha=0.3)
    rate.set_xlabel("optimizer step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    title = loss.set_title(next(iter(runs)) if len(runs) == 1 else "")
    texts = loss.legend([line for line, _ in legend], ["-"] * len(legend), fontsize="small").get_texts()
    for text, (_, name) in zip(texts, legend, strict=True):
        text.set_text(name)  # set afterwards, because matplotlib skips labels that begin with _
    for text in (title, *texts):
        text.set_parse_math(False)  # a directory may be named $x^$
    figure.savefig(out, dpi=200, format="png")

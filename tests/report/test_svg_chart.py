import math

import pytest

from sft_recipes.report.curves import Chart, Point, Series
from sft_recipes.report.svg_chart import AXES, frames, tooltips


def chart(*values: float, style: str = "solid", from_zero: bool = False) -> Chart:
    return Chart("Loss", [Series("training", style, 0, line(*values))], from_zero)


def line(*values: float) -> list[Point]:
    """One value per 10 steps, 1,000 tokens, 60 seconds."""
    return [Point(10 * number, 1000.0 * number, 60.0 * number, value) for number, value in enumerate(values)]


def test_a_frame_an_axis() -> None:
    found = frames(chart(1.0, 2.0, 3.0))

    assert [frame.axis for frame in found] == list(AXES)
    assert [frame.end for frame in found] == [20, 2000, 120]
    # lowest and highest keep a margin of a twentieth: 1 / 1.1 of the height between them
    [path] = [path.d for path in found[0].paths if "line" in path.css]
    assert path == "M0.0 954.5h0L500.0 500.0L1000.0 45.5"


def test_labels_stand_at_their_values() -> None:
    steps, tokens, time = frames(chart(0.0, 1.0, 2.0, from_zero=True))

    assert [(tick.at, tick.text) for tick in steps.across] == [(25.0 * n, f"{5 * n}") for n in range(5)]
    assert [(tick.at, tick.text) for tick in tokens.across] == [(25.0 * n, f"{500 * n}") for n in range(5)]
    assert [tick.text for tick in time.across] == ["0 min", "0.5 min", "1 min", "1.5 min", "2 min"]
    assert steps.up[0] == (0.0, "0")
    assert all(tick.at == pytest.approx(100 * float(tick.text) / 2.1, abs=0.01) for tick in steps.up)


@pytest.mark.parametrize(
    ("end", "last"), [(8_000, "8000"), (20_000, "20k"), (3_000_000, "3M"), (2e9, "2B"), (1e12, "1T")]
)
def test_large_numbers_are_short(end: float, last: str) -> None:
    frame = frames(Chart("Loss", [Series("training", "solid", 0, [Point(1, end, 1.0, 1.0)])]))[1]

    assert frame.across[-1].text == last


@pytest.mark.parametrize(("seconds", "unit"), [(20, "s"), (600, "min"), (90_000, "h")])
def test_time_in_a_unit_that_reads_well(seconds: float, unit: str) -> None:
    frame = frames(Chart("Loss", [Series("training", "solid", 0, [Point(1, 1.0, seconds, 1.0)])]))[2]

    assert all(tick.text.endswith(f" {unit}") for tick in frame.across)


def test_a_gap_where_a_value_is_not_finite() -> None:
    paths = frames(chart(1.0, math.nan, 2.0, 3.0, math.inf))[0].paths

    [path] = [path.d for path in paths if "line" in path.css]
    assert path.count("M") == 2
    assert "nan" not in path
    assert "inf" not in path
    assert [point[3] for point in tooltips(chart(1.0, math.nan))[0]["points"]] == [1.0, None]


def test_evaluations_are_dots_with_a_line_between_them() -> None:
    paths = frames(chart(1.0, 2.0, style="dots"))[0].paths

    assert [path.css for path in paths] == ["grid", "dots c0", "dots line c0"]
    assert paths[1].d.count("M") == 2
    assert "L" not in paths[1].d


def test_rounding_is_not_drawn() -> None:
    [path] = [path.d for path in frames(chart(0.6, 0.6 + 1e-16, 0.6 - 1e-16))[0].paths if "line" in path.css]

    assert len({part.split()[1] for part in path.replace("h0", "").replace("M", "L").split("L")[1:]}) == 1


@pytest.mark.parametrize("values", [(), (1.0,), (0.0, 0.0), (math.nan,), (1e-30, 1e30), (-1.0, 1.0)])
def test_any_values_can_be_drawn(values: tuple[float, ...]) -> None:
    for frame in frames(chart(*values)):
        assert frame.end > 0
        assert all(-0.01 <= tick.at <= 100.01 for tick in (*frame.across, *frame.up))
        assert "nan" not in str(frame)

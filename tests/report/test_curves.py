import math

import numpy as np
import pytest

from sft_recipes.report.curves import Chart, Point, Series, charts, curve, downsampled, positions, smoothed
from tests.report import runs


def points(values: list[float]) -> list[Point]:
    return [Point(number, 10.0 * number, 0.1 * number, value) for number, value in enumerate(values)]


def values(found: list[Point]) -> list[float]:
    return [point.value for point in found]


def test_time_is_what_the_rates_were_taken_over() -> None:
    lines = runs.metrics(10, every=3)
    where = positions(lines)

    assert [(position.step, position.tokens, position.seconds) for position in where] == [
        (0, 0, 0.0), (3, 3000, 1.5), (6, 6000, 3.0), (9, 9000, 4.5), (10, 10_000, 5.0), (10, 10_000, 5.0),
    ]  # fmt: skip


def test_an_evaluation_between_two_records_takes_nothing_from_their_time() -> None:
    lines = [
        {"step": 10, "tokens": 100, "tokens_per_second": 50.0},
        {"step": 15, "tokens": 150, "eval_loss": 1.0},
        {"step": 20, "tokens": 200, "tokens_per_second": 50.0},
        {"step": 21, "tokens": 210, "tokens_per_second": None},  # no time has been measured
        {"step": 22, "eval_loss": 1.0},
    ]

    assert [position.seconds for position in positions(lines)] == [2.0, 2.0, 4.0, 4.0, 4.0]
    assert [point.tokens for point in curve(lines, "eval_loss")] == [150, 210]


def test_smoothing_keeps_a_level_and_a_slope_where_they_are() -> None:
    assert values(smoothed(points([3.0] * 50))) == pytest.approx([3.0] * 50)
    assert values(smoothed(points([float(number) for number in range(200)])))[50:150] == pytest.approx(
        range(50, 150), abs=0.01
    )


def test_smoothing_calms() -> None:
    noise = np.random.default_rng(0).normal(size=400).tolist()

    assert np.std(values(smoothed(points(noise)))) < 0.4 * np.std(noise)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_smoothing_leaves_out_what_is_not_finite(lost: float) -> None:
    found = values(smoothed(points([2.0] * 10 + [lost] + [2.0] * 10)))

    assert [math.isfinite(value) for value in found].index(False) == 10
    assert found[:10] + found[11:] == pytest.approx([2.0] * 20)


def test_few_points_are_not_thinned_out() -> None:
    assert downsampled(points([1.0] * 900)) == points([1.0] * 900)


def test_thinning_keeps_ends_peaks_and_gaps_in_order() -> None:
    many = [1.0] * 100_000
    many[31_415], many[27_182], many[54_321] = 9.0, -9.0, math.nan
    found = downsampled(points(many))

    assert len(found) <= 1000
    assert (found[0].step, found[-1].step) == (0, 99_999)
    assert {31_415, 27_182, 54_321} <= {point.step for point in found}
    assert [point.step for point in found] == sorted({point.step for point in found})


def test_curves_of_one_run() -> None:
    found = charts({"run": runs.metrics(30)})

    assert [chart.title for chart in found] == [
        "Loss per token", "Learning rate", "Gradient norm", "Tokens/s", "Peak memory (GiB)",
    ]  # fmt: skip
    assert [(series.name, series.style) for series in found[0].series] == [
        ("as logged", "faint"), ("training, smoothed", "solid"), ("eval", "dots"),
    ]  # fmt: skip
    assert found[0].series[0].color != found[0].series[2].color


def test_curves_of_two_runs_lie_over_each_other() -> None:
    loss = charts({name: runs.metrics(30) for name in "ab"})[0]

    assert [series.name for series in loss.series] == ["a", "a, eval", "b", "b, eval"]
    assert [series.color for series in loss.series] == [0, 0, 1, 1]


def test_values_that_are_not_finite_are_reported() -> None:
    lines = runs.metrics(5)
    lines[2]["loss"], lines[3]["loss"] = math.nan, math.inf
    [loss, *others] = charts({"run": lines})

    assert loss.note == "2 values are NaN or Inf, first at step 2"
    assert not any(chart.note for chart in others)


def test_many_lines_become_few_points() -> None:
    found = charts({"run": runs.metrics(20_000)})

    assert all(len(series.points) <= 1000 for chart in found for series in chart.series)
    assert {series.points[-1].step for chart in found for series in chart.series} == {20_000}


def test_description() -> None:
    values = [Point(10 * number, 1000.0 * number, 60.0 * number, value) for number, value in enumerate((3.0, 2.0, 1.5))]

    assert Chart("Loss", [Series("training", "solid", 0, values)]).description() == "Loss; training from 3 to 1.5"

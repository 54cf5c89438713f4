import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from sft_recipes.report.learning_curve import (
    Point,
    curve,
    learning_curve,
    learning_curves,
    positions,
    smoothed,
    thinned,
)
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
    assert [point.tokens for point in curve(lines, positions(lines), "eval_loss")] == [150, 210]


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
    assert thinned(points([1.0] * 900)) == points([1.0] * 900)


def test_thinning_keeps_ends_peaks_and_gaps_in_order() -> None:
    many = [1.0] * 100_000
    many[31_415], many[27_182], many[54_321] = 9.0, -9.0, math.nan
    found = thinned(points(many))

    assert len(found) <= 1000
    assert (found[0].step, found[-1].step) == (0, 99_999)
    assert {31_415, 27_182, 54_321} <= {point.step for point in found}
    assert [point.step for point in found] == sorted({point.step for point in found})


ODD = {
    "one step": runs.metrics(1),
    "no evaluation": runs.metrics(30, evaluations=0),
    "nothing yet": [],
    "not finite": [
        {"step": 1, "loss": math.nan, "learning_rate": 0.1},
        {"step": 2, "loss": math.inf, "learning_rate": 0.1},
    ],
    "only evaluations": [{"step": 0, "eval_loss": 1.0}],
}


@pytest.mark.parametrize("case", ODD)
def test_pictures_of_odd_runs(case: str, tmp_path: Path) -> None:
    learning_curve(ODD[case], tmp_path / "curve.png", case)

    assert imread(tmp_path / "curve.png").shape == (920, 1400, 4)


def has(file: Path, *colour: int) -> bool:
    return bool(((imread(file)[..., :3] * 255).round() == colour).all(axis=2).any())


def test_the_picture_shows_training_and_validation(tmp_path: Path) -> None:
    blue, red = (0x2F, 0x6F, 0xB5), (0xC8, 0x50, 0x1E)
    learning_curve(runs.metrics(30), tmp_path / "both.png", "run")
    learning_curve(runs.metrics(30, evaluations=0), tmp_path / "training.png", "run")

    assert has(tmp_path / "both.png", *blue)
    assert has(tmp_path / "both.png", *red)
    assert has(tmp_path / "training.png", *blue)
    assert not has(tmp_path / "training.png", *red)


def test_names_are_no_formulas_and_may_begin_with_an_underscore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning_curve(runs.metrics(3), tmp_path / "one.png", "$x^$")
    learning_curves({"$x^$": runs.metrics(3), "_b": runs.metrics(30)}, tmp_path / "two.png")
    shown: list[str] = []
    monkeypatch.setattr("matplotlib.text.Text.set_text", lambda self, text: shown.append(str(text)))
    learning_curves({"a": runs.metrics(3), "_b": runs.metrics(3)}, tmp_path / "three.png")

    assert {"a", "_b", "eval"} <= set(shown)

import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from sft_recipes.report.learning_curve import learning_curve
from tests.report import runs

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
    learning_curve({case: ODD[case]}, tmp_path / "curve.png")

    assert imread(tmp_path / "curve.png").shape == (920, 1400, 4)


def has(file: Path, *colour: int) -> bool:
    return bool(((imread(file)[..., :3] * 255).round() == colour).all(axis=2).any())


def test_the_picture_shows_training_and_validation(tmp_path: Path) -> None:
    blue, red = (0x2F, 0x6F, 0xB5), (0xC8, 0x50, 0x1E)
    learning_curve({"run": runs.metrics(30)}, tmp_path / "both.png")
    learning_curve({"run": runs.metrics(30, evaluations=0)}, tmp_path / "training.png")

    assert has(tmp_path / "both.png", *blue)
    assert has(tmp_path / "both.png", *red)
    assert has(tmp_path / "training.png", *blue)
    assert not has(tmp_path / "training.png", *red)


def test_names_are_no_formulas_and_may_begin_with_an_underscore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning_curve({"$x^$": runs.metrics(3)}, tmp_path / "one.png")
    learning_curve({"$x^$": runs.metrics(3), "_b": runs.metrics(30)}, tmp_path / "two.png")
    shown: list[str] = []
    monkeypatch.setattr("matplotlib.text.Text.set_text", lambda self, text: shown.append(str(text)))
    learning_curve({"a": runs.metrics(3), "_b": runs.metrics(3)}, tmp_path / "three.png")

    assert {"a", "_b", "a, eval"} <= set(shown)

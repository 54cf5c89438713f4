"""A few of the kills of tests/kills.py."""

from pathlib import Path

import pytest

import sft_recipes.run  # noqa: F401  # once, and not in each child
from tests import kills
from tests.commands import forked


def test_killed_runs_come_to_the_same_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = forked(kills.trials, tmp_path, ["full", "lora"], 2, 1, print)
    child.join()
    said = capfd.readouterr()

    assert child.exitcode == 0, said
    assert "killed at an operation" in said.out

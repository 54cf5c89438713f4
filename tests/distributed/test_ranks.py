"""Several processes: real ones, over gloo."""

import json
from pathlib import Path

import pytest

import sft_recipes.run  # noqa: F401  # once, and not in each child
from sft_recipes.distributed import ranks
from tests.commands import forked
from tests.conftest import metrics
from tests.distributed import two


def test_two_processes_stop_at_the_same_step_and_resume_exactly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = forked(two.main, tmp_path)
    child.join()
    said = capfd.readouterr()
    assert child.exitcode == 0, said
    found = json.loads(said.out.splitlines()[-1])

    assert found["said"]["whole"] == found["said"]["resumed"] == ["done", "done"]
    for step in (3, 5):
        for said in found["said"][f"stopped at {step}"]:
            assert said.startswith("Stopped: ")
            assert f"after step {step} of 7. Last checkpoint: " in said
    assert found["same"]
    run = tmp_path / "stopped" / "run"
    assert {file.name for file in (run / "checkpoints" / "checkpoint-7").glob("*_[01].*")} == {
        f"{name}_{rank}.{suffix}"
        for name, suffix in (("rng_state", "pth"), ("trainer_metrics", "json"))
        for rank in (0, 1)
    }
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == sorted(set(steps))


def test_one_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.is_main()
    monkeypatch.setenv("RANK", "1")
    assert not ranks.is_main()


def test_all_are_there_and_about_to_do_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = forked(two.meet)
    child.join()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])

    assert found["the same"] == ["done", "done"]
    for said in found["other data"]:
        assert said.startswith("RecipeError: launch: rank 1 on ")
        assert " has another data than rank 0 on " in said
    assert found["alone"][0].startswith(
        "RunError: 1 of 2 processes came within 1 s; rank 1 did not; look at what it said"
    )

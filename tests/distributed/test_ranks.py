"""Process groups of real processes over gloo."""

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
    captured = capfd.readouterr()
    assert child.exitcode == 0, captured
    found = json.loads(captured.out.splitlines()[-1])

    assert found["results"]["whole"] == found["results"]["resumed"] == ["done", "done"]
    for step in (3, 5):
        for result in found["results"][f"stopped at {step}"]:
            assert result.startswith("Stopped: ")
            assert f"after step {step} of 7. Last checkpoint: " in result
    assert found["same"]
    run = tmp_path / "stopped" / "run"
    assert {file.name for file in (run / "checkpoints" / "checkpoint-7").glob("*_[01].*")} == {
        f"{name}_{rank}.{suffix}"
        for name, suffix in (("rng_state", "pth"), ("trainer_metrics", "json"))
        for rank in (0, 1)
    }
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == sorted(set(steps))


def test_is_main(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.is_main()
    monkeypatch.setenv("RANK", "1")
    assert not ranks.is_main()


def test_rendezvous_compares_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = forked(two.meet)
    child.join()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])

    assert found["the same"] == ["done", "done"]
    for result in found["different data"]:
        assert result.startswith("RecipeError: launch: data of rank 1 on ")
        assert " differs from rank 0 on " in result
    assert found["alone"][0].startswith("RunError: only 1 of 2 ranks joined within 1 s (missing: rank 1). Read the log")

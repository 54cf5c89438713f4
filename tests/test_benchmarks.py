"""The benchmarks of a training step still run, on models and rows that show nothing of speed."""

import argparse
import importlib
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands import forked

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def script(name: str, *arguments: str, cwd: Path) -> str:
    """What it prints. Fails where the script does."""
    child = forked(_run, name, arguments, cwd)
    child.join()
    said = (cwd / "said").read_text("utf-8")
    assert child.exitcode == 0, said
    return said


def _run(name: str, arguments: tuple[str, ...], cwd: Path) -> None:
    os.chdir(cwd)
    for number in (1, 2):
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    sys.stdout.flush()


def names_of(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / name))


def rows(said: str) -> dict[str, list[str]]:
    """The cells of each line of the tables, by the first."""
    lines = (line[2:-2].split(" | ") for line in said.splitlines() if line.startswith("| ") and line.endswith(" |"))
    return {first: others for first, *others in lines if not first.startswith("|")}


def test_a_step_is_compared_with_plain_trl(tmp_path: Path) -> None:
    """In float32, where losses have to agree to 5 digits."""
    said = script(
        "train_step.py",
        "builtin:tiny",
        "--shapes",
        "2x128",
        "--float32",
        "--turns",
        "2",
        "--overhead",
        "2",
        cwd=tmp_path,
    )

    assert said.count("\nlora, 2 x 128, float32") == said.count("\nfull, 2 x 128, float32") == 1
    found = rows(said)
    for way in ("TRL, its defaults", "TRL, set by hand", "sft-recipes, its defaults"):
        seconds, _, trained, times, losses = found[way]
        assert float(seconds) > 0
        assert float(trained.replace(",", "")) > 0
        assert float(times) > 0
        assert len(losses.split(", ")) == 4
    assert float(found["SFTTrainer, the same settings"][0]) > 0


@pytest.mark.parametrize(
    ("losses", "theirs", "digits", "agree"),
    [
        ([2.30, 1.10], [2.304, 1.104], 2, True),
        ([2.30, 1.10], [2.304, 1.106], 2, False),
        ([7.886587], [7.886586], 5, True),
        ([1.000007], [1.000001], 5, False),
        ([float("nan")], [1.0], 2, False),
    ],
)
def test_losses_that_agree(
    losses: list[float], theirs: list[float], digits: int, agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names_of("train_step.py", monkeypatch)["agree"](losses, theirs, digits) == agree


# --- gpu.py ---


def test_items_for_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    said = script("gpu.py", "--cpu", "--tiny", "--only", "1,5,6,7,9", "--out", "out", cwd=tmp_path)

    out = tmp_path / "out"
    header, *found = map(json.loads, (out / "results.jsonl").read_text("utf-8").splitlines())
    assert header["command"].endswith("gpu.py --cpu --tiny --only 1,5,6,7,9 --out out")
    assert "torch" in header["machine"]
    states = {(row["number"], row["state"]) for row in found}
    expected = {1: "done", 5: "done", 6: "done", 7: "skipped", 9: "done"}
    assert states <= {*expected.items(), (9, "skipped")}, said  # 9: without bitsandbytes or torchao
    for row in found:
        if row["number"] in (5, 6):
            assert row["tokens_per_second"] > 0
            assert row["predicted_gib"] > 0
    assert "aten::mm" in (out / "profile-6.txt").read_text("utf-8")
    table = (out / "results.md").read_text("utf-8")
    assert table.strip() in said  # the terminal shows the same
    assert rows(table).keys() == {"item", "1", "5", "6", "7", "9"}


def test_items_without_time_are_skipped(tmp_path: Path) -> None:
    script("gpu.py", "--cpu", "--tiny", "--only", "6,9", "--minutes", "0.5", "--out", "out", cwd=tmp_path)

    _, *found = map(json.loads, (tmp_path / "out/results.jsonl").read_text("utf-8").splitlines())
    assert [row["state"] for row in found] == ["skipped"] * 3
    assert all("no time left" in row["result"] for row in found)


def test_an_item_that_fails_does_not_affect_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung item is killed at its limit; a crash and an exception are one line each."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu, gpu_items = importlib.import_module("gpu"), importlib.import_module("gpu_items")

    def hang(given: argparse.Namespace) -> None:
        (given.out / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    def crash(_given: argparse.Namespace) -> None:
        os._exit(7)

    def fail(_given: argparse.Namespace) -> None:
        raise ValueError("no such\nthing")

    for function in (hang, crash, fail):
        monkeypatch.setattr(gpu_items, function.__name__, function, raising=False)
    given = argparse.Namespace(cpu=True, tiny=True, device="cpu", out=tmp_path, folder=tmp_path)
    workers = gpu.Workers(given)
    try:
        found = {name: workers.perform(gpu.Item(1, name, 60, name), limit) for name, limit in LIMITS.items()}
    finally:
        workers.close()

    assert {row["state"] for name, row in found.items() if name != "machine"} == {"failed"}
    assert found["hang"]["result"] == "stopped after 5 s without a result"
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    assert "exit code 7" in found["crash"]["result"]
    assert found["fail"]["result"] == "failed: no such thing"
    assert "ValueError: no such\nthing" in (tmp_path / "log.txt").read_text("utf-8")
    assert found["machine"]["state"] == "done"


LIMITS = {"hang": 5, "crash": 60, "fail": 60, "machine": 60}  # seconds

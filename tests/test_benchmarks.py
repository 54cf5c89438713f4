"""The benchmarks of a training step still run, on models and rows that show nothing of speed."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

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
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
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


def test_the_steps_on_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    ways = ("TRL, its defaults", "bfloat16 weights", "cast off")
    cases = ("8b/lora/short", "8b/qlora/short", "8b/full/short")

    said = script("gpu.py", "--cpu", "--tiny", "--timed", "1", "--only", *cases, "--steps", *ways, cwd=tmp_path)

    tables = said.split("tokens a step")[1:]
    for case, table in zip(cases, tables, strict=True):
        found = rows(table)
        assert set(found) == set(ways if "full" not in case else ways[:2])
        for way in found:
            assert float(found[way][0].replace(",", "")) > 0, said  # tokens/s
            assert float(found[way][4]) >= 0  # predicted


@pytest.mark.parametrize(("size", "seen", "full"), [("8b", 150, 45.2e9), ("8b", 8192, 51.5e9), ("1b", 150, 7.44e9)])
def test_operations(size: str, seen: int, full: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 for each weight that is multiplied, and attention; Llama's embeddings are looked up."""
    names = names_of("gpu.py", monkeypatch)
    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(LlamaConfig(**names["MODELS"][size]))

    assert names["operations"](llama, False, seen) == pytest.approx(full, rel=2e-3)

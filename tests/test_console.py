import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_recipes import console

METRICS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.0, "tokens": 0, "peak_memory_gib": 0.5},
    {"step": 1, "loss": 3.1, "tokens": 1000, "tokens_per_second": 100.0, "peak_memory_gib": 0.7},  # 10 s
    {"step": 2, "eval_loss": 2.5, "tokens": 2000, "peak_memory_gib": 1.25},
    {"step": 3, "loss": 2.0, "tokens": 4000, "tokens_per_second": 150.0, "peak_memory_gib": 0.6},  # 20 s
    {"step": 3, "eval_loss": 1.5, "tokens": 4000, "peak_memory_gib": 0.6},
]


def concluded(folder: Path, metrics: list[dict[str, Any]], *outputs: str) -> list[str]:
    """Lines of the summary of a run with these outputs."""
    for name in outputs:
        (folder / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    said = io.StringIO()
    console.print_summary(Console(file=said, width=40), folder)  # commands are never wrapped
    return said.getvalue().splitlines()


def test_what_it_took(tmp_path: Path) -> None:
    said = concluded(tmp_path, METRICS, "model")

    assert "eval loss: 3.0000 → 1.5000" in said
    assert "throughput: 4,000 tokens at 133 tokens/s; peak memory 1.25 GiB" in said  # 4000 / (10 + 20)


def test_a_run_that_was_too_short_to_be_timed(tmp_path: Path) -> None:
    said = concluded(
        tmp_path, [{"step": 1, "loss": 3.1, "tokens": 10, "tokens_per_second": None, "peak_memory_gib": 1}], "model"
    )

    assert "throughput: 10 tokens; peak memory 1.00 GiB" in said


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (
            ["model"],
            [
                "Next:",
                "generate  sft-recipe generate '{}' --prompt \"...\"",
                "DPO  python docs/dpo.py '{}/model' pairs.jsonl --out '{}'-dpo (see docs/dpo.md)",
            ],
        ),
        (
            ["adapter"],
            [
                "Next:",
                "generate  sft-recipe generate '{}' --prompt \"...\"",
                "merge  sft-recipe merge '{}' --out '{}/model'",
                "DPO  python docs/dpo.py '{}/adapter' pairs.jsonl --out '{}'-dpo (see docs/dpo.md)",
            ],
        ),
    ],
)
def test_what_can_be_done_next(tmp_path: Path, outputs: list[str], expected: list[str]) -> None:
    folder = tmp_path / "my run"
    said = concluded(folder, METRICS, *outputs)

    assert said[-len(expected) :] == [line.replace("{}", str(folder)) for line in expected]
    assert f"{folder}/{outputs[0]}" in "\n".join(said)

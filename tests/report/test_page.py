import json
from pathlib import Path

import pytest

from sft_recipes.errors import OutputError
from sft_recipes.report import page, words

METRICS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 3.0, "eval_perplexity": 20.1, "eval_exact_match": 0.0, "memory": 0.5},
    {"step": 1, "epoch": 0.5, "loss": 3.1, "learning_rate": 1e-4, "tokens": 1000, "memory": 0.7},
    {"step": 2, "epoch": 1.0, "loss": 2.0, "learning_rate": 5e-5, "tokens": 2000, "memory": 0.6},
    {"step": 2, "epoch": 1.0, "eval_loss": 1.5, "eval_perplexity": 4.5, "eval_exact_match": 0.75, "memory": 0.6},
]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a run."""
    question = [{"role": "user", "content": "<b>What?</b>", "input": "{x}"}]
    samples = [{"step": s, "messages": question, "answer": a, "expected": None} for s, a in ((0, "early"), (2, "late"))]
    for name, lines in (("metrics", METRICS), ("samples", samples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "recipe.resolved.json").write_text(
        '{"model": {"name": "builtin:tiny"}, "lora": null}', encoding="utf-8"
    )
    (tmp_path / "data.json").write_text("{}", encoding="utf-8")
    (tmp_path / "manifest.json").write_text('{"versions": {"trl": "1.16.0"}}', encoding="utf-8")
    return tmp_path


def test_one_file_with_what_happened(finished: Path) -> None:
    page.write(finished)
    html = (finished / "report.html").read_text("utf-8")

    for text in (
        "3.0000 before, 1.5000 after",
        "0.0% before, 75.0% after",
        "full fine-tuning",
        "0.70 GiB",
        "early",
        "late",
    ):
        assert text in html
    assert "&lt;b&gt;What?&lt;/b&gt;\n{x}" in html
    assert "<b>What?" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert 'src="data:image/png;base64,' in html


def test_the_curve_is_a_picture(finished: Path) -> None:
    page.write(finished)

    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "learning_curve.png").stat().st_size > 10_000


def test_a_run_that_was_not_validated(finished: Path) -> None:
    lines = [line for line in METRICS if "loss" in line]
    (finished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (finished / "samples.jsonl").unlink()
    page.write(finished)

    assert "Validation loss" not in (finished / "report.html").read_text("utf-8")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no run here \(metrics\.jsonl is missing\)"):
        page.write(tmp_path)


def test_first_and_last_answers(finished: Path) -> None:
    [(before, after)] = words.samples(finished)

    assert (before["answer"], after["answer"]) == ("early", "late")

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes.model_dir import BUILTIN
from tests.conftest import metrics, run, write_rows
from tools.builtin_model import make


def test_the_tokenizer_is_that_of_the_script() -> None:
    shipped = json.loads((BUILTIN / "tiny" / "tokenizer.json").read_text("utf-8"))

    assert json.loads(make.make_tokenizer().backend_tokenizer.to_str())["model"] == shipped["model"]


def test_pretraining_learns_and_saves_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.argv", ["make", "--tokens", "65000", "--out", str(tmp_path)])
    make.main()

    assert float(capsys.readouterr().out.split("loss ")[1].split()[0]) < 6.0  # of ln 1024 = 6.93
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tiny")) == model.config.vocab_size == 1024


def test_what_ships_is_small() -> None:
    assert sum(file.stat().st_size for file in BUILTIN.rglob("*") if file.is_file()) < 4_000_000


def test_fine_tuning_shows_what_fine_tuning_does(tmp_path: Path) -> None:
    """The beginning of the quickstart: from no right answer to most."""
    recipe = BUILTIN.parents[1] / "recipes" / "quickstart.yaml"
    lines = (BUILTIN / "tasks" / "heldout.jsonl").read_text("utf-8").splitlines()
    asked = write_rows(tmp_path / "asked.jsonl", map(json.loads, lines[:40]))
    sections = [f"data.eval={asked}", f"eval.generate={asked}", "eval.every=null", f"output_dir={tmp_path / 'run'}"]
    folder, said = run(recipe, *sections, "train.max_steps=40", "train.micro_batch_size=8")
    before, after = (line["eval_exact_match"] for line in metrics(folder) if "eval_exact_match" in line)

    assert before <= 0.05
    assert after >= 0.6
    assert f"exact match: {before:.1%} → {after:.1%}" in said
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "report.html").is_file()

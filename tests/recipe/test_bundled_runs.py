"""Run bundled recipes for one step on small models of the same architecture, method, template and optimizer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipes.recipe import parse
from tests.conftest import metrics, run, write_rows
from tests.recipe.test_bundled import ROOT, rows_for, stand_in

SMALL = {
    "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 1088, "sliding_window_pattern": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
# Architectures that no other test trains to the end.
NAMES = ["gemma3_1b_full", "smollm3_3b_full", "qwen3_4b_chat", "phi4_14b_lora"]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_miniature(name: str, tmp_path: Path) -> None:
    file = ROOT / "recipes" / f"{name}.yaml"
    recipe = parse.load(file).recipe
    folder = stand_in(recipe.model.name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | SMALL), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)

    out, console = run(
        file,
        f"model.name={folder}",
        f"data.train={write_rows(tmp_path / 'rows.jsonl', rows_for(recipe))}",
        "data.eval=0.25",
        "train.max_steps=1",
        "train.global_batch_size=2",
        "eval.max_new_tokens=2",
        f"output_dir={tmp_path / 'run'}",
    )

    assert model.config.model_type == config["model_type"]
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1]
    assert "get no gradient" not in console
    assert (out / ("model" if recipe.lora is None or recipe.export.merge else "adapter")).is_dir()

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipes.errors import ModelError
from sft_recipes.export import load_adapter, merge_plan, safetensors_io
from sft_recipes.export.merge_plan import MergePlan
from tests.export.test_merge import TINY, adapter, llama, untied

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plan(folder: Path, base: Path = TINY, **settings: Any) -> MergePlan:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    found = load_adapter.find(adapter(folder / "adapter", base, **settings))
    return merge_plan.plan_merge(found, safetensors_io.read_model(base), model)


@pytest.mark.parametrize(
    ("make", "settings", "printed"),
    [
        (llama, {"target_modules": r".*layers\.2.*q_proj"},
            "model.layers.2.self_attn.q_proj.weight: add LoRA of rank 4, scale 2"),
        (untied, {"target_modules": r".*layers\.0.*q_proj", "lora_bias": True, "use_rslora": True},
            "model.layers.0.self_attn.q_proj.weight: add LoRA of rank 4, scale 4\n"
            "model.layers.0.self_attn.q_proj.bias: add the bias of LoRA, scale 4"),
        (llama, {"target_modules": r".*layers\.2.*q_proj", "use_dora": True},
            "model.layers.2.self_attn.q_proj.weight: add DoRA of rank 4, scale 2"),
        (llama, {"target_modules": ["lm_head"]},
            f"{HEAD}: replace with [1024, 128]\n{HEAD}: add LoRA of rank 4, scale 2"),
        (llama, {"target_modules": ["embed_tokens"]},
            f"{EMBEDDINGS}: replace with [1024, 128]\n{HEAD}: copy of {EMBEDDINGS}\n"
            f"{EMBEDDINGS}: add LoRA of rank 4, scale 2"),
        (llama, {"target_modules": r".*layers\.2.*q_proj", "modules_to_save": ["embed_tokens"]},
            f"{HEAD}: copy of {EMBEDDINGS}\n{EMBEDDINGS}: replace with [1024, 128]\n"
            "model.layers.2.self_attn.q_proj.weight: add LoRA of rank 4, scale 2"),
        (llama, {"target_modules": r".*layers\.2.*q_proj", "resized": 2},
            f"{EMBEDDINGS}: replace with [1026, 128]\n{EMBEDDINGS}: replace rows 3, 1024, 1025\n"
            "model.layers.2.self_attn.q_proj.weight: add LoRA of rank 4, scale 2"),
    ],
    ids=["LoRA", "bias", "DoRA", "tied head", "tied embeddings", "tied embeddings in full", "new tokens"],
)  # fmt: skip
def test_a_plan_is_printed(tmp_path: Path, make: Any, settings: dict[str, Any], printed: str) -> None:
    found = plan(tmp_path, make(tmp_path / "base"), **settings)

    assert str(found) == printed
    assert found.tied == (make is llama and HEAD not in printed)
    assert found.vocab_size == (1026 if "resized" in settings else 1024)


def test_tensors_without_an_operation_are_those_of_the_base(tmp_path: Path) -> None:
    found, base = plan(tmp_path, target_modules=r".*layers\.2.*q_proj"), safetensors_io.read_model(TINY)

    assert found.tensors.keys() == base.keys()
    assert [name for name in base if found.tensors[name] != base[name]] == ["model.layers.2.self_attn.q_proj.weight"]


def test_a_plan_that_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=r".*layers\.0.*up_proj")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    base = safetensors_io.read_model(untied(tmp_path / "base"))

    with pytest.raises(
        ModelError, match=r"adapter: does not fit the base: model.layers.0.mlp.up_proj.weight has shape"
    ):
        merge_plan.plan_merge(load_adapter.find(source), base, model)

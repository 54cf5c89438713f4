"""Correct exports of other model families pass verification: each computes something of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_recipes.data import encoder, prepare
from sft_recipes.export import artifacts, reference
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
SMALL = {
    "vocab_size": 1088, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "sliding_window": 16,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# What each has that others have not, beside its architecture.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {},  # a scale of embeddings that is a buffer, caps of logits
    "gemma3_text": {},  # and two rotary embeddings
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1088},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 256}},
    "qwen3": {"tie_word_embeddings": True},
    "phi3": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 6,
                                 "long_factor": [2.0] * 6, "original_max_position_embeddings": 256}},
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 512},  # transposed matrices, learned positions
    "cohere2": {"logit_scale": 0.25},
    "glm4_moe": EXPERTS,  # biases that stay in float32 and are saved, experts that are one tensor in memory
}  # fmt: skip
# Dtypes of the base's files, of the weights in training, and of the export.
DTYPES = [
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "bfloat16"),
    ("float16", "bfloat16", "float32"),
    ("float32", "bfloat16", "bfloat16"),
]


@pytest.fixture
def make_base(tmp_path: Path) -> Any:
    def make(family: str, dtype: torch.dtype) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in model.state_dict() and buffer.dtype.is_floating_point:  # they begin as zeros and ones
                    buffer += 0.1 * torch.rand_like(buffer)
        model.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


@pytest.mark.parametrize(("stored", "held", "exported"), DTYPES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_correct_exports_pass_verification(
    write_recipe: WriteRecipe, make_base: Any, family: str, lora: bool, stored: str, held: str, exported: str
) -> None:
    base = make_base(family, getattr(torch, stored))
    sections = {"model": {"name": str(base), "dtype": held}, "export": {"dtype": exported}}
    recipe = parse.load(write_recipe(**sections, **({"lora": {"rank": 2}} if lora else {}))).recipe
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer))
    tokenizer.chat_template = data.chat_template
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=held)
    if lora:
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.01 * torch.randn_like(weight)

    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda model, **_: model),
        args=SimpleNamespace(device=torch.device("cpu")),
        is_world_process_zero=lambda: True,
    )
    recorded = reference.record(trainer, recipe, data)
    assert recorded is not None
    folder = base.parent / "run"
    folder.mkdir()
    said = artifacts.export(recipe, model, tokenizer, data, folder, recorded)

    assert any(line.startswith("verify: passed in a separate process") for line in said)
    assert not any("changed nothing" in line for line in said)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5]},
    ],
    ids=["LoRA", "in full", "some tokens"],
)
def test_buffers_inside_of_peft_are_computed_in_float32(make_base: Any, settings: dict[str, Any]) -> None:
    """By the names that PEFT gives them (0.21): each scale of Gemma's embeddings has a place in the base."""
    model: Any = AutoModelForCausalLM.from_pretrained(make_base("gemma3_text", torch.bfloat16), dtype=torch.bfloat16)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    scales = [scale for name, scale in adapted.named_buffers(remove_duplicate=False) if name.endswith("embed_scale")]
    buffers = [*reference._computed_buffers(adapted)]
    computed = [value for buffer, value in buffers if any(buffer is scale for scale in scales)]

    assert len(computed) == len(scales) > 0
    assert {value.dtype for value in computed} == {torch.float32}

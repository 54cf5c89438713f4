import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sft_recipes.errors import ModelError
from sft_recipes.models import model
from sft_recipes.models.adapters import keep_trainable_in_float32, settle_types
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe
from tests.models.test_model import TINY, loaded


def test_adapters_are_those_of_the_recipe(write_recipe: WriteRecipe) -> None:
    adapted = loaded(
        write_recipe(),
        "lora={rank: 3, alpha: 7, dropout: 0.25, target_modules: [q_proj, down_proj], use_rslora: true, use_dora: true}",
    )
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    trained = {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad}

    assert layer.lora_A["default"].weight.shape == (3, 352)
    assert layer.scaling["default"] == pytest.approx(7 / 3**0.5)
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.use_dora["default"]
    assert trained == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert not hasattr(adapted.base_model.model.model.layers[1].mlp.up_proj, "lora_A")


def test_all_linear_is_every_linear_layer_but_the_head(write_recipe: WriteRecipe) -> None:
    adapted = loaded(write_recipe(), "lora={}")
    with_adapter = {name.split(".")[-1] for name, module in adapted.named_modules() if hasattr(module, "lora_A")}

    assert with_adapter == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_parameters_of_experts_have_adapters(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "moe", ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3MoeConfig(vocab_size=1024, num_experts=4, num_experts_per_tok=2, num_key_value_heads=1, **sizes)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    recipe = write_recipe(model={"name": str(tmp_path / "moe")})
    wanted = "lora={rank: 2, target_modules: [q_proj], target_parameters: [mlp.experts.down_proj]}"
    trained = {name for name, p in loaded(recipe, wanted).named_parameters() if p.requires_grad}

    assert {name.partition(".layers.0.")[2].removesuffix(".default.weight") for name in trained} == {
        f"{name}.lora_{part}" for name in ("self_attn.q_proj", "mlp.experts") for part in "AB"
    }
    missing = r"lora.target_parameters: no parameter is named 'up_proj'. .*mlp.experts.down_proj"
    with pytest.raises(ModelError, match=missing):
        loaded(recipe, wanted.replace("mlp.experts.down_proj", "up_proj"))


def test_layers_trained_in_full_next_to_adapters(write_recipe: WriteRecipe) -> None:
    adapted = loaded(write_recipe(), "lora={modules_to_save: [model.norm]}")

    assert adapted.base_model.model.model.norm.modules_to_save["default"].weight.requires_grad
    assert model.count_parameters(adapted)[1] == 149_504 + 128


def test_trainable_weights_of_adapters_are_float32(write_recipe: WriteRecipe) -> None:
    adapted = loaded(write_recipe(), "model.dtype=bfloat16", "lora={modules_to_save: [norm]}")
    keep_trainable_in_float32(adapted, autocast=True)

    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}

    keep_trainable_in_float32(adapted, autocast=False)
    types = {name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert {dtype for name, dtype in types.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_a_float32_copy_of_an_adapters_input_every_bit_is_the_same(
    write_recipe: WriteRecipe, quantization: str | None, checkpointing: bool
) -> None:
    file = write_recipe(lora={}, model={"dtype": "bfloat16", "quantization": quantization})
    recipe = parse.load(file, ["train.mixed_precision=bf16"]).recipe
    found = []
    for copies in (False, True):
        adapted = loaded(file, f"model.quantization={quantization or 'null'}")
        settle_types(adapted, recipe)
        layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = copies
            torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(300).reshape(2, 150)
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss, *(p.grad for p in adapted.parameters() if p.requires_grad)])

    assert all(torch.equal(without, with_) for without, with_ in zip(*found, strict=True))


@pytest.mark.parametrize("kept", ["lora={dropout: 0.1}", "lora={use_dora: true}", "train.mixed_precision=no"])
def test_the_float32_copy_stays_with_dropout_and_dora(write_recipe: WriteRecipe, kept: str) -> None:
    overrides = [
        "model.dtype=bfloat16",
        "train.mixed_precision=bf16",
        *({"lora={}"} if kept.startswith("train") else ()),
        kept,
    ]
    file = write_recipe()
    adapted = loaded(file, *overrides)
    settle_types(adapted, parse.load(file, overrides).recipe)
    assert all(part.cast_input_dtype_enabled for part in adapted.modules() if isinstance(part, LoraLayer))


def test_new_token_embeddings_are_trained(write_recipe: WriteRecipe) -> None:
    full = loaded(write_recipe(), "model.new_tokens=[<a>, <b>]")
    adapted = loaded(write_recipe(), "model.new_tokens=[<a>, <b>]", "lora={}")

    assert full.get_input_embeddings().weight.shape[0] == 1026
    [rows] = [p for name, p in adapted.named_parameters() if "trainable_tokens" in name]
    assert rows.shape == (2, 128)
    assert rows.requires_grad

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sft_recipes.errors import ModelError
from sft_recipes.models import model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


def loaded(recipe: Path, *overrides: str) -> Any:
    wanted = parse.load(recipe, overrides).recipe
    return model.load_model(wanted, load_tokenizer(wanted.model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_of_the_recipe(write_recipe: WriteRecipe, dtype: str) -> None:
    assert {p.dtype for p in loaded(write_recipe(), f"model.dtype={dtype}").parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("wanted", "used"), [(each, each) for each in ("varlen", "sdpa", "eager")] + [("auto", "varlen")]
)
def test_attention(write_recipe: WriteRecipe, wanted: str, used: str) -> None:
    assert loaded(write_recipe(), f"model.attention={wanted}").config._attn_implementation == used


@pytest.mark.parametrize(
    ("dtype", "mixed", "stored"),
    [
        ("bfloat16", "bf16", torch.bfloat16),
        ("float32", "bf16", torch.bfloat16),
        ("float32", "fp16", torch.float16),
        ("float32", "no", torch.float32),
    ],
)
def test_fsdp2_stores_4_bit_weights_in_the_dtype_that_it_casts_to(
    write_recipe: WriteRecipe, dtype: str, mixed: str, stored: torch.dtype
) -> None:
    """FSDP2 casts weights of another dtype, which would corrupt the packed 4-bit values."""
    overrides = ["model.quantization=nf4", "lora={}", "launch.strategy=fsdp2"]
    overrides += [f"model.dtype={dtype}", f"train.mixed_precision={mixed}"]
    recipe = parse.load(write_recipe(), overrides).recipe

    assert (
        model._quantization(recipe, model.load_config(recipe))["quantization_config"].bnb_4bit_quant_storage == stored
    )


@pytest.mark.parametrize(("free", "fits"), [(2**20, True), (2**19, False)])
def test_device_of_4_bit_weights(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """0.9 million parameters, those of the embeddings in bfloat16: less than a MiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    recipe = parse.load(write_recipe(), ["model.quantization=nf4", "lora={}", "model.dtype=bfloat16"]).recipe
    assert model._fits_on_gpu(recipe, model.load_config(recipe)) == fits


@pytest.mark.parametrize(
    ("overrides", "device_map"),
    [
        ([], {"": 3}),
        (["launch.strategy=zero2"], {"": 3}),
        (["launch.strategy=fsdp2"], None),  # rank 0 reads it, and the shards are sent to the others
        (["launch.strategy=zero3"], None),  # sharded as it is read
        (["model.quantization=nf4", "lora={}"], {"": 3}),
    ],
)
def test_unsharded_weights_are_loaded_onto_the_gpu(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, overrides: list[str], device_map: dict[str, int] | None
) -> None:
    given: dict[str, Any] = {}

    def from_pretrained(*_: Any, **options: Any) -> Any:
        given.update(options)
        return None, {"missing_keys": []}

    recipe = parse.load(write_recipe(), ["model.attention=sdpa", *overrides]).recipe
    config = model.load_config(recipe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model._from_pretrained(recipe, config)
    assert given.get("device_map") == device_map


def test_a_model_loaded_onto_one_device_is_not_model_parallel() -> None:
    """Trainer takes an `hf_device_map` for that, and does not move the model: if this fails, look at `_placement`."""
    on_one = AutoModelForCausalLM.from_pretrained(TINY, device_map={"": "cpu"})
    assert getattr(on_one, "hf_device_map", None) is None


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantized_layers_and_those_skipped(write_recipe: WriteRecipe, quantization: str) -> None:
    adapted = loaded(write_recipe(), f"model.quantization={quantization}", "lora={modules_to_save: [up_proj]}")
    block = adapted.base_model.model.model.layers[0]
    kind = "Linear8bitLt" if quantization == "int8" else "Linear4bit"

    assert type(block.self_attn.q_proj.base_layer).__name__ == kind
    assert type(block.mlp.up_proj.modules_to_save["default"]).__name__ == "Linear"
    assert type(adapted.base_model.model.lm_head).__name__ == "Linear"
    if quantization != "int8":
        assert block.self_attn.q_proj.base_layer.weight.quant_type == quantization
        assert not block.self_attn.q_proj.base_layer.support_avx512bf16_for_cpu


def test_embeddings_with_spare_rows_are_unchanged(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """As in Qwen2.5: 151,665 tokens, 151,936 rows. The new token is trained all the same."""
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=1100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    base.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    adapted = loaded(write_recipe(model={"name": str(tmp_path / "model")}), "model.new_tokens=[<a>]", "lora={}")

    assert adapted.get_input_embeddings().weight.shape[0] == 1100
    rows = {name.split(".")[-4]: p.shape for name, p in adapted.named_parameters() if "trainable_tokens" in name}
    assert rows == {"embed_tokens": (1, 16), "lm_head": (1, 16)}  # the head is not tied, so it has a row of its own


def test_remote_code_runs_only_if_the_recipe_allows_it(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model" / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n",
        encoding="utf-8",
    )
    recipe = write_recipe(model={"name": str(tmp_path / "model")})

    with pytest.raises(ModelError, match=r"Review the code, then set model\.trust_remote_code: true\."):
        loaded(recipe)
    assert type(loaded(recipe, "model.trust_remote_code=true")).__name__ == "Model"

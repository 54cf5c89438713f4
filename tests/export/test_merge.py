from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes.errors import ModelError, OutputError
from sft_recipes.export import merge

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


def adapter(folder: Path, **settings: Any) -> Path:
    """An adapter with random weights, beside the base's tokenizer, as others save it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False, **settings)
    peft.get_peft_model(base, config).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_rounding_of_the_float32_sum(tmp_path: Path, dtype: str) -> None:
    """W' = round(float32(W) + scale · B·A)."""
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    merge.merge(source, tmp_path / "out", dtype=dtype)

    weights, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(TINY / "model.safetensors")
    deltas = load_file(source / "adapter_model.safetensors")
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj"
        a, b = (deltas[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        exact = base[f"{name}.weight"].float() + 8 / 4 * (b @ a)
        assert torch.equal(weights[f"{name}.weight"], exact.to(getattr(torch, dtype)))
    assert torch.equal(weights["model.norm.weight"], base["model.norm.weight"].to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ],
    ids=["dora", "rslora", "embeddings", "untied head", "patterns"],
)
def test_the_merged_model_is_base_and_adapter(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = adapter(tmp_path / "adapter", **settings)
    merge.merge(source, tmp_path / "out", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, str(source)).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits

    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - plain).abs().max() > 0.1


def test_the_base_can_be_given(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    config = (source / "adapter_config.json").read_text("utf-8")
    (source / "adapter_config.json").write_text(config.replace(str(TINY), "/moved/away"), encoding="utf-8")

    with pytest.raises(ModelError, match="/moved/away: the adapter's base cannot be loaded; give it with --base"):
        merge.merge(source, tmp_path / "out")
    merge.merge(source, tmp_path / "out", base="builtin:tiny")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    weights = load_file(source / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({name: torch.cat([w, w], dim=-1) for name, w in weights.items()}, source / "adapter_model.safetensors")

    with pytest.raises(ModelError, match="does not fit the base"):
        merge.merge(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    weights = load_file(source / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({name: w * float("inf") for name, w in weights.items()}, source / "adapter_model.safetensors")

    with pytest.raises(ModelError, match="cannot be merged"):
        merge.merge(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    with pytest.raises(OutputError, match="in use"):
        merge.merge(adapter(tmp_path / "adapter", target_modules=["up_proj"]), tmp_path / "out")

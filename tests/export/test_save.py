import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from sft_recipes.export import save

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


def tiny() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def saved(model: LlamaForCausalLM, folder: Path, *, dtype: str = "float32", max_shard_size: str = "5GB") -> Path:
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    save.save_model(model, tokenizer, folder, dtype=dtype, max_shard_size=max_shard_size, stops=[1])
    return folder


def test_dtype_and_shards(tmp_path: Path) -> None:
    saved(tiny(), tmp_path / "m", dtype="float16", max_shard_size="500KB")

    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text("utf-8"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 600_000 for shard in shards)
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.float16
    for (name, own), (_, original) in zip(loaded.named_parameters(), tiny().named_parameters(), strict=True):
        assert torch.equal(own, original.half()), name


def test_what_a_model_computes_when_it_is_made_is_not_rounded(tmp_path: Path) -> None:
    """Rotary frequencies in bfloat16 would be another model than the one that loads."""
    model, ids = tiny(), torch.arange(300)[None] % 900 + 3
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before

    folder = saved(model, tmp_path / "m", dtype="bfloat16")

    assert model.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.float()(ids).logits)


def test_stops_come_before_those_of_the_base(tmp_path: Path) -> None:
    model, tokenizer = tiny(), AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other end|>"]})
    own = tokenizer.convert_tokens_to_ids("<|other end|>")
    model.generation_config.eos_token_id = [1, own, 99]
    save.set_generation_config(model, tokenizer, [5, 1])

    assert model.generation_config.eos_token_id == [5, 1, own]  # 99 is a word of this tokenizer
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_sampling_settings_without_sampling_can_be_saved(tmp_path: Path) -> None:
    model = tiny()
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9)
    saved(model, tmp_path / "m")

    assert GenerationConfig.from_pretrained(tmp_path / "m").do_sample is True


def test_a_head_that_was_trained_apart_is_saved_apart(tmp_path: Path) -> None:
    model = tiny()
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    saved(model, tmp_path / "m")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(loaded.lm_head.weight, loaded.model.embed_tokens.weight + 1)


def test_the_tokenizer_is_saved_under_a_name_that_others_know(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    save.save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))

    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in config
    assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == tokenizer("a b")["input_ids"]


def test_files_are_safetensors_only(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    saved(LlamaForCausalLM(config), tmp_path / "m", dtype="bfloat16")

    assert not [name for name in os.listdir(tmp_path / "m") if name.endswith((".bin", ".pt", ".pth", ".pkl"))]  # noqa: PTH208
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118

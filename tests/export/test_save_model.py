import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sft_recipes.export import safetensors_io, save_model

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


def tiny() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def saved(model: LlamaForCausalLM, folder: Path, *, dtype: str = "float32", max_shard_size: str = "5GB") -> Path:
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    save_model.save_model(model, tokenizer, folder, dtype=dtype, max_shard_size=max_shard_size, stops=[1])
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


def test_computed_buffers_are_not_rounded(tmp_path: Path) -> None:
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
    save_model.set_generation_config(model, tokenizer, [5, 1])

    assert model.generation_config.eos_token_id == [5, 1, own]  # 99 is a word of this tokenizer
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_sampling_settings_without_sampling_can_be_saved(tmp_path: Path) -> None:
    model = tiny()
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9)
    saved(model, tmp_path / "m")

    assert GenerationConfig.from_pretrained(tmp_path / "m").do_sample is True


def test_an_untied_head_is_saved_separately(tmp_path: Path) -> None:
    model = tiny()
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    saved(model, tmp_path / "m")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(loaded.lm_head.weight, loaded.model.embed_tokens.weight + 1)


def test_the_tokenizer_class_is_known_to_transformers_4(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    save_model.save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))

    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in config
    assert AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"] == tokenizer("a b")["input_ids"]


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 1100,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}
EXPERTS |= {"head_dim": 16, "num_key_value_heads": 2}
ROUTED = EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}


def made(kind: str, folder: Path) -> PreTrainedModel:
    """A small model, loaded as training does: transformers then knows which names its files had."""
    settings = {"qwen3_moe": EXPERTS, "glm4_moe": ROUTED}.get(kind, {})
    config = AutoConfig.for_model(kind, **(SMALL | settings))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def gathered(
    model: PreTrainedModel, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], list[tuple[str, torch.Tensor]]]:
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    return shapes, list(weights.items())


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("llama", None),
        ("gemma3_text", None),  # tied
        ("gpt_neox", None),  # other names in its files
        ("qwen3_moe", None),  # experts that are one tensor in memory
        ("glm4_moe", None),  # and buffers that are saved
        ("hrm_text", "weights gathered layer by layer"),  # a file's tensor is made of several
    ],
)
def test_gathered_weights_are_written_as_save_pretrained_writes_them(
    kind: str, note: str | None, tmp_path: Path
) -> None:
    model = made(kind, tmp_path / "base")
    shapes, weights = gathered(model, torch.bfloat16)
    with save_model.write_gathered(
        model, shapes, weights, tmp_path / "mine", main=True, max_shard_size="20KB"
    ) as written:
        assert written is not None
        assert written.error is None
        assert note in (written.note or "") if note else written.note is None
        save_model.round_weights(model, torch.bfloat16)
        model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")

        mine, theirs = (safetensors_io.read_model(tmp_path / name) for name in ("mine", "theirs"))
        assert mine.keys() == theirs.keys() == written.sha256.keys()
        for name, stored in mine.items():
            assert stored.dtype == theirs[name].dtype
            assert torch.equal(stored.whole(), theirs[name].whole()), name
            assert stored.sha256() == written.sha256[name]
        indices = [
            json.loads((tmp_path / name / safetensors_io.INDEX).read_text("utf-8")) for name in ("mine", "theirs")
        ]
        assert indices[0]["metadata"] == indices[1]["metadata"]
    assert not (tmp_path / "mine").exists()


def test_weights_that_can_only_be_converted_together_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for name, _ in tiny().named_parameters() if "norm" in name}

    def together(_model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All norms are one tensor of the files."""
        if 0 < len(names & weights.keys()) < len(names):
            raise ValueError("not all norms are there")
        norms = [weights.pop(name) for name in sorted(names & weights.keys())]
        return weights | ({"norms": torch.cat(norms)} if norms else {})

    monkeypatch.setattr(save_model, "revert_weight_conversion", together)
    model = tiny()
    shapes, weights = gathered(model, torch.float32)
    with save_model.write_gathered(
        model, shapes, weights, tmp_path / "mine", main=True, max_shard_size="5GB"
    ) as written:
        assert written is not None
        assert written.error is None
        assert "as a whole in host memory" in (written.note or "")
        stored = safetensors_io.read_model(tmp_path / "mine")
        assert torch.equal(stored["norms"].whole(), together(model, dict(weights))["norms"])


def test_all_weights_are_gathered_even_if_writing_fails(tmp_path: Path) -> None:
    """Other ranks take part in it."""
    model = tiny()
    shapes, weights = gathered(model, torch.float32)
    weights[3][1][0] = float("nan")
    for folder, said in (
        (tmp_path / "mine", f"{weights[3][0]} has NaN or Inf in float32"),
        (tmp_path / "no" / "where", ""),
    ):
        left = iter(weights)
        with save_model.write_gathered(model, shapes, left, folder, main=True, max_shard_size="5GB") as written:
            assert written is not None
            assert said in str(written.error) if said else isinstance(written.error, FileNotFoundError)
            assert next(left, None) is None
        left = iter(weights)
        with save_model.write_gathered(model, shapes, left, folder, main=False, max_shard_size="5GB") as written:
            assert not folder.exists()
            assert next(left, None) is None


def test_files_are_safetensors_only(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    saved(LlamaForCausalLM(config), tmp_path / "m", dtype="bfloat16")

    assert not [name for name in os.listdir(tmp_path / "m") if name.endswith((".bin", ".pt", ".pth", ".pkl"))]  # noqa: PTH208
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118

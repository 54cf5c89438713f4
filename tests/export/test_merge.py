import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sft_recipes import atomic_files
from sft_recipes.errors import ModelError, OutputError, RunError
from sft_recipes.export import merge, merge_plan, safetensors_io, save_model, verify
from sft_recipes.export.probe import Probe
from tests.commands import forked

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
IDS = torch.arange(5, 40)[None]


def llama(folder: Path) -> Path:
    """The embedded model, whose head shares the weight of its embeddings."""
    return TINY


def gpt2(folder: Path) -> Path:
    """Convolutions for layers, in files without the prefix that the model's own names have."""
    torch.manual_seed(1)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=1024, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): w for name, w in weights.items()}, folder / "model.safetensors")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def untied(folder: Path) -> Path:
    """Biases, a head of its own, bfloat16, several files."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path = TINY, *, resized: int = 0, beginning: Any = False, **settings: Any) -> Path:
    """An adapter with random weights, beside the base's tokenizer, as others save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if resized:
        tokenizer.add_tokens([f"<new {number}>" for number in range(resized)])
        rows = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(rows + resized)
        ends = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
        settings["trainable_token_indices"] = {end: [3, *range(rows, rows + resized)] for end in ends}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=beginning, **settings)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens" in name or "modules_to_save" in name or "lora_B.default.bias" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    adapted.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel | peft.PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


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


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": "all-linear"}),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "dora": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "patterns": (
        llama,
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "head in full, of two": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings in full, of two": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both in full": (
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "norm in full": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}),
    "rows of tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 9]}}),
    "new tokens": (llama, {"target_modules": ["q_proj"], "resized": 3}),
    "new tokens, two ends": (untied, {"target_modules": ["q_proj"], "resized": 3}),
    "convolutions": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "convolutions, dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "lora bias": (untied, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "several files": (untied, {"target_modules": "all-linear"}),
    "head and embeddings": (untied, {"target_modules": ["embed_tokens", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_base_and_adapter(tmp_path: Path, kind: str) -> None:
    """Streamed; compared with PEFT's unmerged model, here and by the merge itself."""
    make, settings = KINDS[kind]
    base = make(tmp_path / "base")
    source = adapter(tmp_path / "adapter", base, **settings)
    merge.merge(source, tmp_path / "out", dtype="float32")

    assert json.loads((tmp_path / "out" / "merge.json").read_text("utf-8"))["merged_by"] == "streaming"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = logits(plain)
    if settings.get("resized"):
        plain.resize_token_embeddings(without.shape[-1] + settings["resized"])
    if kind in ("embeddings", "tied head"):  # the other end stays as it is
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    expected = logits(peft.PeftModel.from_pretrained(plain, str(source)))
    merged, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)

    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert (logits(merged)[..., : without.shape[-1]] - without).abs().max() > 0.01
    tied = make is not untied and kind in (
        "linear", "rslora", "dora", "patterns", "both in full", "norm in full", "rows of tokens", "new tokens",
        "convolutions", "convolutions, dora", "biases",
    )  # fmt: skip
    assert merged.config.tie_word_embeddings == tied


def test_adapters_that_cannot_be_streamed_are_merged_by_peft(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["q_proj"], beginning="pissa")
    said = merge.merge(source, tmp_path / "out", dtype="float32")

    assert "merged by PEFT, in memory: init_lora_weights pissa changes the base" in said
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(base, str(source)))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-3, rtol=1e-3
    )


def test_shards_index_and_hashes(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules="all-linear")
    merge.merge(source, tmp_path / "out", max_shard_size="300KB")

    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 4
    index = json.loads((tmp_path / "out" / safetensors_io.INDEX).read_text("utf-8"))
    assert sorted(set(index["weight_map"].values())) == files
    listed = json.loads((tmp_path / "out" / "merge.json").read_text("utf-8"))["files"]
    assert listed.keys() == {file.name for file in (tmp_path / "out").iterdir()} - {"merge.json"}
    checked = subprocess.run(
        ["sha256sum", *listed], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    ).stdout.split()
    assert checked[::2] == [each["sha256"] for each in listed.values()]


def test_the_base_can_be_given(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    config = (source / "adapter_config.json").read_text("utf-8")
    (source / "adapter_config.json").write_text(config.replace(str(TINY), "/moved/away"), encoding="utf-8")

    with pytest.raises(
        ModelError, match=r"/moved/away: the adapter's base cannot be loaded: .* Pass the base with --base"
    ):
        merge.merge(source, tmp_path / "out")
    merge.merge(source, tmp_path / "out", base="builtin:tiny")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_base_that_is_a_pickle(tmp_path: Path) -> None:
    base = untied(tmp_path / "base")
    source = adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    for file in (*base.glob("*.safetensors"), base / safetensors_io.INDEX):
        file.unlink()
    (base / "pytorch_model.bin").touch()

    with pytest.raises(ModelError, match=r"no safetensors weights. Its pytorch_model.bin is a pickle"):
        merge.merge(source, tmp_path / "out")


def rewritten(source: Path, change: Any) -> Path:
    weights = load_file(source / "adapter_model.safetensors")
    save_file(change(weights), source / "adapter_model.safetensors")
    return source


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda w: {name: torch.cat([t, t], dim=-1) for name, t in w.items()},
            r"does not fit the base: .* has shape \[352, 128\] \(",
        ),
        (lambda w: {name: t * float("inf") for name, t in w.items()}, "would have NaN or Inf"),
        (
            lambda w: w | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 128)},
            "does not fit",
        ),
        (lambda w: w | {"base_model.model.extra": torch.ones(4)}, "unknown tensors base_model.model.extra"),
    ],
    ids=["another model's", "not finite", "a layer too many", "a stray tensor"],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, change: Any, said: str) -> None:
    source = rewritten(adapter(tmp_path / "adapter", target_modules=["up_proj"]), change)

    with pytest.raises(ModelError, match=said):
        merge.merge(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_lora_bias_without_a_bias_in_the_base_is_refused(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    config = json.loads((source / "adapter_config.json").read_text("utf-8")) | {"lora_bias": True}
    (source / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_B.bias"
    rewritten(
        source,
        lambda w: w | {name.format(n): torch.ones(w[f"{name.format(n)[:-5]}.weight"].shape[0]) for n in range(4)},
    )

    with pytest.raises(ModelError, match=r"lora_bias: the base has no model.layers.0.mlp.up_proj.bias"):
        merge.merge(source, tmp_path / "out")


def test_a_token_without_weights_is_refused(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["q_proj"], resized=3)
    config = json.loads((source / "adapter_config.json").read_text("utf-8"))
    config["trainable_token_indices"] = {"embed_tokens": [3, 1024, 1025, 1029]}
    (source / "adapter_config.json").write_text(json.dumps(config), "utf-8")

    with pytest.raises(ModelError, match="neither base nor adapter has weights of token 1027"):
        merge.merge(source, tmp_path / "out")


def test_a_wrong_merge_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer gets half of its delta."""
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    plan_layer = merge_plan._plan_layer

    def half(base: Any, config: Any, layer: str, parts: Any) -> list[Any]:
        operations = plan_layer(base, config, layer, parts)
        return [replace(each, scale=each.scale / 2) for each in operations] if ".2." in layer else operations

    monkeypatch.setattr(merge_plan, "_plan_layer", half)
    with pytest.raises(RunError) as caught:
        merge.merge(source, tmp_path / "out")

    said = str(caught.value)
    assert (
        f"{tmp_path / 'out'}: verification failed: original: the exported model is not the trained model: max logit "
        in said
    )
    assert "; first difference in layer 2 (up to " in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_missing_delta_smaller_than_rounding_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delta of one layer changes the logits less than rounding does."""
    source = rewritten(
        adapter(tmp_path / "adapter", target_modules=["up_proj"]), lambda w: {name: t * 0.1 for name, t in w.items()}
    )
    apply = merge_plan.AddLora.apply
    monkeypatch.setattr(
        merge_plan.AddLora,
        "apply",
        lambda self, tensors: tensors[self.name] if ".2." in self.name else apply(self, tensors),
    )
    with pytest.raises(RunError, match=r"model.layers.2.mlp.up_proj.weight is not the sum of base and adapter"):
        merge.merge(source, tmp_path / "out")


def test_missing_adapter_tensors_are_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    source = rewritten(
        adapter(tmp_path / "adapter", target_modules=["up_proj"]), lambda w: {k: t for k, t in w.items() if k != key}
    )
    with pytest.raises(ModelError, match=rf"1 tensors that adapter_config.json requires are missing, such as {key}"):
        merge.merge(source, tmp_path / "out")


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    config = json.loads((source / "adapter_config.json").read_text("utf-8")) | {"base_model_name_or_path": None}
    (source / "adapter_config.json").write_text(json.dumps(config), "utf-8")

    with pytest.raises(ModelError, match=r"adapter_config.json does not name a base. Pass the base with --base"):
        merge.merge(source, tmp_path / "out")


def test_embeddings_with_an_adapter_and_more_rows(tmp_path: Path) -> None:
    """PEFT saves embeddings that have grown whole, next to the adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.resize_token_embeddings(1027)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["embed_tokens", "q_proj"]
    )
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "adapter")
    merge.merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 1027


def test_two_merges_into_one_directory(tmp_path: Path) -> None:
    with atomic_files.atomic_dir(tmp_path / "out"):
        with pytest.raises(OutputError, match="out: another process is writing it"):
            merge.merge(adapter(tmp_path / "adapter", target_modules=["up_proj"]), tmp_path / "out")
        assert (tmp_path / ".out.partial").is_dir()


def test_an_adapter_that_left_its_run_knows_its_base(tmp_path: Path) -> None:
    source = quantized(tmp_path / "run", NF4, target_modules=["up_proj"])
    Probe([], None, NF4.to_dict(), "float32").save_quantization(source)
    source.rename(tmp_path / "moved")

    assert any(line.startswith("kept: ") for line in merge.merge(tmp_path / "moved", tmp_path / "out"))


def test_a_wrong_tokenizer_template_or_eos_fails_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = adapter(tmp_path / "run" / "adapter", target_modules=["up_proj"])
    prompt = {"messages": [{"role": "user", "content": "Hi"}], "ids": [1, 2, 3]}
    Probe([], prompt).save(tmp_path / "run")

    def wrong(model: PreTrainedModel, tokenizer: Any, folder: Path, *, dtype: str, stops: list[int]) -> None:
        tokenizer.add_tokens(["hat"])
        save_model.save_around(model, tokenizer, folder, dtype=dtype, stops=stops)
        (folder / "generation_config.json").write_text('{"eos_token_id": 7}', "utf-8")

    monkeypatch.setattr(merge, "save_around", wrong)
    with pytest.raises(RunError) as caught:
        merge.merge(source, tmp_path / "out")

    lines = [line.partition(" verification failed: ")[2] for line in caught.value.lines]
    assert len(lines) == 3
    assert lines[0].startswith("tokenizer: the token ids differ from those of training, for \"  The cat's 12 hats")
    assert lines[1].startswith("chat template: it does not render the prompt of training")
    assert lines[2].startswith("generation_config.json: does not stop at")
    assert not (tmp_path / "out").exists()


def test_training_without_effect_is_a_warning(tmp_path: Path) -> None:
    source = rewritten(
        adapter(tmp_path / "adapter", target_modules=["up_proj"]), lambda w: {name: t * 0 for name, t in w.items()}
    )
    assert "warning: training changed nothing: the exported model is the base" in merge.merge(source, tmp_path / "out")
    small = rewritten(
        adapter(tmp_path / "adapter", target_modules=["up_proj"]), lambda w: {name: t * 0.003 for name, t in w.items()}
    )
    assert any(
        "rounding to bfloat16 changes the logits by up to" in line for line in merge.merge(small, tmp_path / "b")
    )


def test_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    with pytest.raises(OutputError, match="out: already exists"):
        merge.merge(adapter(tmp_path / "adapter", target_modules=["up_proj"]), tmp_path / "out")


def quantized(
    folder: Path, quantization: BitsAndBytesConfig, base: Path = TINY, loaded: str = "float32", **settings: Any
) -> Path:
    """An adapter of a run that trained it on a quantized base."""
    source = adapter(folder / "adapter", base, **settings)
    ids = list(range(5, 60))
    Probe([{"input_ids": ids, "labels": ids}], None, quantization.to_dict(), loaded).save(folder)
    return source


NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"]
)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head"])
INT8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])


@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [NF4, FP4, INT8], ids=["nf4", "fp4", "int8"])
def test_the_dequantized_base_equals_that_of_training(tmp_path: Path, config: BitsAndBytesConfig, loaded: str) -> None:
    """Also those of its layers that have no adapter. Verified against what bitsandbytes makes of the base in that type."""
    source = quantized(tmp_path / "run", config, loaded=loaded, target_modules=["up_proj"])
    said = merge.merge(source, tmp_path / "out", base="dequantized", dtype="float32")
    report = json.loads((tmp_path / "out" / "merge.json").read_text("utf-8"))
    figures = report["verification"]["dequantized"]["vs_quantized_base"]

    assert report["merged_into"] == "dequantized"
    # int8 rounds what goes in, too; what it is compared to here is computed in float32, without bfloat16's rounding.
    assert figures["max_logit_diff"] < (0.6 if config is INT8 else 0.002 if loaded == "float32" else 0.03)
    assert said[0].startswith("merged into dequantized base: loss ")
    base, merged = load_file(TINY / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    off = {name: (merged[name] - base[name].float()).norm() / base[name].float().norm() for name in base}
    assert off["model.layers.0.self_attn.q_proj.weight"] > 0.005  # no adapter there
    assert off["model.embed_tokens.weight"] == off["model.norm.weight"] == 0


def test_both_bases_are_merged_and_the_lower_loss_is_kept(tmp_path: Path) -> None:
    source = quantized(tmp_path / "run", NF4, target_modules=["up_proj"])
    said = merge.merge(source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge.json").read_text("utf-8"))
    figures = report["verification"]

    assert list(figures) == ["original", "dequantized"]
    assert report["merged_into"] == min(figures, key=lambda name: figures[name]["loss"])
    assert [line.partition(":")[0] for line in said[:3]] == [
        "merged into original base", "merged into dequantized base", "kept",
    ]  # fmt: skip
    for chosen in figures:
        merge.merge(source, tmp_path / chosen, base=chosen)
        same = (tmp_path / chosen / "model.safetensors").read_bytes() == (
            tmp_path / "out" / "model.safetensors"
        ).read_bytes()
        assert same == (chosen == report["merged_into"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == []


def test_a_quantized_base_of_convolutions(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    source = quantized(tmp_path / "run", NF4, base, target_modules=["c_attn"])
    merge.merge(source, tmp_path / "out", base="dequantized", dtype="float32")
    figures = json.loads((tmp_path / "out" / "merge.json").read_text("utf-8"))["verification"]["dequantized"]

    assert figures["max_logit_diff"] < 1e-3


def test_base_dequantized_requires_a_record_of_the_quantization(tmp_path: Path) -> None:
    source = adapter(tmp_path / "adapter", target_modules=["up_proj"])
    with pytest.raises(ModelError, match=r"--base dequantized: .* has no record of a quantized base"):
        merge.merge(source, tmp_path / "out", base="dequantized")


def test_peft_merges_into_the_original_alone(tmp_path: Path) -> None:
    source = quantized(tmp_path / "run", NF4, target_modules=["embed_tokens"], use_dora=True)
    said = merge.merge(source, tmp_path / "out", base="original")
    assert any(line.startswith("merged by PEFT, in memory: ") for line in said)
    with pytest.raises(
        ModelError, match=r"--base dequantized: only PEFT can merge .*, and not into a dequantized base"
    ):
        merge.merge(source, tmp_path / "other", base="dequantized")
    assert not (tmp_path / "other").exists()


@pytest.mark.fresh
def test_killed_at_any_point_the_next_try_works(tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "adapter", target_modules="all-linear"), tmp_path / "out"
    for delay in (0.01, 0.1, 0.5, 2):
        merging = forked(merge.merge, source, out)
        time.sleep(delay)
        merging.kill()
        merging.join()
        assert merging.exitcode == -signal.SIGKILL
        assert not out.exists()
    said = merge.merge(source, out)
    assert said[0].startswith("verify: passed in a separate process; max logit difference ")
    assert "; loss on built-in samples: " in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


@pytest.mark.fresh
def test_a_killed_verification_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n", "utf-8")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(RunError, match="out: verification failed: its process was killed"):
        merge.merge(adapter(tmp_path / "adapter", target_modules=["up_proj"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.fresh
def test_a_failed_verification_process_names_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    request = verify.Request(
        {"x": str(tmp_path / "empty")}, "float32", str(TINY), [1], str(TINY), adapter=str(tmp_path)
    )
    with pytest.raises(RunError, match="its process failed: "):
        verify.verify(request)
    shutil.rmtree(tmp_path / "empty")

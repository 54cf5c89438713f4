"""The predicted memory of a training step against what the allocator counts when the Trainer makes it."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._C._profiler import _EventType
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sft_recipes import model_dir
from sft_recipes.data import encoder, prepare
from sft_recipes.errors import ModelError
from sft_recipes.memory import autosize, fake_kernels, memory_trace, prediction, remedies
from sft_recipes.memory.prediction import Footprint, Part, Phase
from sft_recipes.models import model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import trainer
from sft_recipes.training.build import build_trainer

WITHIN = 0.05
LEAST: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 688,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE | {"tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "mistral": MistralConfig(**SHAPE, sliding_window=50),
    "gpt2": GPT2Config(n_embd=256, n_layer=4, n_head=8, vocab_size=2048, n_positions=512),
    # as a model that trains for real, a large vocabulary beside few layers
    "wide": LlamaConfig(**SHAPE | {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 3}),
    # and one whose largest moment is in a layer, not in the loss
    "deep": LlamaConfig(**SHAPE | {"vocab_size": 1024, "intermediate_size": 6144}),
}
BF16 = {"model": {"dtype": "bfloat16"}, "train": {"mixed_precision": "bf16"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full, float32, packed": ("llama", {}),
    "full, bfloat16, every second layer checkpointed": (
        "wide",
        {"model": {"dtype": "bfloat16"}, "train": {"gradient_checkpointing": 2}},
    ),
    "full, float32 under autocast, 8-bit optimizer": (
        "qwen2",
        {"train": {"mixed_precision": "bf16", "optimizer": "adamw_bnb_8bit"}},
    ),
    "full, float32, packed, a mask of all pairs": ("llama", {"model": {"attention": "sdpa"}}),
    "full, packed, windows shorter than documents": ("mistral", {}),
    "full, padded rows, one micro-batch a step": (
        "qwen3",
        {"data": {"packing": "none"}, "train": {"micro_batch_size": 4}},
    ),
    "LoRA, float32": ("gpt2", {"lora": {}}),
    "LoRA with dropout, bfloat16 under autocast, every layer checkpointed": (
        "deep",
        {"lora": {"dropout": 0.1}, **BF16, "train": {"mixed_precision": "bf16", "gradient_checkpointing": True}},
    ),
    "QLoRA, 4 bits": (
        "llama",
        {"lora": {}, "model": {"dtype": "bfloat16", "quantization": "nf4"}, "train": BF16["train"]},
    ),
    "QLoRA, 8 bits, every layer checkpointed": (
        "deep",
        {
            "lora": {},
            "model": {"dtype": "bfloat16", "quantization": "int8"},
            "train": {"mixed_precision": "bf16", "gradient_checkpointing": True},
        },
    ),
}


def recipe_of(folder: Path, sections: dict[str, Any]) -> Recipe:
    rows = folder / "rows.jsonl"
    # Documents of one length that is longer than a sequence and of one that is not, so that padded rows are met.
    texts = (" ".join(f"word number {row} {n}" for n in range(60 if row % 4 else 4)) for row in range(60))
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": str(rows),
            "format": "text",
            "eval": None,
            "max_length": 160,
            "packing": "wrapped",
            "overlong": "truncate",
            "shuffle": False,
        },
        "train": {
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "max_steps": 2,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
        },
        "checkpoint": {"every": None},
        "output_dir": str(folder / "run"),
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    if recipe["data"]["packing"] == "wrapped":
        del recipe["data"]["overlong"]
    return Recipe.model_validate(recipe)


def random_model(folder: Path, config: PreTrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir.BUILTIN / "tiny" / file, folder / "model")


def build(recipe: Recipe, folder: Path) -> trainer.Trainer:
    tokenizer = load_tokenizer(recipe.model)
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer), cached=False)
    (folder / "run").mkdir()
    loaded = model.load_model(recipe, tokenizer)
    return build_trainer(recipe, loaded, tokenizer, data, folder / "run", Console(file=io.StringIO()))


def allocated(sft: trainer.Trainer) -> int:
    """Most bytes that torch's CPU allocator had given out at once while it trained, with the model's own."""
    held = {}
    for tensor in [*sft.model.parameters(), *sft.model.buffers()]:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train(sft, None)
    events = [
        event
        for event in _walk(profile.profiler.kineto_results.experimental_event_tree())
        if event.tag == _EventType.Allocation
    ]
    # By address: of what was there before, the profiler reports sizes that are left over from earlier profiles.
    sizes: dict[int, int] = {}
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        now -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            now += size
        most = max(most, now)
    return sum(held.values()) + most


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_what_the_allocator_counts(case: str, tmp_path: Path) -> None:
    name, sections = CASES[case]
    random_model(tmp_path, CONFIGS[name])
    recipe = recipe_of(tmp_path, sections)

    predicted = memory_trace.Predictor(memory_trace.load_traceable_config(recipe), "cpu", whole=True)(recipe)
    counted = allocated(build(recipe, tmp_path))

    print(f"{case}: predicted {predicted.peak_bytes / 2**20:.1f} MiB, counted {counted / 2**20:.1f} MiB")
    assert predicted.peak_bytes == pytest.approx(counted, rel=WITHIN)


def of(config: PreTrainedConfig, device: str = "cpu", *, whole: bool = False, **sections: Any) -> Footprint:
    values = {
        "model": {"name": "x"},
        "data": {"train": "x", "max_length": 256},
        "train": {"micro_batch_size": 2, "global_batch_size": 8},
        "output_dir": "x",
    }
    recipe = Recipe.model_validate(
        {
            key: {**values.get(key, {}), **section} if isinstance(section, dict) else section
            for key, section in {**values, **sections}.items()
        }
    )  # type: ignore[dict-item]
    return memory_trace.Predictor(config, device, whole=whole)(recipe)


@pytest.mark.parametrize(
    ("layers", "device", "sections"),
    [
        (8, "cuda", {"train": {"gradient_checkpointing": False}}),
        (11, "cpu", {"lora": {}, "train": {"gradient_checkpointing": 2}}),
        (8, "cpu", {"model": {"dtype": "float32"}, "train": {"global_batch_size": 2}}),
    ],
)
def test_extrapolation_is_the_whole_model(layers: int, device: str, sections: dict[str, Any]) -> None:
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers})

    few, whole = of(config, device, **sections), of(config, device, whole=True, **sections)

    assert few.peak == pytest.approx(whole.peak, abs=1)
    assert whole.size.layers > 5  # else it is the same trace
    assert (few.size.parameters, few.size.trained, few.size.layers) == (
        whole.size.parameters,
        whole.size.trained,
        layers,
    )


def test_layers_of_several_kinds_are_extrapolated_by_their_pattern() -> None:
    def repeats(config: PreTrainedConfig, every: bool | int = True) -> tuple[int, int] | None:
        train = {"gradient_checkpointing": every}
        return memory_trace.Predictor(config, "cpu").repeats(Recipe.model_validate({**LEAST, "train": train}))

    def kinds(*names: str) -> PreTrainedConfig:
        layers = [f"{name}_attention" for name in names]
        return Qwen3Config(**SHAPE | {"num_hidden_layers": len(layers)}, layer_types=layers)

    assert repeats(LlamaConfig(**SHAPE | {"num_hidden_layers": 12})) == (0, 1)
    assert repeats(kinds(*["sliding", "full"] * 6)) == (0, 2)
    assert repeats(kinds(*["sliding", "full"] * 24), 3) == (0, 6)
    assert repeats(kinds(*["sliding"] * 3, *["full"] * 9)) == (3, 1)
    assert repeats(kinds(*["full"] * 9, *["sliding"] * 3)) is None
    assert repeats(CONFIGS["llama"]) is None  # few enough to be traced whole


def test_experts_behind_dense_layers() -> None:
    """As in DeepSeek's models, whose config only has the number of layers that are dense."""
    shape = {**SHAPE, "hidden_size": 64, "num_hidden_layers": 12, "n_routed_experts": 4, "moe_intermediate_size": 32}
    config = DeepseekV3Config(
        **shape | {"num_key_value_heads": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        first_k_dense_replace=3, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip

    few, whole = of(config), of(config, whole=True)

    assert (few.size.parameters, few.peak) == (whole.size.parameters, pytest.approx(whole.peak, abs=1))


def test_parts() -> None:
    """What is known without a trace: two bytes a weight, a gradient of each, two moments; four a value of an adapter."""
    config = CONFIGS["llama"]
    number = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())

    full, lora = of(config), of(config, lora={})

    assert full.size.parameters == full.size.trained == number
    assert full.peak[Part.WEIGHTS] == full.peak[Part.GRADIENTS] == 2 * number
    assert full.phases[Phase.CLIP][Part.OPTIMIZER] == pytest.approx(4 * number, rel=1e-3)  # and the count of steps
    assert lora.peak[Part.WEIGHTS] == 2 * number
    assert lora.peak[Part.ADAPTERS] == lora.peak[Part.GRADIENTS] == 4 * lora.size.trained
    assert lora.size.parameters == number + lora.size.trained


def test_the_check_of_isolation_is_not_checkpointed_and_builds_logits() -> None:
    """Of two documents, in the preflight: all layers' activations, and float32 logits of a large vocabulary."""
    config = LlamaConfig(**SHAPE | {"vocab_size": 65536})
    tokens, step = 2 * memory_trace.ISOLATION_TOKENS, {"gradient_checkpointing": True}

    found = of(config, train=step).phases[Phase.PREFLIGHT]
    deeper = of(LlamaConfig(**SHAPE | {"vocab_size": 65536, "num_hidden_layers": 8}), train=step).phases[
        Phase.PREFLIGHT
    ]

    assert (
        found[Part.ACTIVATIONS] > 2 * tokens * 65536 + 4 * tokens / 2 * 65536
    )  # in bfloat16, and those of one in float32
    per_layer = (deeper[Part.ACTIVATIONS] - found[Part.ACTIVATIONS]) / 4
    assert per_layer > 10 * 2 * tokens * config.hidden_size  # more than what checkpointing keeps, one value in bfloat16
    for without in ({"data": {"packing": "none"}}, {"train": {"preflight": False}}):
        assert Phase.PREFLIGHT not in of(config, **without).phases


def test_on_a_gpu_packed_rows_cost_a_mask_of_all_pairs_and_flash_attention_none() -> None:
    long = {"data": {"max_length": 2048}, "train": {"gradient_checkpointing": False}}
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 4096})

    masked, flash = (of(config, "cuda", model={"attention": name}, **long) for name in ("sdpa", "flash_attention_2"))

    pairs = (2 * 2048) ** 2
    # each layer keeps the mask as a number of two bytes for each pair
    assert masked.peak_bytes - flash.peak_bytes >= 2 * config.num_hidden_layers * pairs


def test_dropout_costs_a_byte_a_value_on_a_gpu() -> None:
    config, off = LlamaConfig(**SHAPE | {"intermediate_size": 4096}), {"gradient_checkpointing": False}
    peak = {
        (device, dropout): of(config, device, lora={"dropout": dropout}, train=off).phases[Phase.FORWARD][
            Part.ACTIVATIONS
        ]
        for device in ("cpu", "cuda")
        for dropout in (0.0, 0.1)
    }

    assert 0 < peak["cuda", 0.1] - peak["cuda", 0.0] < 0.7 * (peak["cpu", 0.1] - peak["cpu", 0.0])


def test_experts_in_float32_too() -> None:
    config = Qwen3MoeConfig(**SHAPE, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)

    found = of(config, model={"dtype": "float32"})

    assert found.size.experts == 4 * config.num_hidden_layers * 3 * 64 * 256


def test_leaner_attention() -> None:
    def leaner(device: str, **model: str) -> str | None:
        recipe = Recipe.model_validate(LEAST | {"model": {"name": "x", **model}})
        return fake_kernels.lower_memory_attention(recipe, CONFIGS["llama"], device)

    assert leaner("cuda", attention="sdpa") == leaner("cpu", attention="sdpa") == "varlen"
    assert leaner("cuda", attention="varlen") is None
    assert leaner("cuda", attention="flash_attention_2") is None
    assert leaner("cpu", attention="eager") == "sdpa"
    assert leaner("cpu") is None


def test_weights_that_are_already_quantized(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    CONFIGS["llama"].save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )

    with pytest.raises(ModelError, match="its weights are already quantized"):
        memory_trace.load_traceable_config(recipe_of(tmp_path, {}))


def test_more_tokens_than_can_be_gone_through() -> None:
    with pytest.raises(ModelError, match=r"train.micro_batch_size: memory can .*\(got 25,600,000,000\)"):
        of(CONFIGS["llama"], train={"micro_batch_size": 10**8, "global_batch_size": 10**8})


def test_attention_that_the_run_would_take() -> None:
    recipe = Recipe.model_validate(LEAST)
    assert fake_kernels.attention(recipe, CONFIGS["llama"], "cpu") == fake_kernels.BY_DOCUMENT
    assert fake_kernels.attention(recipe, CONFIGS["llama"], "cuda") == fake_kernels.VARIABLE
    assert fake_kernels.attention(recipe, CONFIGS["gpt2"], "cpu") == "sdpa"  # it has dropout in attention
    padded = Recipe.model_validate(
        LEAST | {"model": {"name": "x", "attention": "varlen"}, "data": {"train": "x", "packing": "none"}}
    )
    assert fake_kernels.attention(padded, CONFIGS["llama"], "cuda") == "sdpa"
    flash = Recipe.model_validate({**LEAST, "model": {"name": "x", "attention": "flash_attention_2"}})
    assert fake_kernels.attention(flash, CONFIGS["llama"], "cuda") == fake_kernels.VARIABLE


def test_a_model_that_cannot_be_traced_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_trace._Step, "run", lambda self: torch.ones(2).nonzero()[0].tolist()[5])

    with pytest.raises(ModelError, match="memory of a model of type llama cannot be predicted"):
        of(CONFIGS["llama"])


def test_auto_is_the_largest_that_fits() -> None:
    values = {
        "model": {"name": "x"},
        "data": {"train": "x", "max_length": 256},
        "train": {"micro_batch_size": "auto", "global_batch_size": 24},
        "output_dir": "x",
    }
    recipe = Recipe.model_validate(values)
    predict = memory_trace.Predictor(CONFIGS["llama"], "cpu")
    peak = {size: predict(remedies.applied(recipe, {"train.micro_batch_size": size})).peak_bytes for size in (1, 4, 8)}

    for size in (1, 4, 8):  # 8 is the largest power of two in 24
        chosen = autosize.largest_micro_batch(recipe, predict, peak[size])
        assert chosen.train.micro_batch_size == size
        assert chosen.sequences_per_step == 24
    assert autosize.largest_micro_batch(recipe, predict, 2 * peak[8]).train.micro_batch_size == 8
    with pytest.raises(ValueError, match="a single sequence does not fit"):
        autosize.largest_micro_batch(recipe, predict, peak[1] - 1)


def test_auto_checkpoints_as_few_layers_as_must_be() -> None:
    recipe = Recipe.model_validate(LEAST | {"train": {"micro_batch_size": 4}})
    predict = memory_trace.Predictor(CONFIGS["llama"], "cpu")
    every = (False, 4, 3, True)  # of 4 layers none, one, two, all
    peak = {n: predict(remedies.applied(recipe, {"train.gradient_checkpointing": n})).peak_bytes for n in every}
    assert sorted(peak.values(), reverse=True) == list(peak.values())

    for layers in every:
        assert autosize.resolve_auto(recipe, predict, peak[layers]).train.gradient_checkpointing == layers
    assert (
        autosize.resolve_auto(recipe, predict, peak[1] / 2).train.gradient_checkpointing is True
    )  # it is left at that
    assert autosize.resolve_auto(recipe, predict, peak[3]).train.micro_batch_size == 4


def test_auto_of_both_prefers_no_checkpointing_once_a_micro_batch_is_large_enough() -> None:
    recipe = Recipe.model_validate(
        LEAST | {"data": {"train": "x", "max_length": 1024}, "train": {"micro_batch_size": "auto"}}
    )
    predict = memory_trace.Predictor(CONFIGS["llama"], "cpu")

    def peak(size: int, layers: bool | int) -> float:
        sized = {"train.gradient_checkpointing": layers, "train.micro_batch_size": size}
        return predict(remedies.applied(recipe, sized)).peak_bytes

    def chosen(capacity: float) -> tuple[Any, Any]:
        train = autosize.resolve_auto(recipe, predict, capacity).train
        return train.micro_batch_size, train.gradient_checkpointing

    assert chosen(peak(8, layers=False)) == (8, False)
    assert chosen(peak(4, layers=False)) == (4, False)
    size, layers = chosen(peak(2, layers=False))  # 2,048 tokens without, more with
    assert size > 2
    assert layers
    # Room for 4,096 tokens with half of the layers recomputed: more tokens with every layer recomputed are not taken.
    half = peak(4, layers=2)
    assert chosen(max(half, peak(8, layers=True)))[1] is not True
    assert chosen(half)[0] == 4
    assert chosen(peak(2, layers=True)) == (2, True)
    with pytest.raises(ValueError, match="a single sequence does not fit"):
        chosen(peak(1, layers=True) - 1)


def test_auto_checkpoints_every_layer_of_weights_that_are_shared_out() -> None:
    shared = LEAST | {"launch": {"processes": 2, "strategy": "fsdp2"}}
    predict = memory_trace.Predictor(CONFIGS["llama"], "cpu")
    settled = autosize.resolve_auto(Recipe.model_validate(shared), predict, 2**50)
    assert settled.train.gradient_checkpointing is True


def test_where_nothing_can_be_predicted_auto_checkpoints_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(tmp_path, CONFIGS["llama"])
    monkeypatch.setattr(memory_trace, "layers_of", lambda _: 1 / 0)
    recipe = recipe_of(tmp_path, {"train": {"gradient_checkpointing": "auto"}})
    assert autosize.resolve_for_run(recipe, tmp_path).train.gradient_checkpointing is True


# --- On a GPU ---------------------------------------------------------------------------------------------------------

B1: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
B8 = B1 | {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128, "intermediate_size": 14336}
B8["tie_word_embeddings"] = False
GPU_CASES: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    # shape, length, micro-batch, sections
    "1B full, bfloat16": (B1, 2048, 4, {}),
    "1B full, bfloat16, no checkpointing": (B1, 1024, 4, {"train": {"gradient_checkpointing": False}}),
    "1B full, float32 under autocast": (B1, 2048, 2, {"model": {"dtype": "float32"}}),
    "1B full, padded": (B1, 1024, 4, {"data": {"packing": "none"}}),
    "8B LoRA": (B8, 2048, 4, {"lora": {}}),
    "8B LoRA, every fourth layer checkpointed": (B8, 1024, 4, {"lora": {}, "train": {"gradient_checkpointing": 4}}),
    "8B LoRA, no checkpointing": (B8, 1024, 2, {"lora": {}, "train": {"gradient_checkpointing": False}}),
    "8B QLoRA": (B8, 1024, 4, {"lora": {}, "model": {"quantization": "nf4"}}),
    "8B full, bfloat16": (B8, 1024, 2, {"model": {"dtype": "bfloat16"}}),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("case", GPU_CASES)
def test_prediction_is_what_a_gpu_counts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights of real shapes; most bytes that the allocator had given out at once, over three steps."""
    shape, length, micro, sections = GPU_CASES[case]
    config = LlamaConfig(**shape)
    config.save_pretrained(tmp_path / "model")
    sizes = {
        "data": {"max_length": length},
        "train": {
            "micro_batch_size": micro,
            "global_batch_size": 2 * micro,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
        },
        "model": {"dtype": "bfloat16"},
    }
    merged = {name: {**sizes.get(name, {}), **sections.get(name, {})} for name in sizes | sections}
    recipe = recipe_of(tmp_path, merged)
    if recipe.lora is not None and recipe.model.quantization:
        # bitsandbytes quantizes while it loads, so there has to be something to load
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    else:
        monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", _random)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir.BUILTIN / "tiny" / file, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    text = " ".join(f"word number {n}" for n in range(length))  # longer than a sequence, so that all are full
    rows.write_text((json.dumps({"text": text}) + "\n") * 40, encoding="utf-8")

    predicted = prediction.on_device(memory_trace.Predictor(config, "cuda")(recipe), "cuda")
    sft = build(recipe, tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train(sft, None)
    counted = torch.cuda.max_memory_allocated()
    del sft
    torch.cuda.empty_cache()

    print(f"{case}: predicted {predicted.peak_bytes / 2**30:.2f} GiB, counted {counted / 2**30:.2f} GiB")
    assert predicted.peak_bytes == pytest.approx(counted, rel=WITHIN)


def _random(name: str, *, config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: Any, **_: Any) -> Any:
    """In place of from_pretrained: weights drawn at random on the GPU, which writing and reading 16 GB takes the place of."""
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return made, {"missing_keys": []}

"""varlen against sdpa with its mask of all pairs, which is the truth here."""

import copy
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.masking_utils import create_bidirectional_sliding_window_mask, create_causal_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.errors import ModelError
from sft_recipes.models import attention
from sft_recipes.models.compiled_layers import compile_layers
from sft_recipes.training import trainer
from tests.conftest import WriteRecipe, build, metrics, run
from tests.cuda.training import recipe_of
from tests.models import graphs

ROUNDING = 1e-5  # float32, relative: sums in another order
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WINDOWS = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, as many heads of keys": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2, windows": Qwen2Config(**SHAPE, sliding_window=7, use_sliding_window=True, layer_types=WINDOWS),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3, experts": Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral, a window": MistralConfig(**SHAPE, sliding_window=7),
    "mistral, a window longer than documents and shorter than the row": MistralConfig(**SHAPE, sliding_window=40),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=7, layer_types=WINDOWS),
    "phi3": Phi3Config(**SHAPE, sliding_window=7),
    "olmo2": Olmo2Config(**SHAPE),
    "neox": GPTNeoXConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "llama4, chunks": Llama4TextConfig(
        **SHAPE | {"num_local_experts": 2, "intermediate_size_mlp": 96, "head_dim": 16},
        attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
    ),
    "deepseek, values narrower than keys": DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 32} | LATENT,
        n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
    ),
}  # fmt: skip
LENGTHS = [5, 1, 30, 2, 17]  # of the documents of a row


def model_of(config: PreTrainedConfig, implementation: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def batch_of(lengths: list[int], vocabulary: int = 128) -> dict[str, Any]:
    """A row as the collator of the training makes it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (sum(lengths),), generator=generator).tolist()
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return dict(collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}]))


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor], within: float = ROUNDING) -> None:
    assert found.keys() == true.keys()
    whole = torch.cat([each.flatten() for each in true.values()]).norm()
    assert all((found[name] - true[name]).norm() <= within * whole for name in true)


# --- The same as sdpa with its mask ----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Documents that were attended to one by one, for each call: else a comparison would be of sdpa with itself."""
    seen: list[list[int]] = []
    by_document = attention.by_document

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], *how: Any) -> Any:
        seen.append(lengths)
        return by_document(query, key, value, lengths, *how)

    monkeypatch.setattr(attention, "by_document", counted)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_mask(name: str, calls: list[list[int]]) -> None:
    batch = batch_of(LENGTHS)
    true, true_gradients = loss_and_gradients(model_of(MODELS[name], "sdpa"), batch)
    assert calls == []
    loss, gradients = loss_and_gradients(model_of(MODELS[name], "varlen"), batch)

    assert loss == pytest.approx(true, rel=ROUNDING)
    assert_close(gradients, true_gradients)
    # Chunks are known to the mask alone, and left to sdpa.
    assert calls == [LENGTHS] * (1 if "chunks" in name else 2)


def test_documents_of_an_opt_model_are_isolated_unlike_with_sdpa() -> None:
    """Its mask is made without positions, so that sdpa's has nothing to tell documents by."""
    config = OPTConfig(**SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 64}, init_std=0.3, dropout=0.0)
    batch = {key: value for key, value in batch_of(LENGTHS).items() if key != "labels"}
    off = {}
    for name in ("sdpa", "varlen"):
        model = model_of(config, name)
        alone = model(batch["input_ids"][:, 6:36]).logits
        off[name] = float((model(**batch, use_cache=False).logits[:, 6:36] - alone).norm() / alone.norm())

    assert off["varlen"] < ROUNDING < 1e-2 < off["sdpa"]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], window: int | None) -> Any:
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (of[:, None] == of[None]).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, scale=0.3).transpose(1, 2)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 10),
)
@settings(deadline=None, max_examples=60)
def test_any_documents(lengths: list[int], heads: tuple[int, int], window: int | None) -> None:
    generator, tokens = torch.Generator().manual_seed(0), sum(lengths)
    query, key, value = (
        torch.randn(1, number, tokens, 8, generator=generator, requires_grad=True)
        for number in (heads[0], heads[1], heads[1])
    )
    weights = torch.randn(1, tokens, heads[0], 8, generator=generator)

    found = attention.by_document(query, key, value, lengths, 0.3, window)
    true = dense(query, key, value, lengths, window)

    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
    for given_, wanted in zip(
        *(torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, true)), strict=True
    ):
        torch.testing.assert_close(given_, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_training_is_the_same(write_recipe: WriteRecipe, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    lines = {}
    for name in ("sdpa", "varlen"):
        sft = build(write_recipe(lora=lora), tmp_path / name, f"model.attention={name}", "log.every=1")
        trainer.train(sft, None)
        lines[name] = [
            value
            for line in metrics(tmp_path / name)
            for key, value in line.items()
            if key in ("loss", "eval_loss", "grad_norm")
        ]

    assert len(lines["sdpa"]) > 6
    assert lines["varlen"] == pytest.approx(lines["sdpa"], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool, calls: list[list[int]]) -> None:
    model, batch = model_of(MODELS["llama"], "varlen"), batch_of(LENGTHS)
    model.train()
    plain, gradients = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, again = loss_and_gradients(model, batch)

    assert loss == plain
    assert all(torch.equal(again[name], gradients[name]) for name in gradients)
    assert len(calls) == 2 + 4  # forward, and forward anew in the backward pass


def test_documents_do_not_see_each_other_to_the_last_bit(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    sft = build(write_recipe(train={"preflight": True}), tmp_path / "run", "model.attention=varlen")
    trainer.train(sft, None)

    found = sft.preflight.results["isolation"]
    assert (found["attention"], found["gradient_leak"]) == ("varlen", 0)


# --- Compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3, experts", "deepseek, values narrower than keys"])
def test_compiled_it_is_the_same_to_the_bit_without_a_graph_break(name: str) -> None:
    """Of two layers one is checkpointed. Rows of several numbers of tokens and documents, one document alone first."""
    rows = [[40], LENGTHS, [7, 9], [3] * 20]
    network = model_of(MODELS[name], "varlen").train()
    network.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    eager = [loss_and_gradients(network, batch_of(lengths)) for lengths in rows]
    torch.compiler.reset()
    counters.clear()
    runs: Counter[str] = Counter()
    compiled_graphs = []

    compile_layers(network, pytest.fail, graphs.counting(runs))
    for lengths, (loss, gradients) in zip(rows, eager, strict=True):
        found, found_gradients = loss_and_gradients(network, batch_of(lengths))
        assert found == loss
        assert all(torch.equal(found_gradients[each], gradients[each]) for each in gradients)
        compiled_graphs.append(counters["stats"]["unique_graphs"])

    assert runs == {"forward": 2 * len(rows), "backward": 2 * len(rows)}  # each layer of each row
    assert not counters["graph_break"]
    assert compiled_graphs[1:] == compiled_graphs[1:2] * 3
    assert compiled_graphs[-1] <= 4  # two layers, and what the row of one document had alone


def test_on_a_gpu_a_layer_waits_for_nothing_and_is_one_graph() -> None:
    """On tensors without values, which raise when a value is asked for; torch's kernel knows its shapes there."""
    with FakeTensorMode(), torch.no_grad():
        query, key, value = (
            torch.empty(1, heads, 64, width, dtype=torch.bfloat16, device="cuda")
            for heads, width in ((4, 64), (2, 64), (2, 32))
        )
        starts = torch.empty(5, dtype=torch.int32, device="cuda")
        mask = attention.LazyMask(lambda: pytest.fail("made a mask"), window=7)

        def layer(longest: int | None) -> torch.Tensor:
            how = {"cu_seq_lens_q": starts, "max_length_q": longest}
            return attention.attend(torch.nn.Module(), query, key, value, mask, **how)[0]

        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
        for out in (layer(30), layer(None), compiled(30)):
            assert (out.shape, out.dtype, out.device.type) == ((1, 64, 4, 32), torch.bfloat16, "cuda")
        with pytest.raises(DataDependentOutputException):
            attention.by_document(query, key, value, starts.diff().tolist())


def test_a_model_that_cannot_be_compiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping, "varlen", torch.compiler.disable(attention.attend)
    )
    network, said = model_of(MODELS["llama"], "varlen"), []
    network.train().activation_checkpointing_enable({"use_reentrant": False})
    compile_layers(network, said.append, graphs.counting(Counter()))
    with torch.no_grad():
        network(**batch_of(LENGTHS), use_cache=False)
    assert said == []
    for _ in range(2):
        loss_and_gradients(network, batch_of(LENGTHS))

    assert said == ["train.compile: torch cannot compile the layers of a llama model. Set it to false."]


# --- Where there are no packed documents -----------------------------------------------------------------------------


def test_padded_rows_and_generation_are_sdpas(calls: list[list[int]]) -> None:
    ids, mask = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0)), torch.ones(2, 12).long()
    mask[0, :5] = 0  # on the left, as answers are generated
    rows: list[dict[str, Any]] = [{"attention_mask": mask}, {"attention_mask": mask.flip(1)}, {}]
    for name in ("llama", "mistral, a window"):
        sdpa, varlen = (model_of(MODELS[name], implementation) for implementation in ("sdpa", "varlen"))
        for row in rows:
            assert torch.equal(varlen(ids, **row).logits, sdpa(ids, **row).logits)
            answers = [m.generate(ids, **row, max_new_tokens=20, do_sample=False) for m in (varlen, sdpa)]
            assert torch.equal(*answers)
    assert calls == []


@pytest.mark.parametrize("name", ["llama", "mistral, a window"])
def test_documents_are_isolated_by_positions_alone(name: str, calls: list[list[int]]) -> None:
    """A forward pass by hand, without the bounds that the collator gives."""
    batch = {key: value for key, value in batch_of(LENGTHS).items() if key in ("input_ids", "position_ids")}
    found, true = (model_of(MODELS[name], each)(**batch, use_cache=False).logits for each in ("varlen", "sdpa"))
    alone = model_of(MODELS[name], "sdpa")(batch["input_ids"][:, 6:36]).logits

    assert torch.equal(found, true)
    torch.testing.assert_close(found[:, 6:36], alone, rtol=1e-4, atol=1e-5)
    assert calls == []


def test_a_cache_does_not_let_them_see_each_other(calls: list[list[int]]) -> None:
    """With a cache transformers looks for no packed documents, and sdpa would let each see those before it."""
    model, batch = model_of(MODELS["llama"], "varlen"), batch_of(LENGTHS)
    assert torch.equal(model(**batch, use_cache=True).logits, model(**batch, use_cache=False).logits)
    assert calls == [LENGTHS] * 4


def test_keys_of_tokens_before_are_left_to_sdpa(calls: list[list[int]]) -> None:
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 6, 8)
    starts, mask = torch.tensor([0, 2], dtype=torch.int32), torch.ones(1, 1, 2, 6, dtype=torch.bool).tril(4)

    found, _ = attention.attend(
        torch.nn.Module(), query, key, key, attention.LazyMask(mask.clone), cu_seq_lens_q=starts
    )

    assert torch.equal(found, scaled_dot_product_attention(query, key, key, mask).transpose(1, 2))
    assert calls == []


def test_with_cross_document_attention_they_see_each_other(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    logits = []
    for name in ("sdpa", "varlen"):
        sft = build(
            write_recipe(data={"packing": "wrapped", "cross_document_attention": True, "shuffle": False, "eval": None}),
            tmp_path / name,
            f"model.attention={name}",
        )
        batch = {key: value for key, value in next(iter(sft.get_train_dataloader())).items() if key != "labels"}
        logits.append(sft.model.eval()(**batch).logits)

    assert torch.equal(*logits)


# --- What it does not know -------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "softcapping": (
        Gemma2Config(**SHAPE, head_dim=16),
        "the attention of a gemma2 model, which differs",
    ),
    "sinks": (GptOssConfig(**SHAPE, head_dim=16), "the attention of a gpt_oss model, which differs"),
    "where documents begin is not passed on": (
        NemotronConfig(**SHAPE),
        "the attention of a nemotron model, which differs",
    ),
    "dropout": (GPT2Config(), r"dropout in attention \(attn_pdrop in the model's config\)"),
    "dropout by another name": (LlamaConfig(**SHAPE, attention_dropout=0.1), r"\(attention_dropout in"),
    "both directions": (LlamaConfig(**SHAPE, is_causal=False), "a model with bidirectional attention"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_models_with_unsupported_attention_are_refused(what: str, device: str) -> None:
    config, why = REFUSED[what]
    with pytest.raises(
        ModelError, match=rf"^model.attention: varlen does not support .*{why}.*\. Set model.attention to auto\.$"
    ):
        attention.select_implementation(recipe_of(model={"attention": "varlen"}), config, device)
    assert attention.select_implementation(recipe_of(), config, device)[0] is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_it_for_packed_documents(name: str, device: str) -> None:
    def chosen(**sections: Any) -> tuple[str | None, str]:
        return attention.select_implementation(recipe_of(**sections), MODELS[name], device)

    assert chosen() == ("varlen", "packed documents, no flash-attn needed")
    assert chosen(data={"packing": "none"}) == (None, "")
    assert chosen(data={"packing": "wrapped", "cross_document_attention": True}) == (None, "")
    assert chosen(model={"attention": "sdpa"}) == ("sdpa", "")
    in_full = chosen(model={"dtype": "float32"}, train={"mixed_precision": "no"})
    assert in_full[0] == ("varlen" if device == "cpu" else None)


@pytest.mark.parametrize(
    "asked",
    [
        {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"position_bias": torch.zeros(1)},
        {"is_causal": False}, {"something_new": 1},
    ],
    ids=lambda asked: next(iter(asked)),
)  # fmt: skip
def test_what_a_layer_asks_for_is_never_left_out(asked: dict[str, Any]) -> None:
    query = torch.randn(1, 4, 6, 8)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)

    attention.attend(torch.nn.Module(), query, query, query, None, cu_seq_lens_q=starts, dropout=0.0, softcap=None)
    with pytest.raises(
        ModelError, match=rf"does not support what Module passes to attention \(got {next(iter(asked))}"
    ):
        attention.attend(torch.nn.Module(), query, query, query, None, cu_seq_lens_q=starts, **asked)


def test_masks_that_are_more_than_causal_within_documents_are_made() -> None:
    config = copy.deepcopy(MODELS["llama"])
    config._attn_implementation = "varlen"
    positions = batch_of(LENGTHS)["position_ids"]
    row: dict[str, Any] = {
        "config": config, "inputs_embeds": torch.zeros(1, sum(LENGTHS), 64), "attention_mask": None,
        "past_key_values": None, "position_ids": positions,
    }  # fmt: skip
    blocks = torch.full_like(positions, -1)
    blocks[0, :4] = 0
    both_ways = copy.deepcopy(config)
    both_ways.is_causal = False

    def odd(_batch: Any, _head: Any, _query: Any, key: Any) -> Any:
        return key % 2 == 0

    assert not isinstance(create_causal_mask(**row), torch.Tensor)
    assert isinstance(create_causal_mask(**row, block_sequence_ids=blocks), torch.Tensor)
    assert isinstance(create_causal_mask(**row, or_mask_function=odd), torch.Tensor)
    assert isinstance(create_causal_mask(**row, and_mask_function=odd), torch.Tensor)
    both_ways.sliding_window = 7
    ahead = {name: each for name, each in row.items() if name != "position_ids"} | {"config": both_ways}
    assert isinstance(create_bidirectional_sliding_window_mask(**ahead), torch.Tensor)
    assert create_causal_mask(**row | {"config": both_ways}) is None  # as for sdpa: every token sees every other


# --- On which GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [None, (7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("width", [32, 42, 128, 256, 264])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_takes_it_if_its_kernel_can(capability: tuple[int, int] | None, width: int, dtype: str) -> None:
    config = Qwen3Config(**SHAPE, head_dim=width)
    wrong = {
        r"float32 on a GPU": dtype == "float32",
        r"GPUs of compute capability below 8.0 \(got 7": capability is not None and capability < (8, 0),
        rf"a multiple of 8 up to 256 \(got {width}\)": width in (42, 264),
    }
    expected = [why for why, here in wrong.items() if here]

    def chosen(device: str = "cuda", **more: Any) -> tuple[str | None, str]:
        sections = {"model": {"dtype": dtype, **more}, "train": {"mixed_precision": "no"}}
        return attention.select_implementation(recipe_of(**sections), config, device, capability)

    name, reason = chosen()
    assert name == (None if expected else "varlen")
    assert not expected or re.match(f"varlen does not support .*{expected[0]}", reason)
    if expected:
        with pytest.raises(ModelError, match=rf"^model.attention: varlen does not support .*{expected[0]}.*to auto\.$"):
            chosen(attention="varlen")
    else:
        assert chosen(attention="varlen")[0] == "varlen"
    assert chosen("cpu")[0] == "varlen"


def test_float32_weights_under_autocast_are_half() -> None:
    recipe = recipe_of(model={"dtype": "float32"}, train={"mixed_precision": "bf16"})
    assert attention.select_implementation(recipe, MODELS["llama"], "cuda", (8, 0))[0] == "varlen"


def test_rows_without_packing_need_no_kernel() -> None:
    recipe = recipe_of(model={"attention": "varlen"}, data={"packing": "none"})
    assert attention.select_implementation(recipe, MODELS["llama"], "cuda", (7, 5))[0] == "varlen"


def test_a_gpu_before_ampere_has_no_flash_attention_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "installed", lambda _: True)
    for capability, name in (((7, 5), None), ((8, 0), "flash_attention_2"), (None, "flash_attention_2")):
        assert attention.select_implementation(recipe_of(), MODELS["llama"], "cuda", capability)[0] == name


@pytest.mark.parametrize("right", [True, False])
def test_the_kernel_is_tried_in_the_widths_of_the_model(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def trial(*how: Any) -> bool:
        tried.append(how)
        return right

    monkeypatch.setattr(attention, "_kernel_is_correct", trial)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    config = MODELS["deepseek, values narrower than keys"]
    recipe = recipe_of(model={"dtype": "float32"}, train={"mixed_precision": "fp16"})

    name, reason = attention.select_here(recipe, config)
    assert tried == [(16, 12, 1, torch.float16)]
    assert name == ("varlen" if right else None)
    assert right or "differs from sdpa" in reason
    assert attention.select_implementation(recipe, config, "cuda")[0] == "varlen"  # a plan for another GPU
    assert len(tried) == 1


WIDTHS: dict[str, tuple[PreTrainedConfig, set[tuple[int, int]]]] = {
    "by the heads": (MODELS["llama"], {(16, 16)}),
    "said": (Qwen3Config(**SHAPE, head_dim=24), {(24, 24)}),
    "glm4_moe": (Glm4MoeConfig(), {(42, 42)}),
    "latent": (MODELS["deepseek, values narrower than keys"], {(16, 12)}),
    "of several kinds of layers": (Gemma4TextConfig(), {(256, 256), (512, 512)}),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_widths_of_heads_are_in_the_config(name: str) -> None:
    config, widths = WIDTHS[name]
    assert attention.head_widths(config) == widths


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_that_attention_gets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **how: Any) -> Any:
        seen.add((query.shape[-1], value.shape[-1]))
        return attention.attend(module, query, key, value, *args, **how)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, "varlen", attend)
    model_of(MODELS[name], "varlen")(**batch_of(LENGTHS), use_cache=False)

    assert seen == attention.head_widths(MODELS[name])


def test_models_that_need_a_tensor_for_a_mask_are_known() -> None:
    """Where a model says so, a mask that is made later would be none: put it into _CUSTOM_MASKS."""
    supported = [
        architecture
        for config, architecture in MODEL_FOR_CAUSAL_LM_MAPPING.items()
        if getattr(architecture, "_supports_attention_backend", False)
        and architecture._supports_sdpa
        and config.model_type not in attention._CUSTOM_MASKS
    ]
    assert len(supported) > 50
    for architecture in supported:
        assert "allow_is_causal_skip=False" not in inspect.getsource(sys.modules[architecture.__module__]), architecture


# --- The run ---------------------------------------------------------------------------------------------------------


def test_the_export_does_not_name_it(write_recipe: WriteRecipe) -> None:
    folder, said = run(write_recipe(lora={"rank": 2}))

    assert "attention varlen (packed documents, no flash-attn needed)" in said
    assert json.loads((folder / "manifest.json").read_text("utf-8"))["attention"] == "varlen"
    assert "attn_implementation" not in (folder / "model" / "config.json").read_text("utf-8")
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert exported.config._attn_implementation == "sdpa"


# --- The kernel ------------------------------------------------------------------------------------------------------


def within(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    window: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """What the kernel computes, in its layout (tokens, heads, width); flash attention 2's window leaves oneself out."""
    assert window[1] == 0  # else tokens see those behind them
    assert longest == starts.diff().max()
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    assert query.shape[-1] == value.shape[-1]
    size = None if window[0] == -1 else window[0] + 1
    return attention.by_document(query, key, value, starts.diff().tolist(), scale, size)[0]


def of_2_11(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    return within(query, key, value, cu_seq_q, max_q, window_size, scale or query.shape[-1] ** -0.5)


def of_2_12(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q is cu_seq_k  # by which 2.15 knows that it can take cuDNN's kernel
    return within(query, key, value, cu_seq_q, max_q, window_size, scale or query.shape[-1] ** -0.5)


@pytest.mark.parametrize("version", [of_2_11, of_2_12])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_of_each_torch_is_asked_for_the_same(
    version: Callable[..., Any], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions with the arguments of the versions stand for kernels that need a GPU."""
    monkeypatch.setattr(attention, "varlen_attn", version)
    monkeypatch.setattr(attention, "_HAS_ENABLE_GQA", version is of_2_12)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 6)
    starts = torch.tensor([0, 1, 4, 9], dtype=torch.int32)

    found = attention._kernel(query, key, value, starts, 5, 0.3, window)

    torch.testing.assert_close(found, dense(query, key, value, [1, 3, 5], window))


@pytest.fixture
def on_gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    yield "cuda"
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_on_a_gpu_auto_has_tried_the_kernel(on_gpu: str) -> None:
    assert attention._kernel_is_correct(64, 64, 2, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_the_kernel_is_the_mask_to_rounding(name: str, on_gpu: str, calls: list[list[int]]) -> None:
    """bfloat16: no further from sdpa in float32 than sdpa in bfloat16 is, by half."""
    batch = {
        key: value.to(on_gpu) if isinstance(value, torch.Tensor) else value for key, value in batch_of(LENGTHS).items()
    }
    true, true_gradients = loss_and_gradients(model_of(MODELS[name], "sdpa").to(on_gpu), batch)
    off = {}
    for implementation in ("sdpa", "varlen"):
        loss, found = loss_and_gradients(model_of(MODELS[name], implementation).to(on_gpu, torch.bfloat16), batch)
        error = sum((found[key].float() - true_gradients[key]).norm() ** 2 for key in found)
        off[implementation] = float(error**0.5)
        assert loss == pytest.approx(true, rel=2e-2)

    assert off["varlen"] < 1.5 * off["sdpa"]
    assert calls == []  # all in one kernel, but for what is left to sdpa

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_recipes.data import encoder, prepare
from sft_recipes.errors import ModelError
from sft_recipes.models import model
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe
from tests.data import tokenizers

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


@pytest.mark.parametrize(
    ("kind", "template"),
    [*((kind, template) for kind in tokenizers.KINDS for template in ("alpaca", "file")), ("chat", "chat")],
)
def test_the_chat_template_gives_the_trained_prompt(
    kind: str, template: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    if template == "file":
        (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tokenizers.save(kind, tmp_path / "model"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    recipe = parse.load(
        write_recipe(
            data={"template": str(tmp_path / "t.jinja") if template == "file" else template, "overlong": "split"}
        )
    ).recipe
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer))

    tokenizer.chat_template = data.chat_template

    assert data.prompt is not None
    assert tokenizer.chat_template is not None
    assert (
        tokenizer.apply_chat_template(data.prompt.messages, add_generation_prompt=True, return_dict=False)
        == data.prompt.ids
    )


def tokenizer_of(special: dict[str, str], *others: str) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens and a vocabulary of two letters."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"extra_special_tokens": list(others)})
    return tokenizer


@pytest.mark.parametrize(
    ("special", "others", "pad"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>"}, [], "<pad>"),  # its own
        ({"eos_token": "<|eot|>", "bos_token": "<|bot|>"}, ["<|reserved_0|>", "<|right_pad_id|>"], "<|right_pad_id|>"),
        ({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, ["<|vision_pad|>", "<|fim_pad|>"], "<|vision_pad|>"),
        ({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, [], "<unk>"),  # Llama 2
        ({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, [], "<|endoftext|>"),  # SmolLM2
        ({"eos_token": "</s>", "bos_token": "<s>"}, ["<|reserved_0|>"], "<|reserved_0|>"),
        ({"eos_token": "<e>", "bos_token": "<e>", "unk_token": "<e>"}, [], "<|pad|>"),  # GPT-2: there is none to take
    ],
)  # fmt: skip
def test_a_pad_token_that_is_not_the_end(special: dict[str, str], others: list[str], pad: str) -> None:
    tokenizer = tokenizer_of(special, *others)
    model.set_pad_token(tokenizer)

    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def loaded(recipe: Path, *overrides: str) -> Any:
    wanted = parse.load(recipe, overrides).recipe
    return model.load_model(wanted, model.load_tokenizer(wanted.model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_type_of_the_recipe(write_recipe: WriteRecipe, dtype: str) -> None:
    assert {p.dtype for p in loaded(write_recipe(), f"model.dtype={dtype}").parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("wanted", "used"), [(each, each) for each in ("varlen", "sdpa", "eager")] + [("auto", "varlen")]
)
def test_attention(write_recipe: WriteRecipe, wanted: str, used: str) -> None:
    assert loaded(write_recipe(), f"model.attention={wanted}").config._attn_implementation == used


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


def test_layers_trained_in_full_beside_the_adapters(write_recipe: WriteRecipe) -> None:
    adapted = loaded(write_recipe(), "lora={modules_to_save: [model.norm]}")

    assert adapted.base_model.model.model.norm.modules_to_save["default"].weight.requires_grad
    assert model.count_parameters(adapted)[1] == 149_504 + 128


def test_what_adapters_train_is_float32(write_recipe: WriteRecipe) -> None:
    adapted = loaded(write_recipe(), "model.dtype=bfloat16", "lora={modules_to_save: [norm]}")
    model.keep_trainable_in_float32(adapted, autocast=True)

    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}

    model.keep_trainable_in_float32(adapted, autocast=False)
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
        model.settle_types(adapted, recipe)
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
def test_the_copy_stays_where_something_is_computed_on_it(write_recipe: WriteRecipe, kept: str) -> None:
    overrides = [
        "model.dtype=bfloat16",
        "train.mixed_precision=bf16",
        *({"lora={}"} if kept.startswith("train") else ()),
        kept,
    ]
    file = write_recipe()
    adapted = loaded(file, *overrides)
    model.settle_types(adapted, parse.load(file, overrides).recipe)
    assert all(part.cast_input_dtype_enabled for part in adapted.modules() if isinstance(part, LoraLayer))


@pytest.mark.parametrize(
    ("dtype", "mixed", "stored"),
    [
        ("bfloat16", "bf16", torch.bfloat16),
        ("float32", "bf16", torch.bfloat16),
        ("float32", "fp16", torch.float16),
        ("float32", "no", torch.float32),
    ],
)
def test_fsdp2_gets_4_bit_weights_in_the_type_that_it_casts_to(
    write_recipe: WriteRecipe, dtype: str, mixed: str, stored: torch.dtype
) -> None:
    """In another it would cast the numbers that they are held in, and of the weights nothing would be left."""
    overrides = ["model.quantization=nf4", "lora={}", "launch.strategy=fsdp2"]
    overrides += [f"model.dtype={dtype}", f"train.mixed_precision={mixed}"]
    recipe = parse.load(write_recipe(), overrides).recipe

    assert (
        model._quantization(recipe, model.load_config(recipe))["quantization_config"].bnb_4bit_quant_storage == stored
    )


@pytest.mark.parametrize(("free", "fits"), [(2**20, True), (2**19, False)])
def test_where_4_bit_weights_are_read(
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
def test_weights_are_read_onto_the_gpu_that_holds_all_of_them(
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


def test_a_model_that_was_read_onto_one_device_is_no_model_parallelism() -> None:
    """Trainer takes an `hf_device_map` for that, and does not move the model: if this fails, look at `_placement`."""
    on_one = AutoModelForCausalLM.from_pretrained(TINY, device_map={"": "cpu"})
    assert getattr(on_one, "hf_device_map", None) is None


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantized_layers_and_those_left_out(write_recipe: WriteRecipe, quantization: str) -> None:
    adapted = loaded(write_recipe(), f"model.quantization={quantization}", "lora={modules_to_save: [up_proj]}")
    block = adapted.base_model.model.model.layers[0]
    kind = "Linear8bitLt" if quantization == "int8" else "Linear4bit"

    assert type(block.self_attn.q_proj.base_layer).__name__ == kind
    assert type(block.mlp.up_proj.modules_to_save["default"]).__name__ == "Linear"
    assert type(adapted.base_model.model.lm_head).__name__ == "Linear"
    if quantization != "int8":
        assert block.self_attn.q_proj.base_layer.weight.quant_type == quantization
        assert not block.self_attn.q_proj.base_layer.support_avx512bf16_for_cpu


def test_new_tokens_have_rows_that_are_trained(write_recipe: WriteRecipe) -> None:
    full = loaded(write_recipe(), "model.new_tokens=[<a>, <b>]")
    adapted = loaded(write_recipe(), "model.new_tokens=[<a>, <b>]", "lora={}")

    assert full.get_input_embeddings().weight.shape[0] == 1026
    [rows] = [p for name, p in adapted.named_parameters() if "trainable_tokens" in name]
    assert rows.shape == (2, 128)
    assert rows.requires_grad


def test_embeddings_with_rows_to_spare_are_left_as_they_are(write_recipe: WriteRecipe, tmp_path: Path) -> None:
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


def test_remote_code_runs_only_where_the_recipe_says_so(write_recipe: WriteRecipe, tmp_path: Path) -> None:
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

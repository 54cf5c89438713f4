"""What models are loaded with on a GPU."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig

from sft_recipes.errors import ModelError
from sft_recipes.models import model
from tests.conftest import WriteRecipe
from tests.cuda import fake_gpu
from tests.cuda.fake_gpu import AMPERE, GB, GPU, HOPPER, TURING, VOLTA
from tests.cuda.training import built, recipe_of, settings


class _Loaded(Exception):
    """Raised in place of loading."""


def options(gpu: GPU, config: Any = None, **sections: Any) -> dict[str, Any]:
    """Return what `from_pretrained` would get on this GPU."""
    given: dict[str, Any] = {}
    config = config or LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)

    def from_pretrained(_name: str, **options: Any) -> Any:
        given.update(options)
        raise _Loaded

    with (
        fake_gpu.installed(gpu),
        fake_gpu.fake_tensors(gpu),  # the kernel is tried
        patch.object(model.AutoModelForCausalLM, "from_pretrained", from_pretrained),
        pytest.raises(_Loaded),
    ):
        model._from_pretrained(recipe_of(**sections), config)
    return given


def test_weights_keep_their_dtype() -> None:
    found = options(GPU(), model={"dtype": "bfloat16"})
    assert found["dtype"] == torch.bfloat16
    assert "quantization_config" not in found
    assert found.get("device_map") in (None, {"": 0}, {"": torch.device("cuda", 0)}, "cuda", "cuda:0")


@pytest.mark.parametrize(
    ("mixed", "compute"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float16)]
)
def test_4_bit_weights_are_read_onto_the_gpu(mixed: str, compute: torch.dtype) -> None:
    found = options(GPU(), lora={}, model={"quantization": "nf4", "dtype": "float16"}, train={"mixed_precision": mixed})
    quantization = found["quantization_config"]
    assert found["device_map"] == {"": 0}
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert quantization.bnb_4bit_use_double_quant
    assert quantization.bnb_4bit_compute_dtype == compute
    assert quantization.bnb_4bit_quant_storage == torch.uint8
    assert quantization.llm_int8_skip_modules == ["lm_head"]


def test_8_bit_weights_are_read_onto_the_gpu() -> None:
    found = options(GPU(), lora={"modules_to_save": ["embed_tokens"]}, model={"quantization": "int8"})
    assert found["device_map"] == {"": 0}
    assert found["quantization_config"].load_in_8bit
    assert found["quantization_config"].llm_int8_skip_modules == ["lm_head", "embed_tokens"]


@pytest.mark.parametrize(("free", "device"), [(GB, 0), (1e4, "cpu")])
def test_shards_of_4_bit_weights_are_cut_where_there_is_room_for_all(free: float, device: Any) -> None:
    found = options(
        GPU(free=free), lora={}, model={"quantization": "nf4"}, launch={"strategy": "fsdp2", "processes": 2}
    )
    assert found["device_map"] == {"": device}
    assert found["quantization_config"].bnb_4bit_quant_storage == torch.bfloat16


def test_quantized_layers_of_the_real_loader(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The options reach from_pretrained through load_model, with adapters on top."""
    with built(write_recipe(**settings(lora={"rank": 4})), tmp_path / "run", GPU()) as found:
        assert found.options["use_safetensors"]
        assert found.options["attn_implementation"] == "varlen"
        adapters = [weight for name, weight in found.trainer.model.named_parameters() if "lora_" in name]
        assert {(weight.device.type, weight.dtype) for weight in adapters} == {("cuda", torch.float32)}


# --- Attention -------------------------------------------------------------------------------------------------------


def config_of(width: int, **other: Any) -> LlamaConfig:
    shape = {"hidden_size": 4 * width, "head_dim": width, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**shape | {"num_hidden_layers": 1, "vocab_size": 64} | other)


def attention_of(gpu: GPU, config: LlamaConfig, **sections: Any) -> str | None:
    """Return the attention implementation that a run takes; None is transformers' own choice, sdpa."""
    found: str | None = options(gpu, config, **sections)["attn_implementation"]
    return found


@pytest.mark.parametrize(
    ("capability", "width", "taken"),
    [
        (AMPERE, 64, "varlen"),
        (AMPERE, 128, "varlen"),
        (HOPPER, 64, "varlen"),
        (HOPPER, 256, "varlen"),
        (VOLTA, 64, None),
        (TURING, 64, None),
        (HOPPER, 20, None),
        (HOPPER, 264, None),
    ],
)
def test_packed_documents_take_the_kernel_where_it_runs(
    capability: tuple[int, int], width: int, taken: str | None
) -> None:
    """Where it does not, layers would wait for the GPU to split documents; sdpa with a mask does not."""
    assert attention_of(GPU(capability=capability), config_of(width)) == taken


@pytest.mark.parametrize("sections", [{"data": {"packing": "none"}}, {"train": {"mixed_precision": "no"}}])
def test_elsewhere_sdpa_is_taken(sections: dict[str, Any]) -> None:
    """Padded rows; and float32, which the kernel does not take."""
    assert attention_of(GPU(), config_of(64), model={"dtype": "float32"}, **sections) is None


def test_the_kernel_is_tried_first() -> None:
    gpu = GPU()
    attention_of(gpu, config_of(64))
    assert gpu.attention_calls


def test_flash_attention_is_taken_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_recipes.models.attention.installed", lambda name: name == "flash_attn")
    assert attention_of(GPU(), config_of(64)) == "flash_attention_2"
    assert attention_of(GPU(), config_of(64), model={"dtype": "float32"}, train={"mixed_precision": "no"}) is None


def test_flex_attention_needs_a_gpu() -> None:
    recipe = recipe_of(model={"attention": "flex_attention"})
    with fake_gpu.installed(GPU()):
        assert model.attention(recipe, config_of(64)) == "flex_attention"
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="flex_attention"):
            model.attention(recipe, config_of(64))

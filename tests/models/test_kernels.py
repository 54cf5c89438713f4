"""Liger's kernels: when they are taken, what they change in a model, and that a wrong one is found.

The kernels themselves need a GPU. On a CPU Liger can be imported with a stand-in for Triton.
"""

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from sft_recipes.errors import ModelError
from sft_recipes.memory import memory_trace
from sft_recipes.memory.prediction import Footprint, Part
from sft_recipes.models import kernels
from sft_recipes.models.kernels import Kernels
from sft_recipes.recipe import library_names
from sft_recipes.recipe.schema import Launch, Recipe
from tests.commands import forked
from tests.conftest import WriteRecipe, run

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
LLAMA = LlamaConfig(**SHAPE)
CONFIGS: dict[str, tuple[PreTrainedConfig, str]] = {
    "llama": (LLAMA, "RMSNorm, RoPE, SwiGLU"),
    "qwen3": (Qwen3Config(**SHAPE), "RMSNorm, RoPE, SwiGLU"),
    "mistral": (MistralConfig(**SHAPE), "RMSNorm, RoPE, SwiGLU"),
    "phi3": (Phi3Config(**SHAPE, eos_token_id=1), "RMSNorm, RoPE, SwiGLU"),
    "gemma3_text": (Gemma3TextConfig(**SHAPE), "RMSNorm, RoPE, GeGLU"),
}
TRITON = [  # what Liger imports of it
    "triton",
    "triton.language",
    "triton.language.extra",
    "triton.language.extra.libdevice",
    "triton.language.extra.cuda",
    "triton.language.extra.cuda.libdevice",
    "triton.language.math",
    "triton.runtime",
    "triton.tools",
    "triton.tools.tensor_descriptor",
]
needs_liger = pytest.mark.skipif(
    not library_names.installed("liger_kernel"), reason="pip install --no-deps liger-kernel, as .ci/run does"
)


def recipe_of(wanted: str = "auto", **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x", **model},
            "data": {"train": "x"},
            "train": {"kernels": wanted, "micro_batch_size": 1, "gradient_checkpointing": False},
            "output_dir": "x",
        }
    )


# --- Which ones ------------------------------------------------------------------------------------------------------


@pytest.fixture
def liger_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "installed", lambda name: True)
    monkeypatch.setattr(kernels, "liger_model_types", lambda: frozenset({"llama"}))


def test_auto_takes_ligers_for_a_model_that_it_knows(liger_is_installed: None) -> None:
    assert kernels.select_kernels(recipe_of(), LLAMA, "cuda").name == "liger"
    assert kernels.select_kernels(recipe_of("none"), LLAMA, "cuda") == Kernels()
    assert kernels.select_kernels(recipe_of(), LLAMA, "cpu") == Kernels()
    assert (
        str(kernels.select_kernels(recipe_of(), GPT2Config(), "cuda"))
        == "none (Liger has no kernels for models of type gpt2)"
    )


@pytest.mark.parametrize("lacking", ["liger_kernel", "triton"])
def test_without_the_packages_auto_takes_none(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(kernels, "installed", lambda name: name != lacking)

    assert str(kernels.select_kernels(recipe_of(), LLAMA, "cuda")) == "none (liger-kernel is not installed)"


def test_liger_that_cannot_be_had_is_an_error(liger_is_installed: None) -> None:
    with pytest.raises(ModelError, match=r"train\.kernels: liger needs an NVIDIA GPU \(got a CPU\)\. Set auto\."):
        kernels.select_kernels(recipe_of("liger"), LLAMA, "cpu")
    with pytest.raises(ModelError, match="no kernels for models of type gpt2"):
        kernels.select_kernels(recipe_of("liger"), GPT2Config(), "cuda")


def test_a_run_on_a_cpu_says_none(write_recipe: WriteRecipe) -> None:
    folder, said = run(write_recipe(export={"merge": False}, lora={}))

    assert "kernels" not in said
    assert '"kernels": "none"' in (folder / "manifest.json").read_text("utf-8")
    with pytest.raises(ModelError, match=r"train\.kernels"):
        run(write_recipe(), "train.kernels=liger", f"output_dir={folder}2")


# --- The comparison --------------------------------------------------------------------------------------------------


def norms_of(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Kernels:
    """Gives norms another forward pass, in place of Liger's."""
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            eager = part.forward
            part.forward = lambda x, eager=eager: change(eager(x))
    return Kernels("liger")


def rotated(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> Any:
    return q.roll(1, dims=-1), k


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_right_kernel_passes(monkeypatch: pytest.MonkeyPatch, model_type: str, dtype: str) -> None:
    monkeypatch.setattr(kernels, "apply_liger", lambda model: norms_of(model, torch.clone))

    assert kernels.compare_layer(recipe_of(dtype=dtype), CONFIGS[model_type][0], "cpu") is None


def test_a_wrong_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "apply_liger", lambda model: norms_of(model, lambda out: out * 1.02))
    assert "output differs by" in str(kernels.compare_layer(recipe_of(dtype="bfloat16"), LLAMA, "cpu"))

    monkeypatch.setattr(kernels, "apply_liger", lambda model: norms_of(model, lambda out: out.detach() + 0 * out))
    assert "gradient of" in str(kernels.compare_layer(recipe_of(dtype="bfloat16"), LLAMA, "cpu"))


def test_a_wrong_function_is_found_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.apply_rotary_pos_emb
    wrong = Kernels("liger", module=modeling_llama, functions={"apply_rotary_pos_emb": rotated})
    monkeypatch.setattr(kernels, "apply_liger", lambda model: wrong)

    assert "output differs" in str(kernels.compare_layer(recipe_of(dtype="bfloat16"), LLAMA, "cpu"))
    assert modeling_llama.apply_rotary_pos_emb is eager


def test_wrong_kernels_are_said_and_not_taken(liger_is_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("no such\nPTX")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = AutoModelForCausalLM.from_config(LLAMA)
    for compare in (lambda *_: "output differs", fail):
        monkeypatch.setattr(kernels, "compare_layer", compare)
        found = kernels.apply_kernels(model, recipe_of())
        assert found.name == "none"
        assert found.why.startswith("Liger's kernels are incorrect here: ")
        with pytest.raises(ModelError, match=r"train\.kernels: Liger's kernels are incorrect .*\. Set none\."):
            kernels.apply_kernels(model, recipe_of("liger"))
    assert found.why.endswith("RuntimeError: no such PTX")


# --- The model -------------------------------------------------------------------------------------------------------


@needs_liger
def test_model_types_are_those_of_ligers_source() -> None:
    assert set(CONFIGS) <= library_names.liger_model_types()
    assert "gpt2" not in library_names.liger_model_types()


def _apply(model_type: str, answers: Any) -> None:
    """In a process of its own, whose Triton nobody else meets."""
    for name in TRITON:
        sys.modules[name] = MagicMock(__version__="3.7.1", __spec__=None, __path__=[])
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type][0])
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    applied = kernels.apply_liger(model)
    left = vars(module) == before
    rotate = module.apply_rotary_pos_emb
    with applied.active():
        during = module.apply_rotary_pos_emb
    own = {type(part).__name__ for part in model.modules() if "forward" not in vars(part)}
    answers.put((str(applied), left, during.__name__, module.apply_rotary_pos_emb is rotate, sorted(own)))


@needs_liger
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_norms_and_mlps_of_the_model_change_and_its_module_stays(model_type: str) -> None:
    answers = multiprocessing.get_context("fork").SimpleQueue()
    child = forked(_apply, model_type, answers)
    child.join()
    assert child.exitcode == 0
    fused, left, during, restored, own = answers.get()

    assert fused == f"Liger ({CONFIGS[model_type][1]})"
    assert left
    assert (during, restored) == ("liger_rotary_pos_emb", True)
    assert not any(name.endswith(("RMSNorm", "MLP")) for name in own)
    assert any(name.endswith("ForCausalLM") for name in own)  # the loss stays TRL's


@pytest.fixture
def predicted(liger_is_installed: None) -> Callable[..., Footprint]:
    def predict(wanted: str, config: PreTrainedConfig, **model: Any) -> Footprint:
        return memory_trace.Predictor(config, "cuda")(recipe_of(wanted, **model))

    return predict


def test_the_prediction_is_of_the_kernels(predicted: Callable[..., Footprint]) -> None:
    """Per layer, token and in bfloat16, eager norms keep a float32 copy of their input (twice), and SwiGLU its activation."""
    wide = LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8})
    none, fused = (predicted(kind, wide, dtype="bfloat16") for kind in ("none", "liger"))

    saved = sum(none.peak.values()) - sum(fused.peak.values())
    assert none.peak[Part.WEIGHTS] == fused.peak[Part.WEIGHTS]
    assert saved > 8 * 512 * 1024 * 2  # the activation of each layer


def test_a_prediction_leaves_the_models_module_as_it_is(predicted: Callable[..., Footprint]) -> None:
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    predicted("liger", LLAMA)

    assert vars(modeling_llama) == before


@pytest.mark.gpu
def test_zero3_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shards each weight as it is created, so a layer cannot be compared."""
    monkeypatch.setattr(kernels, "installed", lambda _: True)
    auto, liger = (
        recipe_of(wanted).model_copy(update={"launch": Launch(strategy="zero3")}) for wanted in ("auto", "liger")
    )
    assert str(kernels.select_kernels(auto, LLAMA, "cuda")) == "none (cannot be checked under zero3)"
    with pytest.raises(ModelError, match=r"cannot be checked under launch\.strategy: zero3"):
        kernels.select_kernels(liger, LLAMA, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_on_a_gpu_they_are_right(model_type: str, dtype: str) -> None:
    shape = SHAPE | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = type(CONFIGS[model_type][0])(**shape | ({"eos_token_id": 1} if model_type == "phi3" else {}))

    assert kernels.compare_layer(recipe_of(dtype=dtype), config, "cuda") is None

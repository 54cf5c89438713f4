"""Memory on the fake GPU: what a run allocates against what is predicted, and what is decided from free memory."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from sft_recipes.errors import RunError
from sft_recipes.memory import autosize, memory_trace, prediction, remedies
from sft_recipes.recipe import bundled
from sft_recipes.training.metrics import peak_memory
from tests.conftest import WriteRecipe
from tests.cuda import fake_gpu
from tests.cuda.fake_gpu import GB, GPU, ROOT
from tests.cuda.training import built, recipe_of, settings, write_model

SCRIPT = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
LAYERS = 6  # of shipped recipes' models: enough for checkpointing to count
# Activations of layers are most of it, so that a pass without checkpointing shows.
DEEP = LlamaConfig(
    hidden_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=1024,
    vocab_size=1024, max_position_embeddings=1024,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "LoRA, every layer checkpointed": {"lora": {"rank": 4}},
    "LoRA, no layer checkpointed": {"lora": {"rank": 4}, "train": {"gradient_checkpointing": False}},
    "full, float32 under autocast": {"model": {"dtype": "float32"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_allocates_what_is_predicted(case: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Of the whole run, from loading on, preflight included: what runs is the code of transformers, TRL and PEFT."""
    gpu, sections = GPU(), settings(**CASES[case])
    sections["model"]["name"] = write_model(tmp_path / "model", DEEP)
    sections["train"] |= {"preflight": True, "max_steps": 2, "micro_batch_size": 4, "global_batch_size": 8}
    sections["data"] |= {"max_length": 512, "packing": "wrapped"}
    with built(write_recipe(**sections), tmp_path / "run", gpu, rows=400) as found:
        recipe = found.trainer.recipe
        found.train()
    predicted = memory_trace.Predictor(memory_trace.load_traceable_config(recipe), "cuda", whole=True)(recipe)

    print(f"{case}: predicted {predicted.peak_bytes / 2**20:.1f} MiB, allocated {gpu.peak / 2**20:.1f} MiB")
    assert predicted.peak_bytes == pytest.approx(gpu.peak, rel=0.05)


@pytest.mark.parametrize("name", ["gemma3_1b_full", "phi4_14b_lora", "qwen3_4b_long"])
def test_a_shipped_recipe_allocates_what_is_predicted(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Its own widths, vocabulary, length and settings, with full sequences and the preflight; of its layers a few.

    That all of them fit the card of its header follows from the prediction: tests/recipe/test_bundled_memory.py.
    """
    size = min(SCRIPT["known"]()[name]["fits"]) * GB
    gpu = GPU(capability=fake_gpu.AMPERE, memory=prediction.SHARE * size - prediction.CONTEXT)
    whole = AutoConfig.from_pretrained(SCRIPT["directory"](SCRIPT["_recipe"](name).model.name))
    config = memory_trace.with_layers(whole, LAYERS)
    micro = SCRIPT["_recipe"](name).train.micro_batch_size
    overrides = [
        f"model.name={write_model(tmp_path / 'model', config)}", f"data.train={tmp_path / 'train.jsonl'}", "data.eval=null",
        "data.template=alpaca", "data.columns={}", "train.epochs=null", "train.max_steps=1", "checkpoint.every=null",
        f"train.micro_batch_size={1 if micro == 'auto' else micro}", f"output_dir={tmp_path / 'run'}",
        f"train.global_batch_size={2 if micro == 'auto' else 2 * micro}", "train.gradient_checkpointing=true",
    ]  # fmt: skip
    write_recipe()
    with built(bundled.folder() / f"{name}.yaml", tmp_path / "run", gpu, *overrides, rows=900, data=tmp_path) as found:
        recipe = found.trainer.recipe
        found.train()
    predicted = memory_trace.Predictor(memory_trace.load_traceable_config(recipe), "cuda", whole=True)(recipe)

    print(f"{name}: predicted {predicted.peak_bytes / 2**30:.2f} GiB, allocated {gpu.peak / 2**30:.2f} GiB")
    assert predicted.peak_bytes == pytest.approx(gpu.peak, rel=0.05)


def test_a_run_that_does_not_fit_is_refused_with_what_would(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    gpu, sections = GPU(memory=60 * 2**20), settings(lora={"rank": 4}, train={"gradient_checkpointing": False})
    sections["model"]["name"] = write_model(tmp_path / "model", DEEP)
    sections["train"] |= {"preflight": True, "micro_batch_size": 4, "global_batch_size": 8}
    sections["data"] |= {"max_length": 512, "packing": "wrapped"}
    recipe = write_recipe(**sections)

    with (
        pytest.raises(RunError, match=r"out of memory before the first step \(.*device memory 60.0 MiB"),
        built(recipe, tmp_path / "run", gpu, rows=400) as found,
    ):
        found.train()


# --- Decided from free memory -----------------------------------------------------------------------------------------


def test_room_is_what_is_free() -> None:
    with fake_gpu.installed(GPU(memory=24 * GB, free=20 * GB)):
        assert autosize.available_memory(recipe_of(), "cuda") == 20 * GB + prediction.CONTEXT  # which asking has taken


def test_auto_takes_what_fits_the_gpu(tmp_path: Path) -> None:
    """As many sequences as fit, and as few layers recomputed."""
    name = write_model(tmp_path / "model", DEEP)
    sections: dict[str, Any] = {"model": {"name": name}, "data": {"train": "x", "max_length": 512}}
    recipe = recipe_of(**sections, train={"micro_batch_size": "auto", "global_batch_size": 8})

    def peak(size: int, layers: bool) -> float:
        with fake_gpu.installed(GPU()) as gpu, fake_gpu.fake_tensors(gpu):
            sized = {"train.micro_batch_size": size, "train.gradient_checkpointing": layers}
            return autosize.predict_here(remedies.applied(recipe, sized)).peak_bytes

    def settled(capacity: float) -> tuple[Any, Any]:
        free = (capacity + prediction.CONTEXT) / prediction.SHARE + 1 - prediction.CONTEXT
        with fake_gpu.installed(GPU(memory=2 * capacity, free=free)) as gpu, fake_gpu.fake_tensors(gpu):
            train = autosize.resolve_for_run(recipe, tmp_path).train
        return train.micro_batch_size, train.gradient_checkpointing

    assert settled(peak(8, layers=False)) == (8, False)
    assert settled(peak(1, layers=True)) == (1, True)


def test_advice_is_for_the_gpu(tmp_path: Path) -> None:
    recipe = recipe_of(
        model={"name": write_model(tmp_path / "model", DEEP)},
        data={"train": "x", "max_length": 512},
        train={"micro_batch_size": 16, "global_batch_size": 16, "gradient_checkpointing": False},
    )
    with fake_gpu.installed(GPU(memory=GB)) as gpu, fake_gpu.fake_tensors(gpu):
        said = autosize.memory_advice(recipe)

    assert "device memory 953.7 MiB" in said
    assert "Any one of these fits: --set train.gradient_checkpointing=true" in said


def test_peak_memory_is_the_gpus() -> None:
    gpu = GPU()
    with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu):
        made = torch.empty(2**20, device="cuda")
        assert peak_memory() == 4 * 2**20 / 2**30
        del made
        assert torch.cuda.memory_allocated() == 0
        torch.cuda.reset_peak_memory_stats()
        assert peak_memory() == 0

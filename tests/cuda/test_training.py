"""Whole trainings on the fake GPU: where tensors are, what waits for the GPU, what is recomputed."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sft_recipes.recipe.validate import STOCHASTIC_ROUNDING
from sft_recipes.training import trainer
from tests.conftest import WriteRecipe
from tests.cuda.fake_gpu import GPU
from tests.cuda.training import built, settings, write_model

LORA = {"rank": 4}
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": LORA, "train": {"max_steps": 2}},
    "LoRA with dropout, trained head": {"lora": {**LORA, "dropout": 0.1, "modules_to_save": ["lm_head"]}},
    "full, float32 under autocast": {"model": {"dtype": "float32"}},
    "full, fp16 with loss scaling": {"model": {"dtype": "float32"}, "train": {"mixed_precision": "fp16"}},
    "full, bfloat16 without autocast": {"train": {"mixed_precision": "no"}},
    "padded rows": {"lora": LORA, "data": {"packing": "none"}},
    "a mask of all pairs": {"lora": LORA, "model": {"attention": "sdpa"}},
    "8-bit optimizer of bitsandbytes": {"train": {"optimizer": "adamw_bnb_8bit"}},
}


def llama(layers: int, **other: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 1024, "max_position_embeddings": 512,
    }  # fmt: skip
    return LlamaConfig(**shape | other)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_on_the_gpu(case: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Tensors of two devices in one operation raise an error, and so do wrong arguments to the attention kernel."""
    gpu = GPU()
    with built(write_recipe(**settings(**CASES[case])), tmp_path / "run", gpu) as found:
        found.train()

        sft = found.trainer
        states = [state for weight in sft.optimizer.state.values() for name, state in weight.items() if name != "step"]
        assert sft.state.global_step == sft.state.max_steps
        assert {weight.device.type for weight in sft.model.parameters()} == {"cuda"}
        assert {state.device.type for state in states if isinstance(state, torch.Tensor)} == {"cuda"}
    packed = "packing" not in CASES[case].get("data", {}) and "attention" not in CASES[case].get("model", {})
    assert bool(gpu.attention_calls) == packed


def test_arguments_of_a_gpu(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    gpu = GPU()
    with built(write_recipe(**settings(lora=LORA)), tmp_path / "run", gpu) as found:
        found.train()

        sft = found.trainer
        assert (sft.args.device.type, sft.args.use_cpu, sft.args.bf16, sft.args.n_gpu) == ("cuda", False, True, 1)
        assert sft.args.dataloader_pin_memory
        assert sft.accelerator.non_blocking
        assert sft.accelerator.device.type == "cuda"
        assert not sft.own_head  # but TRL's loss, which is written for Triton
    assert {"pin_memory", "max_memory_allocated", "synchronize"} <= gpu.calls


def test_fp16_scales_the_loss(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with built(write_recipe(**settings(train={"mixed_precision": "fp16"})), tmp_path / "run", GPU()) as found:
        scaler = found.trainer.accelerator.scaler
    assert scaler.is_enabled()
    assert scaler._device == "cuda"


def test_the_host_waits_for_no_layer(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A wait per layer would leave the GPU idle between layers. Left are TRL's metrics, and ours: one per micro-batch and one
    per step."""
    syncs = []
    for layers in (1, 3):
        gpu = GPU()
        name = write_model(tmp_path / f"of {layers}", llama(layers))
        recipe = write_recipe(**settings(model={"name": name}, train={"max_steps": 2}))
        with built(recipe, tmp_path / f"run {layers}", gpu) as found:
            found.train()
        assert gpu.attention_calls == layers * 2 * 4  # forward and recomputed, of two micro-batches in two steps
        syncs.append(Counter(gpu.syncs))

    assert syncs[0] == syncs[1]
    ours = Counter({line: times for line, times in syncs[0].items() if line.startswith("sft_recipes/")})
    per_step = sum(times for line, times in ours.items() if "guards.py" in line) / 2
    assert per_step == 1
    assert sum(times for line, times in ours.items() if ", mask_for: " in line) == 4  # once per micro-batch
    assert all("guards.py" in line or ", log: " in line or ", mask_for: " in line for line in ours), ours


def test_checkpointing_recomputes_each_layer(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    calls = {}
    for every in (False, True, 2):
        gpu = GPU()
        recipe = write_recipe(**settings(lora=LORA, train={"gradient_checkpointing": every}))
        with built(recipe, tmp_path / f"run {every}", gpu) as found:
            found.train()
        calls[every] = gpu.attention_calls

    forward = 4 * 2  # layers, micro-batches
    assert calls == {False: forward, True: 2 * forward, 2: 1.5 * forward}


@pytest.mark.parametrize(
    ("optimizer", "made", "options"),
    [
        ("adamw_torch_fused", "AdamW", {"fused": True}),
        ("adamw_torch", "AdamW", {"fused": None, "foreach": None}),  # foreach is torch's default on a GPU
        ("adamw_bnb_8bit", "AdamW", {}),
        (STOCHASTIC_ROUNDING, "AdamW8bit", {}),
    ],
)
def test_optimizers(
    optimizer: str, made: str, options: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:  # fmt: skip
    with built(write_recipe(**settings(train={"optimizer": optimizer})), tmp_path / "run", GPU()) as found:
        inner = found.trainer.optimizer
        compiled = trainer._uncompiled_optimizer(found.trainer.recipe)

    assert type(inner).__name__ == made
    assert {name: inner.defaults[name] for name in options} == options
    assert isinstance(compiled, nullcontext)  # torchao compiles its step on a GPU

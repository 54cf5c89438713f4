from dataclasses import replace

import pytest

from sft_recipes.planning import flops
from sft_recipes.planning.model_size import ModelSize
from tests.memory.toys import recipe


class Llama8B:
    hidden_size, num_attention_heads, head_dim, vocab_size = 4096, 32, 128, 128256


HEAD = 4096 * 128256
LAYERS = 6_979_321_856
EIGHT = ModelSize(LAYERS + 2 * HEAD, LAYERS + 2 * HEAD, 32, LAYERS // 32, 2 * HEAD, LAYERS // 32, 2 * HEAD)


@pytest.mark.parametrize(
    ("checkpointing", "length", "expected"),
    [
        # 6 (P + H) + 6 L h s, and the head's logits a second time
        (False, 2048, 6 * (LAYERS + HEAD) + 2 * HEAD + 6 * 32 * 4096 * 2048),
        (True, 2048, 8 * LAYERS + 8 * HEAD + 8 * 32 * 4096 * 2048),
    ],
)
def test_operations(checkpointing: bool, length: int, expected: float) -> None:
    full = recipe(train={"gradient_checkpointing": checkpointing})

    assert flops.flops_per_token(full, EIGHT, Llama8B, length, dense=False) == pytest.approx(expected, rel=1e-9)


def test_operations_of_adapters() -> None:
    adapters = 41_943_040
    with_lora = ModelSize(EIGHT.parameters + adapters, adapters, 32, 0, 2 * HEAD, 0, 0)

    found = flops.flops_per_token(
        recipe(lora={}, train={"gradient_checkpointing": False}), with_lora, Llama8B, 0, dense=False
    )

    assert found == pytest.approx(4 * (LAYERS + HEAD) + 2 * HEAD + 6 * adapters, rel=1e-9)


def test_utilisation_counts_what_the_model_takes_once() -> None:
    full = recipe(train={"gradient_checkpointing": 2})

    found = flops.flops_per_token(full, EIGHT, Llama8B, 2048, dense=True, model_only=True)

    assert found == pytest.approx(6 * (LAYERS + HEAD) + 6 * 32 * 4096 * 2048, rel=1e-9)


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("NVIDIA H100 PCIe", None),  # less power
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_the_peak_rate_of_a_gpu_as_its_driver_names_it(device: str, teraflops: float | None) -> None:
    assert flops.peak_rate(device) == (teraflops and teraflops * 1e12)


def test_a_mask_is_not_skipped() -> None:
    """All pairs of the micro-batch's tokens are computed, whichever documents they are of."""
    masked, skipped = (flops.flops_per_token(recipe(), EIGHT, Llama8B, 100, dense=dense) for dense in (True, False))

    assert masked - skipped == pytest.approx(8 * 32 * 4096 * (2 * 2 * 512 - 100))


def test_time_is_between_the_shares_of_the_peak_rate() -> None:
    h100 = flops.gpu_named("h100")
    assert h100 is not None

    fast, slow = flops.hours(989e12 * 3600, h100, 2)

    assert (fast, slow) == (pytest.approx(1 / 2 / max(flops.REACHED)), pytest.approx(1 / 2 / min(flops.REACHED)))
    assert {gpu.name for gpu in flops.gpus_of(24)} >= {"L4", "RTX-4090"}
    assert flops.gpu_named("rtx 4090") is not None
    assert flops.gpu_named("nothing") is None


def test_of_experts_those_that_a_token_passes() -> None:
    class Experts(Llama8B):
        num_experts, num_experts_per_tok = 8, 2

    half = replace(EIGHT, experts=LAYERS // 2)
    dense, sparse = (flops.flops_per_token(recipe(), half, of, 0, dense=False) for of in (Llama8B, Experts))

    assert dense - sparse == pytest.approx(8 * (LAYERS / 2) * 6 / 8)

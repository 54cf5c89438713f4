"""Estimate FLOPs per token and training time per GPU."""

import re
from dataclasses import dataclass
from typing import Any

from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import Recipe

# Estimated model FLOPs utilization during training, low and high. Published runs of 7B and 8B models on H100s reach 33 to 46%
# (benchmark pages of torchtitan and LLM-Foundry); short sequences and small models reach less.
REACHED = (0.3, 0.5)


@dataclass(frozen=True)
class GPU:
    """A GPU from its data sheet: memory in 10^9 bytes, dense bfloat16 rate in 10^12 FLOP/s, compute capability."""

    name: str
    gigabytes: int
    teraflops: float
    capability: tuple[int, int]


# NVIDIA's data sheets (SXM boards if there are several); rates without sparsity, on GeForce cards with float32 accumulation.
# T4 has no bfloat16: its float16 rate.
GPUS = (
    GPU("B200", 180, 2250, (10, 0)),
    GPU("H200", 141, 989, (9, 0)),
    GPU("H100", 80, 989, (9, 0)),
    GPU("A100-80GB", 80, 312, (8, 0)),
    GPU("A100-40GB", 40, 312, (8, 0)),
    GPU("L40S", 48, 362, (8, 9)),
    GPU("A6000", 48, 155, (8, 6)),
    GPU("RTX-5090", 32, 209, (12, 0)),
    GPU("RTX-4090", 24, 165, (8, 9)),
    GPU("A10", 24, 125, (8, 6)),
    GPU("L4", 24, 121, (8, 9)),
    GPU("RTX-3090", 24, 71, (8, 6)),
    GPU("T4", 16, 65, (7, 5)),
)


def flops_per_token(
    recipe: Recipe,
    size: ModelSize,
    text_config: Any,
    document: float,
    *,
    dense: bool = False,
    model_only: bool = False,
) -> float:
    """Return the FLOPs per token of a training step, forward and backward.

    Per parameter of layers and LM head: 6 (2 forward, 4 backward), or 4 if frozen; 6 per adapter parameter; of experts, those
    that a token uses. Activation checkpointing adds 2 per recomputed layer; the LM head 2, because TRL's loss computes logits
    twice. Embeddings add none. Attention: 6 x layers x width x `document`, times 4/3 if recomputed.

    `document`: mean length of the document that a token is in. `dense`: attention masks packed documents instead of skipping
    them, so it computes all token pairs of the micro-batch. `model_only`: leave out recomputed and masked operations, as model
    FLOPs utilization (MFU) does.
    """
    train = recipe.train
    recomputed = 1 / train.recomputed if train.recomputed and not model_only else 0.0
    hidden, heads = int(text_config.hidden_size), int(text_config.num_attention_heads)
    width: int = heads * (getattr(text_config, "head_dim", None) or hidden // heads)
    head = int(text_config.vocab_size) * hidden
    adapters = size.trained if recipe.lora is not None else 0
    layers = size.parameters - size.rest - (adapters - size.trained_rest if adapters else 0)
    experts, chosen = (getattr(text_config, name, None) for name in ("num_experts", "num_experts_per_tok"))
    experts = (
        experts or getattr(text_config, "num_local_experts", None) or getattr(text_config, "n_routed_experts", None)
    )
    if experts and chosen:
        layers -= size.experts * (1 - chosen / experts)
    frozen = recipe.lora is not None
    work = layers * ((4 if frozen else 6) + 2 * recomputed) + head * ((4 if frozen else 6) + 2 * (not model_only))
    work += adapters * (6 + 2 * recomputed)
    attended = document
    if dense:
        assert isinstance(train.micro_batch_size, int)
        attended = 2 * train.micro_batch_size * recipe.data.max_length
    return work + 6 * size.layers * width * attended * (1 + recomputed / 3)


def hours(flops: float, gpu: GPU, number: int) -> tuple[float, float]:
    """Estimate the hours on `number` GPUs, at the highest and lowest expected utilization."""
    slow, fast = (flops / (gpu.teraflops * 1e12 * share * number * 3600) for share in REACHED)
    return fast, slow


def gpus_of(gigabytes: float) -> list[GPU]:
    """Return the GPUs with about that much memory."""
    return [gpu for gpu in GPUS if abs(gpu.gigabytes - gigabytes) <= 0.07 * gigabytes]


def peak_rate(device: str) -> float | None:
    """Return the peak FLOP/s of a GPU by its driver's name; None if it is not in the table.

    None as well for other boards of the same name, with less power or more units, and for MIG slices.
    """
    words = re.split(r"[^a-z0-9]+", device.lower())
    if not {"pcie", "nvl", "laptop", "max", "ti", "d", "mig"}.isdisjoint(words):
        return None
    of_name = {gpu.name.lower().removeprefix("rtx-").split("-")[0]: gpu.teraflops * 1e12 for gpu in GPUS}
    return next((of_name[word] for word in words if word in of_name), None)


def gpu_named(name: str) -> GPU | None:
    """Return the GPU of that name, ignoring case and punctuation."""

    def plain(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalnum())

    return next((gpu for gpu in GPUS if plain(gpu.name) == plain(name)), None)

"""Bytes of an optimizer's states, for those that cannot be run on tensors without memory."""

import math

_BLOCK_BNB = 256  # values that share one scale in bitsandbytes' 8-bit states
_SMALL = 4096  # values below which bitsandbytes and torchao keep states in full
# What torchao's 8- and 4-bit states hold beside codes and scales: a table of the values that the codes mean.
_BLOCK_TORCHAO = {8: 256, 4: 128}
_TORCHAO_BITS = {"adamw_torch_8bit": 8, "adamw_8bit_sr": 8, "adamw_torch_4bit": 4}
_ONE_STATE = ("lion", "lars", "signsgd", "rmsprop")
# Whose states are float32 whatever the weights' type.
_IN_FLOAT32 = ("lion_32bit", "paged_lion_32bit", "ademamix", "paged_ademamix_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit")
# float32 copies of a parameter that torchao's step makes: two in the kernel that inductor writes (for a CPU, where that can be
# read), and 14 where it runs op by op, as we have it do on CPUs (counted).
_COPIES = {"cuda": 2, "cpu": 14}


def in_weights_type(optimizer: str) -> bool:
    """Whether states have the type of the weights that they belong to."""
    return not ("8bit" in optimizer or "4bit" in optimizer or optimizer in _IN_FLOAT32 or optimizer == "adafactor")


def temporary_bytes(optimizer: str, largest: int, device: str) -> int:
    """Bytes that a step of torchao's optimizers takes for its largest parameter, of so many values."""
    return 4 * _COPIES[device] * largest if optimizer in _TORCHAO_BITS else 0


def state_bytes(
    optimizer: str, shape: tuple[int, ...], itemsize: int, device: str, *, embedding: bool = False
) -> float:
    """Bytes of the states of one parameter of `shape` whose values take `itemsize` bytes.

    Sources: bitsandbytes/optim/optimizer.py (states of 8 bits with a float32 scale per 256 values; of 32 bits for
    parameters below 4,096 values, and, as transformers asks for, of embeddings), torchao/optim/subclass_8bit.py and _4bit.py,
    transformers' Adafactor (a row and a column). Paged states of a GPU live in host memory. Others count as AdamW: two states
    in the parameter's type.
    """
    numel = math.prod(shape)
    if optimizer.startswith("paged_") and device == "cuda":
        return 0
    optimizer = optimizer.removeprefix("paged_")
    states = 3 if "ademamix" in optimizer else 1 if optimizer.startswith(_ONE_STATE) else 2
    if bits := _TORCHAO_BITS.get(optimizer):
        block = _BLOCK_TORCHAO[bits]
        if numel < _SMALL or numel % block:
            return states * numel * itemsize
        table = 4 << bits
        return states * (numel * bits / 8 + numel / block * 4 + table)
    if "8bit" in optimizer:
        if numel < _SMALL or embedding:
            return states * numel * 4
        return states * (numel + math.ceil(numel / _BLOCK_BNB) * 4 + 256 * 4)
    if optimizer in _IN_FLOAT32 or optimizer == "ademamix_32bit":
        return states * numel * 4
    if optimizer == "adafactor":
        return (numel / shape[-1] + numel / shape[-2]) * 4 if len(shape) > 1 else numel * 4
    return states * numel * itemsize

"""Compute the size of optimizer states, for optimizers that cannot run on fake tensors."""

import math

_BLOCK_BNB = 256  # values that share one scale in bitsandbytes' 8-bit states
_SMALL = 4096  # number of values below which bitsandbytes and torchao do not quantize states
# Values per scale in torchao's 8- and 4-bit states, which also hold a table of the values of their codes.
_BLOCK_TORCHAO = {8: 256, 4: 128}
_TORCHAO_BITS = {"adamw_torch_8bit": 8, "adamw_8bit_sr": 8, "adamw_torch_4bit": 4}
_ONE_STATE = ("lion", "lars", "signsgd", "rmsprop")
# Optimizers with float32 states for weights of any dtype.
_IN_FLOAT32 = ("lion_32bit", "paged_lion_32bit", "ademamix", "paged_ademamix_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit")
# float32 copies of a parameter in a step of torchao's optimizers: two in inductor's kernel (counted in the one for CPUs), and
# 14 in eager mode, which is used on CPUs (counted).
_COPIES = {"cuda": 2, "cpu": 14}


def in_weights_type(optimizer: str) -> bool:
    """Return True if states have the dtype of their weights."""
    return not ("8bit" in optimizer or "4bit" in optimizer or optimizer in _IN_FLOAT32 or optimizer == "adafactor")


def temporary_bytes(optimizer: str, largest: int, device: str) -> int:
    """Return the temporary bytes of a step of torchao's optimizers, for a largest parameter of `largest` values."""
    return 4 * _COPIES[device] * largest if optimizer in _TORCHAO_BITS else 0


def state_bytes(
    optimizer: str, shape: tuple[int, ...], itemsize: int, device: str, *, embedding: bool = False
) -> float:
    """Return the bytes of the states of one parameter of `shape` with `itemsize` bytes per value.

    Sources: bitsandbytes/optim/optimizer.py (8-bit states with a float32 scale per 256 values; 32-bit states for parameters
    below 4,096 values and, as transformers configures it, for embeddings), torchao/optim/subclass_8bit.py and _4bit.py,
    transformers' Adafactor (a row and a column). Paged states of a GPU are in host memory. Others count as AdamW: two states
    in the parameter's dtype.
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

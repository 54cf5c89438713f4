"""Bytes of an optimizer's states, for those that cannot be run on tensors without memory."""

import math

_BLOCK_BNB = 256  # values that share one scale in bitsandbytes' 8-bit states
_SMALL = 4096  # values below which bitsandbytes and torchao keep states in full
# What torchao's 8- and 4-bit states hold beside codes and scales: a table of the values that the codes mean.
_BLOCK_TORCHAO = {8: 256, 4: 128}
_TORCHAO_BITS = {"adamw_torch_8bit": 8, "adamw_8bit_sr": 8, "adamw_torch_4bit": 4}
_ONE_STATE = ("lion", "lars", "signsgd")


def state_bytes(optimizer: str, shape: tuple[int, ...], itemsize: int, *, embedding: bool = False) -> float:
    """Bytes of the states of one parameter of `shape` whose values take `itemsize` bytes.

    Sources: bitsandbytes/optim/optimizer.py (states of 8 bits with a float32 scale per 256 values; of 32 bits for
    parameters below 4,096 values, and, as transformers asks for, of embeddings), torchao/optim/subclass_8bit.py and _4bit.py,
    transformers' Adafactor (a row and a column). Paged states live in host memory. Others count as AdamW: two states in the
    parameter's type.
    """
    numel = math.prod(shape)
    if optimizer.startswith("paged_"):
        return 0
    states = 1 if optimizer.startswith(_ONE_STATE) else 2
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
    if optimizer in ("lion_32bit", "ademamix", "rmsprop_bnb", "rmsprop_bnb_32bit"):
        return (1 if optimizer.startswith(("lion", "rmsprop")) else 3) * numel * 4
    if optimizer == "adafactor":
        return (numel / shape[-1] + numel / shape[-2]) * 4 if len(shape) > 1 else numel * 4
    return states * numel * itemsize

"""Reproduce the base weights seen in training: rounded to `model.dtype` when loaded, or quantized and dequantized."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from sft_recipes.export.safetensors_io import StoredTensor, stored_name
from sft_recipes.upstream import float32_modules


def merge_dtype(loaded: str, base: str, *, quantized: bool, recorded: bool) -> torch.dtype:
    """Return the dtype to which base weights are rounded before an adapter is merged; float32: they are not rounded.

    Args:
        loaded: the dtype in which training loaded the base.
        base: `original` or `dequantized`.
        quantized: whether training quantized the base.
        recorded: whether the outputs of the trained model were recorded. If not, the merge is compared with what PEFT
            computes from the files as they are.
    """
    as_trained = base == "dequantized" or (recorded and not quantized)
    return getattr(torch, loaded) if as_trained else torch.float32


def is_rounded(model: PreTrainedModel, name: str, stored: torch.dtype, loaded: torch.dtype) -> bool:
    """Return True if `from_pretrained(dtype=loaded)` rounds a tensor.

    transformers keeps some in float32, such as the biases by which routers choose experts.
    """
    rounds = stored.is_floating_point and loaded not in (torch.float32, stored)
    return rounds and not any(part in name for part in float32_modules(model, loaded))


@dataclass
class RoundedTensor(StoredTensor):
    """A stored tensor, rounded to the dtype in which training loaded it."""

    verbatim: ClassVar[bool] = False
    loaded: torch.dtype

    def rows(self, first: int, last: int) -> torch.Tensor:
        return super().rows(first, last).to(self.loaded).float()


def as_loaded(base: Mapping[str, StoredTensor], model: PreTrainedModel, loaded: torch.dtype) -> dict[str, StoredTensor]:
    """Return the base as a model loaded in `loaded` holds it. `model` is the base on the meta device."""
    return {
        name: RoundedTensor(**vars(stored), loaded=loaded) if is_rounded(model, name, stored.dtype, loaded) else stored
        for name, stored in base.items()
    }


@dataclass
class DequantizedTensor(StoredTensor):
    """A stored weight, quantized as in training and dequantized.

    It is in memory as a whole while its rows are read in order: the scales of 4-bit blocks are themselves quantized around
    their mean over the whole tensor.
    """

    verbatim: ClassVar[bool] = False
    config: BitsAndBytesConfig
    loaded: torch.dtype  # in which training held the weight
    transposed: bool
    dequantized: torch.Tensor | None = field(default=None, compare=False)

    def rows(self, first: int, last: int) -> torch.Tensor:
        if self.dequantized is None:
            self.dequantized = self._dequantize(super().rows(0, self.shape[0]))
        rows = self.dequantized[first:last]
        if last == self.shape[0]:
            self.dequantized = None
        return rows

    def _dequantize(self, weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import functional

        weight = weight.to(self.loaded)
        weight = weight.T.contiguous() if self.transposed else weight
        if self.config.load_in_8bit:
            quantized, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            weight = functional.int8_vectorwise_dequant(quantized, scale)
        else:
            quantized, state = functional.quantize_4bit(
                weight,
                compress_statistics=self.config.bnb_4bit_use_double_quant,
                quant_type=self.config.bnb_4bit_quant_type,
            )
            weight = functional.dequantize_4bit(quantized, state)  # in the dtype of `loaded`
        weight = weight.float()
        return weight.T.contiguous() if self.transposed else weight


def dequantize(
    base: Mapping[str, StoredTensor], model: PreTrainedModel, config: Mapping[str, Any], loaded: torch.dtype
) -> dict[str, StoredTensor]:
    """Return the base with the weights dequantized that training quantized.

    Args:
        base: all weights as loaded (`as_loaded`).
        model: the base on the meta device.
        config: the quantization config of bitsandbytes.
        loaded: the dtype in which training held weights before it quantized them.
    """
    settings = BitsAndBytesConfig.from_dict(dict(config))
    weights = dict(base)
    for name, module in model.named_modules():
        file_name = stored_name(f"{name}.weight", base, model.base_model_prefix)
        is_matrix = isinstance(module, (torch.nn.Linear, Conv1D))
        if is_matrix and file_name in base and should_convert_module(name, settings.llm_int8_skip_modules):
            stored, transposed = base[file_name], isinstance(module, Conv1D)
            weights[file_name] = DequantizedTensor(
                stored.file, stored.name, stored.dtype, stored.shape, settings, loaded, transposed
            )
    return weights

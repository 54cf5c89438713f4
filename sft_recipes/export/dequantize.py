"""A base as training held it: rounded to `model.dtype` when it was loaded, or taken to 4 or 8 bits and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from sft_recipes.export.safetensors_io import Stored
from sft_recipes.export.save_model import DTYPES
from sft_recipes.upstream import float32_modules


def held_in(loaded: str, kind: str, *, quantized: bool, recorded: bool) -> torch.dtype:
    """The dtype to which a base is rounded before an adapter is merged into it; float32: it is not rounded.

    Args: the dtype in which training loaded it; `original` or `dequantized`; whether training quantized it; whether what the
    trained model computes was recorded. Without that, PEFT's sum of the files as they are is what a merge is compared with.
    """
    as_trained = kind == "dequantized" or (recorded and not quantized)
    return DTYPES[loaded] if as_trained else torch.float32


def is_rounded(model: PreTrainedModel, name: str, stored: torch.dtype, loaded: torch.dtype) -> bool:
    """Return whether `from_pretrained(dtype=loaded)` rounds a tensor. transformers keeps some in float32, such as the biases
    by which routers choose experts."""
    rounds = stored.is_floating_point and loaded not in (torch.float32, stored)
    return rounds and not any(part in name for part in float32_modules(model, loaded))


@dataclass
class Rounded(Stored):
    """A stored tensor of which training held a rounded one."""

    verbatim: ClassVar[bool] = False
    loaded: torch.dtype

    def rows(self, first: int, last: int) -> torch.Tensor:
        return super().rows(first, last).to(self.loaded).float()


def as_loaded(base: Mapping[str, Stored], model: PreTrainedModel, loaded: torch.dtype) -> dict[str, Stored]:
    """The base as a model that is loaded in `loaded` holds it. `model` is the base on the meta device."""
    return {
        name: Rounded(own.file, own.dtype, own.shape, own.start, loaded)
        if is_rounded(model, name, own.dtype, loaded)
        else own
        for name, own in base.items()
    }


@dataclass
class Dequantized(Stored):
    """A stored tensor after its way to few bits and back. It is in memory from its first row to its last: the scales of
    4-bit blocks are themselves quantized around their mean over the whole tensor."""

    verbatim: ClassVar[bool] = False
    config: BitsAndBytesConfig
    loaded: torch.dtype  # in which training held the weight
    transposed: bool
    held: torch.Tensor | None = field(default=None, compare=False)

    def rows(self, first: int, last: int) -> torch.Tensor:
        if self.held is None:
            self.held = self._there_and_back(super().rows(0, self.shape[0]))
        rows = self.held[first:last]
        if last == self.shape[0]:
            self.held = None
        return rows

    def _there_and_back(self, weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import functional

        weight = weight.to(self.loaded)
        weight = weight.T.contiguous() if self.transposed else weight
        if self.config.load_in_8bit:
            few, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            weight = functional.int8_vectorwise_dequant(few, scale)
        else:
            few, state = functional.quantize_4bit(
                weight,
                compress_statistics=self.config.bnb_4bit_use_double_quant,
                quant_type=self.config.bnb_4bit_quant_type,
            )
            weight = functional.dequantize_4bit(few, state)  # in the type that it was held in
        weight = weight.float()
        return weight.T.contiguous() if self.transposed else weight


def dequantized(
    base: Mapping[str, Stored], model: PreTrainedModel, config: Mapping[str, Any], loaded: torch.dtype
) -> dict[str, Stored]:
    """The base with those weights changed that `config`, a bitsandbytes one, has quantized in training.

    `model` is the base on the meta device, `loaded` the type in which training held the other weights.
    """
    settings = BitsAndBytesConfig.from_dict(dict(config))
    changed = dict(base)
    for name, module in model.named_modules():
        file_name = f"{name}.weight"
        if file_name not in base:
            file_name = file_name.removeprefix(f"{model.base_model_prefix}.")
        is_matrix = isinstance(module, (torch.nn.Linear, Conv1D))
        if is_matrix and file_name in base and should_convert_module(name, settings.llm_int8_skip_modules):
            own, transposed = base[file_name], isinstance(module, Conv1D)
            changed[file_name] = Dequantized(own.file, own.dtype, own.shape, own.start, settings, loaded, transposed)
    return changed

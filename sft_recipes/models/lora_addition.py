"""Add a LoRA update to its layer's output in place, with one matrix product (addmm) instead of three passes over it.

PEFT computes `result + lora_B(h) * scaling`. In bfloat16 that writes and reads three more tensors of the output's size, and
rounds three times instead of once. PEFT's extension point for a different forward pass is LoraVariant, which its docstring
calls prone to change: `tests/models/test_lora_addition.py` tests what this module depends on.
"""

from typing import Any

import peft
import torch
from peft.tuners.lora import Linear, Linear4bit
from peft.tuners.lora.layer import LoraLayer, LoraVariant

from sft_recipes.recipe.schema import Recipe


class _AddProduct(torch.autograd.Function):
    """result + scaling * h @ weight.T, written into `result` (..., out); `h` (..., rank), `weight` (out, rank)."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, scaling: float) -> torch.Tensor:
        ctx.save_for_backward(h, weight)
        ctx.scaling = scaling
        result.view(-1, result.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), weight.T, alpha=scaling)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        h, weight = ctx.saved_tensors
        rows, low = gradient.reshape(-1, gradient.shape[-1]), h.reshape(-1, h.shape[-1])
        nothing = rows.new_zeros(())  # addmm's first argument, which beta=0 ignores; alpha is applied before rounding
        of_h = torch.addmm(nothing, rows, weight, beta=0, alpha=ctx.scaling).view(h.shape)
        of_weight = torch.addmm(nothing, rows.T, low, beta=0, alpha=ctx.scaling)
        return gradient, of_h, of_weight, None


class _InPlace(LoraVariant):
    """Vanilla LoRA with the addition in place. Merging is PEFT's formula."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        h = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        lora_b, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        if h.dtype != result.dtype:
            return result + lora_b(h) * scaling
        if not result.is_contiguous():
            result = result.clone()
        return _AddProduct.apply(result, h, lora_b.weight.to(h.dtype), scaling)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def add_in_place(model: peft.PeftModel, recipe: Recipe) -> None:
    """Make plain LoRA layers add their update in place.

    PEFT's own addition stays for DoRA, for compiled layers (the compiler fuses it), and under fsdp2 and zero3: they gather a
    weight when its module is called, but this product reads lora_B's weight without calling the module.
    """
    assert recipe.lora is not None
    if recipe.lora.use_dora or recipe.train.compile or recipe.launch.strategy in ("fsdp2", "zero3"):
        return
    for module in model.modules():
        if type(module) in (Linear, Linear4bit):
            for adapter in module.lora_A:
                module.lora_variant.setdefault(adapter, _InPlace())

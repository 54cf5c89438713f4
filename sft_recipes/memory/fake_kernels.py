"""Traceable substitutes for GPU kernels and quantized layers, because memory is traced on the CPU."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig, masking_utils
from transformers.integrations import moe
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from sft_recipes.memory.storage_tracker import StorageTracker
from sft_recipes.models import attention as varlen
from sft_recipes.models import cpu_loss
from sft_recipes.models.attention import Capability
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import supports

VARIABLE = "traced_varlen"  # attention that isolates documents by cu_seqlens, without a mask
BY_DOCUMENT = "traced_by_document"  # the same on a CPU: one sdpa call per document


def attention(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> str | None:
    """Return the implementation that is traced in place of the run's. Arguments as `named`'s."""
    name = named(recipe, config, device, capability)
    if name == varlen.NAME and not recipe.padding_free:
        return "sdpa"
    if name == varlen.NAME and device == "cpu":
        return BY_DOCUMENT
    return name if name in ("sdpa", "eager", None) else VARIABLE


def named(recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None) -> str | None:
    """Return the run's implementation; None for a model that supports only its own.

    `capability` is that of the GPU. If it is None, Ampere or later is assumed.

    Raises: ModelError if model or GPU does not support it.
    """
    selected, _ = varlen.select_implementation(recipe, config, device, capability)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if selected is None and (architecture is None or supports(architecture, "sdpa")):
        return "sdpa"
    return selected


def lower_memory_attention(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> str | None:
    """Return an implementation that needs less memory than the recipe's, None if there is none."""
    used = attention(recipe, config, device, capability)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if used in ("eager", None):
        return "sdpa" if supports(model, "sdpa") else None
    packed = masks_all_pairs(recipe, config, device, capability)
    if packed and varlen.problem(recipe, config, device, capability) is None:
        return varlen.NAME
    masks = packed or recipe.train.micro_batch_size != 1
    recent = capability is None or capability >= varlen.AMPERE
    able = device == "cuda" and recent and supports(model, "flash_attn")
    return "flash_attention_2" if used == "sdpa" and masks and able else None


def masks_all_pairs(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> bool:
    """Return True if packed documents are isolated by a mask of all token pairs of the micro-batch."""
    return attention(recipe, config, device, capability) == "sdpa" and recipe.padding_free


class _Attention(torch.autograd.Function):
    """The allocations of a fused attention kernel: output, log-sum-exp per row, gradients.

    And a float32 accumulator of the queries' gradient (flash attention 2's dq_accum; sdpa's memory-efficient kernel, which it
    uses with a mask, has one too).
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any) -> Any:
        out = torch.empty_like(query[..., : value.shape[-1]])
        rows = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        accumulated = torch.empty(query.shape, dtype=torch.float32)
        deltas = torch.empty(query.shape[:-1], dtype=torch.float32)
        heads = query.shape[1] // key.shape[1]
        expanded = [torch.empty(query.shape, dtype=query.dtype) for _ in range(2)] if heads > 1 else []
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
        del accumulated, deltas, expanded
        return gradients


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Return no mask; or replace an operation that Triton does in place."""


def _variable(_module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value, None).transpose(1, 2).contiguous(), None


def _by_document(
    _module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **others: Any
) -> tuple[torch.Tensor, None]:
    """Attend within documents as long as a sequence: what the backward pass keeps depends on the number of tokens only."""
    length = others["max_length_q"]
    lengths = [length] * (query.shape[2] // length)
    return varlen.by_document(query, key, value, lengths, window=others.get("sliding_window")), None


for _name, _traced in ((VARIABLE, _variable), (BY_DOCUMENT, _by_document)):
    AttentionInterface.register(_name, _traced)
    AttentionMaskInterface.register(_name, _nothing)


def _sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    """Replace sdpa by its GPU kernels; with a mask, the memory-efficient one, which keeps a number per token pair."""
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
    return _Attention.apply(query, key, value, bias)


class _Head:
    """The LM-head loss, with its phases marked.

    On a GPU, and with `cpu_loss`, the hidden states of trained tokens (here all) are copied first.
    """

    def __init__(self, tracker: StorageTracker, device: str, loss_type: str) -> None:
        self.tracker = tracker
        on_cpu = cpu_loss.applies(device, loss_type)
        self.copies = on_cpu or device == "cuda"
        self.loss: Any = cpu_loss.Head if on_cpu else chunked_logprob.ChunkedLogProbFunction

    def apply(self, hidden: torch.Tensor, *args: Any) -> Any:
        if hidden.requires_grad:  # called when the loss's own backward pass is done
            hidden.register_hook(lambda _: self.tracker.enter("backward, upper layers", "activations"))
        with self.tracker.during("loss, forward", "head"):
            return self.loss.apply(hidden.clone() if self.copies else hidden, *args)


@contextmanager
def gpu_kernels(device: str, tracker: StorageTracker, *, half: bool, loss_type: str) -> Iterator[None]:
    """Mark the phases of the loss, and substitute kernels if the device is a GPU."""
    on_gpu = device == "cuda"
    layer_norm = torch.nn.functional.layer_norm

    def dropout(x: Any, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> Any:
        """CUDA keeps one byte per value; the CPU a mask in the input's dtype."""
        return torch.native_dropout(x, p, True)[0] if training and p else x

    def in_float32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        """CUDA's autocast computes layer norms in float32, the CPU's does not."""
        return layer_norm(x.float(), shape, *(None if p is None else p.float() for p in (weight, bias)), eps)

    with (
        patch.object(trl_utils, "_ChunkedLogProbFunction", _Head(tracker, device, loss_type)),
        # If traced, transformers always builds a mask, because there are no values; StorageTracker supplies them.
        patch.object(masking_utils, "is_tracing", lambda *_: False),
        # torch has fake tensors of the grouped expert kernel for bfloat16 only; the loop over experts allocates the same.
        patch.object(moe, "_can_use_grouped_mm", lambda _, weight, __: weight.dtype == torch.bfloat16),
    ):
        if not on_gpu:
            yield
            return
        with (
            patch.object(chunked_logprob, "_forward_tile", _nothing),
            patch.object(chunked_logprob, "_backward_tile", _nothing),
            patch.object(chunked_logprob, "_addmm_fp32", _nothing),
            patch.object(torch.nn.functional, "scaled_dot_product_attention", _sdpa),
            patch.object(torch.nn.functional, "dropout", dropout),
            patch.object(torch.nn.functional, "layer_norm", in_float32 if half else layer_norm),
        ):
            yield


# --- Liger's kernels ---


class _RMSNorm(torch.autograd.Function):
    """Liger's norm: keeps its input and a float32 number per row, and writes the input's gradient into the output's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weight = ctx.saved_tensors[1]
        return gradient, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _GatedProduct(torch.autograd.Function):
    """Liger's SwiGLU and GeGLU, which keep both inputs and overwrite them with their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> Any:
        return ctx.saved_tensors


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "gate_up_proj"):
        gate, up = (half.contiguous() for half in module.gate_up_proj(x).chunk(2, dim=-1))
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(_GatedProduct.apply(gate, up))


def _rotated(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate nothing, since Liger rotates in place, forward and backward."""
    return q, k


@contextmanager
def liger(model: PreTrainedModel) -> Iterator[None]:
    """Substitute Liger's norms, MLPs and rotation, by their names in transformers; experts of a mixture stay."""
    module, rotate = sys.modules[type(model).__module__], "apply_rotary_pos_emb"
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = partial(lambda norm, x: _RMSNorm.apply(x, norm.weight), part)
        elif isinstance(getattr(part, "down_proj", None), torch.nn.Module):
            part.forward = partial(_gated, part)
    with patch.object(module, rotate, _rotated) if hasattr(module, rotate) else nullcontext():
        yield


# --- Quantized weights ---


class _FourBits(torch.autograd.Function):
    """A product with a 4-bit weight, which is dequantized in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: int, _device: str) -> torch.Tensor:
        ctx.shape = out, x.shape[-1]
        return torch.nn.functional.linear(x, torch.empty(ctx.shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None


class _EightBits(torch.autograd.Function):
    """bitsandbytes' MatMul8bitLt: keeps the input, quantizes it via float16, and multiplies to int32, which CPUs scale in
    float32. The backward pass dequantizes the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: int, device: str) -> torch.Tensor:
        ctx.shape, ctx.kept = (out, x.shape[-1]), x
        _quantized = x.to(torch.float16).to(torch.int8)
        product = torch.empty((*x.shape[:-1], out), dtype=torch.int32)
        if device == "cpu":
            return (product * torch.empty(product.shape, dtype=torch.float32)).to(x.dtype)
        return product.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None


class QuantizedLinear(torch.nn.Linear):
    """A linear layer with a 4- or 8-bit weight, stored as bitsandbytes does.

    4 bits: half a byte per value; a scale per 64 values, itself in 8 bits, and a float32 scale per 256 of those (double
    quantization). 8 bits: a byte per value, and a float32 scale per output.
    """

    quantized = True

    def __init__(self, like: torch.nn.Linear, kind: str, compute: torch.dtype, device: str) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.product: Any = _EightBits if kind == "int8" else _FourBits
        self.compute, self.device = compute, device
        numel = self.in_features * self.out_features
        scales = math.ceil(numel / 64)
        size = numel + 4 * self.out_features if kind == "int8" else numel // 2 + scales + math.ceil(scales / 256) * 4
        self.register_buffer("packed", torch.empty(size, dtype=torch.uint8))
        self.register_parameter("bias", like.bias)

    @property
    def weight(self) -> torch.Tensor:
        """Return what PEFT reads device and dtype from."""
        return self.packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        input_dtype = x.dtype
        out = self.product.apply(x.to(self.compute), self.out_features, self.device)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(input_dtype).clone()  # PEFT clones the output of 4-bit layers


def quantize(model: PreTrainedModel, kind: str, keep: list[str], compute: torch.dtype, device: str) -> None:
    """Replace all linear layers by quantized ones, except those named in `keep`."""
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if type(module) is torch.nn.Linear and last not in keep:
            setattr(model.get_submodule(parent), last, QuantizedLinear(module, kind, compute, device))

"""Traceable substitutes for GPU kernels and quantized layers, because memory is traced on the CPU."""

import math
import sys
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from sft_recipes.models import attention as varlen
from sft_recipes.models.attention import Capability
from sft_recipes.models.kernels import Kernels
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import GROUPED_MM, supports

# --- Attention -------------------------------------------------------------------------------------------------------

VARIABLE = "traced_varlen"  # isolates documents by cu_seqlens, without a mask
BY_DOCUMENT = "traced_by_document"  # the same on a CPU: one sdpa call per document
FULL_ROWS = "traced_full_rows"  # sdpa on rows without padding, which need no mask


def attention(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> str | None:
    """Return the implementation that is traced in place of the run's. Arguments as `named`'s."""
    name = named(recipe, config, device, capability)
    if name == varlen.NAME and not recipe.padding_free:
        name = "sdpa"
    if name == "sdpa" and not recipe.padding_free and not _pads(recipe):
        # transformers masks all rows while tracing, because it cannot read whether they are padded.
        exchangeable = supports(varlen.architecture_of(config), "attention_backend")
        return FULL_ROWS if exchangeable else name
    if name == varlen.NAME and device == "cpu":
        return BY_DOCUMENT
    return name if name in ("sdpa", "eager", None) else VARIABLE


def named(recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None) -> str | None:
    """Return the run's implementation; None for a model that supports only its own.

    `capability` is that of the GPU. If it is None, Ampere or later is assumed.

    Raises: ModelError if model or GPU does not support it.
    """
    selected, _ = varlen.select_implementation(recipe, config, device, capability)
    return "sdpa" if selected is None and supports(varlen.architecture_of(config), "sdpa", default=True) else selected


def lower_memory_attention(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> str | None:
    """Return an implementation that needs less memory than the recipe's, None if there is none."""
    used, model = named(recipe, config, device, capability), varlen.architecture_of(config)
    if used in ("eager", None):
        return "sdpa" if supports(model, "sdpa") else None
    packed = masks_all_pairs(recipe, config, device, capability)
    if packed and varlen.problem(recipe, config, device, capability) is None:
        return varlen.NAME
    recent = capability is None or capability >= varlen.AMPERE
    able = device == "cuda" and recent and supports(model, "flash_attn")
    return "flash_attention_2" if used in ("sdpa", varlen.NAME) and (packed or _pads(recipe)) and able else None


def masks_all_pairs(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> bool:
    """Return True if packed documents are isolated by a mask of all token pairs of the micro-batch."""
    return recipe.padding_free and named(recipe, config, device, capability) == "sdpa"


def _pads(recipe: Recipe) -> bool:
    """Return True if rows of a micro-batch are padded to one length."""
    return recipe.data.packing == "none" and recipe.train.micro_batch_size != 1


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


def _variable(_module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value, None).transpose(1, 2).contiguous(), None


def _by_document(
    _module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **others: Any
) -> tuple[torch.Tensor, None]:
    """Attend within documents as long as a sequence: what the backward pass keeps depends on the number of tokens only."""
    length = others["max_length_q"]
    lengths = [length] * (query.shape[2] // length)
    return varlen.by_document(query, key, value, lengths, window=others.get("sliding_window")), None


def _no_mask(**_: Any) -> None:
    return None


def _mask_of_window(*, kv_length: int, local_size: int | None = None, **others: Any) -> Any:
    """Mask what is outside of a window that is shorter than the row; causal attention alone needs no mask."""
    if local_size is None or local_size > kv_length:
        return None
    return sdpa_mask(kv_length=kv_length, local_size=local_size, **others)


for _name, _attend, _mask in (
    (VARIABLE, _variable, _no_mask),
    (BY_DOCUMENT, _by_document, _no_mask),
    (FULL_ROWS, sdpa_attention_forward, _mask_of_window),
):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, _mask)


# --- Functions of torch ----------------------------------------------------------------------------------------------


class FakeKernels(TorchFunctionMode):
    """Replace calls of torch's functions by the allocations of the device's kernels while it is active.

    A backward pass runs without it, so checkpointed layers have to enter it to be recomputed.
    """

    def __init__(self, device: str, *, autocast: bool) -> None:
        super().__init__()
        self.substitutes: dict[Any, Any] = {GROUPED_MM: _grouped_mm}
        if device == "cuda":
            self.substitutes |= {functional.scaled_dot_product_attention: _sdpa, functional.dropout: _dropout}
        if device == "cuda" and autocast:
            self.substitutes[functional.layer_norm] = _layer_norm

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.substitutes.get(func, func)(*args, **(kwargs or {}))


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """Multiply all tokens by one expert's weight, which allocates the same. Autocast does not cover the grouped kernel."""
    with torch.autocast("cpu", enabled=False):
        return x @ weight[0]


def _sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    """With a mask, sdpa uses its memory-efficient kernel, which keeps a number per token pair."""
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
    return _Attention.apply(query, key, value, bias)


def _dropout(x: Any, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> Any:
    """CUDA keeps one byte per value; the CPU a mask in the input's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """CUDA's autocast computes layer norms in float32, the CPU's does not."""
    weight, bias = (None if parameter is None else parameter.float() for parameter in (weight, bias))
    return functional.layer_norm(x.float(), shape, weight, bias, eps)


class Loss(torch.autograd.Function):
    """The allocations of TRL's loss on a GPU: a tile of logits, numbers per token, gradients in float32."""

    TOKENS, VOCABULARY = 4096, 32768  # of a tile: trl/kernels/chunked_logprob.py, trl/trainer/utils.py

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        _tile = Loss.tile(ctx.dtype, hidden, weight)
        return torch.empty(6, len(hidden))

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        gradients = [torch.empty(tensor.shape) if need else None for tensor, need in needed]
        _tile = Loss.tile(ctx.dtype, *ctx.saved_tensors)
        return tuple(
            None if each is None else each.to(tensor.dtype)
            for each, tensor in zip(gradients, ctx.saved_tensors, strict=True)
        )

    @staticmethod
    def tile(dtype: torch.dtype, hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        logits = torch.empty(min(len(hidden), Loss.TOKENS), Loss.VOCABULARY, dtype=dtype)
        return logits, hidden[: Loss.TOKENS].to(dtype), weight[: Loss.VOCABULARY].to(dtype)


# --- Liger's kernels -------------------------------------------------------------------------------------------------


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


def apply_liger(model: PreTrainedModel) -> Kernels:
    """Substitute Liger's norms, MLPs and (while the result is active) rotation; experts of a mixture stay."""
    module, rotate = sys.modules[type(model).__module__], "apply_rotary_pos_emb"
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = partial(lambda norm, x: _RMSNorm.apply(x, norm.weight), part)
        elif isinstance(getattr(part, "down_proj", None), torch.nn.Module):
            part.forward = partial(_gated, part)
    return Kernels("liger", module=module, functions={rotate: _rotated} if hasattr(module, rotate) else {})


# --- Quantized weights -----------------------------------------------------------------------------------------------


class _FourBits(torch.autograd.Function):
    """A product with a 4-bit weight, which is dequantized in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: int, _device: str) -> torch.Tensor:
        ctx.shape = out, x.shape[-1]
        return functional.linear(x, torch.empty(ctx.shape, dtype=x.dtype))

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

    backward = _FourBits.backward


class QuantizedLinear(torch.nn.Linear):
    """A linear layer with a 4- or 8-bit weight, stored as bitsandbytes does.

    4 bits: half a byte per value; a scale per 64 values, itself in 8 bits, and a float32 scale per 256 of those (double
    quantization). 8 bits: a byte per value, and a float32 scale per output.
    """

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

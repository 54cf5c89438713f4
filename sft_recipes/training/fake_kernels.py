"""What a GPU does where the CPU, on which a step is traced, does otherwise; and layers that cannot be traced as they are."""

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

from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import attention as varlen
from sft_recipes.training import cpu_loss
from sft_recipes.training.attention import Capability
from sft_recipes.training.sft_config import padding_free
from sft_recipes.training.storage_tracker import StorageTracker

VARIABLE = "traced_varlen"  # attention that knows where documents begin, and needs no mask
BY_DOCUMENT = "traced_by_document"  # the same on a CPU: one call of sdpa for each


def attention(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> str | None:
    """Return the implementation that is traced for the run's; of a GPU of this compute capability, see `named`."""
    name = named(recipe, config, device, capability)
    if name == varlen.NAME and not padding_free(recipe):
        return "sdpa"
    if name == varlen.NAME and device == "cpu":
        return BY_DOCUMENT
    return name if name in ("sdpa", "eager", None) else VARIABLE


def named(recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None) -> str | None:
    """Return the run's implementation; None for a model that has only its own.

    `capability` is that of the GPU. If it is None, Ampere or later is assumed.

    Raises: ModelError if model or GPU cannot have it.
    """
    chosen, _ = varlen.select_implementation(recipe, config, device, capability)
    if chosen is None and getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_supports_sdpa", True):
        return "sdpa"
    return chosen


def lower_memory_attention(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> str | None:
    """Return an implementation that takes less memory than the recipe's, None if there is none."""
    used = attention(recipe, config, device, capability)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if used in ("eager", None):
        return "sdpa" if getattr(model, "_supports_sdpa", False) else None
    packed = masks_all_pairs(recipe, config, device, capability)
    if packed and varlen.problem(recipe, config, device, capability) is None:
        return varlen.NAME
    masks = packed or recipe.train.micro_batch_size != 1
    recent = capability is None or capability >= varlen.AMPERE
    able = device == "cuda" and recent and getattr(model, "_supports_flash_attn", False)
    return "flash_attention_2" if used == "sdpa" and masks and able else None


def masks_all_pairs(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> bool:
    """Return True if packed documents are isolated by a mask of all token pairs of the micro-batch."""
    return attention(recipe, config, device, capability) == "sdpa" and padding_free(recipe)


class _Attention(torch.autograd.Function):
    """Tensors that a fused attention kernel keeps and makes: its output, the log-sum-exp of each row, the gradients, and
    the float32 sum in which the queries' gradient is taken (flash attention 2's dq_accum; the same in the
    memory-efficient kernel, which sdpa takes where there is a mask)."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any) -> Any:
        out = torch.empty_like(query[..., : value.shape[-1]])
        rows = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        summed = torch.empty(query.shape, dtype=torch.float32)
        deltas = torch.empty(query.shape[:-1], dtype=torch.float32)
        heads = query.shape[1] // key.shape[1]
        expanded = [torch.empty(query.shape, dtype=query.dtype) for _ in range(2)] if heads > 1 else []
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
        del summed, deltas, expanded
        return gradients


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """No mask; or a fold that Triton does in place."""


def _variable(_module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value, None).transpose(1, 2).contiguous(), None


def _by_document(
    _module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **others: Any
) -> tuple[torch.Tensor, None]:
    """Documents as long as a sequence. What shorter ones keep is together the same: so much a token."""
    length = others["max_length_q"]
    lengths = [length] * (query.shape[2] // length)
    return varlen.by_document(query, key, value, lengths, window=others.get("sliding_window")), None


for _name, _traced in ((VARIABLE, _variable), (BY_DOCUMENT, _by_document)):
    AttentionInterface.register(_name, _traced)
    AttentionMaskInterface.register(_name, _nothing)


def _sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    """torch's sdpa on a GPU: with a mask the memory-efficient kernel, which keeps the mask as a number for each pair."""
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
    return _Attention.apply(query, key, value, bias)


class _Head:
    """The loss, with its phases marked. On a GPU, and where it is not TRL's own, it is that of the trained tokens only (here
    all), which are copied together first."""

    def __init__(self, tracker: StorageTracker, device: str, loss_type: str) -> None:
        self.tracker = tracker
        own = cpu_loss.applies(device, loss_type)
        self.gathers = own or device == "cuda"
        self.loss: Any = cpu_loss.Head if own else chunked_logprob.ChunkedLogProbFunction

    def apply(self, hidden: torch.Tensor, *args: Any) -> Any:
        if hidden.requires_grad:  # reached when the loss's own backward pass is done
            hidden.register_hook(lambda _: self.tracker.enter("backward, upper layers", "activations"))
        with self.tracker.during("loss, forward", "head"):
            return self.loss.apply(hidden.clone() if self.gathers else hidden, *args)


@contextmanager
def gpu_kernels(device: str, tracker: StorageTracker, *, half: bool, loss_type: str) -> Iterator[None]:
    """The phases of the loss are marked; and where the device is a GPU, its kernels stand in for the CPU's."""
    on_gpu = device == "cuda"
    normalise = torch.nn.functional.layer_norm

    def dropout(x: Any, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> Any:
        """CUDA's keeps a byte a value, the CPU's a mask in the input's type."""
        return torch.native_dropout(x, p, True)[0] if training and p else x

    def in_float32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        """CUDA's autocast takes layer norms to float32, the CPU's leaves them."""
        return normalise(x.float(), shape, *(None if each is None else each.float() for each in (weight, bias)), eps)

    with (
        patch.object(trl_utils, "_ChunkedLogProbFunction", _Head(tracker, device, loss_type)),
        # transformers makes a mask in any case where it cannot look at values; the tracker answers for them.
        patch.object(masking_utils, "is_tracing", lambda *_: False),
        # Of the kernel for experts torch knows the shapes in bfloat16 alone; the loop over them makes the same.
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
            patch.object(torch.nn.functional, "layer_norm", in_float32 if half else normalise),
        ):
            yield


# --- Liger's kernels ---


class _RMSNorm(torch.autograd.Function):
    """Liger keeps the input and a float32 number a row, and writes the input's gradient over the output's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weight = ctx.saved_tensors[1]
        return gradient, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _GatedProduct(torch.autograd.Function):
    """Liger's SwiGLU and GeGLU keep both inputs, and write the gradients over them."""

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
    """Liger rotates in place, forward and backward."""
    return q, k


@contextmanager
def liger(model: PreTrainedModel) -> Iterator[None]:
    """Liger's norms, MLPs and rotation stand in for the model's own, by the names that transformers gives them. Experts of a
    mixture are left as they are."""
    module, rotate = sys.modules[type(model).__module__], "apply_rotary_pos_emb"
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = partial(lambda norm, x: _RMSNorm.apply(x, norm.weight), part)
        elif isinstance(getattr(part, "down_proj", None), torch.nn.Module):
            part.forward = partial(_gated, part)
    with patch.object(module, rotate, _rotated) if hasattr(module, rotate) else nullcontext():
        yield


# --- Quantised weights ---


class _FourBits(torch.autograd.Function):
    """A product with a weight that is made from its quantised form, once in the forward and once in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, out: int, _device: str) -> torch.Tensor:
        ctx.shape = out, x.shape[-1]
        return torch.nn.functional.linear(x, torch.empty(ctx.shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None


class _EightBits(torch.autograd.Function):
    """bitsandbytes' MatMul8bitLt: the input is kept, quantised by way of float16, and multiplied to 32-bit integers, which on
    CPUs are scaled in float32. The backward pass makes the weight anew."""

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
    """A linear layer whose weight is held in 4 or 8 bits by bitsandbytes.

    4 bits: half a byte a value; a scale per 64 values, itself in 8 bits, and a float32 scale per 256 of those (double
    quantisation). 8 bits: a byte a value, and a float32 scale per output.
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
        """PEFT asks for its device and type."""
        return self.packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.dtype
        out = self.product.apply(x.to(self.compute), self.out_features, self.device)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.to(wide).clone()  # PEFT's layer clones what comes of 4 bits


def quantize(model: PreTrainedModel, kind: str, keep: list[str], compute: torch.dtype, device: str) -> None:
    """Put quantised layers in the place of all linear ones but those to keep."""
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if type(module) is torch.nn.Linear and last not in keep:
            setattr(model.get_submodule(parent), last, QuantizedLinear(module, kind, compute, device))

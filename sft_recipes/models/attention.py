"""Select a run's attention implementation, and provide `varlen`: attention over packed documents with torch alone.

Packed documents share a row. sdpa isolates them with a mask of all token pairs, which rules out its fastest kernels and
grouped heads. `varlen` isolates them by `cu_seq_lens`, which TRL's collator provides: one kernel for all documents on CUDA,
one causal sdpa call per document on other devices. Without `cu_seq_lens` it is sdpa with sdpa's mask.
"""

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft_recipes.errors import ModelError
from sft_recipes.recipe.library_names import installed
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import supports

NAME = "varlen"  # for a name with "flash" in it transformers would require flash-attn
Capability = tuple[int, int]  # compute capability of a GPU, such as (8, 0)
AMPERE: Capability = (8, 0)  # minimum of flash attention 2, torch's varlen kernel
WIDEST = 256  # maximum width of a head in flash attention 2
# Model types of transformers 5.23 that change the mask before attention receives it, or do not pass cu_seq_lens on.
_CUSTOM_MASKS = {
    "axk2", "deepseek_v32", "doge", "dots3_note", "dots3_note_text", "glm_moe_dsa", "lfm3", "nemotron", "recurrent_gemma",
}  # fmt: skip
# Other arguments that models pass to attention and that do not change the result.
_IGNORED = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids", "use_cache",
    "cache_position", "num_items_in_batch", "output_router_logits", "sliding_window", "is_causal",
}  # fmt: skip


# --- Selection -------------------------------------------------------------------------------------------------------


def select_implementation(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None
) -> tuple[str | None, str]:
    """Select the attention implementation of a run on `device`, cuda or cpu.

    `capability` is that of the GPU. If it is None, Ampere or later is assumed.

    Returns: its name, None for transformers' own choice; and the reason, "" if there is nothing to explain.

    Raises: ModelError if the recipe names varlen and the model or the GPU does not support it.
    """
    wanted, packed = recipe.model.attention, recipe.padding_free
    if wanted not in ("auto", NAME):
        return wanted, ""
    flash = supports(architecture_of(config), "flash_attn") and (capability or AMPERE) >= AMPERE
    if wanted == "auto" and device == "cuda" and _half(recipe) and flash and installed("flash_attn"):
        return "flash_attention_2", "flash-attn is installed"
    unsupported = problem(recipe, config, device, capability)
    if wanted == NAME and unsupported is not None:
        raise ModelError(f"model.attention: varlen does not support {unsupported}. Set model.attention to auto.")
    if wanted == NAME:
        return NAME, "" if packed else "runs sdpa, because there are no packed documents to isolate"
    if not packed:
        return None, ""
    if unsupported is not None:
        return None, f"varlen does not support {unsupported}"
    return NAME, "packed documents, no flash-attn needed"


def problem(recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None = None) -> str | None:
    """Return what of a run varlen does not support, None if nothing. Arguments as `select_implementation`'s."""
    unsupported = obstacle(config)
    if unsupported is not None or device != "cuda" or not recipe.padding_free:
        return unsupported
    if not _half(recipe):
        return "float32 on a GPU"
    return kernel_obstacle(config, capability) or _trial(recipe, config, capability)


def obstacle(config: PreTrainedConfig) -> str | None:
    """Return what of a model's attention varlen does not support, None if nothing."""
    architecture, text = architecture_of(config), config.get_text_config(decoder=True)
    # varlen lacks what sdpa lacks (softcapping, sinks), and transformers declares which models need it.
    as_sdpa = supports(architecture, "attention_backend") and supports(architecture, "sdpa")
    # transformers before 5.22 declares sdpa for Gemma 2, without its softcapping.
    softcaps = getattr(text, "attn_logit_softcapping", None) is not None
    if not as_sdpa or softcaps or config.model_type in _CUSTOM_MASKS:
        return f"the attention of a {config.model_type} model, which differs from transformers' sdpa"
    if not getattr(text, "is_causal", True):
        return "a model with bidirectional attention"
    dropout = (name for name in text.to_dict() if "att" in name and "drop" in name and getattr(text, name))
    return next((f"dropout in attention ({name} in the model's config)" for name in dropout), None)


def kernel_obstacle(config: PreTrainedConfig, capability: Capability | None) -> str | None:
    """Return why torch's varlen kernel cannot run a model on a GPU, None if it can.

    Decided from config and GPU before training: a layer's fallback would wait for the GPU to split documents.
    """
    if capability is not None and capability < AMPERE:
        return "GPUs of compute capability below 8.0 (got {}.{})".format(*capability)
    for width, of_values in sorted(head_widths(config)):
        if width % 8 or width > WIDEST:
            return f"attention heads on a GPU whose width is not a multiple of 8 up to {WIDEST} (got {width})"
        if of_values > width:
            return f"values wider than keys on a GPU (got {of_values} and {width})"
    return None


def head_widths(config: PreTrainedConfig) -> set[tuple[int, int]]:
    """Return the widths of a head's keys and values, of all layers."""
    widths = set()
    for layer in config.get_text_config(decoder=True).per_layer_config:
        latent, rotary = (getattr(layer, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
        # Models with latent attention call the width of the rotary part head_dim.
        width = latent + rotary if latent and rotary else getattr(layer, "head_dim", None)
        width = width or layer.hidden_size // layer.num_attention_heads
        widths.add((width, getattr(layer, "v_head_dim", None) or width))
    return widths


def select_here(recipe: Recipe, config: PreTrainedConfig) -> tuple[str | None, str]:
    """`select_implementation` for a run on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return select_implementation(recipe, config, device, capability_here())


def capability_here() -> Capability | None:
    """Return the compute capability of this process's GPU, None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def architecture_of(config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _half(recipe: Recipe) -> bool:
    """Return True if attention is computed in half precision."""
    return recipe.model.dtype != "float32" or recipe.train.mixed_precision != "no"


def _trial(recipe: Recipe, config: PreTrainedConfig, capability: Capability | None) -> str | None:
    """Test the kernel with the model's widths if this GPU has that capability; return the problem, None if it passes."""
    if capability is None or capability_here() != capability:
        return None
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    half = getattr(torch, recipe.compute_dtype)
    correct = all(_kernel_is_correct(*widths, max(groups, 1), half) for widths in head_widths(config))
    return None if correct else "this GPU, on which torch's varlen kernel differs from sdpa"


# --- varlen ----------------------------------------------------------------------------------------------------------


class LazyMask:
    """sdpa's mask of a row without padding, built only if sdpa runs.

    Attributes:
        build: returns sdpa's mask, a tensor, or None if causal attention needs no mask.
        window: how many tokens of its document a token attends to, itself included. None: all before it.
        chunk: as `window`, for attention within chunks of so many tokens. None: no chunks.
    """

    def __init__(self, build: Callable[[], Any], window: int | None = None, chunk: int | None = None) -> None:
        self.build, self.window, self.chunk = build, window, chunk


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within documents; the attention function that transformers calls in each layer.

    torch.compile traces it without a graph break: a break would leave the whole layer uncompiled if the layer is
    checkpointed. It never waits for a GPU.

    `query`, `key` and `value` are (rows, heads, tokens, width); keys and values may have fewer heads. `attention_mask` is a
    LazyMask, or sdpa's mask. `cu_seq_lens_q` among the other arguments has the starts of documents, and the end of the last
    one. Without it, with a mask that is a tensor, or with keys of earlier tokens, sdpa runs.

    Returns: (rows, tokens, heads, width); and None, for the attention weights.

    Raises: ModelError if the layer passes an argument that varlen does not support.
    """
    starts, mask = kwargs.get("cu_seq_lens_q"), attention_mask
    longest = kwargs.get("max_length_q") or query.shape[2]  # a bound suffices; the exact value is on the device
    lazy = isinstance(mask, LazyMask)
    in_chunks = lazy and mask.chunk is not None and longest > mask.chunk
    if (
        starts is None
        or in_chunks
        or isinstance(mask, torch.Tensor)
        or query.shape[0] > 1
        or query.shape[2] != key.shape[2]
    ):
        return sdpa_attention_forward(module, query, key, value, mask.build() if lazy else mask, **kwargs)
    window, scaling = mask.window if lazy else None, kwargs.pop("scaling", None)
    _reject_unsupported(module, kwargs)
    if torch.is_autocast_enabled(query.device.type):  # autocast covers sdpa, but not the kernel
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if query.is_cuda:
        return _kernel(query, key, value, starts, longest, scaling, window), None
    if torch.compiler.is_compiling():  # lengths are tensor values, which a graph does not have
        return _ByDocument.apply(query, key, value, starts, scaling, window), None
    return by_document(query, key, value, starts.diff().tolist(), scaling, window), None


def _reject_unsupported(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    unknown = [
        name
        for name, given in kwargs.items()
        if name not in _IGNORED and given is not None and (isinstance(given, torch.Tensor) or given)
    ]
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        unknown.append("is_causal: false")
    if unknown:
        raise ModelError(
            f"model.attention: varlen does not support what {type(module).__name__} passes to attention "
            f"(got {', '.join(unknown)}). Set model.attention to sdpa or eager."
        )


def by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attend with one causal call of sdpa per document.

    `query`, `key` and `value` are (1, heads, tokens, width); keys and values may have fewer heads. `lengths` are the tokens
    of each document. A token attends to the last `window` tokens of its document, itself included, or to all if it is None.

    Returns: (1, tokens, heads, width).
    """
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        band, tokens = None, q.shape[2]
        if window is not None and tokens > window:
            band = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = scaled_dot_product_attention(
            q, k, v, band, is_causal=band is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


# `by_document` and its gradients as nodes of a compiled graph, which cannot split documents: lengths are tensor values.
_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor starts, float? scaling, SymInt? window"
torch.library.define("sft_recipes::by_document", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "sft_recipes::by_document_backward", f"(Tensor gradient, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl("sft_recipes::by_document", "CPU")  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *args: Any) -> torch.Tensor:
    return by_document(query, key, value, starts.diff().tolist(), *args).contiguous()


@torch.library.register_fake("sft_recipes::by_document")  # type: ignore[untyped-decorator]
def _(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.impl("sft_recipes::by_document_backward", "CPU")  # type: ignore[untyped-decorator]
def _(gradient: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    *tensors, starts, scaling, window = inputs
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in tensors)
        out = by_document(query, key, value, starts.diff().tolist(), scaling, window)
    return tuple(grad.contiguous() for grad in torch.autograd.grad(out, (query, key, value), gradient))


@torch.library.register_fake("sft_recipes::by_document_backward")  # type: ignore[untyped-decorator]
def _(_gradient: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:3])


class _ByDocument(torch.autograd.Function):
    """`by_document` in a compiled graph.

    The backward pass runs the forward pass again, because an operator keeps no autograd graph: 9 instead of 7 products of the
    size of a document's attention matrix.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *tensors, ctx.scaling, ctx.window = inputs
        ctx.save_for_backward(*tensors)
        return torch.ops.sft_recipes.by_document(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradients = torch.ops.sft_recipes.by_document_backward(gradient, *ctx.saved_tensors, ctx.scaling, ctx.window)
        return *gradients, None, None, None


# --- torch's kernel --------------------------------------------------------------------------------------------------

# From torch 2.12 on; 2.11 accepts fewer key heads without the argument.
_HAS_ENABLE_GQA = "enable_gqa" in signature(varlen_attn).parameters


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend with torch's kernel for documents of several lengths; arguments and result as `by_document`'s.

    In half precision, for the GPUs and widths of `kernel_obstacle`.
    """
    width, of_values = query.shape[-1], value.shape[-1]
    if of_values < width:
        value = pad(value, (0, width - of_values))
    out = varlen_attn(
        *(tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)),
        # The same object twice marks self-attention in newer versions.
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # earlier tokens, and no later ones
        **({"enable_gqa": query.shape[1] != key.shape[1]} if _HAS_ENABLE_GQA else {}),
    )
    return out.narrow(-1, 0, of_values).unsqueeze(0)


@cache
def _kernel_is_correct(width: int, of_values: int, groups: int, half: torch.dtype) -> bool:
    """Check torch's kernel and its gradients against one call of sdpa per document, to bfloat16's rounding, on this GPU."""
    random = torch.Generator("cuda").manual_seed(0)
    inputs = query, key, value = [
        torch.randn(1, heads, 48, size, device="cuda", dtype=half, generator=random, requires_grad=True)
        for heads, size in ((2 * groups, width), (2, width), (2, of_values))
    ]
    starts = torch.tensor([0, 5, 17, 48], dtype=torch.int32, device="cuda")
    try:
        actual = _kernel(query, key, value, starts, 31, None, None)
        expected = by_document(query, key, value, [5, 12, 31])
        pairs = [
            (actual, expected),
            *zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (actual, expected)), strict=True),
        ]
    except (RuntimeError, TypeError, ValueError):  # the kernel was not built for this GPU, or has a different signature
        return False
    return all(bool((x - reference).norm() < 0.02 * reference.norm()) for x, reference in pairs)


# --- Registration ----------------------------------------------------------------------------------------------------


def mask_for(
    *, mask_function: Any, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    """Make the mask of rows for `attend`; the mask function that transformers calls once per mask.

    Returns: a LazyMask for rows without padding, of one document or several; else sdpa's mask, also if the model adds mask
    functions of its own.
    """
    build = partial(
        sdpa_mask,
        mask_function=mask_function,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        **kwargs,
    )
    causal = "allow_is_bidirectional_skip" not in kwargs and not kwargs.get("use_vmap", False)
    if not causal or attention_mask is not None or q_length != kv_length:
        return build()
    # transformers forbids skipping the mask of packed documents, and that of bidirectional blocks such as an image's tokens.
    # Evaluating the mask tells them apart. The host waits for it once per micro-batch: other inputs may need another mask.
    if not kwargs.get("allow_is_causal_skip", True):
        tokens = torch.arange(q_length - 1, device=kwargs.get("device"))
        row = tokens.new_zeros(())
        if mask_function(row, row, tokens, tokens + 1).any():
            return build()
    size = kwargs.get("local_size")
    if size is not None and size == getattr(kwargs["config"], "attention_chunk_size", None):
        return LazyMask(build, chunk=size)
    return LazyMask(build, window=size)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_for)

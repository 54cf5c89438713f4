"""Which attention a run takes; and `varlen`, which keeps packed documents apart with nothing but torch.

Packed documents share a row. sdpa keeps them apart by a mask of all pairs of the row's tokens, with which it has neither
its fastest kernels nor grouped heads. `varlen` goes by where documents begin, which TRL's collator says: one kernel for all
of them on CUDA, one causal call a document elsewhere. Where that is not said, it is sdpa with sdpa's mask.
"""

from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, sdpa_mask

from sft_recipes.errors import ModelError
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.upstream import installed
from sft_recipes.training.arguments import padding_free

NAME = "varlen"  # with "flash" in it transformers would ask for flash-attn
# Of those in transformers 5.23: they change the mask before attention gets it, or do not tell it where documents begin.
_OWN_WAYS = {
    "axk2", "deepseek_v32", "doge", "dots3_note", "dots3_note_text", "glm_moe_dsa", "lfm3", "nemotron", "recurrent_gemma",
}  # fmt: skip
# What else models pass on, and that changes nothing of the result.
_KNOWN = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids", "use_cache",
    "cache_position", "num_items_in_batch", "output_router_logits", "sliding_window", "is_causal",
}  # fmt: skip


# --- Which one -------------------------------------------------------------------------------------------------------


def choose(recipe: Recipe, config: PreTrainedConfig, device: str) -> tuple[str | None, str]:
    """The attention that a run on `device`, cuda or cpu, takes, and a few words of why. None: transformers' own choice.

    Raises ModelError for a varlen that the model cannot have.
    """
    wanted = recipe.model.attention
    packed, problem = padding_free(recipe), obstacle(config)
    if wanted == NAME and problem is not None:
        raise ModelError(f"model.attention: varlen does not go with {problem}; set auto")
    if wanted == NAME:
        return NAME, "" if packed else "as sdpa, since no packed documents are kept apart"
    if wanted != "auto":
        return wanted, ""
    half = device == "cuda" and (recipe.model.dtype != "float32" or recipe.train.mixed_precision != "no")
    if half and getattr(_architecture(config), "_supports_flash_attn", False) and installed("flash_attn"):
        return "flash_attention_2", "flash-attn is installed"
    if not packed:
        return None, ""
    if problem is None and device == "cuda":
        problem = None if half else "float32 on a GPU"
        problem = problem or (
            None if _kernel_is_right() else "this GPU, where its kernel gives other numbers than sdpa"
        )
    if problem is not None:
        return None, f"varlen does not go with {problem}"
    return NAME, "packed documents, no flash-attn needed"


def obstacle(config: PreTrainedConfig) -> str | None:
    """What in a model varlen would have to leave out, in words; None where there is nothing."""
    architecture, text = _architecture(config), config.get_text_config(decoder=True)
    # What sdpa lacks (softcapping, sinks) varlen lacks too, and transformers says which models need it.
    as_sdpa = getattr(architecture, "_supports_attention_backend", False) and architecture._supports_sdpa
    # transformers before 5.22 says of Gemma 2 that sdpa will do, and leaves its softcapping out.
    softcaps = getattr(text, "attn_logit_softcapping", None) is not None
    if not as_sdpa or softcaps or config.model_type in _OWN_WAYS:
        return f"the attention of a {config.model_type} model, which is another than transformers' sdpa"
    if not getattr(text, "is_causal", True):
        return "a model whose tokens see those behind them"
    dropout = (name for name in text.to_dict() if "att" in name and "drop" in name and getattr(text, name))
    return next((f"dropout in attention ({name} in the model's config)" for name in dropout), None)


def _architecture(config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


# --- varlen ----------------------------------------------------------------------------------------------------------


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of queries (rows, heads, tokens, width) within documents; (rows, tokens, heads, width).

    `cu_seq_lens_q` says where documents begin, and where the last ends. Without it, with a mask that is a tensor, or with
    keys of tokens before, it is sdpa. Raises ModelError for what a layer asks for and would not get.
    """
    starts, mask = kwargs.get("cu_seq_lens_q"), attention_mask
    if starts is None or isinstance(mask, torch.Tensor) or query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, mask() if callable(mask) else mask, **kwargs)
    longest = kwargs.get("max_length_q") or int(starts.diff().max())
    window = mask.keywords.get("local_size") if isinstance(mask, partial) else None
    if window is not None and longest <= window:
        window = None
    if window is not None and window != kwargs.get("sliding_window"):  # chunks, which only the mask knows
        return sdpa_attention_forward(module, query, key, value, mask(), **kwargs)
    scaling = kwargs.pop("scaling", None)
    _refuse_unknown(module, kwargs)
    if torch.is_autocast_enabled(query.device.type):  # which knows sdpa, and not the kernel
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if _kernel_takes(query):
        return _kernel(query, key, value, starts, longest, scaling, window), None
    return by_document(query, key, value, starts.diff().tolist(), scaling, window), None


def _refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    unknown = [
        name
        for name, given in kwargs.items()
        if name not in _KNOWN and given is not None and (isinstance(given, torch.Tensor) or given)
    ]
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        unknown.append("is_causal: false")
    if unknown:
        raise ModelError(
            f"model.attention: varlen knows nothing of what {type(module).__name__} asks for "
            f"({', '.join(unknown)}); set sdpa, or eager"
        )


def by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """One causal call of sdpa for each document of so many tokens; (1, tokens, heads, width). A token sees the last `window`
    tokens of its document, itself among them."""
    done = []
    for q, k, v in zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True):
        band, tokens = None, q.shape[2]
        if window is not None and tokens > window:
            band = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = scaled_dot_product_attention(
            q, k, v, band, is_causal=band is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        done.append(out.transpose(1, 2))
    return torch.cat(done, dim=1)


def _kernel_takes(query: torch.Tensor) -> bool:
    """Half precision on a GPU from Ampere on, in widths of flash attention 2."""
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return (
        half
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """torch's kernel for documents of several lengths; its arguments changed from version to version."""
    takes, width, wanted = signature(varlen_attn).parameters, query.shape[-1], value.shape[-1]
    options: dict[str, Any] = {}
    if "window_size" in takes:  # torch 2.11 on; tokens before one's own that are seen, and none behind
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        return by_document(query, key, value, starts.diff().tolist(), scaling, window)
    if "enable_gqa" in takes:  # 2.12 on; before, fewer heads of keys were taken as they are
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    if "scale" in takes:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * width**0.5)
    rows = (each[0].transpose(0, 1) for each in (query, key, pad(value, (0, width - wanted))))
    # The same object twice tells newer versions that queries and keys are the same tokens.
    return varlen_attn(*rows, starts, starts, longest, longest, **options)[None, ..., :wanted]


@cache
def _kernel_is_right() -> bool:
    """Whether torch's kernel gives here, and its gradients are, what a call of sdpa a document gives, to bfloat16's rounding;
    true where there is no GPU to try it on, as for a plan."""
    if not torch.cuda.is_available():
        return True
    random = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn(1, heads, 48, 64, device="cuda", dtype=torch.bfloat16, generator=random, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    if not _kernel_takes(made[0]):
        return True
    query, key, value = made
    starts = torch.tensor([0, 5, 17, 48], dtype=torch.int32, device="cuda")
    try:
        found = _kernel(query, key, value, starts, 31, None, None)
        true = by_document(query, key, value, [5, 12, 31])
        pairs = [
            (found, true),
            *zip(*(torch.autograd.grad(out.square().sum(), made) for out in (found, true)), strict=True),
        ]
    except (RuntimeError, TypeError, ValueError):  # a kernel that was not built for it, or takes other arguments
        return False
    return all(bool((one - other).norm() < 0.02 * other.norm()) for one, other in pairs)


def mask_for(
    *, mask_function: Any, attention_mask: torch.Tensor | None = None, use_vmap: bool = False, **how: Any
) -> Any:
    """sdpa's mask; for packed documents only the means to make it, which `attend` needs where it is not told the documents.

    Packed are those that transformers found by positions that start again: causal *and* of the same document. What models
    add to that (blocks that see each other, functions of their own) is not it.
    """
    make = partial(sdpa_mask, mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, **how)
    causal = "allow_is_bidirectional_skip" not in how and not use_vmap
    whole = how.get("allow_is_causal_skip", True)  # transformers asks for a mask where there is more than one document
    same_document = getattr(mask_function, "__code__", None) is and_masks().__code__
    return make if causal and not whole and same_document and attention_mask is None else make()


# The compiler would make another program for each number of documents.
AttentionInterface.register(NAME, torch.compiler.disable(attend))
AttentionMaskInterface.register(NAME, mask_for)

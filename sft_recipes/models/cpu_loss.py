"""Memory-efficient LM-head loss for CPUs: TRL's loss of trained tokens only, with its gradient computed in the forward pass.

TRL's head is written for Triton. On a CPU it computes the logits of every token, twice, multiplies in float32, and computes
the entropy, in additional passes. Here each row of logits is computed once, and replaced by its gradient while it is in cache.
"""

import math
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

_TILE = 2**26  # logits per matrix product: 128 MiB in bfloat16
_CHUNK = 2**22  # logits per softmax: 16 MiB in float32


class LogProbs(torch.autograd.Function):
    """Log-probabilities of target tokens, and whether each is the most likely token.

    The gradient of log p[target] with respect to the logits is onehot - p. The hidden states' gradient is exact for any
    upstream gradient; the weight's only if that is the same for all tokens, as in a mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        needs_grad: bool,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` (N, H), `weight` (V, H), `bias` (V) and `targets` (N) to log-probabilities and hits, both (N)."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        rows, wide = hidden.to(dtype), weight.to(dtype)
        to_hidden, to_weight, to_bias = (needs_grad and need for need in ctx.needs_input_grad[1:4])
        log_probs = torch.empty(len(rows), dtype=torch.float32)
        hits = torch.empty(len(rows), dtype=torch.bool)
        hidden_grad = torch.empty_like(rows) if to_hidden else None
        weight_grad = bias_grad = None
        chunk = max(_CHUNK // len(wide), 1)
        # The product for the weight's gradient is faster for large tiles, everything else if it stays in cache.
        tile = max(_TILE // len(wide), 1) if to_weight else chunk
        for start in range(0, max(len(rows), 1), tile):  # at least once: without trained tokens the gradients are zero
            of_tile = slice(start, start + tile)
            logits = torch.nn.functional.linear(rows[of_tile], wide, None if bias is None else bias.to(dtype))
            for logits_chunk, target, log_prob, hit in zip(
                *(tensor.split(chunk) for tensor in (logits, targets[of_tile], log_probs[of_tile], hits[of_tile])),
                strict=True,
            ):
                _log_probs_and_gradient(logits_chunk, target[:, None], log_prob, hit, scale, softcap)
            if hidden_grad is not None:
                torch.mm(logits, wide, out=hidden_grad[of_tile])
            if to_weight:
                product = logits.t() @ rows[of_tile]
                weight_grad = product.float() if weight_grad is None else weight_grad.add_(product)
            if to_bias:
                product = logits.sum(0, dtype=torch.float32)
                bias_grad = product if bias_grad is None else bias_grad.add_(product)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.scale, ctx.dtypes = scale, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(hits)
        return log_probs, hits

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> Any:
        upstream = upstream * -ctx.scale
        one = upstream[:1].sum()
        gradients = (
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, factor, dtype in zip(
                ctx.saved_tensors, (upstream[:, None], one, one), ctx.dtypes, strict=True
            )
        )
        return None, *gradients, None, None, None


def applies(device: str, loss_type: str) -> bool:
    """Return True if this head can compute the loss: on a CPU, for a mean over tokens (see LogProbs on gradients)."""
    return device == "cpu" and loss_type == "nll"


def replace_fused_lm_head(model: PreTrainedModel) -> None:
    """Compute `model(..., labels=labels, fused_lm_head=True)` with this head, after TRL's `add_fused_lm_head(model)`.

    The arguments and the output are TRL's. The entropy is NaN, and a router's load-balancing loss is left to TRL's forward.
    """
    trls = model.forward
    config = model.config.get_text_config()
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)

    @wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head or labels is None or kwargs.get("output_router_logits"):
            given = {} if labels is None else {"labels": labels}
            return trls(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        head = self.get_output_embeddings()
        weight, bias = (each.full_tensor() if isinstance(each, DTensor) else each for each in (head.weight, head.bias))
        with maybe_gather_lm_head_ctx(weight, bias):
            trained = LogProbs.apply(torch.is_grad_enabled(), hidden[mask], weight, bias, targets[mask], scale, softcap)
        # masked_scatter connects the output with the model even if no token is trained.
        log_probs, hits = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in trained)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count),
            log_probs=log_probs,
            entropy=torch.full_like(log_probs, math.nan),
            is_top1=hits,
            label_mask=mask,
        )

    model.forward = MethodType(forward, model)


def logit_scale(config: PreTrainedConfig) -> float:
    """Return the factor of a model's logits, from the keys that TRL reads."""
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, key, None)) is not None:
            return float(factor)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def _log_probs_and_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    log_probs: torch.Tensor,
    hits: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Compute log-probability and hit of each row's target; overwrite the logits with p - onehot."""
    z = logits.float()
    if scale != 1:
        z = z * scale
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z = tanh * softcap
    largest, index = z.max(-1, keepdim=True)  # the first of equals, as in TRL
    p = torch.softmax(z, -1)
    # Relative to the largest p, which never underflows in the logarithm.
    log_p = z.gather(-1, target) - largest + p.gather(-1, index).log()
    log_probs.copy_(log_p[:, 0])
    hits.copy_((index == target)[:, 0])
    p.scatter_(-1, target, torch.expm1(log_p))  # p - 1, without the rounding of a p near 1
    if softcap is not None:
        p *= 1 - tanh * tanh
    logits.copy_(p)

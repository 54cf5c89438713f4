"""The loss on a CPU: TRL's, of the trained tokens alone and with its gradient taken in the forward pass.

TRL's head is written for Triton. On a CPU it makes the logits of every token, twice, multiplies in float32, and counts the
entropy, which takes passes of its own. Here each row of logits is made once, and turned into its gradient while it is in the
processor's cache.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.function import once_differentiable
from trl.trainer import utils as trl_utils

_TILE = 2**26  # logits that are multiplied at once: 128 MiB in bfloat16
_PIECE = 2**22  # logits that are looked at at once: 16 MiB in float32


class LogProbs(torch.autograd.Function):
    """Log-probabilities of targets, and whether each is the likeliest.

    The gradient of log p[target] to the logits is onehot - p. A token's share of the hidden states' gradient is right
    whatever comes from above; the weight's where that is the same for all tokens, as in a mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        learns: bool,
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
        to_hidden, to_weight, to_bias = (learns and need for need in ctx.needs_input_grad[1:4])
        log_probs = torch.empty(len(rows), dtype=torch.float32)
        hits = torch.empty(len(rows), dtype=torch.bool)
        for_hidden = torch.empty_like(rows) if to_hidden else None
        for_weight = for_bias = None
        piece = max(_PIECE // len(wide), 1)
        # A product for the weight's gradient is fast where it is large, all else where it stays in the cache.
        tile = max(_TILE // len(wide), 1) if to_weight else piece
        for start in range(0, max(len(rows), 1), tile):  # without any trained token the gradients are zero
            of_tile = slice(start, start + tile)
            logits = torch.nn.functional.linear(rows[of_tile], wide, None if bias is None else bias.to(dtype))
            for part, to, found, hit in zip(
                *(each.split(piece) for each in (logits, targets[of_tile], log_probs[of_tile], hits[of_tile])),
                strict=True,
            ):
                _look(part, to[:, None], found, hit, scale, softcap)
            if for_hidden is not None:
                torch.mm(logits, wide, out=for_hidden[of_tile])
            if to_weight:
                product = logits.t() @ rows[of_tile]
                for_weight = product.float() if for_weight is None else for_weight.add_(product)
            if to_bias:
                product = logits.sum(0, dtype=torch.float32)
                for_bias = product if for_bias is None else for_bias.add_(product)
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.scale, ctx.dtypes = scale, [None if each is None else each.dtype for each in (hidden, weight, bias)]
        ctx.mark_non_differentiable(hits)
        return log_probs, hits

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, above: torch.Tensor, _: Any) -> Any:
        above = above * -ctx.scale
        one = above[:1].sum()
        found = (
            None if each is None else (each * by).to(dtype)
            for each, by, dtype in zip(ctx.saved_tensors, (above[:, None], one, one), ctx.dtypes, strict=True)
        )
        return None, *found, None, None, None


class Head:
    """What TRL calls in the place of its own ChunkedLogProbFunction."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        _chunk: int,
        softcap: float | None,
        scale: float,
        _outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        assert temperature == 1.0, temperature  # SFTTrainer's
        log_probs, hits = LogProbs.apply(torch.is_grad_enabled(), hidden, weight, bias, targets, scale, softcap)
        return log_probs, torch.full_like(log_probs, math.nan), None, None, hits  # no entropy


def applies(device: str, loss_type: str) -> bool:
    """Whether the loss is taken here: on a CPU, where it is a mean over tokens, for which the weight's gradient holds."""
    return device == "cpu" and loss_type == "nll"


@contextmanager
def in_place_of_trls() -> Iterator[None]:
    """What SFTTrainer computes within goes through this head."""
    with (
        patch.object(trl_utils, "_ChunkedLogProbFunction", Head),
        patch.object(trl_utils, "_use_triton", lambda _: True),  # by which it takes the trained tokens alone
    ):
        yield


def _look(
    logits: torch.Tensor,
    target: torch.Tensor,
    log_probs: torch.Tensor,
    hits: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Log-probability and hit of each row's target; its logits become p - onehot."""
    z = logits.float()
    if scale != 1:
        z = z * scale
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z = bent * softcap
    most, place = z.max(-1, keepdim=True)  # the first of equals, as in TRL's
    p = torch.softmax(z, -1)
    # By the largest p, which is never too small for a logarithm.
    found = z.gather(-1, target) - most + p.gather(-1, place).log()
    log_probs.copy_(found[:, 0])
    hits.copy_((place == target)[:, 0])
    p.scatter_(-1, target, torch.expm1(found))  # p - 1, without the rounding of a p near 1
    if softcap is not None:
        p *= 1 - bent * bent
    logits.copy_(p)

"""The loss on a CPU against cross entropy on the whole logits, and against TRL's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer import utils as trl_utils

from sft_recipes.models import cpu_loss
from tests.conftest import WriteRecipe, build, metrics


def ours(hidden: Any, weight: Any, bias: Any, targets: Any, softcap: Any, scale: float) -> tuple[Any, Any]:
    return cpu_loss.LogProbs.apply(True, hidden, weight, bias, targets, scale, softcap)


def theirs(hidden: Any, weight: Any, bias: Any, targets: Any, softcap: Any, scale: float) -> tuple[Any, Any]:
    log_probs, _, _, _, hits = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 1.0, 8, softcap, scale, ("log_probs", "entropy", "is_top1")
    )
    return log_probs, hits


def taken(
    function: Any, values: list[torch.Tensor], targets: torch.Tensor, softcap: float | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities, hits, and the gradients of their mean to the hidden states, the weight and the bias."""
    hidden, weight, bias = (each.clone().requires_grad_() for each in values)
    log_probs, hits = function(hidden, weight, bias, targets, softcap, scale)
    (-log_probs.sum() / max(len(targets), 1) * 3).backward()  # 3: what comes from above is not 1
    return log_probs.detach(), hits, [each.grad for each in (hidden, weight, bias)]


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 40),
    vocabulary=st.integers(1, 50),
    large=st.sampled_from([1.0, 30.0]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.25]),
    piece=st.integers(1, 500),
    tile=st.integers(1, 1000),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_are_trls(
    tokens: int, vocabulary: int, large: float, softcap: float | None, scale: float, piece: int, tile: int, seed: int
) -> None:
    torch.manual_seed(seed)
    values = [torch.randn(tokens, 6) * large, torch.randn(vocabulary, 6), torch.randn(vocabulary)]
    targets = torch.randint(0, vocabulary, (tokens,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu_loss, "_CHUNK", piece)
        patched.setattr(cpu_loss, "_TILE", tile)
        log_probs, hits, gradients = taken(ours, values, targets, softcap, scale)

    expected, their_hits, their_gradients = taken(theirs, values, targets, softcap, scale)
    assert torch.allclose(log_probs, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(hits, their_hits)
    for gradient, other in zip(gradients, their_gradients, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-5 * large)


def test_a_token_that_is_all_but_certain_or_impossible_keeps_its_loss_and_gradient() -> None:
    # In bfloat16 1 - p of the first is 0, and the second's p is 0 in float32.
    hidden = torch.eye(2, dtype=torch.bfloat16)
    weight = torch.tensor([[9.0, 0.0], [0.0, 200.0]], dtype=torch.bfloat16)
    targets = torch.tensor([0, 0])
    log_probs, hits, (to_hidden, _, _) = taken(
        ours, [hidden, weight, torch.zeros(2, dtype=torch.bfloat16)], targets, None, 1.0
    )

    assert torch.allclose(log_probs, torch.tensor([-1.2340e-4, -200.0]), rtol=1e-3)
    assert hits.tolist() == [True, False]
    assert to_hidden[0, 0].item() == pytest.approx(-1.5 * 9 * 1.2339e-4, rel=0.01)


def test_under_autocast_it_multiplies_in_half_and_keeps_the_types() -> None:
    torch.manual_seed(0)
    values = [torch.randn(300, 32), torch.randn(500, 32) * 0.3, torch.zeros(500)]
    targets = torch.randint(0, 500, (300,))
    whole = [each.clone().requires_grad_() for each in values]
    cross_entropy(linear(*whole), targets).mul(3).backward()
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _, gradients = taken(ours, values, targets, None, 1.0)

    assert -log_probs.mean() == pytest.approx(cross_entropy(linear(*values), targets).item(), abs=5e-3)
    for gradient, exact in zip(gradients, whole, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_without_gradients_none_is_taken() -> None:
    weight = torch.randn(20, 4, requires_grad=True)
    with torch.no_grad():
        log_probs, *_ = cpu_loss.LogProbs.apply(
            False, torch.randn(3, 4), weight, None, torch.tensor([1, 2, 3]), 1.0, None
        )
    assert not log_probs.requires_grad


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"final_logit_softcapping": 5.0},
        {"logit_scale": 0.5},
        {"output_multiplier": 0.5},
        {"lm_head_multiplier": 0.5},
        {"logits_scaling": 4.0},
        {"logits_scaling": 4.0, "model_type": "hyperclovax"},
    ],
)
def test_a_model_has_the_outputs_of_trls_head(keys: dict[str, Any]) -> None:
    """With each key of a config that changes the logits."""
    model = AutoModelForCausalLM.from_pretrained("sft_recipes/builtin/tiny")
    for key, value in keys.items():
        setattr(model.config, key, value)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    labels = torch.randint(0, 500, (2, 30))
    inputs = {"input_ids": labels, "labels": labels.masked_fill(labels % 3 == 0, -100), "fused_lm_head": True}
    theirs = model(**inputs)
    cpu_loss.replace_fused_lm_head(model)
    ours = model(**inputs, num_items_in_batch=torch.tensor(7))

    assert torch.allclose(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert ours.loss.item() == pytest.approx(theirs.loss.item() * theirs.label_mask.sum().item() / 7, rel=1e-5)
    assert torch.isfinite(model(input_ids=labels).logits).all()


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_training_gives_the_losses_of_trls_head(
    write_recipe: WriteRecipe, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning of tied embeddings, in which the head's gradient meets that of the embeddings."""
    recipe, logged = write_recipe(log={"every": 1}, data={"packing": packing}), []
    for name in ("ours", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(cpu_loss, "applies", lambda *_: False)
        build(recipe, tmp_path / name).train()
        logged.append([line for line in metrics(tmp_path / name) if "loss" in line])

    ours, theirs = logged
    assert len(ours) == 3
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "token_accuracy"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5), key
        assert "entropy" in other
        assert "entropy" not in mine


def test_a_loss_that_weighs_tokens_is_left_to_trl(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    sft = build(write_recipe(trl={"loss_type": "dft"}), tmp_path / "run")
    assert not sft.own_head

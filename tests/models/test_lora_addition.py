"""The LoRA update, added in place: the numbers of PEFT's own addition, for less memory traffic."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from sft_recipes.models.lora_addition import add_in_place
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Recipe
from tests.conftest import WriteRecipe

RECIPE = Recipe.model_validate({"model": {"name": "x"}, "data": {"train": "x"}, "lora": {}, "output_dir": "x"})


def layer(dtype: torch.dtype, dropout: float = 0.0, bias: bool = False) -> tuple[Linear, Linear]:
    """The same layer with PEFT's addition, and with ours."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40, bias, dtype=dtype))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=dropout)
    plain: Any = peft.get_peft_model(base, config)
    torch.nn.init.normal_(plain.base_model.model[0].lora_B.default.weight)
    ours = copy.deepcopy(plain)
    for module in (plain, ours):
        module.base_model.model[0].cast_input_dtype_enabled = False
    add_in_place(ours, RECIPE)
    return plain.base_model.model[0], ours.base_model.model[0]


def passed(module: Linear, x: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(x * 1)
    out.float().square().sum().backward()
    adapters = module.lora_A.default.weight, module.lora_B.default.weight
    return [each.detach().float() for each in (out, x.grad, *(weight.grad for weight in adapters))]


@pytest.mark.parametrize(("dropout", "bias"), [(0.0, False), (0.5, False), (0.0, True)])
def test_in_float32_it_is_pefts(dropout: float, bias: bool) -> None:
    plain, ours = layer(torch.float32, dropout, bias)
    x = torch.randn(2, 7, 24)

    for mine, theirs in zip(passed(ours, x, False), passed(plain, x, False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_as_near_to_the_truth() -> None:
    plain, ours = layer(torch.bfloat16)
    x = torch.randn(2, 64, 24).bfloat16()
    exact = copy.deepcopy(plain).float()
    true = passed(exact, x.float(), False)

    for mine, theirs, right in zip(passed(ours, x, True), passed(plain, x, True), true, strict=True):
        assert (mine - right).norm() <= 1.05 * (theirs - right).norm()


class _Large(TorchDispatchMode):
    """Counts results of the size of the output."""

    def __init__(self, size: int) -> None:
        self.size, self.made = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {each.data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.numel() == self.size and out.data_ptr() not in inputs:
            self.made.append(str(func))
        return out


def test_it_makes_nothing_of_the_outputs_size() -> None:
    made = []
    for module in layer(torch.float32):
        x = torch.randn(2, 7, 24)
        with _Large(2 * 7 * 40) as counted:
            out = module(x)
        loss = (out * torch.ones(())).sum()
        with counted:
            loss.backward()
        made.append(len([name for name in counted.made if "expand" not in name]))
    plain, ours = made

    assert plain - ours == 4  # the product, its multiple, the sum; backward, the product's gradient


@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_pefts(safe: bool) -> None:
    plain, ours = layer(torch.float32)
    before = ours.base_layer.weight.clone()
    for module in (plain, ours):
        module.merge(safe_merge=safe)
    assert torch.equal(plain.base_layer.weight, ours.base_layer.weight)
    assert not torch.equal(before, ours.base_layer.weight)

    ours.unmerge()
    torch.testing.assert_close(ours.base_layer.weight, before)


def test_which_layers(write_recipe: WriteRecipe) -> None:
    def variants(**sections: Any) -> set[str]:
        recipe = parse.load(write_recipe(**sections)).recipe
        assert recipe.lora is not None
        config = LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
        )
        model: Any = peft.get_peft_model(
            LlamaForCausalLM(config),
            peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=recipe.lora.use_dora),
        )
        add_in_place(model, recipe)
        return {
            f"{name.rpartition('.')[2]} {type(variant).__name__}"
            for name, module in model.named_modules()
            for variant in getattr(module, "lora_variant", {}).values()
        }

    assert variants(lora={}) == {"q_proj _InPlace"}
    assert variants(lora={"use_dora": True}) == {"q_proj DoraLinearVariant", "embed_tokens DoraEmbeddingVariant"}
    assert variants(lora={}, launch={"strategy": "fsdp2"}) == set()
    assert variants(lora={}, train={"compile": True}) == set()

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_recipes import model_dir
from sft_recipes.models import strategies
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe, build


@pytest.mark.parametrize(
    ("strategy", "moved"),
    [
        ("zero2", {"offload_optimizer": {"device": "cpu"}}),
        ("zero3", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
)
def test_cpu_offload_moves_what_deepspeed_shards(
    write_recipe: WriteRecipe, strategy: str, moved: dict[str, Any]
) -> None:
    file = write_recipe(launch={"processes": 2, "strategy": strategy})
    without, offloaded = (
        strategies.arguments(parse.load(file, [f"launch.cpu_offload={value}"]).recipe)["deepspeed"]["zero_optimization"]
        for value in ("false", "true")
    )

    assert offloaded == without | moved
    assert not moved.keys() & without.keys()


def test_what_is_exported_computes_in_the_type_of_its_weights(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """And not under the autocast of the training, with which no export of float32 weights would be like it."""
    recipe = write_recipe(train={"mixed_precision": "bf16", "max_steps": 1, "learning_rate": 1e-30})
    trainer = build(recipe, tmp_path / "run")
    trainer.train()

    gathered = strategies.gather_for_export(trainer, parse.load(recipe).recipe)

    base = AutoModelForCausalLM.from_pretrained(model_dir.BUILTIN / "tiny", dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(gathered.model.eval()(ids).logits, base(ids).logits)
    assert gathered.adapter is gathered.shapes is None

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sft_recipes import model_dir
from sft_recipes.models import strategies
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe, build


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

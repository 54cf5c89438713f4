"""A recipe with no more than it has to have, and a footprint in round numbers."""

from sft_recipes.memory.prediction import Footprint
from sft_recipes.recipe.schema import Recipe

LEAST = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}
WHOLE = Footprint(
    phases={
        "forward": {"weights": 1000, "activations": 500, "optimizer": 2000},
        "backward, upper layers": {"weights": 1000, "gradients": 1000, "activations": 400, "optimizer": 2000},
        "optimizer": {"weights": 1000, "gradients": 1000, "optimizer": 2000},
    },
    parameters=500, trained=500, layers=8, layer=50, rest=100, trained_layer=50, trained_rest=100,
)  # fmt: skip


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate(LEAST | sections)

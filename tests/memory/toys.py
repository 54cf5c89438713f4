"""A recipe with no more than it has to have, and a footprint in round numbers."""

from sft_recipes.memory.prediction import Footprint, Part, Phase
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import Recipe

LEAST = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}
WHOLE = Footprint(
    phases={
        Phase.FORWARD: {Part.WEIGHTS: 1000, Part.ACTIVATIONS: 500, Part.OPTIMIZER: 2000},
        Phase.BACKWARD_UPPER: {Part.WEIGHTS: 1000, Part.GRADIENTS: 1000, Part.ACTIVATIONS: 400, Part.OPTIMIZER: 2000},
        Phase.OPTIMIZER: {Part.WEIGHTS: 1000, Part.GRADIENTS: 1000, Part.OPTIMIZER: 2000},
    },
    size=ModelSize(
        parameters=500, trained=500, layers=8, layer=50, rest=100, trained_layer=50, trained_rest=100,
    ),
)  # fmt: skip


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate(LEAST | sections)

import pytest

from sft_recipes.planning.steps import Steps, count
from sft_recipes.recipe.schema import Recipe


def recipe(drop_last: bool = False, **train: object) -> Recipe:
    trl = {"dataloader_drop_last": True} if drop_last else {}
    return Recipe.model_validate(
        {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x", "train": train, "trl": trl}
    )


@pytest.mark.parametrize(
    ("train", "sequences", "expected"),
    [
        ({}, 320, Steps(10, 10, 1)),
        ({}, 321, Steps(11, 11, 1)),
        ({"epochs": 3}, 321, Steps(11, 33, 1)),
        ({"epochs": 1.5}, 320, Steps(10, 15, 1)),
        ({"max_steps": 7}, 320, Steps(10, 7, 1)),
        ({"max_steps": 70}, 320, Steps(10, 70, 3)),
        ({"max_steps": 70, "epochs": 2}, 320, Steps(10, 20, 1)),
        ({"max_steps": 7, "epochs": 2}, 320, Steps(10, 7, 1)),
        ({"warmup_ratio": 0.0}, 320, Steps(10, 10, 0)),
        ({"warmup_ratio": 0.5}, 320, Steps(10, 10, 5)),
        ({"warmup_steps": 4, "epochs": 3}, 320, Steps(10, 30, 4)),
        ({"warmup_steps": 0}, 320, Steps(10, 10, 0)),
        ({"warmup_steps": 40}, 320, Steps(10, 10, 9)),
        ({"gradient_accumulation_steps": 4, "micro_batch_size": 8}, 320, Steps(10, 10, 1)),
        ({}, 1, Steps(1, 1, 0)),
        ({"micro_batch_size": 8, "drop_last": True}, 39, Steps(1, 1, 0)),
        ({"micro_batch_size": 8, "global_batch_size": 8, "drop_last": True}, 39, Steps(4, 4, 1)),
    ],
)
def test_count(train: dict[str, object], sequences: int, expected: Steps) -> None:
    assert count(recipe(**train), sequences) == expected  # type: ignore[arg-type]


def test_intervals() -> None:
    steps = Steps(per_epoch=50, total=55, warmup=1)

    assert [steps.every(interval) for interval in (None, 0.1, 1.0, 0.001, 1, 20)] == [None, 6, 55, 1, 1, 20]

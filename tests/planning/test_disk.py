import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_recipes.errors import OutputError
from sft_recipes.planning import disk
from sft_recipes.recipe.schema import Recipe

LEAST = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}


@pytest.mark.parametrize(
    ("sections", "trained", "expected"),
    [
        # three checkpoints of 2 + 4 bytes a weight, and the model
        ({}, 1000, 3 * 1000 * 6 + 2000),
        ({"train": {"optimizer": "adamw_8bit_sr"}}, 1000, 3 * 1000 * 4 + 2000),
        ({"checkpoint": {"every": None}}, 1000, 2000),
        ({"checkpoint": {"keep": 1, "export_best": True}, "export": {"dtype": "float32"}}, 1000, 3 * 1000 * 6 + 4000),
        # adapters are held in float32; the merged model has all weights
        ({"lora": {}}, 10, 3 * 10 * 12 + 40 + 2000),
        ({"lora": {}, "export": {"merge": False}}, 10, 3 * 10 * 12 + 40),
    ],
)
def test_needed(sections: dict[str, object], trained: int, expected: int) -> None:
    assert disk.needed(Recipe.model_validate(LEAST | sections), 1000, trained) == expected


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))

    with pytest.raises(OutputError, match=r"3\.0 GB free, and the run writes up to 160\.0 GB"):
        disk.check_room(Recipe.model_validate(LEAST), tmp_path, 8_000_000_000, 8_000_000_000)
    disk.check_room(Recipe.model_validate(LEAST), tmp_path, 1_000_000, 1_000_000)

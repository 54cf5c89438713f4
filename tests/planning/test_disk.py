import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_recipes.errors import OutputError
from sft_recipes.planning import disk
from sft_recipes.recipe.schema import Recipe

BESIDE = disk._CONFIGS
LEAST = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}


@pytest.mark.parametrize(
    ("sections", "trained", "expected"),
    [
        # three checkpoints of 2 + 4 bytes a weight, and the model
        ({}, 1000, 3 * (1000 * 6 + 7) + 2000 + 7),
        ({"train": {"optimizer": "adamw_8bit_sr"}}, 1000, 3 * (1000 * 4 + 7) + 2000 + 7),
        ({"checkpoint": {"every": None}}, 1000, 2000 + 7),
        (
            {"checkpoint": {"keep": 1, "export_best": True}, "export": {"dtype": "float32"}},
            1000,
            3 * (1000 * 6 + 7) + 4000 + 7,
        ),
        # bitsandbytes: moments in float32, some of them even with 8 bits; ademamix has three
        ({"train": {"optimizer": "paged_adamw_32bit"}}, 1000, 3 * (1000 * 10 + 7) + 2000 + 7),
        ({"train": {"optimizer": "ademamix"}}, 1000, 3 * (1000 * 14 + 7) + 2000 + 7),
        ({"train": {"optimizer": "adamw_bnb_8bit"}}, 1000, 3 * (1000 * 5 + 7) + 2000 + 7),
        # adapters are held in float32; the merged model has all weights
        ({"lora": {}}, 10, 3 * (10 * 12 + 7) + 40 + 7 + 2000 + 7),
        ({"lora": {}, "export": {"merge": False}}, 10, 3 * (10 * 12 + 7) + 40 + 7),
    ],
)
def test_needed(sections: dict[str, object], trained: int, expected: int) -> None:
    assert disk.needed(Recipe.model_validate(LEAST | sections), 1000, trained, 7 - BESIDE) == expected


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))

    with pytest.raises(OutputError, match=r"160\.0 GB needed, 3\.0 GB free"):
        disk.check_room(Recipe.model_validate(LEAST), tmp_path, 8_000_000_000, 8_000_000_000, 0)
    disk.check_room(Recipe.model_validate(LEAST), tmp_path, 1_000_000, 1_000_000, 0)


def test_what_is_there_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed writes over what it wrote."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"2\.4 MB needed, 1\.0 MB free"):
        disk.check_room(Recipe.model_validate(LEAST), tmp_path, 100_000, 100_000, 0)
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-1" / "optimizer.pt").write_bytes(bytes(1_500_000))

    disk.check_room(Recipe.model_validate(LEAST), tmp_path, 100_000, 100_000, 0)


def test_what_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))

    assert disk.space_shortage(tmp_path, 5_000_000_000) == " (5.0 GB needed, 3.0 MB free)"
    assert disk.space_shortage(tmp_path, 2_000_000) == ""

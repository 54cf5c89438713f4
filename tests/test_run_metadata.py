"""The settings that a run may be resumed with."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import run_metadata
from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe import parse
from tests.conftest import ROWS, WriteRecipe, run, write_rows


@pytest.fixture
def begun(write_recipe: WriteRecipe, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and a run of it that finished training but has no export."""
    recipe = write_recipe(checkpoint={"every": 1})
    folder, _ = run(recipe)
    shutil.rmtree(folder / "model")
    return recipe, folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), encoding="utf-8")


def test_every_difference_that_is_another_training(begun: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, folder = begun
    write_rows(tmp_path / "train.jsonl", ROWS[1:])
    for force in (False, True):
        with pytest.raises(RecipeError) as caught:
            run(recipe, "train.learning_rate=1", "data.packing=none", "log.every=2", resume=True, force=force)
        assert [line.split(": ", 1)[1] for line in caught.value.lines[:3]] == [
            'data.packing: changed from "bfd" to "none" since the run started.',
            "train.learning_rate: changed from 0.001 to 1.0 since the run started.",
            "content changed since the run started.",
        ]
        assert "log.every: changed from 10 to 2 since the run started." in caught.value.lines[3]
        assert caught.value.lines[-1].endswith(
            "cannot resume with changed settings. Restore the original values, or use a new output_dir."
        )

    assert json.loads((folder / "recipe.resolved.json").read_text("utf-8"))["train"]["learning_rate"] == 1e-3


def test_what_does_no_harm_can_be_forced(begun: tuple[Path, Path]) -> None:
    recipe, folder = begun
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    change(folder / "manifest.json", versions=manifest["versions"] | {"torch": "1.0"})
    changes = ("train.micro_batch_size=1", "export.dtype=float32", "checkpoint.keep=1")
    with pytest.raises(RecipeError) as caught:
        run(recipe, *changes, resume=True)
    assert len(caught.value.lines) == 5
    assert f"versions: torch changed from 1.0 to {manifest['versions']['torch']} since" in caught.value.lines[3]
    assert "or pass --force." in caught.value.lines[4]

    _, said = run(recipe, *changes, resume=True, force=True)
    assert 'warning: export.dtype: changed from "bfloat16" to "float32" since the run started.' in said
    resumed = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert resumed["versions"] == manifest["versions"]
    assert resumed["started"] == manifest["started"]
    assert resumed["resumed"][0]["from"] == "checkpoint-3"
    assert len(resumed["resumed"][0]["changes"]) == 4


def test_prompts_that_changed_do_no_harm(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "asked.jsonl", ROWS[:2])
    recipe = write_recipe(
        eval={"generate": str(tmp_path / "asked.jsonl"), "max_new_tokens": 2}, checkpoint={"every": 1}
    )
    folder, _ = run(recipe)
    shutil.rmtree(folder / "model")
    write_rows(tmp_path / "asked.jsonl", ROWS[2:4])
    with pytest.raises(RecipeError, match="or pass --force"):
        run(recipe, resume=True)
    run(recipe, resume=True, force=True)
    shutil.rmtree(folder / "model")
    write_rows(tmp_path / "others.jsonl", ROWS[4:6])
    _, said = run(recipe, f"eval.generate={tmp_path / 'others.jsonl'}", resume=True, force=True)
    assert "content changed" not in said


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_manifest_that_cannot_be_read(begun: tuple[Path, Path], content: str) -> None:
    recipe, folder = begun
    (folder / "manifest.json").write_text(content)
    with pytest.raises(
        OutputError, match=r"manifest.json: not a JSON object: .*\. Restore the file as the run wrote it\."
    ):
        run(recipe, resume=True)


def test_versions_are_those_of_what_is_installed() -> None:
    found = run_metadata.versions()

    assert found["trl"] is not None
    assert found["flash-attn"] is None


def test_the_date_of_a_run_is_that_of_its_start(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Also if it is resumed on another day."""
    recipe, dated = (parse.load(write_recipe(), [*more]).recipe for more in ([], ["data.date=2031-02-03"]))
    assert run_metadata.start_date(tmp_path / "new", recipe) == str(datetime.date.today())
    (tmp_path / "manifest.json").write_text('{"date": "2030-12-31"}', "utf-8")

    assert run_metadata.start_date(tmp_path, recipe) == "2030-12-31"
    assert run_metadata.start_date(tmp_path, dated) == "2031-02-03"
    (tmp_path / "manifest.json").write_text("{", "utf-8")
    assert run_metadata.start_date(tmp_path, recipe) == str(datetime.date.today())

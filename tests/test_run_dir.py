"""Creating, locking and resuming run directories."""

import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import atomic_files, run_dir
from sft_recipes.errors import ModelError, OutputError, RecipeError
from sft_recipes.recipe import parse
from tests.conftest import ROWS, WriteRecipe, metrics, run, write_rows


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


def test_a_run_that_has_finished_is_left_alone(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    folder, _ = run(recipe)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    _, said = run(recipe, resume=True)

    assert "run: already finished, nothing to do" in said
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_resume_starts_where_there_is_nothing_to_resume(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """So that a job can always pass --resume."""
    _, said = run(write_recipe(), resume=True)

    assert "No complete checkpoint: starting from scratch" in said
    assert (tmp_path / "run" / "model").is_dir()


def test_killed_before_its_first_checkpoint(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(checkpoint={"every": None})
    folder, _ = run(recipe)
    whole, weights = metrics(folder), (folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "model")
    _, said = run(recipe, resume=True)

    assert "No complete checkpoint: starting from scratch" in said
    assert [line["step"] for line in metrics(folder)] == [line["step"] for line in whole]
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


def test_a_second_start_leaves_the_first_alone(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "_PATIENCE", 0)
    with run_dir.open_run_dir(str(tmp_path / "a" / "run"), resume=False) as folder:
        before = folder.stat().st_ino
        child = os.fork()
        if child == 0:
            try:
                with run_dir.open_run_dir(str(folder), resume=False):
                    os._exit(0)
            except OutputError as error:
                os._exit(7 if "in use by another process" in str(error) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert folder.stat().st_ino == before


def test_what_is_given_back_is_what_was_made(tmp_path: Path) -> None:
    """Another run has started in the parent directory that this run created."""

    def fail() -> None:
        with run_dir.open_run_dir(str(tmp_path / "runs" / "a"), resume=False) as folder:
            (folder / "half").touch()
            (tmp_path / "runs" / "b").mkdir()
            raise RecipeError("wrong")

    with pytest.raises(RecipeError):
        fail()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_an_empty_directory_under_another_name(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(ModelError):
        run(write_recipe(), "lora.target_modules=[foo]")

    assert (tmp_path / "run").is_symlink()
    assert list((tmp_path / "real").iterdir()) == []


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


def test_killed_while_its_first_file_was_written(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.resolved.json.4711.partial").write_text("{", "utf-8")
    folder, said = run(write_recipe(train={"max_steps": 1}), resume=True)

    assert "No complete checkpoint: starting from scratch" in said
    assert not list(folder.glob(".*"))


def test_a_directory_that_holds_something_else_is_not_resumed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(
        OutputError, match=r"run has no run to resume \(contains thesis.tex\). Choose another directory"
    ):
        run(write_recipe(), resume=True)

    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_manifest_that_cannot_be_read(begun: tuple[Path, Path], content: str) -> None:
    recipe, folder = begun
    (folder / "manifest.json").write_text(content)
    with pytest.raises(OutputError, match=r"manifest.json: cannot be read: .*\. Use a new output_dir\."):
        run(recipe, resume=True)


def test_versions_are_those_of_what_is_installed() -> None:
    found = run_dir.versions()

    assert found["trl"] is not None
    assert found["flash-attn"] is None


def test_the_date_of_a_run_is_that_of_its_start(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Also where it is resumed on another day."""
    recipe, dated = (parse.load(write_recipe(), [*more]).recipe for more in ([], ["data.date=2031-02-03"]))
    assert run_dir.start_date(tmp_path / "new", recipe) == str(datetime.date.today())
    (tmp_path / "manifest.json").write_text('{"date": "2030-12-31"}', "utf-8")

    assert run_dir.start_date(tmp_path, recipe) == "2030-12-31"
    assert run_dir.start_date(tmp_path, dated) == "2031-02-03"
    (tmp_path / "manifest.json").write_text("{", "utf-8")
    assert run_dir.start_date(tmp_path, recipe) == str(datetime.date.today())

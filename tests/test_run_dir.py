"""Creating, locking and resuming run directories."""

import os
import shutil
from pathlib import Path

import pytest

from sft_recipes import atomic_files, run_dir
from sft_recipes.errors import ModelError, OutputError, RecipeError
from tests.conftest import WriteRecipe, metrics, run


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

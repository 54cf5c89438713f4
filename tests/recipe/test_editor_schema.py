import json
from pathlib import Path

import jsonschema
import pytest

from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe import editor_schema


def test_the_schema_describes_and_validates_keys() -> None:
    schema = json.loads(editor_schema.schema())

    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["Train"]["properties"]["learning_rate"]["description"] == "Peak learning rate."
    validator = jsonschema.Draft202012Validator(schema)
    good = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}
    assert validator.is_valid(good)
    assert not validator.is_valid(good | {"train": {"learning_ratee": 1e-5}})
    assert not validator.is_valid(good | {"train": {"learning_rate": "fast"}})


def test_only_a_schema_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "deep" / editor_schema.FILE
    assert editor_schema.write(out).read_text("utf-8") == editor_schema.schema() + "\n"

    out.write_text(
        json.dumps({"title": json.loads(editor_schema.schema())["title"]}), encoding="utf-8"
    )  # of an earlier version
    assert editor_schema.write(out).read_text("utf-8") == editor_schema.schema() + "\n"

    for other in ("model: {name: mine}\n", "[1]", '{"title": "Another"}'):
        out.write_text(other, encoding="utf-8")
        with pytest.raises(RecipeError, match=r"is not a recipe schema\. Choose another name with --out\."):
            editor_schema.write(out)
        assert out.read_text("utf-8") == other


def test_a_schema_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    for out in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(OutputError, match=r"cannot be written: .*\. Choose another name with --out\."):
            editor_schema.write(out)


def test_the_nearest_schema_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    recipe = tmp_path / "a" / "b" / "c" / "mine.yaml"  # the directory does not exist yet
    assert editor_schema.line_for(recipe) == ""

    editor_schema.write(tmp_path / editor_schema.FILE)
    assert editor_schema.line_for(recipe) == "# yaml-language-server: $schema=../../../.sft-recipe.schema.json\n"

    editor_schema.write(tmp_path / "a" / "b" / editor_schema.FILE)
    assert editor_schema.line_for(recipe) == "# yaml-language-server: $schema=../.sft-recipe.schema.json\n"
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert editor_schema.line_for(Path("mine.yaml")) == "# yaml-language-server: $schema=.sft-recipe.schema.json\n"

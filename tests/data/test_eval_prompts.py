import json
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.eval_prompts import EvalPrompt, eval_prompts
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Recipe
from tests.conftest import minimal, write_rows

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def asked(folder: Path, generate: Any, **data: Any) -> list[EvalPrompt]:
    recipe = minimal(folder) | {"eval": {"generate": generate}}
    return eval_prompts(Recipe.model_validate(recipe | {"data": {**recipe["data"], **data}}))


def test_prompts_in_the_recipe(tmp_path: Path) -> None:
    first, second = asked(tmp_path, ["a", {"prompt": "b", "input": "c", "expected": "d"}])

    assert (first.messages, first.expected, first.text) == ([USER | {"input": ""}], None, "a")
    assert (second.expected, second.text) == ("d", "b\nc")


@pytest.mark.parametrize(
    ("row", "text", "expected"),
    [
        ({"instruction": "a", "input": "i", "output": "b"}, "a\ni", "b"),
        ({"instruction": "a", "output": " "}, "a", None),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": "a"}, "a", None),
        ({"prompt": "a", "input": "i", "expected": "b"}, "a\ni", "b"),
        ({"prompt": "a", "input": None, "expected": None}, "a", None),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, "a", "b"),
        ({"messages": [USER]}, "a", None),
    ],
)
def test_rows_of_a_file(tmp_path: Path, row: dict[str, Any], text: str, expected: str | None) -> None:
    """Of any format, independent of the format of the training data."""
    [question] = asked(tmp_path, str(write_rows(tmp_path / "asked.jsonl", [row])), format="alpaca")

    assert (question.text, question.expected) == (text, expected)
    assert question.messages[-1]["role"] == "user"


def test_system_prompt_tools_and_the_format_that_the_recipe_chooses(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "system": "s", "tools": [{"name": "f"}], "messages": [USER]}
    file = str(write_rows(tmp_path / "asked.jsonl", [row]))
    [question] = asked(tmp_path, file, format="prompt_completion")

    assert question.messages == [{"role": "system", "content": "s"}, USER]
    assert question.tools == [{"name": "f"}]
    with pytest.raises(DataError, match="the columns are those of 2 formats"):
        asked(tmp_path, file)


def test_columns_of_the_recipe(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "asked.jsonl", [{"q": "a", "a": "b"}]))
    [question] = asked(tmp_path, file, columns={"prompt": "q", "completion": "a"})

    assert (question.text, question.expected) == ("a", "b")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"text": "a"}],
            "asked.jsonl:1: eval.generate needs prompts (got plain text). Add a column 'prompt'.",
        ),
        ([{"messages": [ANSWER]}], "asked.jsonl:1: eval.generate needs a prompt before the answer"),
        (
            [{"prompt": "a", "expect": "b"}],
            "asked.jsonl:1: unknown column 'expect' (expected prompt, input, expected).",
        ),
        ([{"prompt": "a"}, {"prompt": 1}], "asked.jsonl:2: 'prompt' must be text (got 1)."),
        ([{"question": "a"}], "asked.jsonl:1: unrecognized columns 'question'"),
        ([], "asked.jsonl: the file is empty"),
    ],
)
def test_rows_that_are_no_questions(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        asked(tmp_path, str(write_rows(tmp_path / "asked.jsonl", rows)))

    [line] = error.value.lines
    assert said in line


def test_every_row_at_fault_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": 1}\nnonsense\n' + json.dumps({"prompt": "a"}) + "\n", "utf-8")
    with pytest.raises(DataError) as error:
        asked(tmp_path, str(tmp_path / "asked.jsonl"))

    assert [line.split(": ")[0].partition("jsonl:")[2] for line in error.value.lines] == ["1", "2:1"]

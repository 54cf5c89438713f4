from typing import Any

import pytest

from sft_recipes.data import formats
from sft_recipes.data.formats import Example, find_format, to_example
from sft_recipes.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "columns", "found", "messages"),
    [
        ({"instruction": "q", "output": "a"}, {}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "q", "input": "i", "output": "a"}, {}, "alpaca", [USER | {"input": "i"}, ASSISTANT]),
        ({"instruction": "q", "input": None, "output": "a"}, {}, "alpaca", [USER, ASSISTANT]),
        ({"prompt": "q", "completion": "a"}, {}, "prompt_completion", [USER, ASSISTANT]),
        ({"prompt": "q", "response": "a"}, {}, "prompt_completion", [USER, ASSISTANT]),
        (
            {"question": "q", "answer": "a"},
            {"prompt": "question", "completion": "answer"},
            "prompt_completion",
            [USER, ASSISTANT],
        ),
        (
            {"i": "q", "o": "a", "x": "i"},
            {"instruction": "i", "output": "o", "input": "x"},
            "alpaca",
            [USER | {"input": "i"}, ASSISTANT],
        ),
        ({"messages": [USER, ASSISTANT]}, {}, "messages", [USER, ASSISTANT]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {},
            "messages",
            [USER, ASSISTANT],
        ),
        (
            {"instruction": "q", "input": "", "output": "a", "text": "t"},
            {},
            "alpaca",
            [USER | {"input": ""}, ASSISTANT],
        ),
    ],
)
def test_formats_are_found_from_the_columns(
    row: dict[str, Any], columns: dict[str, str], found: str, messages: list[dict[str, str]]
) -> None:
    assert find_format(row, columns) == found
    assert to_example(row, found, columns, "f:1") == Example("f:1", messages)


def test_text() -> None:
    assert find_format({"text": "t"}, {}) == "text"
    assert to_example({"text": "t"}, "text", {}, "f:1") == Example("f:1", text="t")


def test_nothing_known() -> None:
    assert find_format({"a": "b"}, {}) is None
    assert find_format({"prompt": "q"}, {}) is None


@pytest.mark.parametrize(
    ("row", "format", "said"),
    [
        (
            {"instruction": "q"},
            "alpaca",
            "f:1: column 'output' is missing (got 'instruction'). If it has another name, set data.columns",
        ),
        ({"instruction": "q", "output": 3}, "alpaca", "f:1: 'output' must be text (got 3)."),
        ({"instruction": None, "output": "a"}, "alpaca", "f:1: 'instruction' must be text (got null)."),
        ({"instruction": "q", "input": 1, "output": "a"}, "alpaca", "'input' must be text"),
        ({"messages": "hello"}, "messages", "'messages' must be a non-empty list of messages (got 'hello')."),
        ({"messages": []}, "messages", "must be a non-empty list of messages"),
        ({"messages": ["x"]}, "messages", "message 1 must have 'role' and 'content'"),
        ({"messages": [USER, {"role": "user"}]}, "messages", "message 2 must have a text 'role' and 'content'"),
        (
            {"messages": [USER, {"from": "function_call", "value": "x"}]},
            "messages",
            "message 2 has an unknown role 'function_call' (expected system, developer, user, assistant, tool",
        ),
        ({"messages": [{**USER, "weight": 0}]}, "messages", "f:1: message 1 has 'weight', which is not supported"),
        ({"messages": [{**USER, "tool_calls": 3}]}, "messages", "message 1: 'tool_calls' must be a list of objects"),
        ({"messages": [USER], "tools": "{"}, "messages", "'tools' must be a list of functions (got '{')."),
        ({}, "messages", "column 'messages' is missing (got none)."),
        ({"text": ["x" * 100]}, "text", "..."),
    ],
)
def test_rows_that_are_wrong(row: dict[str, Any], format: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        to_example(row, format, {}, "f:1")

    assert said in str(caught.value)


def test_tool_calls_and_what_else_a_message_has() -> None:
    """Arguments and tools are parsed from JSON; nulls, as in Parquet, are removed."""
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None},
        {"from": "observation", "value": "2", "tool_call_id": "1"},
    ]
    row = to_example({"messages": turns, "tools": '[{"name": "add"}]'}, "messages", {}, "f:1")

    assert row.messages == [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert row.tools == [{"name": "add"}]


def test_the_formats_are_those_of_the_schema() -> None:
    from typing import get_args

    from sft_recipes.recipe.schema import Format

    assert tuple(formats.NEEDS) == get_args(Format)


def test_a_system_prompt_beside_the_conversation() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    read = to_example({"conversations": turns, "system": "Be brief."}, "messages", {}, "f:1").messages

    assert [message["role"] for message in read] == ["system", "user", "assistant"]
    assert read[0]["content"] == "Be brief."
    again = {"conversations": [{"from": "system", "value": "Be long."}, *turns], "system": "Be brief."}
    with pytest.raises(DataError, match="f:1: both the column 'system' and the first message are system prompts"):
        to_example(again, "messages", {}, "f:1")


def test_of_two_columns_that_mean_the_same_the_one_that_is_filled() -> None:
    read = to_example({"prompt": "a", "completion": None, "response": "b"}, "prompt_completion", {}, "f:1")
    assert read.messages[1]["content"] == "b"

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.formats import registry
from sft_recipes.data.formats.base import Example
from sft_recipes.data.formats.registry import find_format, to_example, unknown
from sft_recipes.data.sources import SourceRow
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


def test_columns_of_several_formats_ask_which() -> None:
    row = {"prompt": "q", "response": "b", "messages": [USER, ASSISTANT]}
    with pytest.raises(DataError) as caught:
        find_format(row, {}, "f:1")

    assert str(caught.value) == (
        "f:1: the columns are those of 2 formats (got messages and prompt_completion). Set data.format to the one to train on."
    )
    assert find_format(row, {"prompt": "prompt"}) == "prompt_completion"  # named by data.columns
    assert find_format(row | {"messages": None}, {}) == "prompt_completion"  # in a table, other rows fill the column
    assert find_format(row | {"response": ""}, {}) == "messages"
    assert find_format({"prompt": "q", "response": "", "text": "t"}, {}) == "prompt_completion"
    assert to_example(row, "messages", {}, "f:1").unused == ["prompt", "response"]


def test_preference_pairs_are_no_format() -> None:
    pairs = {"prompt": "q", "chosen": "a", "rejected": "b"}

    assert "'chosen' and 'rejected' are preference pairs, which DPO trains on: see docs/dpo.md." in unknown(
        pairs, {}, "f:1"
    )
    columns = {"completion": "chosen"}
    assert find_format(pairs, columns) == "prompt_completion"
    assert to_example(pairs, "prompt_completion", columns, "f:1").messages == [USER, ASSISTANT]


def test_the_hint_has_a_name_for_each_of_three_columns() -> None:
    assert "e.g. {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}." in unknown({"q": "1", "a": "2"}, {}, "f:1")
    hint = unknown({"q": "1", "facts": "2", "a": "3"}, {}, "f:1")
    assert "e.g. {instruction: YOUR_COLUMN, input: YOUR_COLUMN, output: YOUR_COLUMN}." in hint


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"instruction": "q", "input": "", "output": "a", "id": 7, "text": "t"}, ["id", "text"]),
        ({"prompt": "q", "completion": "a", "response": "b", "label": True}, ["response"]),
        ({"prompt": "q", "completion": "a", "empty": "", "null": None, "none": [], "zero": 0}, ["zero"]),
        ({"messages": [USER, ASSISTANT], "system": "s", "tools": "[]", "source": "x"}, ["source"]),
    ],
)
def test_columns_that_are_not_used_are_named(row: dict[str, Any], unused: list[str]) -> None:
    format = find_format(row, {})

    assert format is not None
    assert to_example(row, format, {}, "f:1").unused == unused


def test_a_format_is_added_by_one_file(tmp_path: Path) -> None:
    """In a checkout of its own: it is detected, converted, in the schema, and its columns can be renamed."""
    shutil.copytree(
        Path(registry.__file__).parents[2], tmp_path / "sft_recipes", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (tmp_path / "sft_recipes/data/formats/question.py").write_text(
        "from sft_recipes.data.formats.base import Example, Format\n"
        "FORMAT = Format(name='question', about='A question.', required=('question', 'answer'),\n"
        "    convert=lambda row: Example(row.place, [{'role': 'user', 'content': row.text('question')},\n"
        "                                            {'role': 'assistant', 'content': row.text('answer')}]))\n",
        "utf-8",
    )
    code = (
        "from sft_recipes.data.formats.registry import COLUMNS, find_format, to_example\n"
        "from sft_recipes.recipe import editor_schema\n"
        "row = {'question': 'q', 'reply': 'a'}\n"
        "columns = {'answer': 'reply'}\n"
        "print(find_format(row, columns), to_example(row, 'question', columns, '').messages[1]['content'])\n"
        "print('answer' in COLUMNS, '\"question\"' in editor_schema.schema())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip

    assert done.stdout == "question a\nTrue True\n"


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
            {"messages": [USER, {"from": "boss", "value": "x"}]},
            "messages",
            "message 2 has an unknown role 'boss' (expected system, developer, user, assistant, tool",
        ),
        (
            {"messages": [USER, {"from": "function_call", "value": "x"}]},
            "messages",
            "message 2: the content of role 'function_call' must be JSON of {name, arguments} (got 'x').",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["q"]]},
            "alpaca",
            "f:1: 'history' must be a list of [instruction, answer] pairs (got [['q']]).",
        ),
        (
            {"prompt": [USER], "completion": "a"},
            "prompt_completion",
            "'completion' must be a non-empty list of messages",
        ),
        ({"prompt": "q", "completion": "a", "system": 1}, "prompt_completion", "'system' must be text (got 1)."),
        (
            {"prompt": "q", "completion": "a", "tools": ["{"]},
            "prompt_completion",
            "'tools' must be a list of functions",
        ),
        *(
            (row, format, f"f:1: {name} false marks an answer to avoid")
            for row, format, name in (
                ({"prompt": "q", "completion": "a", "label": False}, "prompt_completion", "label"),
                ({"prompt": "q", "completion": "a", "label": "False"}, "prompt_completion", "label"),
                ({"messages": [USER, ASSISTANT], "label": False}, "messages", "label"),
                ({"instruction": "q", "output": "a", "kto_tag": False}, "alpaca", "kto_tag"),
            )
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ASSISTANT]},
            "messages",
            "message 1 has a part that is not text, and runs train on text only",
        ),
        (
            {"messages": [USER, ASSISTANT], "images": ["a.jpg"]},
            "messages",
            "f:1: column 'images' has content, but runs train on text only. Remove the column, or these rows.",
        ),
        ({"text": "t", "audio": {"path": "a.wav"}}, "text", "f:1: column 'audio' has content"),
        ({"prompt": "q", "completion": "a", "chosen": "b", "rejected": "c"}, "prompt_completion", "see docs/dpo.md"),
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


SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"]]},
        {"instruction": "q", "response": "a", "system_prompt": "s"},
        {"prompt": "q", "completion": "a", "system_prompt": "s", "tools": [TOOL]},
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT], "functions": [{"name": "add"}]},
        {"messages": [USER, ASSISTANT], "system": "s", "tools": [json.dumps(TOOL)]},
        {"messages": [USER, ASSISTANT], "system_prompt": "s", "tools": json.dumps([TOOL])},
    ],
)
def test_columns_beside_prompt_and_answer(row: dict[str, Any]) -> None:
    example = to_example(row, find_format(row, {}) or "", {}, "f:1")
    history = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}] if "history" in row else []

    assert example.messages == [SYSTEM, *history, USER, ASSISTANT]
    assert example.tools == ([TOOL] if "tools" in row or "functions" in row else None)
    assert example.unused == []


def test_calls_of_llama_factory() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    expected = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
        ASSISTANT,
    ]
    for calls in (call, [call]):
        turns[1]["value"] = json.dumps(calls)
        assert to_example({"conversations": turns}, "messages", {}, "f:1").messages == expected


@pytest.mark.parametrize(
    ("keys", "flag"),
    [
        ({}, []),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"trainable": True}, True),
        ({"masked": True}, False),
        ({"masked": 0}, True),
        ({"loss_scale": 0.0}, False),
        ({"weight": 1, "train": True}, True),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}, [(1, 3)]),
        ({"train_detail": [{"begin_offset": 1, "end_offset": 1, "train": False}]}, [(0, 1), (2, 3)]),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, False),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": True}]}, [(0, 3)]),
    ],
)
def test_flags_of_messages(keys: dict[str, Any], flag: Any) -> None:
    turn = {"role": "assistant", "content": "abc"}
    example = to_example({"messages": [USER, turn | keys], "system": "s"}, "messages", {}, "f:1")

    assert example.flags == ([None, None, flag] if keys else [])
    assert example.messages == [SYSTEM, USER, turn]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weight": 0.5}, "f:1: message 2: 'weight' must be 0 or 1, true or false (got 0.5)."),
        ({"train": "no"}, "'train' must be 0 or 1, true or false (got 'no')."),
        ({"train_on_this": True}, "message 2 has 'train_on_this', which is not supported. Rename it to 'train'"),
        ({"weight": 1, "masked": True}, "'weight' and 'masked' contradict each other. Keep only one."),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "with offsets from 0 to 2"),
        ({"train_detail": "all"}, "'train_detail' must be a list of {begin_offset, end_offset, train}"),
    ],
)
def test_flags_that_cannot_be_honored(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        to_example({"messages": [USER, {"role": "assistant", "content": "abc"} | keys]}, "messages", {}, "f:1")

    assert said in str(caught.value)


def test_a_tree_of_messages_is_a_conversation_for_each_last_answer() -> None:
    rows = [
        ("a", None, "prompter", "1"), ("b", "a", "assistant", "2"), ("c", "a", "assistant", "3"),
        ("d", "b", "prompter", "4"), ("e", "d", "assistant", "5"), ("f", "e", "prompter", "6"),
    ]  # fmt: skip
    names = ("message_id", "parent_id", "role", "text")
    found = [
        SourceRow(f"f:{number}", dict(zip(names, row, strict=True)) | {"lang": "en"})
        for number, row in enumerate(rows, 1)
    ]
    combined = list(registry.combined(found, find_format(found[0].values, {}), {}))
    examples = [to_example(row.values, "tree", {}, row.place) for row in combined]

    assert [(e.place, "".join(m["content"] for m in e.messages)) for e in examples] == [("f:3", "13"), ("f:5", "1245")]
    assert [m["role"] for m in examples[1].messages] == ["user", "assistant"] * 2
    assert examples[0].unused == ["lang"]


def test_a_tree_with_a_message_missing() -> None:
    rows = [
        SourceRow("f:1", {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "2"}),
        SourceRow("f:2", {"message_id": "c", "parent_id": "c", "role": "assistant", "text": "3"}),
    ]
    first, second = registry.combined(rows, "tree", {})

    assert str(first).startswith("f:1: the message 'a', which 'parent_id' names, is missing.")
    assert str(second).startswith("f:2: 'parent_id' leads back to the message itself.")


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

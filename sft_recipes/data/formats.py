"""What a row of the data says, whatever its columns are called."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sft_recipes.errors import DataError, shown

# The columns a format needs, and those it takes where they are there. `columns:` in a recipe renames.
NEEDS = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
# Other usual names of the same columns, looked for when the recipe does not rename.
ALSO = {"completion": ("response",), "messages": ("conversations",)}
# ShareGPT's words, and those that are taken as they are. Templates leave out what they do not know, without a word.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHOWN = 20  # columns of a row that are named
_WEIGHTS = ("weight", "train")  # of single messages, in other tools


@dataclass(slots=True)
class Example:
    """One row: messages of `role` and `content` (an Alpaca input stays apart, as `input`), or plain text."""

    place: str  # file:line
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    tools: list[Any] | None = None  # functions that the assistant may call, for templates that have a place for them

    @property
    def empty(self) -> bool:
        """Whether there is no answer in it."""
        if not self.messages:
            return not self.text.strip()
        return not self.messages[-1]["content"].strip() and "tool_calls" not in self.messages[-1]


def find_format(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The first format whose columns the row has, or None."""
    return next((name for name, needs in NEEDS.items() if all(_column(row, need, columns) for need in needs)), None)


def columns_of(format: str) -> tuple[str, ...]:
    """The columns that `columns` can rename in rows of a format."""
    return (*NEEDS[format], "input") if format == "alpaca" else NEEDS[format]


def unknown(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> str:
    """The problem of a row that no format fits."""
    for name, column in columns.items():
        if column not in row:
            return f"{place}: no column '{column}' in this row, which data.columns takes for '{name}'; it has {_names(row)}"
    needs = " or ".join("+".join(needs) for needs in NEEDS.values())
    return (
        f"{place}: cannot tell the format from the columns {_names(row)}; expected {needs}; "
        "rename with data.columns, such as {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}"
    )


def to_example(row: Mapping[str, Any], format: str, columns: Mapping[str, str], place: str) -> Example:
    """Read `row` as `format`. Raises DataError where a column is missing or holds something else than text."""
    if format == "messages":
        return Example(place, _messages(row, columns, place), tools=_tools(row, place))
    if format == "text":
        return Example(place, text=_text(row, "text", columns, place))
    if format == "alpaca":
        user = {"role": "user", "content": _text(row, "instruction", columns, place)}
        if row.get(columns.get("input", "input")) is not None:
            user["input"] = _text(row, "input", columns, place)
        answer = _text(row, "output", columns, place)
    else:
        user = {"role": "user", "content": _text(row, "prompt", columns, place)}
        answer = _text(row, "completion", columns, place)
    return Example(place, [user, {"role": "assistant", "content": answer}])


def _column(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> str | None:
    """The row's own name for the column `name`, or None."""
    if name in columns:
        return columns[name] if columns[name] in row else None
    names = (name, *ALSO.get(name, ()))
    # One that is null in this row is so because other rows have it.
    filled = next((other for other in names if row.get(other) is not None), None)
    return filled or next((other for other in names if other in row), None)


def _text(row: Mapping[str, Any], name: str, columns: Mapping[str, str], place: str) -> str:
    column = _column(row, name, columns)
    if column is None:
        raise DataError(
            f"{place}: no column '{columns.get(name, name)}' in this row, it has {_names(row)}; "
            f"rename with data.columns: {{{name}: YOUR_COLUMN}}"
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: '{column}' must be text, got {shown(value)}")
    return value


def _messages(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> list[dict[str, Any]]:
    column = _column(row, "messages", columns)
    if column is None:
        raise DataError(
            f"{place}: no column '{columns.get('messages', 'messages')}' in this row, it has {_names(row)}; "
            "rename with data.columns: {messages: YOUR_COLUMN}"
        )
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: '{column}' must be a list of messages, got {shown(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: message {number} must have 'role' and 'content', got {shown(turn)}")
        messages.append(_message(turn, f"{place}: message {number}"))
    system = row.get("system")  # as ShareGPT's rows have it
    if isinstance(system, str) and system.strip() and column != "system":
        if messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise DataError(f"{place}: both the column 'system' and the first message are system prompts; keep one")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`role` and `content`, and whatever else a template may ask for; of tool calls, arguments that are JSON are read."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{place} must have a text 'role' and 'content', got {shown(turn)}")
    if found := next((key for key in _WEIGHTS if turn.get(key) is not None), None):
        raise DataError(f"{place} has '{found}', which is not supported; choose with data.train_on, and take it out")
    role = _ROLES.get(role, role)
    if role not in _KNOWN_ROLES:
        raise DataError(f"{place} has the role '{role}'; expected one of {', '.join((*_KNOWN_ROLES, *_ROLES))}")
    others = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    message: dict[str, Any] = {"role": role, "content": content}
    message |= {key: value for key, value in others.items() if value is not None}
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"{place}: 'tool_calls' must be a list of objects, got {shown(calls)}")
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI writes them as JSON, templates expect what it means."""
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _call(inner)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {**call, "arguments": arguments} if "arguments" in call else dict(call)


def _tools(row: Mapping[str, Any], place: str) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise DataError(f"{place}: 'tools' must be a list of functions, got {shown(tools)}") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{place}: 'tools' must be a list of functions, got {shown(tools)}")
    return tools or None


def _names(row: Mapping[str, Any]) -> str:
    names = [shown(name) for name in islice(row, _SHOWN)]
    return ", ".join([*names, *([f"and {len(row) - _SHOWN:,} more"] if len(row) > _SHOWN else [])]) or "none"

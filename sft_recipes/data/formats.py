"""Convert rows of every format to examples: messages or plain text."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sft_recipes.errors import DataError, shown

# Required columns per format; `data.columns` in a recipe renames them.
NEEDS = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
# Common aliases, used if the recipe does not rename the column.
ALSO = {"completion": ("response",), "messages": ("conversations",)}
# ShareGPT's roles, and those used unchanged. Others are an error, because templates silently skip unknown roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHOWN = 20  # columns listed in a message
_WEIGHTS = ("weight", "train")  # per-message loss weights of other tools


# Whether a message is in the loss: yes or no, the [start, end) character ranges of its content that are (as in the row,
# ascending), or None: data.train_on decides.
Flag = bool | list[tuple[int, int]] | None


@dataclass(slots=True)
class Example:
    """One row: messages with `role` and `content` (and `input` for an Alpaca input), or plain text.

    `flags`, if not empty, has one entry per message; the keys it comes from (`weight`, `train`, ...) are not in the messages.
    Only assistant messages can be trained, so a true flag on another one is an error of the renderer.
    """

    place: str  # file:line
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    tools: list[Any] | None = None  # functions that the assistant may call, for templates that render them
    flags: list[Flag] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Return True if the answer (plain text: the text) is blank and calls no tool."""
        if not self.messages:
            return not self.text.strip()
        return not self.messages[-1]["content"].strip() and "tool_calls" not in self.messages[-1]


def find_format(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the first format whose required columns the row has, or None."""
    return next((name for name, needs in NEEDS.items() if all(_column(row, need, columns) for need in needs)), None)


def columns_of(format: str) -> tuple[str, ...]:
    """Return the columns of a format that `data.columns` can rename."""
    return (*NEEDS[format], "input") if format == "alpaca" else NEEDS[format]


def unknown(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> str:
    """Return the error message for a row that matches no format."""
    for name, column in columns.items():
        if column not in row:
            return f"{place}: column '{column}' is missing, which data.columns maps to '{name}' (got {_names(row)})."
    *others, last = ("+".join(needs) for needs in NEEDS.values())
    return (
        f"{place}: unrecognized columns {_names(row)} (expected {', '.join(others)} or {last}). "
        "Map them with data.columns, e.g. {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}."
    )


def to_example(row: Mapping[str, Any], format: str, columns: Mapping[str, str], place: str) -> Example:
    """Convert a row. Raises DataError if a column is missing or has the wrong type."""
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
    """Return the name that the row uses for the column `name`, or None."""
    if name in columns:
        return columns[name] if columns[name] in row else None
    names = (name, *ALSO.get(name, ()))
    # A column that only other rows fill is null in this row of a table.
    filled = next((other for other in names if row.get(other) is not None), None)
    return filled or next((other for other in names if other in row), None)


def _text(row: Mapping[str, Any], name: str, columns: Mapping[str, str], place: str) -> str:
    column = _column(row, name, columns)
    if column is None:
        raise DataError(
            f"{place}: column '{columns.get(name, name)}' is missing (got {_names(row)}). "
            f"If it has another name, set data.columns: {{{name}: YOUR_COLUMN}}."
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: '{column}' must be text (got {shown(value)}).")
    return value


def _messages(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> list[dict[str, Any]]:
    column = _column(row, "messages", columns)
    if column is None:
        raise DataError(
            f"{place}: column '{columns.get('messages', 'messages')}' is missing (got {_names(row)}). "
            "If it has another name, set data.columns: {messages: YOUR_COLUMN}."
        )
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: '{column}' must be a non-empty list of messages (got {shown(turns)}).")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: message {number} must have 'role' and 'content' (got {shown(turn)}).")
        messages.append(_message(turn, f"{place}: message {number}"))
    system = row.get("system")  # a column in ShareGPT data
    if isinstance(system, str) and system.strip() and column != "system":
        if messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise DataError(
                f"{place}: both the column 'system' and the first message are system prompts. Keep only one."
            )
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Normalize a message: `role`, `content`, any other keys, and tool calls with parsed arguments."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{place} must have a text 'role' and 'content' (got {shown(turn)}).")
    if weight := next((key for key in _WEIGHTS if turn.get(key) is not None), None):
        raise DataError(f"{place} has '{weight}', which is not supported. Remove it and use data.train_on instead.")
    role = _ROLES.get(role, role)
    if role not in _KNOWN_ROLES:
        raise DataError(f"{place} has an unknown role '{role}' (expected {', '.join((*_KNOWN_ROLES, *_ROLES))}).")
    others = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    message: dict[str, Any] = {"role": role, "content": content}
    message |= {key: value for key, value in others.items() if value is not None}
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"{place}: 'tool_calls' must be a list of objects (got {shown(calls)}).")
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the arguments of a tool call: OpenAI writes them as JSON text, templates expect an object."""
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
            raise DataError(f"{place}: 'tools' must be a list of functions (got {shown(tools)}).") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{place}: 'tools' must be a list of functions (got {shown(tools)}).")
    return tools or None


def _names(row: Mapping[str, Any]) -> str:
    names = [shown(name) for name in islice(row, _SHOWN)]
    return ", ".join([*names, *([f"and {len(row) - _SHOWN:,} more"] if len(row) > _SHOWN else [])]) or "none"

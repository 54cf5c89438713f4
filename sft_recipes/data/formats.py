"""What a row of the data says, whatever its columns are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.errors import DataError

# The columns a format needs, and those it takes where they are there. `columns:` in a recipe renames.
NEEDS = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
# Other usual names of the same columns, looked for when the recipe does not rename.
ALSO = {"completion": ("response",), "messages": ("conversations",)}
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words


@dataclass(frozen=True, slots=True)
class Example:
    """One row: messages of `role` and `content` (an Alpaca input stays apart, as `input`), or plain text."""

    place: str  # file:line
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""


def find_format(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The first format whose columns the row has, or None."""
    return next((name for name, needs in NEEDS.items() if all(_column(row, need, columns) for need in needs)), None)


def to_example(row: Mapping[str, Any], format: str, columns: Mapping[str, str], place: str) -> Example:
    """Read `row` as `format`. Raises DataError where a column is missing or holds something else than text."""
    if format == "messages":
        return Example(place, _messages(row, columns, place))
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
    candidates = (columns[name],) if name in columns else (name, *ALSO.get(name, ()))
    return next((candidate for candidate in candidates if candidate in row), None)


def _text(row: Mapping[str, Any], name: str, columns: Mapping[str, str], place: str) -> str:
    column = _column(row, name, columns)
    if column is None:
        raise DataError(
            f"{place}: no column '{columns.get(name, name)}' in this row, it has {_names(row)}; "
            f"rename with data.columns: {{{name}: YOUR_COLUMN}}"
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: '{column}' must be text, got {_short(value)}")
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
        raise DataError(f"{place}: '{column}' must be a list of messages, got {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: message {number} must have 'role' and 'content', got {_short(turn)}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place}: message {number} must have a text 'role' and 'content', got {_short(turn)}")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in row) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""What a format declares, and the example that rows of every format are converted to."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from sft_recipes.errors import DataError, shown

# Whether a message is in the loss: yes or no, the [start, end) character ranges of its content that are (as in the row,
# ascending), or None: data.train_on decides.
Flag = bool | list[tuple[int, int]] | None

SYSTEM, TOOLS = "system", "tools"  # optional columns of several formats
_ALSO = {SYSTEM: ("system_prompt",), TOOLS: ("functions",)}
_SHOWN = 20  # columns listed in a message
_EMPTY: tuple[Any, ...] = (None, "", [], {})


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
    chat: bool = field(default=False, compare=False)  # a chat template renders it by default
    unused: list[str] = field(default_factory=list, compare=False)  # columns with content that were not read

    @property
    def empty(self) -> bool:
        """Return True if the answer (plain text: the text) is blank and calls no tool."""
        if not self.messages:
            return not self.text.strip()
        return not self.messages[-1]["content"].strip() and "tool_calls" not in self.messages[-1]


@dataclass(slots=True)
class Row:
    """One row of a source. Remembers which columns were read, so that the others can be named."""

    place: str
    values: Mapping[str, Any]
    columns: Mapping[str, str]  # data.columns: name in the format -> name in the row
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other names of the format's columns
    read: set[str] = field(default_factory=set)

    def column(self, name: str) -> str | None:
        """Return the name that the row uses for the format's column `name`, or None."""
        if name in self.columns:
            return self.columns[name] if self.columns[name] in self.values else None
        # A column that only other rows fill is null in this row of a table.
        empty = name if name in self.values else None
        if empty and self.values[name] is not None:
            return name
        for other in self.also.get(name, ()):
            if other in self.values:
                if self.values[other] is not None:
                    return other
                empty = empty or other
        return empty

    def get(self, name: str) -> Any:
        """Return the value of a column, None if it is missing."""
        column = self.column(name)
        if column is None:
            return None
        self.read.add(column)
        return self.values[column]

    def require(self, name: str) -> Any:
        """Return the value of a column. Raises DataError if it is missing."""
        if self.column(name) is None:
            raise self.error(
                f"column '{self.columns.get(name, name)}' is missing (got {self.names()}). "
                f"If it has another name, set data.columns: {{{name}: YOUR_COLUMN}}."
            )
        return self.get(name)

    def text(self, name: str) -> str:
        """Return the text of a column. Raises DataError if it is missing or not text."""
        column = self.column(name)
        value = self.require(name) if column is None else self.values[column]
        if not isinstance(value, str):
            raise self.error(f"'{column}' must be text (got {shown(value)}).")
        self.read.add(str(column))
        return value

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.place}: {problem}")

    def names(self) -> str:
        """Return the columns of the row for a message."""
        names = [shown(name) for name in islice(self.values, _SHOWN)]
        more = [f"and {len(self.values) - _SHOWN:,} more"] if len(self.values) > _SHOWN else []
        return ", ".join([*names, *more]) or "none"

    def unused(self) -> list[str]:
        """Return the columns with content that were not read."""
        return [name for name, value in self.values.items() if name not in self.read and value not in _EMPTY]


@dataclass(frozen=True)
class Format:
    """A row format: one file of this package, which assigns it to FORMAT."""

    name: str
    about: str  # for the documentation
    required: tuple[str, ...]  # columns that a row must have; the format is detected from them
    convert: Callable[[Row], Example]
    optional: tuple[str, ...] = ()  # columns that are used if the row has them
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other names of columns, used if not renamed
    # Makes fewer rows, which have `place` and `values`, of those of a source, if several are one example; gets data.columns,
    # too. Rows and the result may contain DataErrors.
    combine: Callable[[Iterable[Any], Mapping[str, str]], Iterator[Any]] | None = None
    last: bool = False  # detected only if no other format matches

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that `data.columns` can rename."""
        return (*self.required, *self.optional)

    @cached_property
    def _every_name(self) -> Mapping[str, tuple[str, ...]]:
        return {**_ALSO, **self.also}

    def row(self, values: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Row:
        return Row(place, values, columns, self._every_name)

    def matches(self, values: Mapping[str, Any], columns: Mapping[str, str], *, filled: bool = False) -> bool:
        """Return True if the row has all required columns, and they are `filled`."""
        row = self.row(values, columns, "")
        found = [row.column(name) for name in self.required]
        return all(name is not None and not (filled and values[name] in _EMPTY) for name in found)


def with_system(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the system prompt in the row's column, if it is not blank, first. Raises DataError if there are two."""
    system = row.get(SYSTEM)
    if system is None:
        return messages
    if not isinstance(system, str):
        raise row.error(f"'{row.column(SYSTEM)}' must be text (got {shown(system)}).")
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise row.error(
            f"both the column '{row.column(SYSTEM)}' and the first message are system prompts. Keep only one."
        )
    return messages


def tools(row: Row) -> list[Any] | None:
    """Return the functions that the assistant may call. They may be JSON, each or as a whole. Raises DataError."""
    column, listed = row.column(TOOLS), row.get(TOOLS)
    try:
        listed = (json.loads(listed) if listed.strip() else None) if isinstance(listed, str) else listed
        if isinstance(listed, list):
            listed = [json.loads(tool) if isinstance(tool, str) else tool for tool in listed]
    except ValueError:
        raise row.error(f"'{column}' must be a list of functions (got {shown(listed)}).") from None
    if listed is not None and not (isinstance(listed, list) and all(isinstance(tool, Mapping) for tool in listed)):
        raise row.error(f"'{column}' must be a list of functions (got {shown(listed)}).")
    if listed and column == "functions":  # OpenAI's earlier name, of functions that stood alone
        listed = [{"type": "function", "function": tool} if "function" not in tool else tool for tool in listed]
    return listed or None

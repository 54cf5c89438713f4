import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from sft_recipes.data.formats.base import SYSTEM, TOOLS, Example, Flag, Format, Row, tools, with_system
from sft_recipes.errors import DataError, shown

# Roles of ShareGPT, LLaMA-Factory and OASST, and those used unchanged. Others are an error, because templates silently
# skip unknown roles.
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant",
    "observation": "tool",
}  # fmt: skip
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Keys that say whether a message is in the loss, and the value that means yes: of OpenAI (weight), Axolotl (train,
# training), ms-swift (loss, loss_scale) and others.
_FLAGS = {
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_scale": True,
    "masked": False,
}
_MAY_BE_A_FLAG = re.compile(r"train|loss|mask|weight")


def convert(row: Row) -> Example:
    messages, flags = read(row, "messages")
    return conversation(row, messages, flags)


def conversation(row: Row, messages: list[dict[str, Any]], flags: list[Flag]) -> Example:
    """Return the example of a conversation, with the row's system prompt and tools."""
    whole = with_system(row, messages)
    flags = [None] * (len(whole) - len(messages)) + flags if any(flag is not None for flag in flags) else []
    return Example(row.place, whole, tools=tools(row), flags=flags, chat=True)


def read(row: Row, name: str) -> tuple[list[dict[str, Any]], list[Flag]]:
    """Return the messages in a column, and whether each is in the loss. Raises DataError."""
    turns = row.require(name)
    if not isinstance(turns, list) or not turns:
        raise row.error(f"'{row.column(name)}' must be a non-empty list of messages (got {shown(turns)}).")
    messages, flags = list[dict[str, Any]](), list[Flag]()
    for number, turn in enumerate(turns, start=1):
        place = f"{row.place}: message {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{place} must have 'role' and 'content' (got {shown(turn)}).")
        messages.append(_message(turn, place))
        flags.append(_flag(turn, messages[-1]["content"], place))
    return messages, flags


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Normalize a message: `role`, `content`, any other keys, and tool calls with parsed arguments."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if role == "function_call":
        content, calls = "", _calls_in(content, place)
    if content is None and calls:
        content = ""
    if isinstance(content, list) and any(isinstance(part, Mapping) and part.get("type") != "text" for part in content):
        raise DataError(
            f"{place} has a part that is not text, and runs train on text only (got {shown(content)}). Remove the row."
        )
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{place} must have a text 'role' and 'content' (got {shown(turn)}).")
    role = _ROLES.get(role, role)
    if role not in _KNOWN_ROLES:
        raise DataError(f"{place} has an unknown role '{role}' (expected {', '.join((*_KNOWN_ROLES, *_ROLES))}).")
    skipped = ("role", "from", "content", "value", "train_detail", *_FLAGS)
    message: dict[str, Any] = {"role": role, "content": content}
    message |= {key: value for key, value in turn.items() if value is not None and key not in skipped}
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"{place}: 'tool_calls' must be a list of objects (got {shown(calls)}).")
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _calls_in(content: Any, place: str) -> list[dict[str, Any]]:
    """Parse the content of LLaMA-Factory's role function_call: JSON of one call, or of a list of them."""
    try:
        calls = json.loads(content)
    except (ValueError, TypeError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError(
            f"{place}: the content of role 'function_call' must be JSON of {{name, arguments}} (got {shown(content)})."
        )
    return [{"type": "function", "function": call} for call in calls]


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


def _flag(turn: Mapping[str, Any], content: str, place: str) -> Flag:
    """Return whether a message, or which characters of it, are in the loss. Raises DataError if that cannot be honored."""
    flags: dict[str, Flag] = {}
    for key, value in turn.items():
        if value is None or not _MAY_BE_A_FLAG.search(key):
            continue
        if key == "train_detail":
            flags[key] = _trained_characters(value, content, place)
        elif key not in _FLAGS:
            raise DataError(
                f"{place} has '{key}', which is not supported. Rename it to 'train' if it says whether the message is in "
                "the loss; else remove it."
            )
        elif value in (0, 1):  # True and 1.0, too
            flags[key] = bool(value) is _FLAGS[key]
        else:
            raise DataError(f"{place}: '{key}' must be 0 or 1, true or false (got {shown(value)}).")
    distinct = [flag for number, flag in enumerate(flags.values()) if flag not in list(flags.values())[:number]]
    if len(distinct) > 1:
        raise DataError(f"{place}: {' and '.join(map(repr, flags))} contradict each other. Keep only one.")
    return distinct[0] if distinct else None


def _trained_characters(spans: Any, content: str, place: str) -> Flag:
    """Convert Axolotl's train_detail, whose end_offset is the last character: all but the spans with train false."""
    trained = [True] * len(content)
    for span in spans if isinstance(spans, list) else [spans]:
        begin, end = (span.get("begin_offset"), span.get("end_offset")) if isinstance(span, Mapping) else (None, None)
        train = span.get("train", True) if isinstance(span, Mapping) else None
        if not (type(begin) is type(end) is int and 0 <= begin <= end < len(content) and isinstance(train, bool)):
            raise DataError(
                f"{place}: 'train_detail' must be a list of {{begin_offset, end_offset, train}} with offsets from 0 to "
                f"{len(content) - 1}, the last character (got {shown(span)})."
            )
        trained[begin : end + 1] = [train] * (end + 1 - begin)
    edges = [
        at for at in range(len(trained) + 1) if (trained[at - 1 : at] or [False]) != (trained[at : at + 1] or [False])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True)) or False


FORMAT = Format(
    name="messages",
    about="A conversation: messages with role and content (OpenAI), or with from and value (ShareGPT).",
    required=("messages",),
    optional=(SYSTEM, TOOLS),
    also={"messages": ("conversations",)},
    convert=convert,
)

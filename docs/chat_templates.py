"""The chat templates that come with TRL, and ours, with ten conversations: the table in docs/chat-templates.md."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft_recipes.data.chat import Chat
from sft_recipes.data.formats.base import Example
from sft_recipes.data.templates import alpaca_chat_template
from sft_recipes.errors import InputError

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "temperature", "arguments": {"place": "Oslo", "unit": None}},
}
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"type": "string", "description": "A city."}},
    "required": ["place"],
}
TOOLS = [{"type": "function", "function": {"name": "temperature", "description": "Measure.", "parameters": PARAMETERS}}]
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "temperature", "content": "9"}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


CONVERSATIONS: dict[str, Example] = {
    "one turn": Example("row", [user("Why?"), answer("Because.")]),
    "several": Example("row", [user("Why?"), answer("Because."), user("How?"), answer("Like so.")]),
    "system": Example("row", [{"role": "system", "content": "Be brief."}, user("Why?"), answer("Because.")]),
    "thought": Example("row", [user("Why?"), answer("Because.", reasoning_content="Hm.")]),
    "thoughts": Example(
        "row",
        [
            user("Why?"),
            answer("Because.", reasoning_content="Hm."),
            user("How?"),
            answer("So.", reasoning_content="Oh."),
        ],
    ),
    "tool": Example("row", [user("Warm?"), answer("", tool_calls=[CALL]), RESULT, answer("No.")], tools=TOOLS),
    "tool, thought": Example(
        "row",
        [
            user("Warm?"),
            answer("", tool_calls=[CALL], reasoning_content="Hm."),
            RESULT,
            answer("No.", reasoning_content="Oh."),
        ],
        tools=TOOLS,
    ),
    "empty": Example("row", [user("Why?"), answer("")]),
    "newline": Example("row", [user("Why?"), answer("\nBecause.")]),
    "emoji": Example("row", [user("Why?"), answer("Because 👍🏽")]),
}


def sources() -> Iterator[tuple[str, str]]:
    """Yield name and text of every template."""
    trl = find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    for file in sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja")):
        yield file.stem, file.read_text("utf-8")
    yield "alpaca", alpaca_chat_template()


def outcome(source: str, example: Example) -> str:
    """Say how a conversation is trained with `train_on: assistant`."""
    try:
        rendered = Chat(source, "assistant", SPECIALS, ())(example)
    except InputError:
        return "no"
    words = {
        "turns": rendered.more,
        "other prompt": not all(document.prompted for document in (rendered, *rendered.more)),
        "lossy": rendered.lossy,
    }
    return ", ".join(word for word, applies in words.items() if applies) or "yes"


def table() -> list[str]:
    lines = [f"| template | {' | '.join(CONVERSATIONS)} |", "|" + "---|" * (1 + len(CONVERSATIONS))]
    for name, source in sources():
        outcomes = " | ".join(outcome(source, example) for example in CONVERSATIONS.values())
        lines.append(f"| {name}{' (marks)' if 'endgeneration' in source else ''} | {outcomes} |")
    return lines

from collections.abc import Iterator
from typing import Any

from sft_recipes.data.formats.base import SYSTEM, TOOLS, Example, Format, Row, tools, with_system
from sft_recipes.errors import shown


def convert(row: Row) -> Example:
    return instruction(row, "input", "output")


def instruction(row: Row, input: str, output: str) -> Example:
    """Convert a row with an instruction, an input in the column `input` and an answer in `output`."""
    user = {"role": "user", "content": row.text("instruction")}
    if row.get(input) is not None:
        user["input"] = row.text(input)
    answer = {"role": "assistant", "content": row.text(output)}
    listed = tools(row)
    return Example(row.place, with_system(row, [*_history(row), user, answer]), tools=listed, chat=bool(listed))


def _history(row: Row) -> Iterator[dict[str, Any]]:
    """Yield the earlier turns, as LLaMA-Factory writes them: pairs of instruction and answer."""
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise row.error(f"'history' must be a list of [instruction, answer] pairs (got {shown(history)}).")
        yield {"role": "user", "content": turn[0]}
        yield {"role": "assistant", "content": turn[1]}


FORMAT = Format(
    name="alpaca",
    about="An instruction, optionally an input, and the answer. `history`: earlier [instruction, answer] pairs.",
    required=("instruction", "output"),
    optional=("input", SYSTEM, "history", TOOLS),
    convert=convert,
)

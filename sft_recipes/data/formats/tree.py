from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sft_recipes.data.formats import messages
from sft_recipes.data.formats.base import Example, Format, Row
from sft_recipes.errors import DataError


def combine(rows: Iterable[Any], columns: Mapping[str, str]) -> Iterator[Any]:
    """Yield a row per conversation: the path from a first message to each answer that no other answer follows."""
    nodes, answers = dict[str, Row](), list[tuple[Any, Row]]()
    for source_row in rows:
        if isinstance(source_row, DataError):
            yield source_row
            continue
        row = FORMAT.row(source_row.values, columns, source_row.place)
        nodes[str(row.get("message_id"))] = row
        if row.get("role") == "assistant":
            answers.append((source_row, row))
    paths, continued = list[tuple[Any, list[Row]]](), set[int]()
    for source_row, row in answers:
        try:
            paths.append((source_row, _path(row, nodes)))
        except DataError as error:
            yield error
        else:
            continued.update(map(id, paths[-1][1][:-1]))
    for source_row, path in paths:
        if id(path[-1]) not in continued:
            turns = [{"role": node.get("role"), "content": node.get("text")} for node in path]
            source_row.values = {**source_row.values, str(path[-1].column("text")): turns}
            yield source_row


def _path(row: Row, nodes: Mapping[str, Row]) -> list[Row]:
    """Return the rows from the first message to this one. Raises DataError if one is missing."""
    path = [row]
    while (parent := path[-1].get("parent_id")) is not None:
        if str(parent) not in nodes:
            raise row.error(f"the message {parent!r}, which 'parent_id' names, is missing. Add it, or remove this row.")
        path.append(nodes[str(parent)])
        if len(path) > len(nodes):
            raise row.error("'parent_id' leads back to the message itself. Correct it.")
    return path[::-1]


def convert(row: Row) -> Example:
    row.read |= {str(row.column(name)) for name in FORMAT.columns}
    return messages.conversation(row, *messages.read(row, "text"))


FORMAT = Format(
    name="tree",
    about="A message per row, each with the id of the one before it (OASST): a conversation for each last answer.",
    required=("message_id", "role", "text"),
    optional=("parent_id",),
    convert=convert,
    combine=combine,
)

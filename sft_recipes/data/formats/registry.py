"""Find the format of a row among the files of this package, and convert rows to examples."""

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sft_recipes.data.formats.base import Example, Format, Row
from sft_recipes.errors import DataError


def discover() -> dict[str, Format]:
    """Import the files of this package and return the format of each by name."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = (import_module(f"sft_recipes.data.formats.{name}") for name in names if name not in ("base", "registry"))
    return {module.FORMAT.name: module.FORMAT for module in modules}


FORMATS = discover()
COLUMNS = tuple(dict.fromkeys(column for format in FORMATS.values() for column in format.columns))
# Columns that make a row something other than a text to train on, and what to do.
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PAIRS = ("chosen", "rejected")
_TAGS = ("label", "kto_tag")


def find_format(values: Mapping[str, Any], columns: Mapping[str, str], place: str = "") -> str | None:
    """Return the format whose required columns the row has, or None. Raises DataError if several match."""
    found = [format for format in FORMATS.values() if format.matches(values, columns)]
    renamed = [format for format in found if any(name in columns for name in format.columns)]
    filled = [format for format in renamed or found if format.matches(values, columns, filled=True)]
    names = [format.name for format in filled or renamed or found if not format.last]
    if len(names) > 1:
        raise DataError(
            f"{place}: the columns are those of {len(names)} formats (got {' and '.join(names)}). "
            "Set data.format to the one to train on."
        )
    return next(iter(names or [format.name for format in found]), None)


def unknown(values: Mapping[str, Any], columns: Mapping[str, str], place: str) -> str:
    """Return the error message for a row that matches no format."""
    row = Row(place, values, columns)
    for name, column in columns.items():
        if column not in values:
            return f"{place}: column '{column}' is missing, which data.columns maps to '{name}' (got {row.names()})."
    try:
        _refuse_other_tasks(row)
    except DataError as error:
        return str(error)
    *others, last = ("+".join(format.required) for format in FORMATS.values())
    names = ("prompt", "completion") if len(values) < 3 else ("instruction", "input", "output")
    return (
        f"{place}: unrecognized columns {row.names()} (expected {', '.join(others)} or {last}). Map them with "
        f"data.columns, e.g. {{{', '.join(f'{name}: YOUR_COLUMN' for name in names)}}}."
    )


def combined(rows: Iterable[Any], format: str | None, columns: Mapping[str, str]) -> Iterator[Any]:
    """Combine rows, which have `place` and `values`, if the format makes one example of several."""
    combine = FORMATS[format].combine if format else None
    yield from rows if combine is None else combine(rows, columns)


def to_example(values: Mapping[str, Any], format: str, columns: Mapping[str, str], place: str) -> Example:
    """Convert a row. Raises DataError if a column is missing or has the wrong type."""
    row = FORMATS[format].row(values, columns, place)
    example = FORMATS[format].convert(row)
    _refuse_other_tasks(row)
    example.unused = row.unused()
    return example


def _refuse_other_tasks(row: Row) -> None:
    """Raise DataError if a column that was not read makes the row something other than a text to train on."""
    for name in _TAGS:
        tag = str(row.values.get(name)).strip().lower()
        if tag == "false":
            raise row.error(
                f"{name} false marks an answer to avoid (KTO), and fine-tuning would teach it. Remove the rows with {name} "
                "false."
            )
        if tag == "true":
            row.get(name)  # nothing to do: not a column that is not used
    unused = row.unused()
    if media := next((name for name in _MEDIA if name in unused), None):
        raise row.error(f"column '{media}' has content, but runs train on text only. Remove the column, or these rows.")
    if all(name in unused for name in _PAIRS):
        raise row.error(
            "'chosen' and 'rejected' are preference pairs, which DPO trains on: see docs/dpo.md. To train on the "
            "chosen answers only, set data.columns, e.g. {completion: chosen}, or {messages: chosen}."
        )

"""Parse data files to rows with their locations: JSON lines, JSON, CSV, Excel, Parquet and Arrow.

Each parser yields rows and, for invalid ones, the DataError that describes them. What else it finds goes into a ReadReport.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Protocol

from sft_recipes.errors import DataError, reason_of, shown

_SHOWN = 20  # columns listed in a line

_BOM = b"\xef\xbb\xbf"
_SEPARATORS = ",;\t"
_JSON_LIMITS = (
    "JSON exceeds the parser's limits: numbers of thousands of digits or deeply nested brackets. Remove them."
)


class File(Protocol):
    """A local file (pathlib.Path), or one of another file system."""

    @property
    def name(self) -> str: ...
    def open(self, mode: Any) -> Any: ...
    def stat(self) -> Any: ...


@dataclass(slots=True)  # creating a frozen dataclass takes three times as long
class SourceRow:
    """One row and its location, `file:line` (tables: `file:row N`)."""

    place: str
    values: Mapping[str, Any]


@dataclass
class ReadReport:
    """What was found while a source was read, other than its valid rows."""

    notes: list[str] = field(default_factory=list)  # how the files were read
    blank_rows: int = 0  # of tables, left out
    nan_cells: int = 0  # read as empty
    null_keys: int = 0  # rows with null keys in nested objects of a table, left out
    bad_rows: list[str] = field(default_factory=list)  # locations of invalid rows that were dropped
    warnings: list[str] = field(default_factory=list)  # about these rows
    unused: dict[str, int] = field(default_factory=dict)  # columns with content that are not used -> rows
    # Text that looks like a special token and is encoded as characters -> rows, rows that end with it, first location.
    special_text: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def clear(self) -> None:
        vars(self).update(vars(ReadReport()))

    def count_unused(self, columns: Iterable[str]) -> None:
        for column in columns:
            self.unused[column] = self.unused.get(column, 0) + 1

    def count_special_text(self, token: str, place: str, *, ends: bool) -> None:
        rows, ending, first = self.special_text.get(token, (0, 0, place))
        self.special_text[token] = rows + 1, ending + ends, first

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def describe_unused(columns: Mapping[str, int]) -> list[str]:
    """Return a line about columns that are not used, with the number of rows, if there are any."""
    listed = [f"{name} ({rows:,} rows)" for name, rows in islice(columns.items(), _SHOWN)]
    more = [f"{len(columns) - _SHOWN:,} more"] if len(columns) > _SHOWN else []
    return [f"columns not used: {', '.join([*listed, *more])}"] if listed else []


Rows = Iterator[SourceRow | DataError]


def kind_of(file: File) -> str | None:
    """Return the type of a file, a key of PARSERS, from its name; None for other files and hidden ones (`._a.csv`)."""
    name = PurePosixPath(file.name.lower().removesuffix(".gz"))
    return name.suffix if name.suffix in PARSERS and not file.name.startswith(".") else None


def decompressed(file: File, raw: Any) -> Any:
    """Return the content of an open file as a stream."""
    return gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw


@contextmanager
def opened(file: File) -> Iterator[Any]:
    """Open a file to read its content."""
    with file.open("rb") as raw:
        yield decompressed(file, raw)


def count(file: File) -> int | None:
    """Count the rows of a table or JSON file exactly; None for files of lines."""
    kind = kind_of(file)
    if kind not in (".json", ".parquet", ".arrow", ".xlsx"):
        return None
    if kind == ".xlsx":
        return sum(1 for _ in _excel(file, ReadReport()))
    with opened(file) as stream:
        if kind == ".json":
            return len(json.loads(stream.read().decode("utf-8-sig")))
        if kind == ".arrow":
            return sum(int(batch.num_rows) for batch in _arrow_batches(stream))
        from pyarrow import parquet

        return int(parquet.ParquetFile(stream).metadata.num_rows)


# --- JSON --------------------------------------------------------------------------------------------------------------


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return found


_parse = json.JSONDecoder(object_pairs_hook=_object).decode


def _jsonl(file: File, report: ReadReport) -> Rows:
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{file}:{number}"
            if not (line := line.removeprefix(_BOM).strip()):
                continue
            if number == 1 and (line in (b"[", b"{") or line.startswith(b"[{")):
                report.note("one JSON list instead of one object per line")
                yield from _json(file, report)
                return
            try:
                values = _parse(line.decode())
            except UnicodeDecodeError:
                yield DataError(f"{place}: invalid UTF-8. Save the file as UTF-8.")
            except json.JSONDecodeError as error:
                yield DataError(f"{place}:{error.colno}: invalid JSON: {_json_error(error)}.")
            except _DuplicateKeyError as error:
                yield DataError(f"{place}: duplicate key '{error}' in an object. Remove all but one.")
            except (ValueError, RecursionError):
                yield DataError(f"{place}: {_JSON_LIMITS}")
            else:
                yield _row(place, values)


def _json(file: File, _report: ReadReport) -> Rows:
    with opened(file) as stream:
        content = stream.read()
    try:
        rows = _parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: invalid UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            is_list = kind_of(file) == ".json"
            hint = (
                " Rename a file with one object per line to .jsonl."
                if is_list
                else " Write one object per line (jq -c)."
            )
        raise DataError(f"{file}:{error.lineno}:{error.colno}: invalid JSON: {_json_error(error)}.{hint}") from None
    except _DuplicateKeyError as error:
        raise DataError(f"{file}: duplicate key '{error}' in an object. Remove all but one.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{file}: {_JSON_LIMITS}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of objects (got {shown(rows)}). Save the list of rows alone.")
    for number, values in enumerate(rows, start=1):
        yield _row(f"{file}:row {number}", values)


def _row(place: str, values: Any) -> SourceRow | DataError:
    if isinstance(values, dict):
        return SourceRow(place, values)
    return DataError(f"{place}: expected an object with columns (got {shown(values)}).")


def _json_error(error: json.JSONDecodeError) -> str:
    """Return the parser's message without the position, which is part of the row's location."""
    text = error.msg.removesuffix(" at").removesuffix(" starting").rstrip(": ")
    return text[:1].lower() + text[1:]


# --- Tables of text ----------------------------------------------------------------------------------------------------


def _csv(file: File, report: ReadReport) -> Rows:
    csv.field_size_limit(1 << 30)  # the default, 128 KiB per field, is shorter than a long document
    with opened(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        line = 0
        try:
            header = text.readline()
            separator = "\t" if kind_of(file) == ".tsv" else _separator(header)
            if separator != ",":
                report.note("separated by tabs" if separator == "\t" else "separated by semicolons")
            reader = csv.reader(_chained(header, text), strict=True, delimiter=separator)
            names = next(reader, [])
            _check_header(file, names)
            line = reader.line_num
            for fields in reader:
                line = reader.line_num
                if len(fields) not in (0, len(names)) and any(map(str.strip, fields)):
                    yield DataError(f"{file}:{line}: number of fields differs from the header (expected {len(names)}).")
                elif fields and (row := _cells(f"{file}:{line}", names, fields, report)):
                    yield row
        except UnicodeDecodeError:
            raise DataError(f"{file}:{line + 1} or later: invalid UTF-8. Save the file as UTF-8.") from None
        except csv.Error as error:
            raise DataError(f"{file}:{line + 1} or later: invalid CSV: {error}.") from None


def _separator(header: str) -> str:
    try:
        return csv.Sniffer().sniff(header, delimiters=_SEPARATORS).delimiter
    except csv.Error:  # one column
        return ","


def _chained(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _excel(file: File, report: ReadReport) -> Rows:
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f"{file}: Excel files require a package that is not installed. Run pip install 'sft-recipes[excel]'."
        ) from None
    with opened(file) as stream:
        try:
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
        except Exception as error:  # zipfile's, XML's and openpyxl's own
            raise DataError(f"{file}: invalid Excel file: {reason_of(error)}. Save it again as .xlsx.") from None
        sheet, *others = book.worksheets
        if others:
            report.note(f"only sheet '{sheet.title}' is read, not {', '.join(repr(other.title) for other in others)}")
        lines = sheet.iter_rows(values_only=True)
        header = ["" if name is None else str(name) for name in next(lines, ())]
        used = [number for number, name in enumerate(header) if name]
        names = [header[number] for number in used]
        _check_header(file, names)
        for line, cells in enumerate(lines, start=2):
            fields = [_as_text(cells[number]) if number < len(cells) else "" for number in used]
            if row := _cells(f"{file}:row {line}", names, fields, report):
                yield row


def _as_text(cell: Any) -> Any:
    """Return empty cells and numbers as text; dates and truth values, whose text is a matter of format, as they are."""
    return "" if cell is None else str(cell) if isinstance(cell, (int, float)) and not isinstance(cell, bool) else cell


def _check_header(file: File, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{file}:1: duplicate column in the header (got {', '.join(map(repr, names))}).")


def _cells(place: str, names: list[str], fields: list[Any], report: ReadReport) -> SourceRow | None:
    """Return a row of a table of text, in which `nan` is what pandas writes for an empty cell; None if all are blank."""
    if "nan" in fields or "NaN" in fields:
        report.nan_cells += sum(cell in ("nan", "NaN") for cell in fields)
        fields = ["" if cell in ("nan", "NaN") else cell for cell in fields]
    if not any(str(cell).strip() for cell in fields):
        report.blank_rows += 1
        return None
    return SourceRow(place, dict(zip(names, fields, strict=True)))


# --- Parquet and Arrow -------------------------------------------------------------------------------------------------


def _parquet(file: File, report: ReadReport) -> Rows:
    from pyarrow import parquet

    return _batches(file, report, "Parquet", lambda stream: parquet.ParquetFile(stream).iter_batches())


def _arrow(file: File, report: ReadReport) -> Rows:
    return _batches(file, report, "Arrow", _arrow_batches)


def _arrow_batches(stream: Any) -> Iterator[Any]:
    from pyarrow import ipc

    if stream.read(6) == b"ARROW1":
        reader = ipc.open_file(stream)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    stream.seek(0)
    return iter(ipc.open_stream(stream))  # as datasets writes them


def _batches(file: File, report: ReadReport, name: str, read: Callable[[Any], Iterable[Any]]) -> Rows:
    import pyarrow

    number = 0
    try:
        with opened(file) as stream:
            for batch in read(stream):
                for values in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield SourceRow(f"{file}:row {number}", table_row(values, report))
    except UnicodeDecodeError:
        raise DataError(f"{file}:row {number + 1} or later: invalid UTF-8. Write the file again as UTF-8.") from None
    except (pyarrow.ArrowException, ArithmeticError, KeyError, ValueError) as error:  # also for dates out of range
        raise DataError(f"{file}: invalid {name} file: {reason_of(error)}. Download it again.") from None


def table_row(values: Mapping[str, Any], report: ReadReport) -> dict[str, Any]:
    """Remove NaN, and the nulls that Arrow adds to nested objects for keys that occur only in other rows."""
    before = report.null_keys
    row = {
        name: _without_nulls(value, report, 0) if isinstance(value, (list, dict)) else value
        for name, value in _without_nan(values, report).items()
    }
    report.null_keys = min(report.null_keys, before + 1)  # rows, not keys
    return row


def _without_nulls(value: Any, report: ReadReport, depth: int) -> Any:
    if isinstance(value, dict):
        # Null keys of the outermost object, such as a message's tool_calls, mean the same as missing ones.
        report.null_keys += depth > 0 and None in value.values()
        return {key: _without_nulls(inner, report, depth + 1) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner, report, depth) for inner in value] if isinstance(value, list) else value


def _without_nan(values: Mapping[str, Any], report: ReadReport) -> Mapping[str, Any]:
    """Replace float NaN, which pandas writes for missing values, by null."""
    nan = [name for name, value in values.items() if isinstance(value, float) and value != value]
    report.nan_cells += len(nan)
    return {**values, **dict.fromkeys(nan)} if nan else values


PARSERS: Mapping[str, Callable[[File, ReadReport], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".xlsx": _excel,
}

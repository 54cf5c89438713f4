"""Read sources and convert rows to examples."""

import re
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from sft_recipes.data import sources
from sft_recipes.data.formats import registry as formats
from sft_recipes.data.formats.base import Example
from sft_recipes.data.parsers import ReadReport, SourceRow
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data, Source, WeightedSource

_SHOWN = 20  # problems that are listed; the rest are counted
_PER_KIND = 3  # of the same kind
_HOPELESS = 20  # invalid rows without a valid one before them: the others are likely invalid, too


def train_sources(data: Data) -> list[WeightedSource]:
    """Return the sources of training rows."""
    listed = [data.train] if isinstance(data.train, str) else data.train
    return [WeightedSource(path=source) if isinstance(source, str) else source for source in listed]


def eval_sources(data: Data) -> list[Source]:
    """Return the sources of evaluation rows; none if those are held out of the training rows."""
    if isinstance(data.eval, str):
        return [Source(path=data.eval)]
    return [data.eval] if isinstance(data.eval, Source) else []


def every_source(data: Data) -> list[Source]:
    """Return the sources of training and evaluation rows."""
    return [*train_sources(data), *eval_sources(data)]


def with_splits(data: Data) -> list[tuple[Source, tuple[str, ...]]]:
    """Return every source with the splits to look for if it is a Hub dataset."""
    train: list[Source] = list(train_sources(data))
    defaults = [(train, sources.TRAIN), (eval_sources(data), sources.HELD_OUT)]
    return [(source, (source.split,) if source.split else splits) for listed, splits in defaults for source in listed]


class Problems:
    """Problems of rows by kind: the first lines of each, and how many rows have it."""

    def __init__(self) -> None:
        self.rows = 0  # read so far, valid or not
        self.stopped = False  # before the last row
        self._kinds: dict[str, tuple[list[str], int]] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __len__(self) -> int:
        return sum(count for _, count in self._kinds.values())

    def add(self, error: DataError) -> None:
        """Add the lines of an error, one for each row."""
        for line in error.lines:
            kind = re.sub(r"\(got .*\)|\d+", "", line.partition(": ")[2])  # without location and values
            first, count = self._kinds.get(kind, ([], 0))
            self._kinds[kind] = [*first, line][:_PER_KIND], count + 1

    def lines(self) -> list[str]:
        """Return at most three lines for each kind of problem, the first with the number of rows that have it."""
        listed = []
        for first, count in self._kinds.values():
            if count == 1:
                listed += first
            elif count == self.rows:
                listed.append(f"{first[0]} This affects all {'of the first ' if self.stopped else ''}{count:,} rows.")
            else:
                among = f" of {self.rows:,}" if self.rows else ""
                listed += [f"{first[0]} This affects {count:,}{among} rows.", *first[1:]]
        return listed


class RowReader:
    """Iterable over the valid examples of one source; `problems` and `report` describe what else was read."""

    def __init__(self, source: Source, data: Data, splits: tuple[str, ...]) -> None:
        self.source, self.splits = source, splits
        self.columns = {**data.columns, **source.columns}
        self.format: str | None = source.format or data.format  # None until the first row is read
        self.separator = data.input_separator
        self.drops = data.on_bad_row == "drop"
        self.problems, self.report = Problems(), ReadReport()

    def __iter__(self) -> Iterator[Example]:
        self.problems = Problems()
        self.report.clear()
        any_valid = False
        for row in self._rows(self.report):
            self.problems.rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                if self.format is None:
                    raise DataError(formats.unknown(row.values, self.columns, row.place))
                example = formats.to_example(row.values, self.format, self.columns, row.place)
                join_input(example.messages, self.separator)
            except DataError as error:
                self.reject(error)
                if not any_valid and not self.drops and len(self.problems) >= _HOPELESS:
                    self.problems.stopped = True
                    return
            else:
                any_valid = True
                self.report.count_unused(example.unused)
                yield example
        if not self.problems.rows:
            raise DataError(f"{self.source.path}: the source contains no rows.")

    def reject(self, error: DataError) -> None:
        """Record an invalid row, whose location the error begins with."""
        self.problems.add(error)
        if self.drops:
            self.report.bad_rows += [line.partition(": ")[0] for line in error.lines]

    @property
    def failed(self) -> bool:
        """Return True if a row is invalid and must not be dropped."""
        return bool(self.problems) and not self.drops

    def finish(self) -> None:
        """Raise DataError with the problems of the rows; if these are dropped, warn instead."""
        lines = self.problems.lines()
        if lines and (not self.drops or len(self.problems) >= self.problems.rows):
            raise DataError(*lines)
        self.report.warnings = [f"data.on_bad_row: dropped {line}" for line in lines]

    def places(self, numbers: Collection[int]) -> dict[int, str]:
        """Return `file:line` of valid rows, numbered from 0."""
        bad = set(self.report.bad_rows)
        rows = (row for row in self._rows() if isinstance(row, SourceRow) and row.place not in bad)
        return {n: row.place for n, row in enumerate(islice(rows, max(numbers) + 1)) if n in numbers}

    def _rows(self, report: ReadReport | None = None) -> Iterator[SourceRow | DataError]:
        """Yield the rows, after detecting the format from the first one; several are one row if the format says so."""
        rows = sources.iter_rows(self.source.path, self.source.name, self.splits, report)
        head = list[SourceRow | DataError]()
        for row in rows:
            head.append(row)
            if isinstance(row, SourceRow):
                self.format = self.format or formats.find_format(row.values, self.columns, row.place)
                break
        yield from formats.combined(chain(head, rows), self.format, self.columns)


def join_input(messages: list[dict[str, Any]], separator: str | None) -> None:
    """Join instruction and input of Alpaca rows, unless that is left to the template."""
    for message in messages if separator is not None else ():
        if given := message.pop("input", ""):
            message["content"] += separator + given


def open_all(data: Data) -> list[tuple[RowReader, Example]]:
    """Open every source and detect its format from its first example, which is returned too."""
    opened = []
    problems: list[str] = []
    for source, splits in with_splits(data):
        rows = RowReader(source, data, splits)
        try:
            first = next(iter(rows), None)
        except DataError as error:
            problems += error.lines
            continue
        if first is None:
            problems += rows.problems.lines()
        else:
            opened.append((RowReader(source, data, splits), first))
            opened[-1][0].format = rows.format
    used = {name for rows, _ in opened for name in formats.FORMATS[rows.format or ""].columns}
    # Names that no format has are reported by the validation of the recipe.
    if opened and (unused := [name for name in data.columns if name in set(formats.COLUMNS) - used]):
        detected = " and ".join(sorted({rows.format or "" for rows, _ in opened}))
        problems.append(
            f"data.columns: '{unused[0]}' is not a column of the format of any source (got {detected}). "
            "Remove it, or set data.format."
        )
    raise_all(problems)
    return opened


def look_through(source: Source, data: Data, seconds: float) -> tuple[int, int, ReadReport]:
    """Read rows for at most `seconds`; returns the rows read, the approximate total and the report. Raises DataError."""
    rows, deadline = RowReader(source, data, sources.TRAIN), time.monotonic() + seconds
    number, cut_short = 0, False
    for _ in rows:
        number += 1
        if cut_short := time.monotonic() > deadline:
            rows.problems.stopped = True
            break
    rows.finish()
    return number, max(number, sources.count(source.path)) if cut_short else number, rows.report


def raise_all(problems: Sequence[str]) -> None:
    """Raise DataError with the first problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN:,} more problems."] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)

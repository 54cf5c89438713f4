"""Read sources and convert rows to examples."""

import time
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice

from sft_recipes.data import sources
from sft_recipes.data.formats import registry as formats
from sft_recipes.data.formats.base import Example
from sft_recipes.data.sources import SourceRow
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data, Source, WeightedSource

_SHOWN = 20  # problems that are listed; the rest are counted


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


class RowReader:
    """Iterable over the valid examples of one source; afterwards `problems` describes the invalid rows."""

    def __init__(self, source: Source, data: Data, splits: tuple[str, ...]) -> None:
        self.source, self.splits = source, splits
        self.columns = {**data.columns, **source.columns}
        self.format: str | None = source.format or data.format  # None until the first row is read
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Example]:
        empty, any_valid = True, False
        for row in self._rows():
            empty = False
            try:
                if isinstance(row, DataError):
                    raise row
                if self.format is None:
                    self.problems.append(formats.unknown(row.values, self.columns, row.place))
                    return
                example = formats.to_example(row.values, self.format, self.columns, row.place)
            except DataError as error:
                self.problems += error.lines
                if not any_valid and len(self.problems) >= _SHOWN:
                    return  # the other rows are likely invalid too
            else:
                any_valid = True
                yield example
        if empty:
            raise DataError(f"{self.source.path}: the source contains no rows.")

    def _rows(self) -> Iterator[SourceRow | DataError]:
        """Yield the rows, after detecting the format from the first one; several are one row if the format says so."""
        rows = sources.iter_rows(self.source.path, self.source.name, self.splits)
        head = list[SourceRow | DataError]()
        for row in rows:
            head.append(row)
            if isinstance(row, SourceRow):
                self.format = self.format or formats.find_format(row.values, self.columns, row.place)
                break
        yield from formats.combined(chain(head, rows), self.format, self.columns)

    def places(self, numbers: Collection[int]) -> dict[int, str]:
        """Return `file:line` of rows, numbered from 0."""
        rows = islice(self._rows(), max(numbers) + 1)
        return {n: row.place for n, row in enumerate(rows) if n in numbers and isinstance(row, SourceRow)}


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
            problems += rows.problems
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


def read_examples(source: Source, data: Data) -> list[Example]:
    """Return all examples of a source. Raises DataError with one line for each of the first invalid rows."""
    rows = RowReader(source, data, sources.TRAIN)
    examples = list(rows)
    raise_all(rows.problems)
    return examples


def look_through(source: Source, data: Data, seconds: float) -> tuple[int, int]:
    """Read rows for at most `seconds`; returns the rows read and the approximate total. Raises DataError."""
    rows, deadline = RowReader(source, data, sources.TRAIN), time.monotonic() + seconds
    number, cut_short = 0, False
    for _ in rows:
        number += 1
        if cut_short := time.monotonic() > deadline:
            break
    raise_all(rows.problems)
    return number, max(number, sources.count(source.path)) if cut_short else number


def raise_all(problems: Sequence[str]) -> None:
    """Raise DataError with the first problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN:,} more rows with errors."] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)

"""Sources opened, and their rows as examples: what is trained on, before it is text."""

import time
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from sft_recipes.data import formats, sources
from sft_recipes.data.formats import Example
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data, Source, WeightedSource

_SHOWN = 20  # problems of the data that are listed; the rest are counted


def train_sources(data: Data) -> list[WeightedSource]:
    """The sources of training rows."""
    listed = [data.train] if isinstance(data.train, str) else data.train
    return [WeightedSource(path=source) if isinstance(source, str) else source for source in listed]


def eval_sources(data: Data) -> list[Source]:
    """The source of validation rows; none where they are set aside from the training rows."""
    if isinstance(data.eval, str):
        return [Source(path=data.eval)]
    return [data.eval] if isinstance(data.eval, Source) else []


def every_source(data: Data) -> list[Source]:
    """The sources of training and validation rows."""
    return [*train_sources(data), *eval_sources(data)]


def with_splits(data: Data) -> list[tuple[Source, tuple[str, ...]]]:
    """Every source with the splits of a hub data set that are meant by it."""
    train: list[Source] = list(train_sources(data))
    usual = [(train, sources.TRAIN), (eval_sources(data), sources.HELD_OUT)]
    return [(source, (source.split,) if source.split else splits) for listed, splits in usual for source in listed]


class Rows:
    """The examples of one source. What is wrong with the other rows is found in `problems` afterwards."""

    def __init__(self, source: Source, data: Data, splits: tuple[str, ...]) -> None:
        self.source, self.splits = source, splits
        self.columns = {**data.columns, **source.columns}
        self.format: str | None = source.format or data.format  # None until the first row is read
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Example]:
        nothing, good = True, False
        for row in sources.read(self.source.path, self.source.name, self.splits):
            nothing = False
            try:
                if isinstance(row, DataError):
                    raise row
                if self.format is None:
                    self.format = formats.find_format(row.values, self.columns)
                if self.format is None:
                    self.problems.append(formats.unknown(row.values, self.columns, row.place))
                    return
                example = formats.to_example(row.values, self.format, self.columns, row.place)
            except DataError as error:
                self.problems += error.lines
                if not good and len(self.problems) >= _SHOWN:
                    return  # the others will be no better
            else:
                good = True
                yield example
        if nothing:
            raise DataError(f"{self.source.path}: no rows")

    def places(self, numbers: Collection[int]) -> dict[int, str]:
        """`file:line` of examples, counted from 0."""
        rows = islice(sources.read(self.source.path, self.source.name, self.splits), max(numbers) + 1)
        return {n: row.place for n, row in enumerate(rows) if n in numbers and isinstance(row, sources.Row)}


def open_all(data: Data) -> list[tuple[Rows, Example]]:
    """Every source with its first example, by which its format is known."""
    opened = []
    problems: list[str] = []
    for source, splits in with_splits(data):
        rows = Rows(source, data, splits)
        try:
            first = next(iter(rows), None)
        except DataError as error:
            problems += error.lines
            continue
        if first is None:
            problems += rows.problems
        else:
            opened.append((Rows(source, data, splits), first))
            opened[-1][0].format = rows.format
    used = {name for rows, _ in opened for name in formats.columns_of(rows.format or "")}
    known = {
        name for format in formats.NEEDS for name in formats.columns_of(format)
    }  # of others, the recipe's check tells
    if opened and (unused := [name for name in data.columns if name in known - used]):
        found = " and ".join(sorted({rows.format or "" for rows, _ in opened}))
        problems.append(f"data.columns: no source has use for '{unused[0]}': the rows were read as {found}")
    raise_all(problems)
    return opened


def read(source: Source, data: Data) -> list[Example]:
    """Examples of one source. Raises DataError with a line for each of the first rows that cannot be read."""
    rows = Rows(source, data, sources.TRAIN)
    examples = list(rows)
    raise_all(rows.problems)
    return examples


def look_through(source: Source, data: Data, seconds: float) -> tuple[int, int]:
    """How many rows of a source can be read in that time, and about how many there are. Raises DataError as `read`."""
    rows, deadline = Rows(source, data, sources.TRAIN), time.monotonic() + seconds
    number, cut_short = 0, False
    for _ in rows:
        number += 1
        if cut_short := time.monotonic() > deadline:
            break
    raise_all(rows.problems)
    return number, max(number, sources.count(source.path)) if cut_short else number


def raise_all(problems: Sequence[str]) -> None:
    """Raise DataError with the first of the problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN:,} more rows like these"] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)

"""Rows of every source as documents of token ids, from the cache or anew."""

import datetime
import gc
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from tokenizers import Encoding

from sft_recipes.data import cache, sources
from sft_recipes.data.formats import Example
from sft_recipes.data.reading import Rows, raise_all
from sft_recipes.data.templates import Rendered, Template
from sft_recipes.data.tokens import Documents, Encoder, LightTokenizer
from sft_recipes.data.ways import Way
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data

_BATCH = 500  # rows that are tokenised at once


@dataclass(frozen=True)
class Tokenised:
    """One source as token ids, as far as it was read."""

    rows: Rows
    way: Way
    first: Example
    documents: Documents
    total: int  # rows there are


def tokenise_all(
    opened: Sequence[tuple[Rows, Example]],
    data: Data,
    ways: Mapping[str, Way],
    encoder: Encoder,
    tokenizer: LightTokenizer,
    *,
    cached: bool,
    seconds: float | None,
) -> list[Tokenised]:
    """Every opened source as documents. Raises DataError with the problems of all their rows.

    `cached` takes them from the cache, and puts them there; `seconds` ends the work on each source after that time.
    """
    tokenised = []
    problems: list[str] = []
    of_tokenizer = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest() if cached else ""
    for rows, first in opened:
        assert rows.format is not None
        way, source = ways[rows.format], rows.source
        name = None
        if cached:
            written = way.chat_source or ""
            name = cache.key(
                content=sources.fingerprint(source.path, source.name, rows.splits), path=source.path, format=rows.format,
                columns=rows.columns, way=way.name, template=written, train_on=data.train_on, tokenizer=of_tokenizer,
                specials=dict(tokenizer.specials), day=str(datetime.date.today()) if "strftime_now" in written else "",
            )  # fmt: skip
        work = Work(rows, way.render, encoder, seconds)
        try:
            with _no_garbage_collection():
                documents = cache.stored(name, work.batches, lambda work=work: not work.cut_short)  # type: ignore[misc]
        except DataError as error:
            problems += error.lines
            continue
        total = sources.count(source.path, source.name, rows.splits) if work.cut_short else len(documents)
        tokenised.append(Tokenised(rows, way, first, documents, total))
    raise_all(problems)
    return tokenised


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows hold no cycles; the collector would look through all that is imported each time so many of them are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Work:
    """Tokenises the rows of a source, as long as there is time."""

    def __init__(self, rows: Rows, render: Template, encoder: Encoder, seconds: float | None) -> None:
        self.rows, self.render, self.encoder = rows, render, encoder
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.cut_short = False

    def batches(self) -> Iterator[Documents]:
        """Documents of some hundred rows at a time; while one batch is tokenised, others are read and put together.

        Raises DataError with everything that is wrong with the rows.
        """
        problems: list[str] = []
        examples = iter(self.rows)
        waiting: tuple[list[Rendered], Future[list[Encoding]]] | None = None
        with ThreadPoolExecutor(1) as pool:
            while batch := list(islice(examples, _BATCH)):
                rendered = []
                for example in batch:
                    try:
                        rendered.append(self.render(example))
                    except DataError as error:
                        problems += error.lines
                # With a problem nothing will come of it; what else is wrong is still worth knowing.
                if not problems and not self.rows.problems:
                    tokenising = pool.submit(self.encoder.tokenise, rendered)
                    if waiting is not None:
                        yield self.encoder.documents(waiting[0], waiting[1].result())
                    waiting = rendered, tokenising
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self.cut_short = next(examples, None) is not None
                    break
            if self.rows.problems or problems:
                raise DataError(*self.rows.problems, *problems)
            if waiting is not None:
                yield self.encoder.documents(waiting[0], waiting[1].result())

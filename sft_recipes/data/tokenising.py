"""Rows of every source as documents of token ids, from the cache or anew."""

import ctypes
import datetime
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from tokenizers import Encoding

from sft_recipes.data import cache, sources
from sft_recipes.data.formats import Example
from sft_recipes.data.reading import Rows, raise_all
from sft_recipes.data.templates import Rendered, Template
from sft_recipes.data.tokens import Documents, Encoder, LightTokenizer
from sft_recipes.data.ways import Way
from sft_recipes.errors import DataError, RunError
from sft_recipes.recipe.schema import Data

_BATCH = 500  # rows that are tokenised at once, or
_CHARACTERS = 2_000_000  # as many as have these
# Threads within one tokenizer are the faster way on few cores (benchmarks/data_prep.py); on many they wait for each other
# (huggingface/tokenizers#1900) and for Python, which renders the rows. Then each process has a tokenizer of its own.
_CORES_FOR_PROCESSES = 8
_BATCHES_FOR_PROCESSES = 8  # a source with fewer is done before they have started

Sent = Future[
    tuple[Documents | None, list[str]]
]  # to a process: the documents of a batch, and what is wrong with its rows


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
        before = sources.state(source.path)  # what changes while it is read is not kept under the old name
        name = None
        # A look at the data that is bounded in time has none to hash a large file.
        if cached and (seconds is None or sum(size for size, _ in before) <= sources.QUICK):
            written = way.chat_source or ""
            name = cache.key(
                content=sources.fingerprint(source.path, source.name, rows.splits), path=source.path, format=rows.format,
                columns=rows.columns, way=way.name, template=written, train_on=data.train_on, tokenizer=of_tokenizer,
                specials=dict(tokenizer.specials), day=str(datetime.date.today()) if "strftime_now" in written else "",
            )  # fmt: skip
        work = Work(rows, way.render, encoder, seconds)

        def complete(work: Work = work, before: object = before) -> bool:
            return not work.cut_short and sources.state(work.rows.source.path) == before

        try:
            with _no_garbage_collection():
                documents = cache.stored(name, work.batches, complete)
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
        self.read = 0
        self.problems: list[str] = []

    def batches(self) -> Iterator[Documents]:
        """Documents of some hundred rows at a time. Raises DataError with everything that is wrong with the rows."""
        examples = self._examples()
        if self.deadline is not None or (processes := _processes()) < 2:
            yield from self._by_threads(examples)
        elif len(first := list(islice(examples, _BATCHES_FOR_PROCESSES))) < _BATCHES_FOR_PROCESSES:
            yield from self._by_threads(first)
        else:
            yield from self._by_processes(chain(first, examples), processes)
        if (
            self.read > 1
            and len(self.problems) == self.read
            and len({line.partition(": ")[2] for line in self.problems}) == 1
        ):
            self.problems = [f"{self.problems[0]} (and so all {self.read:,} rows)"]  # one fault, and none of the rows'
        if self.rows.problems or self.problems:
            raise DataError(*self.rows.problems, *self.problems)

    def _examples(self) -> Iterator[list[Example]]:
        """Batches of rows, as long as there is time."""
        examples, batch, characters = iter(self.rows), list[Example](), 0
        for example in examples:
            self.read += 1
            batch.append(example)
            characters += _characters(example)
            if len(batch) == _BATCH or characters > _CHARACTERS:
                yield batch
                batch, characters = [], 0
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self.cut_short = next(examples, None) is not None
                    return
        if batch:
            yield batch

    @property
    def _good(self) -> bool:
        """With a problem nothing will come of it; what else is wrong is still worth knowing."""
        return not self.problems and not self.rows.problems

    def _by_threads(self, batches: Iterable[list[Example]]) -> Iterator[Documents]:
        """While one batch is tokenised, in Rust and on every core, others are read and put together."""
        waiting: tuple[list[Rendered], Future[list[Encoding]]] | None = None
        with ThreadPoolExecutor(1) as pool:
            for batch in batches:
                rendered, wrong = _rendered(batch, self.render)
                self.problems += wrong
                if self._good:
                    tokenising = pool.submit(self.encoder.tokenise, rendered)
                    yield from self._put_together(waiting)
                    waiting = rendered, tokenising
            if self._good:
                yield from self._put_together(waiting)

    def _put_together(self, waiting: tuple[list[Rendered], Future[list[Encoding]]] | None) -> Iterator[Documents]:
        if waiting is not None:
            try:
                yield self.encoder.documents(waiting[0], waiting[1].result())
            except DataError as error:
                self.problems += error.lines

    def _by_processes(self, batches: Iterable[list[Example]], processes: int) -> Iterator[Documents]:
        """Each batch is rendered, tokenised and put together in one of the processes; they end with this one."""
        waiting: deque[tuple[list[Example], Sent]] = deque()
        _OF_WORKER.update(render=self.render, encoder=self.encoder)
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _set_up_worker) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(_in_worker, batch)))
                if len(waiting) > 2 * processes:
                    yield from self._received(waiting)
            while waiting:
                yield from self._received(waiting)

    def _received(self, waiting: deque[tuple[list[Example], Sent]]) -> Iterator[Documents]:
        """What the first batch has become."""
        try:
            documents, wrong = waiting[0][1].result()
        except BrokenProcessPool as error:
            rows = [row for batch, sent in waiting if not sent.done() or sent.exception() for row in batch]
            longest = max(rows, key=_characters)
            raise RunError(
                f"{longest.place}: a process that tokenised the rows from {rows[0].place} to {rows[-1].place} was killed, "
                f"most likely because memory ran out; this is the longest of them, with {_characters(longest):,} characters"
            ) from error
        waiting.popleft()
        self.problems += wrong
        if documents is not None and self._good:
            yield documents


def _characters(example: Example) -> int:
    return len(example.text) + sum(len(message["content"]) for message in example.messages)


def _processes() -> int:
    """How many processes tokenise: 1 where threads do it."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere forking is not safe
    return cores if cores >= _CORES_FOR_PROCESSES else 1


_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
_OF_WORKER: dict[str, Any] = {}  # template and encoder, which a process has from birth: they cannot be sent


def _set_up_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive forking
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also where the parent is killed


def _in_worker(batch: list[Example]) -> tuple[Documents | None, list[str]]:
    rendered, wrong = _rendered(batch, _OF_WORKER["render"])
    try:
        return (None, wrong) if wrong else (_OF_WORKER["encoder"].encode(rendered), [])
    except DataError as error:
        return None, list(error.lines)


def _rendered(batch: list[Example], render: Template) -> tuple[list[Rendered], list[str]]:
    """The texts of rows, and what is wrong with the others."""
    rendered: list[Rendered] = []
    wrong: list[str] = []
    for example in batch:
        try:
            rendered.append(render(example))
        except DataError as error:
            wrong += error.lines
    return rendered, wrong

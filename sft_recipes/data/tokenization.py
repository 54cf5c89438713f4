"""Tokenize all sources in threads or processes, using the cache."""

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
from sft_recipes.data.encoder import Documents, Encoder, LightTokenizer, alike
from sft_recipes.data.formats.base import Example
from sft_recipes.data.readers import RowReader, raise_all
from sft_recipes.data.renderers import Renderer
from sft_recipes.data.templates import Rendered, Template
from sft_recipes.errors import DataError, RunError
from sft_recipes.recipe.schema import Data

_BATCH = 500  # rows per batch, unless they exceed
_CHARACTERS = 2_000_000  # this many characters
# The threads of one tokenizer are faster on few cores (benchmarks/data_prep.py). On many cores they wait for each other
# (huggingface/tokenizers#1900) and for Python rendering the rows, so each process gets its own tokenizer.
_CORES_FOR_PROCESSES = 8
_BATCHES_FOR_PROCESSES = 8  # a source with fewer batches is done before the processes have started

BatchResult = Future[tuple[Documents | None, list[str]]]  # documents of a batch, and problems of its rows


@dataclass(frozen=True)
class TokenizedSource:
    """One tokenized source, as far as it was read."""

    rows: RowReader
    renderer: Renderer
    first: Example
    documents: Documents
    total: int  # rows of the source, approximate if not all were read


def tokenize_all(
    opened: Sequence[tuple[RowReader, Example]],
    data: Data,
    renderers: Mapping[str, Renderer],
    encoder: Encoder,
    tokenizer: LightTokenizer,
    *,
    cached: bool,
    seconds: float | None,
) -> list[TokenizedSource]:
    """Tokenize every opened source. Raises DataError with the problems of all rows.

    `cached` reads and writes the cache; `seconds` is a time limit per source.
    """
    tokenized = []
    problems: list[str] = []
    tokenizer_hash = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest() if cached else ""
    for rows, first in opened:
        assert rows.format is not None
        renderer, source = renderers[rows.format], rows.source
        before = sources.state(source.path)  # a source that changes while it is read is not cached
        name = None
        # With a time limit, there is no time to hash a large file.
        if cached and (seconds is None or sum(size for size, _ in before) <= sources.QUICK):
            template = renderer.chat_source or ""
            name = cache.key(
                content=sources.fingerprint(source.path, source.name, rows.splits), path=source.path, format=rows.format,
                columns=rows.columns, renderer=renderer.name, template=template, train_on=data.train_on,
                tokenizer=tokenizer_hash, specials=dict(tokenizer.specials),
                day=str(datetime.date.today()) if "strftime_now" in template else "",
            )  # fmt: skip
        work = Work(rows, renderer.render, encoder, seconds)

        def complete(work: Work = work, before: object = before) -> bool:
            return not work.cut_short and sources.state(work.rows.source.path) == before

        try:
            with _no_garbage_collection():
                documents = cache.stored(name, work.batches, complete)
        except DataError as error:
            problems += error.lines
            continue
        total = sources.count(source.path, source.name, rows.splits) if work.cut_short else len(documents)
        tokenized.append(TokenizedSource(rows, renderer, first, documents, total))
    raise_all(problems)
    return tokenized


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector, which would repeatedly scan all objects; rows have no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Work:
    """Tokenization of the rows of one source, within an optional time limit."""

    def __init__(self, rows: RowReader, render: Template, encoder: Encoder, seconds: float | None) -> None:
        self.rows, self.render, self.encoder = rows, render, encoder
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.cut_short = False
        self.read = 0
        self.problems: list[str] = []

    def batches(self) -> Iterator[Documents]:
        """Yield the documents of batches of rows. Raises DataError with the problems of all rows."""
        examples = self._examples()
        if self.deadline is not None or (processes := _processes()) < 2:
            yield from self._by_threads(examples)
        elif len(first := list(islice(examples, _BATCHES_FOR_PROCESSES))) < _BATCHES_FOR_PROCESSES:
            yield from self._by_threads(first)
        else:
            yield from self._by_processes(chain(first, examples), processes)
        distinct = {line.partition(": ")[2] for line in self.problems}
        if 1 < self.read == len(self.problems) and len(distinct) == 1:
            self.problems = [f"{self.problems[0]} This affects all {self.read:,} rows."]
        if self.rows.problems or self.problems:
            raise DataError(*self.rows.problems, *self.problems)

    def _examples(self) -> Iterator[list[Example]]:
        """Yield batches of rows until the time limit."""
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
    def _valid(self) -> bool:
        """Return True if there are no problems so far. Otherwise rows are still checked, but not tokenized."""
        return not self.problems and not self.rows.problems

    def _by_threads(self, batches: Iterable[list[Example]]) -> Iterator[Documents]:
        """Read and assemble batches while another one is tokenized by Rust on all cores."""
        waiting: tuple[list[Rendered], Future[list[Encoding]]] | None = None
        with ThreadPoolExecutor(1) as pool:
            for batch in batches:
                rendered, problems = _render_all(batch, self.render)
                self.problems += problems
                for part in alike(rendered) if self._valid else []:
                    tokenizing = pool.submit(self.encoder.tokenize, part)
                    yield from self._assemble(waiting)
                    waiting = part, tokenizing
            if self._valid:
                yield from self._assemble(waiting)

    def _assemble(self, waiting: tuple[list[Rendered], Future[list[Encoding]]] | None) -> Iterator[Documents]:
        if waiting is not None:
            try:
                yield self.encoder.documents(waiting[0], waiting[1].result())
            except DataError as error:
                self.problems += error.lines

    def _by_processes(self, batches: Iterable[list[Example]], processes: int) -> Iterator[Documents]:
        """Render and tokenize each batch in one of several processes, which end with this one."""
        waiting: deque[tuple[list[Example], BatchResult]] = deque()
        _WORKER.update(render=self.render, encoder=self.encoder)
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _set_up_worker) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(_in_worker, batch)))
                if len(waiting) > 2 * processes:
                    yield from self._received(waiting)
            while waiting:
                yield from self._received(waiting)

    def _received(self, waiting: deque[tuple[list[Example], BatchResult]]) -> Iterator[Documents]:
        """Wait for the first batch and yield its documents."""
        try:
            documents, problems = waiting[0][1].result()
        except BrokenProcessPool as error:
            rows = [row for batch, result in waiting if not result.done() or result.exception() for row in batch]
            longest = max(rows, key=_characters)
            raise RunError(
                f"{longest.place}: a process that tokenized rows {rows[0].place} to {rows[-1].place} was killed, most likely "
                f"because memory ran out. This row is the longest of them ({_characters(longest):,} characters). Shorten or "
                "remove it."
            ) from error
        waiting.popleft()
        self.problems += problems
        if documents is not None and self._valid:
            yield documents


def _characters(example: Example) -> int:
    return len(example.text) + sum(len(message["content"]) for message in example.messages)


def _processes() -> int:
    """Return the number of processes to tokenize with; 1 means threads."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # fork is unsafe on other systems
    return cores if cores >= _CORES_FOR_PROCESSES else 1


_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
_WORKER: dict[str, Any] = {}  # template and encoder, inherited by fork because they cannot be pickled


def _set_up_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # in case the parent is killed


def _in_worker(batch: list[Example]) -> tuple[Documents | None, list[str]]:
    rendered, problems = _render_all(batch, _WORKER["render"])
    try:
        return (None, problems) if problems else (_WORKER["encoder"].encode(rendered), [])
    except DataError as error:
        return None, list(error.lines)


def _render_all(batch: list[Example], render: Template) -> tuple[list[Rendered], list[str]]:
    """Render rows; returns the valid ones and the problems of the others."""
    rendered: list[Rendered] = []
    problems: list[str] = []
    for example in batch:
        try:
            rendered.append(render(example))
        except DataError as error:
            problems += error.lines
    return rendered, problems

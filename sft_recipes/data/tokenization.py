"""Tokenize all sources, using the cache. Rows are rendered by Python, in limited processes, and tokenized by Rust threads."""

import gc
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from tokenizers import Encoding

from sft_recipes.data import cache, sandbox, sources
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import Documents, Encoder, LightTokenizer, alike
from sft_recipes.data.formats.base import Example
from sft_recipes.data.readers import RowReader, raise_all
from sft_recipes.data.renderers import Renderer
from sft_recipes.data.special_tokens import Finder
from sft_recipes.data.templates import Rendered, Template
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data

_BATCH = 500  # rows per batch, unless they exceed
_CHARACTERS = 2_000_000  # this many characters
_MOST_CHILDREN = 8  # processes that render


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
        before = sources.state(source.path, rows.splits)  # a source that changes while it is read is not cached
        name = None
        # With a time limit, there is no time to hash a large file.
        if cached and (seconds is None or sum(size for size, _ in before) <= sources.QUICK):
            template = renderer.chat_source or ""
            name = cache.key(
                content=sources.fingerprint(source.path, source.name, rows.splits), path=source.path, format=rows.format,
                columns=rows.columns, renderer=renderer.name, template=template, train_on=data.train_on,
                on_bad_row=data.on_bad_row, reasoning=data.train_on_reasoning, special_tokens=data.special_tokens,
                input_separator=data.input_separator, tokenizer=tokenizer_hash, specials=dict(tokenizer.specials),
            )  # fmt: skip
        parses = data.special_tokens == "parse" or isinstance(renderer.render, Chat)
        work = Work(rows, renderer, encoder, seconds, Finder(tokenizer.special_texts, parsed=parses))

        def complete(work: Work = work, before: object = before) -> bool:
            return not work.cut_short and sources.state(work.rows.source.path, work.rows.splits) == before

        try:
            with _no_garbage_collection():
                documents = cache.stored(name, work.batches, complete, vars(rows.report))
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

    def __init__(
        self, rows: RowReader, renderer: Renderer, encoder: Encoder, seconds: float | None, special_tokens: Finder
    ) -> None:
        self.rows, self.renderer, self.encoder, self.special_tokens = rows, renderer, encoder, special_tokens
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.cut_short = False

    def batches(self) -> Iterator[Documents]:
        """Yield the documents of batches of rows. Raises DataError with the problems of all rows.

        After an invalid row, the others are checked, but not tokenized.
        """
        waiting: tuple[list[Rendered], Future[list[Encoding]]] | None = None
        with ThreadPoolExecutor(1) as pool:  # to read and assemble batches while another one is tokenized
            for rendered, errors in self._rendered():
                for error in errors:
                    self.rows.reject(error)
                for part in alike(rendered) if not self.rows.failed else []:
                    tokenizing = pool.submit(self.encoder.tokenize, part)
                    yield from self._assemble(waiting)
                    waiting = part, tokenizing
            if not self.rows.failed:
                yield from self._assemble(waiting)
        self.rows.finish()

    def _examples(self) -> Iterator[list[Example]]:
        """Yield batches of rows until the time limit."""
        examples, batch, characters = iter(self.rows), list[Example](), 0
        for example in examples:
            batch.append(example)
            if found := self.special_tokens.find(example):
                self.rows.report.count_special_text(found[0], example.place, ends=found[1])
            characters += _characters(example)
            if len(batch) == _BATCH or characters > _CHARACTERS:
                yield batch
                batch, characters = [], 0
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self.cut_short = self.rows.problems.stopped = next(examples, None) is not None
                    return
        if batch:
            yield batch

    def _rendered(self) -> Iterator[tuple[list[Rendered], list[DataError]]]:
        """Render batches of rows, and the errors of invalid rows."""
        render, batches = self.renderer.render, self._examples()
        if not isinstance(render, Chat) or self.renderer.ours:
            yield from (_render_all(batch, render) for batch in batches)
            return
        number = max(1, min(_MOST_CHILDREN, (os.cpu_count() or 1) // 2))
        waiting: deque[tuple[list[Example], Future[tuple[list[Rendered], list[DataError]]]]] = deque()
        pool = sandbox.children(number)
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_in_child, batch, render)))
                if len(waiting) > number:
                    yield waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][1].result()
                waiting.popleft()
        except BrokenProcessPool:
            first, last = waiting[0][0][0].place, waiting[-1][0][-1].place
            raise sandbox.exceeded(render.name, f" for a row from {first} to {last}") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _assemble(self, waiting: tuple[list[Rendered], Future[list[Encoding]]] | None) -> Iterator[Documents]:
        if waiting is None:
            return
        try:
            yield self.encoder.documents(waiting[0], waiting[1].result())
        except DataError as error:
            self.rows.reject(error)
            if self.rows.drops:
                bad = {line.partition(": ")[0] for line in error.lines}
                if valid := [rendered for rendered in waiting[0] if rendered.place not in bad]:
                    yield self.encoder.encode(valid)


def _characters(example: Example) -> int:
    return len(example.text) + sum(len(message["content"]) for message in example.messages)


def _in_child(batch: list[Example], render: Template) -> tuple[list[Rendered], list[DataError]]:
    return _render_all(batch, render, limited=True)


def _render_all(
    batch: list[Example], render: Template, *, limited: bool = False
) -> tuple[list[Rendered], list[DataError]]:
    """Render rows; returns the valid ones and the errors of the others."""
    rendered: list[Rendered] = []
    errors: list[DataError] = []
    for example in batch:
        if limited:
            sandbox.restart_clock()
        try:
            rendered.append(render(example))
        except DataError as error:
            errors.append(error)
    return rendered, errors

"""The way of the data: sources → examples → text → documents of token ids → sequences, and an account of every one."""

import gc
import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from sft_recipes.data import cache, formats, sources, templates
from sft_recipes.data.accounting import SourceAccount
from sft_recipes.data.formats import Example
from sft_recipes.data.sequences import Chosen, Ints, Sequences, lay_out
from sft_recipes.data.templates import Rendered
from sft_recipes.data.tokens import Documents, Encoder, LightTokenizer
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data, Recipe, Source, WeightedSource

_SHOWN = 20  # problems of the data that are listed; the rest are counted
_BATCH = 500  # rows that are tokenised at once


@dataclass(frozen=True)
class Prompt:
    """Messages up to an assistant's turn, and the token ids that were trained as its prompt."""

    messages: list[dict[str, Any]]
    ids: list[int]


@dataclass
class Prepared:
    """All that is trained and validated on."""

    train: Sequences
    eval: Sequences | None
    chat_template: str | None  # for the exported tokenizer; None: the tokenizer keeps what it has
    stops: list[int]  # tokens that end the documents, the most frequent first
    prompt: Prompt | None  # one that was trained on, to check the chat template with
    share: float  # of the training rows that were read; below 1 where time ran out

    def as_dict(self) -> dict[str, Any]:
        return {"train": self.train.account.as_dict(), "eval": self.eval.account.as_dict() if self.eval else None}

    def lines(self) -> list[str]:
        return self.train.account.lines("train") + (self.eval.account.lines("eval") if self.eval else [])


def prepare(
    recipe: Recipe, tokenizer: LightTokenizer, *, cached: bool = True, seconds: float | None = None
) -> Prepared:
    """Everything from files to sequences. Raises DataError with a line for each of the first problems.

    `cached` takes tokenised sources from the cache, and puts them there. `seconds` ends the tokenising of each source
    after that time: what is prepared then is a sample, its first rows.
    """
    data, rng = recipe.data, np.random.default_rng(recipe.train.seed)
    opened, train_count = _open_all(data), len(train_sources(data))
    encoder = Encoder(tokenizer)
    firsts = {rows.format or "": first for rows, first in reversed(opened)}
    _refuse_two_templates(data, firsts)
    ways = {found: _way(data, found, first, tokenizer, encoder) for found, first in firsts.items()}
    tokenised = _tokenise_all(opened, data, ways, encoder, tokenizer, cached=cached, seconds=seconds)
    train, held_out = tokenised[:train_count], tokenised[train_count:]

    rows = [np.arange(len(each.documents)) for each in train]
    eval_rows = [np.arange(len(each.documents)) for each in held_out]
    if isinstance(data.eval, float):
        held_out, eval_rows = train, _set_aside([len(each.documents) for each in train], data.eval, rng)
        rows = [np.setdiff1d(all_rows, aside) for all_rows, aside in zip(rows, eval_rows, strict=True)]
    weights = [source.weight for source in train_sources(data)]
    rows = [_weighted(some, weight, rng) for some, weight in zip(rows, weights, strict=True)]
    rows = _limited(rows, data.max_train_samples, rng if data.shuffle else None)
    eval_rows = _limited(eval_rows, data.max_eval_samples, None)
    if not sum(map(len, rows)):
        raise DataError("data.train: no rows are left to train on; look at the weights, and at data.eval")

    train_sequences = lay_out(_chosen(train, rows), data, rng if data.shuffle else None)
    if not train_sequences.account.trained_tokens:
        raise DataError("data.train: no token of the whole data set is trained on; check data.format and data.train_on")
    eval_sequences = lay_out(chosen, data, None) if (chosen := _chosen(held_out, eval_rows, only_some=True)) else None
    if eval_sequences is not None and not eval_sequences.account.trained_tokens:
        raise DataError("data.eval: no token of the validation rows is trained on; validation would be empty")
    spoken = next((each for each in train if each.way.chat_source is not None), None)
    return Prepared(
        train_sequences,
        eval_sequences,
        spoken.way.chat_source if spoken else None,
        _most_frequent_first(
            np.concatenate([each.documents.stops[some] for each, some in zip(train, rows, strict=True)])
        ),
        _trained_prompt(spoken, data, encoder, tokenizer) if spoken else None,
        sum(len(each.documents) for each in train) / sum(each.total for each in train),
    )


def read(source: Source, data: Data) -> list[Example]:
    """Examples of one source. Raises DataError with a line for each of the first rows that cannot be read."""
    rows = _Rows(source, data, sources.TRAIN)
    examples = list(rows)
    _raise(rows.problems)
    return examples


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


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of every source's content."""
    found = {}
    for each, splits in _with_splits(recipe.data):
        found[each.path] = sources.fingerprint(each.path, each.name, splits)
    if isinstance(recipe.eval.generate, str):
        found[recipe.eval.generate] = sources.fingerprint(recipe.eval.generate)
    return found


def _with_splits(data: Data) -> list[tuple[Source, tuple[str, ...]]]:
    """Every source with the splits of a hub data set that are meant by it."""
    train: list[Source] = list(train_sources(data))
    usual = [(train, sources.TRAIN), (eval_sources(data), sources.HELD_OUT)]
    return [(source, (source.split,) if source.split else splits) for listed, splits in usual for source in listed]


# --- Rows ------------------------------------------------------------------------------------------------------------


class _Rows:
    """The examples of one source. What is wrong with the other rows is found in `problems` afterwards."""

    def __init__(self, source: Source, data: Data, splits: tuple[str, ...]) -> None:
        self.source, self.splits = source, splits
        self.columns = {**data.columns, **source.columns}
        self.format: str | None = source.format or data.format  # None until the first row is read
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Example]:
        nothing = True
        for row in sources.read(self.source.path, self.source.name, self.splits):
            nothing = False
            try:
                if isinstance(row, DataError):
                    raise row
                if self.format is None:
                    self.format = formats.find_format(row.values, self.columns)
                if self.format is None:
                    self.problems.append(formats.unknown(row.values, row.place))
                    return
                yield formats.to_example(row.values, self.format, self.columns, row.place)
            except DataError as error:
                self.problems += error.lines
        if nothing:
            raise DataError(f"{self.source.path}: no rows")

    def places(self, numbers: Collection[int]) -> dict[int, str]:
        """`file:line` of examples, counted from 0."""
        rows = islice(sources.read(self.source.path, self.source.name, self.splits), max(numbers) + 1)
        return {n: row.place for n, row in enumerate(rows) if n in numbers and isinstance(row, sources.Row)}


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - _SHOWN:,} more rows like these"] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)


def _open_all(data: Data) -> list[tuple[_Rows, Example]]:
    """Every source with its first example, by which its format is known."""
    opened = []
    problems: list[str] = []
    for source, splits in _with_splits(data):
        rows = _Rows(source, data, splits)
        try:
            first = next(iter(rows), None)
        except DataError as error:
            problems += error.lines
            continue
        if first is None:
            problems += rows.problems
        else:
            opened.append((_Rows(source, data, splits), first))
            opened[-1][0].format = rows.format
    used = {name for rows, _ in opened for name in formats.columns_of(rows.format or "")}
    if opened and (unused := [name for name in data.columns if name not in used]):
        found = " and ".join(sorted({rows.format or "" for rows, _ in opened}))
        problems.append(f"data.columns: no source has use for '{unused[0]}': the rows were read as {found}")
    _raise(problems)
    return opened


def _set_aside(sizes: Sequence[int], fraction: float, rng: np.random.Generator) -> list[Ints]:
    """Random rows of each source, a `fraction` of all and at least one."""
    total = sum(sizes)
    count = max(1, round(fraction * total))
    if count >= total:
        raise DataError(
            f"data.eval: {fraction} of {total} rows leaves nothing to train on; set data.eval: null, or give more rows"
        )
    return _by_source(np.sort(rng.choice(total, count, replace=False)), sizes)


def _weighted(rows: Ints, weight: float, rng: np.random.Generator) -> Ints:
    """Each row as often as the weight says; of a fraction, a random part."""
    whole, part = divmod(weight, 1)
    some = rng.choice(rows, round(part * len(rows)), replace=False)
    return np.sort(np.concatenate([np.repeat(rows, int(whole)), some]))


def _limited(rows: list[Ints], most: int | None, rng: np.random.Generator | None) -> list[Ints]:
    """`most` rows over all sources: random ones, or without `rng` the first."""
    sizes = [len(some) for some in rows]
    if most is None or most >= sum(sizes):
        return rows
    chosen = np.sort(rng.choice(sum(sizes), most, replace=False)) if rng else np.arange(most)
    return [some[which] for some, which in zip(rows, _by_source(chosen, sizes), strict=True)]


def _by_source(numbers: Ints, sizes: Sequence[int]) -> list[Ints]:
    """Numbers of rows counted over all sources, as numbers within each."""
    edges = np.cumsum([0, *sizes])
    return [numbers[(numbers >= a) & (numbers < b)] - a for a, b in pairwise(edges)]


# --- Text and tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """How rows of one format become text."""

    name: str
    render: templates.Template
    chat_source: str | None  # the same as a chat template; None: the text is not made of messages


@dataclass(frozen=True)
class _Tokenised:
    """One source as token ids, as far as it was read."""

    rows: _Rows
    way: _Way
    first: Example
    documents: Documents
    total: int  # rows there are


def _refuse_two_templates(data: Data, found: Collection[str]) -> None:
    if data.template is None and "messages" in found and len(found) > 1:
        raise DataError(
            f"data.train: the sources are {' and '.join(sorted(found))}; say with data.template which one "
            "template they share"
        )


def _way(data: Data, found: str, first: Example, tokenizer: LightTokenizer, encoder: Encoder) -> _Way:
    name = data.template or ("chat" if found == "messages" else "alpaca")
    if found == "text":
        if data.template is not None:
            raise DataError(f"data.template: {data.template} has no use for plain text; leave it out")
        return _Way("text", templates.plain, None)
    if name == "alpaca":
        source = templates.alpaca_chat_template()
    elif name == "chat":
        if tokenizer.chat_template is None:
            raise DataError(
                "data.template: chat, and the tokenizer has no chat template; set data.template: alpaca, or the path "
                "of a .jinja file"
            )
        source = tokenizer.chat_template
    else:
        source = _template_file(name)
    bos = tokenizer.specials.get("bos_token")
    chat = templates.Chat(source, data.train_on, tokenizer.specials, tokenizer.special_texts)
    # Each document begins with BOS where the tokenizer adds one, and the template does not.
    if encoder.bos and bos and not _renders(chat, first).startswith(bos):
        source = templates.BOS + source
        chat = templates.Chat(source, data.train_on, tokenizer.specials, tokenizer.special_texts)
    if name == "alpaca" and found != "messages":
        return _Way(name, templates.Alpaca(data.train_on), source)
    return _Way(name, chat, source)


def _renders(chat: templates.Chat, example: Example) -> str:
    """The text of a row, "" where the template refuses it: that is said with all other rows that are wrong."""
    try:
        return chat.render(example.messages, example.place)
    except DataError:
        return ""


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.template: '{name}' is neither alpaca nor chat, and no template file that can be read: {error}"
        ) from None


def _tokenise_all(
    opened: Sequence[tuple[_Rows, Example]],
    data: Data,
    ways: dict[str, _Way],
    encoder: Encoder,
    tokenizer: LightTokenizer,
    *,
    cached: bool,
    seconds: float | None,
) -> list[_Tokenised]:
    tokenised = []
    problems: list[str] = []
    of_tokenizer = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest() if cached else ""
    for rows, first in opened:
        assert rows.format is not None
        way, source = ways[rows.format], rows.source
        name = None
        if cached:
            content = sources.fingerprint(source.path, source.name, rows.splits)
            name = cache.key(
                content=content, path=source.path, format=rows.format, columns=rows.columns, way=way.name,
                template=way.chat_source, train_on=data.train_on, tokenizer=of_tokenizer, specials=dict(tokenizer.specials),
            )  # fmt: skip
        work = _Work(rows, way.render, encoder, seconds)
        try:
            with _no_garbage_collection():
                documents = cache.stored(name, work.batches, lambda work=work: not work.cut_short)  # type: ignore[misc]
        except DataError as error:
            problems += error.lines
            continue
        total = sources.count(source.path, source.name, rows.splits) if work.cut_short else len(documents)
        tokenised.append(_Tokenised(rows, way, first, documents, total))
    _raise(problems)
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


class _Work:
    """Tokenises the rows of a source, as long as there is time."""

    def __init__(self, rows: _Rows, render: templates.Template, encoder: Encoder, seconds: float | None) -> None:
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
                if problems or self.rows.problems:
                    continue  # nothing will come of it; what else is wrong is still worth knowing
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


def _chosen(tokenised: Sequence[_Tokenised], rows: Sequence[Ints], *, only_some: bool = False) -> list[Chosen]:
    """Rows of each source, with an account to be filled; `only_some` leaves out sources of which there are none."""
    chosen = []
    for each, some in zip(tokenised, rows, strict=True):
        account = SourceAccount(each.rows.source.path, each.rows.format or "", each.way.name)
        if each.total > len(each.documents):
            account.sampled = f"of the first {len(each.documents):,} of about {each.total:,}"
        if len(some) or not only_some:
            chosen.append(Chosen(each.documents, some, account, each.rows.places))
    return chosen


def _most_frequent_first(stops: Ints) -> list[int]:
    values, counts = np.unique(stops, return_counts=True)
    return [int(stop) for stop in values[np.argsort(-counts, kind="stable")]]


def _trained_prompt(tokenised: _Tokenised, data: Data, encoder: Encoder, tokenizer: LightTokenizer) -> Prompt | None:
    """A plain prompt as it is trained on: a made-up one, or where the template wants another kind that of the first row."""
    completion = data.model_copy(update={"train_on": "completion"})
    found, first = tokenised.rows.format or "", tokenised.first
    way = _way(completion, found, first, tokenizer, encoder)
    made_up = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    try:
        example = Example("", made_up)
        rendered = way.render(example)
    except DataError:
        example = first
        rendered = way.render(example)
    ids, trained = encoder.encode([rendered])[0]
    messages = example.messages[:-1]
    return Prompt(
        templates.as_chat(messages) if rendered.writes_specials else messages, ids[: int(trained.argmax())].tolist()
    )

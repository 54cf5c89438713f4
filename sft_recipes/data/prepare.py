"""The way of the data: sources → examples → text → token ids → sequences, with an account of every row and token."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_recipes.data import formats, packing, sources, templates
from sft_recipes.data.accounting import Account, SourceAccount, percentiles
from sft_recipes.data.formats import Example
from sft_recipes.data.tokens import Document, Encoder, LightTokenizer
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data, Recipe, Source, WeightedSource

if TYPE_CHECKING:
    import pyarrow

IGNORED = -100  # the label of a token that is not trained on, as torch's cross entropy has it
_SHOWN = 20  # problems of the data that are listed; the rest are counted
_BATCH = 1000


@dataclass
class Sequences:
    """Documents laid out in sequences, and the account of them."""

    documents: list[Document]
    layout: list[list[packing.Piece]]
    account: Account
    isolated: bool  # documents in one sequence do not see each other

    def __len__(self) -> int:
        return len(self.layout)

    def table(self) -> "pyarrow.Table":
        """One row a sequence: input_ids, labels (not shifted; IGNORED where not trained), seq_lengths.

        `seq_lengths` are the lengths of what sees itself alone: the documents, or the whole sequence. The first token of
        each has no context within it, so it is not trained on.
        """
        import pyarrow

        ids: list[NDArray[np.int32]] = []
        labels: list[NDArray[np.int32]] = []
        lengths: list[int] = []
        token_offsets, piece_offsets = [0], [0]
        for pieces in self.layout:
            for document, start, end in pieces:
                piece, trained = self.documents[document].ids[start:end], self.documents[document].trained[start:end]
                ids.append(piece)
                labels.append(np.where(trained, piece, np.int32(IGNORED)))
                if self.isolated or (document, start, end) == pieces[0]:
                    labels[-1][0] = IGNORED
            sizes = [end - start for _, start, end in pieces]
            lengths += sizes if self.isolated else [sum(sizes)]
            token_offsets.append(token_offsets[-1] + sum(sizes))
            piece_offsets.append(len(lengths))

        def lists(values: Any, offsets: list[int]) -> "pyarrow.ListArray":
            return pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, pyarrow.int64()), pyarrow.array(values))

        return pyarrow.table(
            {
                "input_ids": lists(np.concatenate(ids), token_offsets),
                "labels": lists(np.concatenate(labels), token_offsets),
                "seq_lengths": lists(np.array(lengths, dtype=np.int32), piece_offsets),
            }
        )


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

    def as_dict(self) -> dict[str, Any]:
        return {"train": self.train.account.as_dict(), "eval": self.eval.account.as_dict() if self.eval else None}

    def lines(self) -> list[str]:
        return self.train.account.lines("train") + (self.eval.account.lines("eval") if self.eval else [])


@dataclass
class _Read:
    """One source, read."""

    source: Source
    format: str
    examples: list[Example]


def prepare(recipe: Recipe, tokenizer: LightTokenizer) -> Prepared:
    """Everything from files to sequences. Raises DataError with a line for each of the first problems."""
    data, rng = recipe.data, random.Random(recipe.train.seed)
    problems: list[str] = []
    train = [_read(source, data, problems) for source in train_sources(data)]
    held_out = [_read(source, data, problems, sources.HELD_OUT) for source in eval_sources(data)]
    _raise(problems)
    if isinstance(data.eval, float):
        held_out = _set_aside(train, data.eval, rng)

    formats_found = {read.format for read in [*train, *held_out]}
    if data.template is None and "messages" in formats_found and len(formats_found) > 1:
        raise DataError(
            f"data.train: the sources are {' and '.join(sorted(formats_found))}; say with data.template which one "
            "template they share"
        )
    encoder = Encoder(tokenizer)
    way = {found: _way(data, found, tokenizer, encoder) for found in formats_found}
    for read, source in zip(train, train_sources(data), strict=True):
        read.examples = _weighted(read.examples, source.weight, rng)
    limited = [(train, data.max_train_samples, data.shuffle), (held_out, data.max_eval_samples, False)]
    for reads, most, shuffle in limited:
        _limit(reads, most, rng if shuffle else None)

    train_sequences = _sequences(train, data, encoder, way, rng if data.shuffle else None)
    if not train_sequences.account.trained_tokens:
        raise DataError("data.train: no token of the whole data set is trained on; check data.format and data.train_on")
    eval_sequences = _sequences(held_out, data, encoder, way, None) if held_out else None
    if eval_sequences is not None and not eval_sequences.account.trained_tokens:
        raise DataError("data.eval: no token of the validation rows is trained on; validation would be empty")
    stops = Counter(document.stop for document in train_sequences.documents)
    return Prepared(
        train_sequences,
        eval_sequences,
        way[train[0].format].chat_source,
        [stop for stop, _ in stops.most_common()],
        _trained_prompt(train[0], data, encoder, tokenizer),
    )


def read(source: Source, data: Data) -> list[Example]:
    """Examples of one source. Raises DataError with a line for each of the first rows that cannot be read."""
    problems: list[str] = []
    examples = _read(source, data, problems).examples
    _raise(problems)
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
    paths = [source.path for source in every_source(recipe.data)]
    paths += [recipe.eval.generate] if isinstance(recipe.eval.generate, str) else []
    return {path: sources.fingerprint(path) for path in paths}


# --- Rows ------------------------------------------------------------------------------------------------------------


def _read(source: Source, data: Data, problems: list[str], splits: tuple[str, ...] = sources.TRAIN) -> _Read:
    """Examples of one source; rows that cannot be read are added to `problems`."""
    columns = {**data.columns, **source.columns}
    found: str | None = source.format or data.format
    examples: list[Example] = []
    for row in sources.read(source.path, source.name, (source.split,) if source.split else splits):
        try:
            if isinstance(row, DataError):
                raise row
            if found is None:
                found = formats.find_format(row.values, columns)
            if found is None:
                raise DataError(
                    f"{row.place}: cannot tell the format from the columns {', '.join(map(repr, row.values))}; expected "
                    + " or ".join("+".join(needs) for needs in formats.NEEDS.values())
                    + "; rename with data.columns, such as {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}"
                )
            examples.append(formats.to_example(row.values, found, columns, row.place))
        except DataError as error:
            problems += error.lines
            if found is None:
                break
    if not examples and not problems:
        raise DataError(f"{source.path}: no rows")
    return _Read(source, found or "text", examples)


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - _SHOWN:,} more rows like these"] if len(problems) > _SHOWN else []
        raise DataError(*problems[:_SHOWN], *more)


def _set_aside(train: list[_Read], fraction: float, rng: random.Random) -> list[_Read]:
    """Take a random `fraction` of all rows, at least one, out of the training sources."""
    total = sum(len(read.examples) for read in train)
    count = max(1, round(fraction * total))
    if count >= total:
        raise DataError(
            f"data.eval: {fraction} of {total} rows leaves nothing to train on; set data.eval: null, or give more rows"
        )
    chosen = set(rng.sample(range(total), count))
    held_out, start = [], 0
    for read in train:
        numbered = list(enumerate(read.examples, start))
        start += len(numbered)
        held_out.append(replace(read, examples=[example for number, example in numbered if number in chosen]))
        read.examples = [example for number, example in numbered if number not in chosen]
    return [read for read in held_out if read.examples]


def _weighted(examples: list[Example], weight: float, rng: random.Random) -> list[Example]:
    """Each row as often as the weight says; of a fraction, a random part."""
    whole, part = divmod(weight, 1)
    return examples * int(whole) + rng.sample(examples, round(part * len(examples)))


def _limit(reads: list[_Read], most: int | None, rng: random.Random | None) -> None:
    """Keep `most` rows over all sources: random ones, or without `rng` the first."""
    total = sum(len(read.examples) for read in reads)
    if most is None or most >= total:
        return
    chosen = set(rng.sample(range(total), most) if rng else range(most))
    start = 0
    for read in reads:
        numbered = list(enumerate(read.examples, start))
        start += len(numbered)
        read.examples = [example for number, example in numbered if number in chosen]


# --- Text and tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """How rows of one format become text."""

    name: str
    render: templates.Template
    chat_source: str | None  # the same as a chat template; None: the text is not made of messages


def _way(data: Data, found: str, tokenizer: LightTokenizer, encoder: Encoder) -> _Way:
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
    if encoder.bos and "bos_token" not in source:  # each document begins with BOS where the tokenizer adds one
        source = templates.BOS + source
    if name == "alpaca" and found != "messages":
        return _Way(name, templates.Alpaca(data.train_on), source)
    return _Way(name, templates.Chat(source, data.train_on, tokenizer.specials, tokenizer.special_texts), source)


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.template: '{name}' is neither alpaca nor chat, and no template file that can be read: {error}"
        ) from None


def _sequences(
    reads: list[_Read], data: Data, encoder: Encoder, way: dict[str, _Way], rng: random.Random | None
) -> Sequences:
    account = Account(packing=data.packing)
    documents: list[Document] = []
    overlong: list[Document] = []
    for read in reads:
        source = SourceAccount(read.source.path, read.format, way[read.format].name)
        account.sources.append(source)
        for document in _encode(read.examples, way[read.format].render, encoder):
            source.rows += 1
            source.lengths.append(len(document.ids))
            if len(document.ids) > data.max_length and data.packing != "wrapped" and data.overlong == "error":
                overlong.append(document)
                continue
            documents += _fit(document, data, source)
    if overlong:
        raise DataError(_overlong_message(overlong, account, data.max_length))
    if rng:
        rng.shuffle(documents)
    lengths = [len(document.ids) for document in documents]
    if data.packing == "bfd":
        layout = packing.best_fit_decreasing(lengths, data.max_length)
    elif data.packing == "wrapped":
        layout = packing.wrapped(lengths, data.max_length)
    else:
        layout = packing.one_each(lengths)
    account.sequences = len(layout)
    account.fill = sum(lengths) / (len(layout) * data.max_length) if layout else 0.0
    return Sequences(documents, layout, account, isolated=not data.cross_document_attention)


def _encode(examples: Sequence[Example], render: templates.Template, encoder: Encoder) -> Iterator[Document]:
    problems: list[str] = []
    remaining = iter(examples)
    while batch := list(islice(remaining, _BATCH)):
        rendered = []
        for example in batch:
            try:
                rendered.append(render(example))
            except DataError as error:
                problems += error.lines
        if len(problems) >= _SHOWN:
            break
        if not problems:
            yield from encoder.encode(rendered)
    if problems:
        raise DataError(*problems[:_SHOWN])


def _fit(document: Document, data: Data, account: SourceAccount) -> Iterable[Document]:
    """The document in pieces that fit, and what had to go for it."""
    length, most = len(document.ids), data.max_length
    pieces = [document]
    if length > most and (data.packing != "wrapped" or data.overlong in ("drop", "truncate")):
        if data.overlong == "drop":
            account.dropped["overlong"] += 1
            return []
        if data.overlong == "truncate":
            account.truncated_rows += 1
            account.cut_tokens += length - most
            pieces = [_cut(document, 0, most)]
        else:
            account.split_rows += 1
            pieces = [_cut(document, start, end) for start, end in packing.split(length, most)]
    # The first token of a document is never predicted.
    pieces = [piece for piece in pieces if piece.trained[1:].any()]
    if not pieces:
        account.dropped["no trained token"] += 1
        return []
    account.kept += 1
    account.tokens += sum(len(piece.ids) for piece in pieces)
    account.trained_tokens += sum(int(piece.trained[1:].sum()) for piece in pieces)
    return pieces


def _cut(document: Document, start: int, end: int) -> Document:
    return replace(document, ids=document.ids[start:end], trained=document.trained[start:end])


def _overlong_message(overlong: list[Document], account: Account, most: int) -> str:
    lengths = [length for source in account.sources for length in source.lengths]
    spread = percentiles(lengths)
    longest = max(overlong, key=lambda document: len(document.ids))
    return (
        f"data.max_length: {len(overlong):,} of {len(lengths):,} rows are longer than {most} tokens: half of all have up to "
        f"{spread['p50']}, 90 % up to {spread['p90']}, 99 % up to {spread['p99']}, the longest {spread['max']} "
        f"({longest.place}); set data.max_length to one of these, or data.overlong: drop, truncate or split"
    )


def _trained_prompt(read: _Read, data: Data, encoder: Encoder, tokenizer: LightTokenizer) -> Prompt | None:
    """The prompt of the first row as it is trained on; None for plain text, which has none."""
    way = _way(data.model_copy(update={"train_on": "completion"}), read.format, tokenizer, encoder)
    if way.chat_source is None:
        return None
    rendered = way.render(read.examples[0])
    [document] = encoder.encode([rendered])
    messages = read.examples[0].messages[:-1]
    return Prompt(
        templates.as_chat(messages) if rendered.writes_specials else messages,
        document.ids[: int(document.trained.argmax())].tolist(),
    )

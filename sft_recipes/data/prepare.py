"""Run the data pipeline: sources → examples → text → tokenized documents → sequences, with statistics."""

import datetime
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sft_recipes import model_dir
from sft_recipes.data import lint, sandbox, selection, sources, templates
from sft_recipes.data.chat import as_chat
from sft_recipes.data.encoder import Encoder, LightTokenizer
from sft_recipes.data.formats.base import Example
from sft_recipes.data.packing import Ints
from sft_recipes.data.readers import RowReader, open_all, train_sources, with_splits
from sft_recipes.data.renderers import Renderer, choose_renderer, refuse_two_templates
from sft_recipes.data.sequences import SelectedRows, Sequences, build_sequences
from sft_recipes.data.stats import SourceStats
from sft_recipes.data.tokenization import TokenizedSource, tokenize_all
from sft_recipes.errors import DataError, ModelError
from sft_recipes.recipe.schema import Data, Recipe, WeightedSource


@dataclass(frozen=True)
class TrainedPrompt:
    """Messages before an assistant turn, their tools, and the token ids of their prompt in training."""

    messages: list[dict[str, Any]]
    ids: list[int]
    tools: list[Any] | None = None


@dataclass
class Prepared:
    """Training and evaluation data."""

    train: Sequences
    eval: Sequences | None
    chat_template: str | None  # for the exported tokenizer; None keeps its own
    stops: list[int]  # EOS tokens of the documents, most frequent first
    prompt: TrainedPrompt | None  # a prompt as trained, to verify the chat template
    share: float  # fraction of the training rows that was read; below 1 if time ran out
    warnings: list[str]  # each begins with a recipe key

    def scale(self, max_train_samples: int | None) -> float:
        """Return how many times as many training rows there are as were read, if at most `max_train_samples` are used."""
        rows = sum(source.rows for source in self.train.stats.sources)
        return min(1 / self.share, max_train_samples / rows) if max_train_samples else 1 / self.share

    def as_dict(self) -> dict[str, Any]:
        return {"train": self.train.stats.as_dict(), "eval": self.eval.stats.as_dict() if self.eval else None}

    def lines(self) -> list[str]:
        return self.train.stats.lines("train") + (self.eval.stats.lines("eval") if self.eval else [])


def prepare(
    recipe: Recipe,
    tokenizer: LightTokenizer,
    *,
    cached: bool = True,
    seconds: float | None = None,
    date: str | None = None,
) -> Prepared:
    """Build training and evaluation sequences. Raises DataError with one line per problem.

    `cached` reads and writes the tokenization cache. `seconds` limits the time to tokenize each source; only the rows
    read until then are used. `date` is what chat templates take for today, by default data.date or today.
    """
    data, rng = recipe.data, np.random.default_rng(recipe.train.seed)
    try:
        today = datetime.date.fromisoformat(date or data.date or str(datetime.date.today()))
    except ValueError as error:
        raise DataError(f"data.date: {error} (got '{data.date}'). Set it to a date as YYYY-MM-DD.") from None
    # Rows
    opened = open_all(data)
    first_of = {rows.format or "": first for rows, first in reversed(opened)}
    refuse_two_templates(data, first_of, [first for _, first in opened])

    # Text and tokens
    with _name_model_in_errors(recipe.model.name):
        encoder = Encoder(tokenizer)
        renderers = {
            format: choose_renderer(data, format, first, tokenizer, encoder, today)
            for format, first in first_of.items()
        }
        tokenized = tokenize_all(opened, data, renderers, encoder, tokenizer, cached=cached, seconds=seconds)

    # Train and eval split
    listed = train_sources(data)
    train, evaluation = tokenized[: len(listed)], tokenized[len(listed) :]
    split = selection.select_rows(_sizes(train), listed, _sizes(evaluation), data, rng)

    # Sequences
    train_rows = _chosen(train, split.train, _sizes(train), split.held_out)
    if isinstance(data.eval, float):
        eval_rows = _chosen(train, split.eval, split.held_out)
    else:
        eval_rows = _chosen(evaluation, split.eval, _sizes(evaluation))
    eval_rows = [selected for selected in eval_rows if selected.stats.rows_read]
    sufficient = _sufficient_length([*train_rows, *eval_rows], recipe.model.name)
    train_sequences = build_sequences(train_rows, data, rng if data.shuffle else None, sufficient)
    if not train_sequences.stats.trained_tokens:
        raise DataError(
            "data.train: no trained tokens in the dataset (all labels are masked). Check data.format, data.train_on and the "
            "flags of messages (weight, train)."
        )
    eval_sequences = build_sequences(eval_rows, data, None, sufficient) if eval_rows else None
    if eval_sequences is not None and not eval_sequences.stats.trained_tokens:
        raise DataError(
            "data.eval: no trained tokens in the evaluation rows (all labels are masked). "
            "Check their format, or set data.eval: null."
        )

    # Warnings
    warnings = [line for source in tokenized for line in source.rows.report.warnings]
    warnings += [
        line for renderer in renderers.values() for line in lint.check_template(renderer, recipe.model.name, tokenizer)
    ]
    warnings += lint.check_special_tokens([source.rows.report for source in train], sum(_sizes(train)), data, tokenizer)
    warnings += lint.check_eos(train_sequences) + lint.check_prompts(train_sequences)
    if eval_sequences is not None:
        warnings += lint.check_overlap(train_sequences, eval_sequences, data)

    stops = [source.documents.stops[rows] for source, rows in zip(train, split.train, strict=True)]
    chat = next((source for source in train if source.renderer.chat is not None), None)
    template, prompt = (
        _chat_template(chat.renderer, _first_valid(chat, data), encoder, tokenizer) if chat else (None, None)
    )
    return Prepared(
        train_sequences,
        eval_sequences,
        template,
        _most_frequent_first(np.concatenate(stops)),
        prompt,
        _share(train, listed),
        warnings,
    )


@contextmanager
def _name_model_in_errors(model: str) -> Iterator[None]:
    """Prefix errors of the tokenizer with the model's name."""
    try:
        yield
    except ModelError as error:
        raise ModelError(*(f"model.name: {model}: {line}" for line in error.lines)) from None


def _sufficient_length(chosen: Sequence[SelectedRows], model: str) -> int | None:
    """Return the smallest `max_length` that fits all rows; None if the model's context is shorter."""
    documents = [selected.documents.pieces(selected.rows) for selected in chosen]
    longest = max(int((end - start).max(initial=0)) for _, start, end in documents)
    with suppress(ModelError):
        folder = model_dir.directory(model)
        context = model_dir.positions(model_dir.config(folder)) if folder else None
        return longest if context is None or longest <= context else None
    return longest


def _sizes(tokenized: Sequence[TokenizedSource]) -> list[int]:
    return [len(source.documents) for source in tokenized]


def _share(train: Sequence[TokenizedSource], listed: Sequence[WeightedSource]) -> float:
    """Return the fraction of the training rows that was read, each source weighted and up to its max_samples."""

    def rows(sizes: Iterable[int]) -> float:
        pairs = zip(sizes, listed, strict=True)
        return sum(source.weight * min(size, source.max_samples or size) for size, source in pairs)

    return rows(_sizes(train)) / rows(source.total for source in train)


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of the content of every source, by path."""
    hashes = {}
    for source, splits in with_splits(recipe.data):
        hashes[source.path] = sources.fingerprint(source.path, source.name, splits)
    if isinstance(recipe.eval.generate, str):
        hashes[recipe.eval.generate] = sources.fingerprint(recipe.eval.generate)
    return hashes


def _chosen(
    tokenized: Sequence[TokenizedSource], rows: Sequence[Ints], rows_read: Sequence[int], held_out: Sequence[int] = ()
) -> list[SelectedRows]:
    """Combine the selected rows of each source with its documents and new statistics."""
    chosen = []
    for source, selected, read, held in zip(tokenized, rows, rows_read, held_out or [0] * len(rows), strict=True):
        stats = SourceStats(source.rows.source.path, source.rows.format or "", source.renderer.name, read, held)
        stats.not_sampled = read - held - len(np.unique(selected))
        if read == len(source.documents):  # not an evaluation split of training rows
            stats.add_report(source.rows.report)
        if source.total > len(source.documents):
            stats.sampled = f"the first {len(source.documents):,} of about {source.total:,}"
        chosen.append(SelectedRows(source.documents, selected, stats, source.rows.places))
    return chosen


def _most_frequent_first(stops: Ints) -> list[int]:
    values, counts = np.unique(stops, return_counts=True)
    return [int(stop) for stop in values[np.argsort(-counts, kind="stable")]]


def _first_valid(source: TokenizedSource, data: Data) -> Example:
    """Return the first row of a source that was not dropped."""
    bad = set(source.rows.report.bad_rows)
    if source.first.place not in bad:
        return source.first
    return next(row for row in RowReader(source.rows.source, data, source.rows.splits) if row.place not in bad)


def _chat_template(
    renderer: Renderer, first: Example, encoder: Encoder, tokenizer: LightTokenizer
) -> tuple[str, TrainedPrompt]:
    """Return the chat template to export, and the prompt of the first row, which it reproduces. Raises DataError."""
    chat = renderer.chat
    assert chat is not None
    messages = first.messages[:-1]
    if renderer.render is chat or templates.needs_chat(first):
        accepted = partial(chat.accepted, prompt=True)
        messages, text, _ = sandbox.limited(chat.name, accepted, as_chat(messages), first)
        ids = encoder.prompt(text, specials=True)
    else:
        if not chat.parse and any(
            text in message[key] for text in tokenizer.special_texts for message in messages for key in message
        ):
            messages = [{"role": "user", "content": "Hello"}]  # a chat template cannot encode special tokens as text
        prompt = templates.alpaca_prompt(messages[0]["content"], messages[0].get("input", ""))
        text = chat.bos + prompt
        ids = encoder.prompt(text, specials=True) if chat.parse else encoder.prompt(prompt, specials=False)
    # SentencePiece-like tokenizers prepend a space to a text, but not after a BOS token inside it.
    bos, blank = chat.bos, templates.BOS.replace("bos_token", "bos_token + ' '")
    for template, rendered in (
        (chat.source, text),
        (chat.source.replace(templates.BOS, blank, 1), f"{bos} {text.removeprefix(bos)}"),
    ):
        if encoder.prompt(rendered, specials=True) == ids:
            return template, TrainedPrompt(messages, ids, first.tools)
    raise DataError(
        "data.template: the chat template does not reproduce the prompts of the training data (expected "
        f"{tokenizer.backend.decode(ids)[:80]!r})."
    )

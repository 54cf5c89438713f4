"""The way of the data: sources → examples → text → documents of token ids → sequences, and an account of every one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft_recipes.data import choosing, faults, sources, templates
from sft_recipes.data.accounting import SourceAccount
from sft_recipes.data.formats import Example
from sft_recipes.data.packing import Ints
from sft_recipes.data.reading import open_all, train_sources, with_splits
from sft_recipes.data.sequences import Chosen, Sequences, lay_out
from sft_recipes.data.tokenising import Tokenised, tokenise_all
from sft_recipes.data.tokens import Encoder, LightTokenizer
from sft_recipes.data.ways import refuse_two_templates, way_of
from sft_recipes.errors import DataError, ModelError
from sft_recipes.recipe.schema import Data, Recipe


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
    warnings: list[str]  # of data that trains well, and teaches something else than was wanted; lines begin with a key

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
    # Rows
    opened = open_all(data)
    firsts = {rows.format or "": first for rows, first in reversed(opened)}
    refuse_two_templates(data, firsts)

    # Text and tokens
    with _said_of(recipe.model.name):
        encoder = Encoder(tokenizer)
        ways = {found: way_of(data, found, first, tokenizer, encoder) for found, first in firsts.items()}
        tokenised = tokenise_all(opened, data, ways, encoder, tokenizer, cached=cached, seconds=seconds)

    # Which rows for what
    weights = [source.weight for source in train_sources(data)]
    train, held_out = tokenised[: len(weights)], tokenised[len(weights) :]
    choice = choosing.choose(_sizes(train), weights, _sizes(held_out), data, rng)

    # Sequences
    trained = _chosen(train, choice.train, _sizes(train), choice.set_aside)
    train_sequences = lay_out(trained, data, rng if data.shuffle else None)
    if not train_sequences.account.trained_tokens:
        raise DataError("data.train: no token of the whole data set is trained on; check data.format and data.train_on")
    if isinstance(data.eval, float):
        validated = _chosen(train, choice.eval, choice.set_aside)
    else:
        validated = _chosen(held_out, choice.eval, _sizes(held_out))
    validated = [each for each in validated if each.account.read]
    eval_sequences = lay_out(validated, data, None) if validated else None
    if eval_sequences is not None and not eval_sequences.account.trained_tokens:
        raise DataError("data.eval: no token of the validation rows is trained on; validation would be empty")

    # What it would teach
    warnings = [line for way in ways.values() for line in faults.another_template(way, recipe.model.name, tokenizer)]
    warnings += faults.without_end(train_sequences)
    if eval_sequences is not None:
        warnings += faults.overlap(train_sequences, eval_sequences, data)

    stops = [each.documents.stops[some] for each, some in zip(train, choice.train, strict=True)]
    spoken = next((each for each in train if each.way.chat_source is not None), None)
    return Prepared(
        train_sequences,
        eval_sequences,
        spoken.way.chat_source if spoken else None,
        _most_frequent_first(np.concatenate(stops)),
        _trained_prompt(spoken, data, encoder, tokenizer) if spoken else None,
        sum(_sizes(train)) / sum(each.total for each in train),
        warnings,
    )


@contextmanager
def _said_of(model: str) -> Iterator[None]:
    """What is wrong with a tokenizer names the model that it is of."""
    try:
        yield
    except ModelError as error:
        raise ModelError(*(f"model.name: {model}: {line}" for line in error.lines)) from None


def _sizes(tokenised: Sequence[Tokenised]) -> list[int]:
    return [len(each.documents) for each in tokenised]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of every source's content."""
    found = {}
    for each, splits in with_splits(recipe.data):
        found[each.path] = sources.fingerprint(each.path, each.name, splits)
    if isinstance(recipe.eval.generate, str):
        found[recipe.eval.generate] = sources.fingerprint(recipe.eval.generate)
    return found


def _chosen(
    tokenised: Sequence[Tokenised], rows: Sequence[Ints], read: Sequence[int], set_aside: Sequence[int] = ()
) -> list[Chosen]:
    """Rows of each source, chosen from as many as were `read` and not `set_aside`, with an account to be filled."""
    chosen = []
    for each, some, there, aside in zip(tokenised, rows, read, set_aside or [0] * len(rows), strict=True):
        account = SourceAccount(each.rows.source.path, each.rows.format or "", each.way.name, there, aside)
        account.not_chosen = there - aside - len(np.unique(some))
        if each.total > len(each.documents):
            account.sampled = f"of the first {len(each.documents):,} of about {each.total:,}"
        chosen.append(Chosen(each.documents, some, account, each.rows.places))
    return chosen


def _most_frequent_first(stops: Ints) -> list[int]:
    values, counts = np.unique(stops, return_counts=True)
    return [int(stop) for stop in values[np.argsort(-counts, kind="stable")]]


def _trained_prompt(tokenised: Tokenised, data: Data, encoder: Encoder, tokenizer: LightTokenizer) -> Prompt | None:
    """A plain prompt as it is trained on: a made-up one, or where the template wants another kind that of the first row."""
    completion = data.model_copy(update={"train_on": "completion"})
    found, first = tokenised.rows.format or "", tokenised.first
    way = way_of(completion, found, first, tokenizer, encoder)
    made_up = Example("", [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
    for example in (made_up, first):
        try:
            rendered = way.render(example)
            break
        except DataError:
            continue
    else:
        return None  # its prompts cannot be told from its answers, which only train_on: all does without
    ids, trained = encoder.encode([rendered])[0]
    messages = example.messages[:-1]
    return Prompt(
        templates.as_chat(messages) if rendered.writes_specials else messages, ids[: int(trained.argmax())].tolist()
    )

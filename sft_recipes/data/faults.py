"""What is wrong with data that trains well, and teaches something else than its author wants."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft_recipes.data.sequences import Chosen, Sequences
from sft_recipes.data.templates import Chat
from sft_recipes.data.tokens import LightTokenizer
from sft_recipes.data.ways import Way
from sft_recipes.errors import DataError, ModelError, RecipeError
from sft_recipes.recipe import model_files
from sft_recipes.recipe.schema import Data

_INSTRUCT = {"instruct", "chat", "it", "sft", "dpo"}  # words in the names of models that have learned a chat template
_QUESTION = [{"role": "user", "content": "Hello"}]
_ANSWER = {"role": "assistant", "content": "Hi"}


def overlap(train: Sequences, held_out: Sequences, data: Data) -> list[str]:
    """A warning where validation rows are training rows too, and so say nothing of what was learned. Counts them, and those
    that only have the prompt of one, in the account of the validation rows."""
    known, asked = (np.unique(_column(train.chosen, name)) for name in ("digests", "prompts"))
    first = None
    for each in held_out.chosen:
        same = np.isin(each.documents.digests[each.rows], known)
        prompts = each.documents.prompts[each.rows]
        each.account.in_training = int(same.sum())
        each.account.prompts_in_training = int((np.isin(prompts, asked) & (prompts != 0) & ~same).sum())
        if same.any() and first is None:
            first = _place(each, int(each.rows[np.argmax(same)]))
    count = sum(each.account.in_training for each in held_out.chosen)
    if not count:
        return []
    prompts_only = sum(each.account.prompts_in_training for each in held_out.chosen)
    of = sum(each.account.rows for each in held_out.chosen)
    remedy = (
        "take the duplicates out of data.train"
        if isinstance(data.eval, float)
        else "take them out of data.train or of data.eval"
    )
    return [
        f"data.eval: {_at_least(held_out, train)}{count:,} of {of:,} validation rows are training rows too, first {first}"
        f"{f', and {prompts_only:,} more have the prompt of one' if prompts_only else ''}; the validation loss is lower than "
        f"on new rows: {remedy}"
    ]


def without_end(train: Sequences) -> list[str]:
    """A warning where answers do not end in an end token that is trained on. Counts them in the account.

    Raises DataError where none does: the model would never stop.
    """
    kept = 0
    first = None
    for number, each in enumerate(train.chosen):
        rows = np.unique(train.row[train.source == number])
        endless = rows[~each.documents.ended[rows]]
        each.account.endless = len(endless)
        kept += len(rows)
        if len(endless) and first is None:
            first = _place(each, int(endless[0]))
    endless_rows = sum(each.account.endless for each in train.chosen)
    if endless_rows:
        said = (
            "end in no token that is trained on and ends a turn, so the model would not learn to stop; let the template "
            "close the turn within {% generation %} or right behind it, or set data.train_on: all"
        )
        if endless_rows == kept:
            raise DataError(f"data.template: the answers of all {kept:,} rows {said}")
        return [
            f"data.template: the answers of {_at_least(train)}{endless_rows:,} of {kept:,} rows, first {first}, {said}"
        ]
    cut = sum(each.account.truncated_rows for each in train.chosen if each.account.format != "text")
    if 2 * cut > kept:
        return [
            f"data.overlong: truncate cuts off the end of {cut:,} of {kept:,} rows, and the end token with it, so the model "
            "would hardly learn to stop; raise data.max_length, or set data.overlong: split or drop"
        ]
    return []


def another_template(way: Way, model: str, tokenizer: LightTokenizer) -> list[str]:
    """A warning where a model that has learned its own chat template is trained with another one."""
    if way.chat_source is None or tokenizer.chat_template is None:
        return []
    try:
        used, own = (
            Chat(source, "all", tokenizer.specials, tokenizer.special_texts)
            for source in (way.chat_source, tokenizer.chat_template)
        )
        bos = tokenizer.specials.get("bos_token", "")
        prompts = {
            chat.render(_QUESTION, model, add_generation_prompt=True).removeprefix(bos).strip() for chat in (used, own)
        }
        answered = own.render([*_QUESTION, _ANSWER], model).rstrip()
    except (DataError, RecipeError):  # a template that refuses so plain a conversation is not for such
        return []
    if len(prompts) == 1 or not _is_instruct(model, answered, tokenizer):
        return []
    return [
        f"data.template: {way.name} writes other prompts than the chat template of {model}, which looks like a model that "
        "was trained with its own; set data.template: chat to build on that"
    ]


def _is_instruct(model: str, answered: str, tokenizer: LightTokenizer) -> bool:
    """Whether a model has learned its chat template. Base models carry one too, but they end a text otherwise than with the
    token that closes a turn in it; where the name says which of the two it is, the name counts."""
    words = set(re.split(r"[^a-z0-9]+", Path(model).name.lower()))
    if "base" in words or words & _INSTRUCT:
        return "base" not in words
    ends = [tokenizer.specials.get("eos_token")]
    with contextlib.suppress(ModelError):  # said when the model is loaded
        ends += [tokenizer.backend.id_to_token(token) for token in model_files.end_tokens(model)]
    return any(answered.endswith(end) for end in ends if end)


def _column(chosen: Sequence[Chosen], name: str) -> NDArray[np.uint64]:
    return np.concatenate([getattr(each.documents, name)[each.rows] for each in chosen])


def _place(chosen: Chosen, row: int) -> str:
    """`file:line` of a row."""
    return next(iter(chosen.places([row]).values()))


def _at_least(*sequences: Sequences) -> str:
    return "at least " if any(each.account.sampled for some in sequences for each in some.chosen) else ""

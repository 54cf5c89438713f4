"""Warn about data that trains without errors but teaches the wrong thing."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft_recipes import model_dir
from sft_recipes.data import sandbox
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import LightTokenizer
from sft_recipes.data.parsers import ReadReport
from sft_recipes.data.renderers import Renderer
from sft_recipes.data.sequences import SelectedRows, Sequences
from sft_recipes.errors import DataError, ModelError, RecipeError
from sft_recipes.recipe.schema import Data

_INSTRUCT = {"instruct", "chat", "it", "sft", "dpo"}  # words in the names of instruction-tuned models
_QUESTION = [{"role": "user", "content": "Hello"}]
_ANSWER = {"role": "assistant", "content": "Hi"}


def check_overlap(train: Sequences, held_out: Sequences, data: Data) -> list[str]:
    """Warn about evaluation rows that are also training rows; count them and shared prompts."""
    train_rows, train_prompts = (np.unique(_column(train.chosen, name)) for name in ("digests", "prompts"))
    first = None
    for source in held_out.chosen:
        same = np.isin(source.documents.digests[source.rows], train_rows)
        prompts = source.documents.prompts[source.rows]
        source.stats.train_overlap = int(same.sum())
        source.stats.prompt_overlap = int((np.isin(prompts, train_prompts) & (prompts != 0) & ~same).sum())
        if same.any() and first is None:
            first = _place(source, int(source.rows[np.argmax(same)]))
    count = sum(source.stats.train_overlap for source in held_out.chosen)
    if not count:
        return []
    prompts_only = sum(source.stats.prompt_overlap for source in held_out.chosen)
    total = sum(source.stats.rows for source in held_out.chosen)
    remedy = (
        "Remove the duplicates from data.train."
        if isinstance(data.eval, float)
        else "Remove them from data.train or from data.eval."
    )
    return [
        f"data.eval: {_at_least(held_out, train)}{count:,} of {total:,} evaluation rows are also training rows (first: "
        f"{first}{f'; {prompts_only:,} more share a prompt with one' if prompts_only else ''}), so the evaluation loss is too "
        f"low. {remedy}"
    ]


def check_eos(train: Sequences) -> list[str]:
    """Warn about answers without an EOS token in the loss, and count them in the statistics.

    Raises DataError if no answer has one, because the model would never stop.
    """
    kept = 0
    first = None
    for number, source in enumerate(train.chosen):
        rows = np.unique(train.row[train.source == number])
        missing = rows[~source.documents.ended[rows]]
        source.stats.missing_eos = len(missing)
        kept += len(rows)
        if len(missing) and first is None:
            first = _place(source, int(missing[0]))
    count = sum(source.stats.missing_eos for source in train.chosen)
    if count:
        problem = (
            "an EOS token that is in the loss, so the model would not learn to stop. Move the end-of-turn token inside "
            "{% generation %} or directly after it, or set data.train_on: all."
        )
        if count == kept:
            raise DataError(f"data.template: none of the {kept:,} answers ends with {problem}")
        return [
            f"data.template: {_at_least(train)}{count:,} of {kept:,} answers (first: {first}) do not end with {problem}"
        ]
    truncated = sum(source.stats.truncated_rows for source in train.chosen if source.stats.format != "text")
    if 2 * truncated > kept:
        return [
            f"data.overlong: truncate removes the EOS token of {truncated:,} of {kept:,} rows, so the model would hardly "
            "learn to stop. Raise data.max_length, or set data.overlong to split or drop."
        ]
    return []


def check_prompts(train: Sequences) -> list[str]:
    """Warn about rows that do not begin with the prompt of inference, such as one that opens a thought."""
    other = [source.rows[~source.documents.prompted[source.rows]] for source in train.chosen]
    count, total = sum(map(len, other)), sum(len(source.rows) for source in train.chosen)
    if not count:
        return []
    first = next(_place(source, int(rows[0])) for source, rows in zip(train.chosen, other, strict=True) if len(rows))
    return [
        f"data.template: {_at_least(train)}{count:,} of {total:,} rows (first: {first}) do not begin with the prompt that the "
        "template writes at inference, for example because it opens a thought that they do not have. Add the thoughts, or "
        "choose a matching prompt with data.chat_template_kwargs, e.g. {enable_thinking: false}."
    ]


def check_special_tokens(reports: Sequence[ReadReport], rows: int, data: Data, tokenizer: LightTokenizer) -> list[str]:
    """Warn about text that looks like a special token but is encoded as characters, unless the recipe says so.

    At most three tokens have a line, those of the most rows.
    """
    if data.special_tokens == "text" and "special_tokens" in data.model_fields_set:
        return []
    known, warnings = tokenizer.special_texts, list[tuple[int, str]]()
    for token in dict.fromkeys(token for report in reports for token in report.special_text):
        parts = [report.special_text[token] for report in reports if token in report.special_text]
        count, ending, place = sum(part[0] for part in parts), sum(part[1] for part in parts), parts[0][2]
        which = f"{count:,} of {rows:,} rows " + ("end with" if ending == count else "contain")
        kind, remedy = (
            ("the special token", "Set parse to encode it as the token, or text to keep the characters.")
            if token in known
            else (
                "a token that the tokenizer does not have,",
                "Remove it, or add it to model.new_tokens and set parse.",
            )
        )
        warnings.append(
            (count, f"data.special_tokens: {which} the text of {kind} {token!r} (first: {place}), encoded as plain "
             f"characters. {remedy}")
        )  # fmt: skip
    return [line for _, line in sorted(warnings, key=lambda warning: -warning[0])[:3]]


def check_template(renderer: Renderer, model: str, tokenizer: LightTokenizer) -> list[str]:
    """Warn if an instruction-tuned model is trained with different prompts than its chat template's."""
    own = tokenizer.chat_template
    if renderer.chat is None or own is None or renderer.name == "chat" or renderer.chat.source == own:
        return []
    chat = Chat(own, "all", tokenizer.specials, tokenizer.special_texts, name=f"model.name: {model}: its chat template")
    try:
        prompts = [sandbox.limited(one.name, one.prompt, _QUESTION, model) for one in (renderer.chat, chat)]
        conversation = sandbox.limited(chat.name, chat.text, [*_QUESTION, _ANSWER], model).rstrip()
    except (DataError, RecipeError):  # a template that rejects this conversation cannot be compared
        return []
    bos = tokenizer.specials.get("bos_token", "")
    same = len({prompt.removeprefix(bos).strip() for prompt in prompts}) == 1
    if same or not _is_instruct(model, conversation, tokenizer):
        return []
    return [
        f"data.template: {renderer.name} writes different prompts than the chat template of {model}, which looks "
        "instruction-tuned. Set data.template: chat to use the prompts of its template."
    ]


def _is_instruct(model: str, conversation: str, tokenizer: LightTokenizer) -> bool:
    """Guess whether a model is instruction-tuned: from its name, else from its EOS tokens.

    Base models may have a chat template too, but their EOS token is not the one that ends a turn in it.
    """
    words = set(re.split(r"[^a-z0-9]+", Path(model).name.lower()))
    if "base" in words or words & _INSTRUCT:
        return "base" not in words
    ends = [tokenizer.specials.get("eos_token")]
    with contextlib.suppress(ModelError):  # reported when the model is loaded
        ends += [tokenizer.backend.id_to_token(token) for token in model_dir.end_tokens(model)]
    return any(conversation.endswith(end) for end in ends if end)


def _column(chosen: Sequence[SelectedRows], name: str) -> NDArray[np.uint64]:
    return np.concatenate([getattr(source.documents, name)[source.rows] for source in chosen])


def _place(chosen: SelectedRows, row: int) -> str:
    """Return `file:line` of a row."""
    return next(iter(chosen.places([row]).values()))


def _at_least(*sequences: Sequences) -> str:
    return "at least " if any(source.stats.sampled for part in sequences for source in part.chosen) else ""

"""From rendered text to token ids, and which of them are trained on.

A document is BOS (where the tokenizer adds one) + text + EOS, encoded as a whole: its ids are those the tokenizer gives
the whole text. Chat templates write BOS and the end of turns themselves; where one does not close the last turn, EOS does.
Where a token straddles the border between prompt and answer it counts as part of the answer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sft_recipes.data.templates import Rendered
from sft_recipes.errors import DataError, ModelError


@dataclass(frozen=True)
class LightTokenizer:
    """What the data needs of a tokenizer; needs neither transformers nor torch."""

    backend: Tokenizer
    specials: Mapping[str, str]  # bos_token, eos_token, ... -> text
    chat_template: str | None = None

    @property
    def special_texts(self) -> list[str]:
        """The texts that this tokenizer reads as special tokens."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]


def from_directory(folder: Path, new_tokens: Sequence[str] = ()) -> LightTokenizer | None:
    """The tokenizer in a model's directory; None where it has no tokenizer.json (transformers can convert it)."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{file}: not a valid tokenizer: {error}") from None
    config = _json(folder / "tokenizer_config.json") | _json(folder / "special_tokens_map.json")
    specials = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            specials[name] = token
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    backend.add_tokens(list(new_tokens))
    return LightTokenizer(backend, specials, template if isinstance(template, str) else None)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids (int32) of one document, a mask of those trained on, and the token that ends it."""

    place: str
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    stop: int


class Encoder:
    """Encodes batches of rendered text."""

    def __init__(self, tokenizer: LightTokenizer) -> None:
        eos = tokenizer.specials.get("eos_token")
        if eos is None:
            raise ModelError(
                "the tokenizer has no end token (eos_token), so the model could not learn to stop; "
                "set eos_token in its tokenizer_config.json"
            )
        self._plain = _copy(tokenizer.backend, specials_are_text=True)
        self._special = _copy(tokenizer.backend, specials_are_text=False)
        known = {text: self._special.token_to_id(text) for text in (eos, *tokenizer.special_texts)}
        self._stops = {text: token for text, token in known.items() if token is not None}
        if eos not in self._stops:
            raise ModelError(f"the tokenizer's end token {eos!r} is not in its vocabulary")
        self.eos = self._stops[eos]
        before, after = _added(self._plain)
        self.bos = before
        self._adds_eos = bool(after)

    def encode(self, batch: Sequence[Rendered]) -> list[Document]:
        """Documents of a batch, in order. Raises DataError where the text is no valid Unicode."""
        special = iter(self._encode([r for r in batch if r.writes_specials], specials=True))
        plain = iter(self._encode([r for r in batch if not r.writes_specials], specials=False))
        return [
            self._with_specials(rendered, next(special))
            if rendered.writes_specials
            else self._without_specials(rendered, next(plain))
            for rendered in batch
        ]

    def _encode(self, batch: list[Rendered], *, specials: bool) -> list[Encoding]:
        backend = self._special if specials else self._plain
        try:
            return backend.encode_batch([rendered.text for rendered in batch], add_special_tokens=not specials)
        except TypeError:
            raise _not_unicode(batch) from None

    def _without_specials(self, rendered: Rendered, encoding: Encoding) -> Document:
        ids = encoding.ids if self._adds_eos else [*encoding.ids, self.eos]
        trained = _mask(rendered, encoding, len(ids), last=len(ids) - 1)
        return Document(rendered.place, np.array(ids, dtype=np.int32), trained, self.eos)

    def _with_specials(self, rendered: Rendered, encoding: Encoding) -> Document:
        ids, text = encoding.ids, rendered.text.rstrip()
        trained = _mask(rendered, encoding, len(ids), last=len(ids))
        stop = self.eos
        if text.endswith(tuple(self._stops)):
            stop = self._stops[max((token for token in self._stops if text.endswith(token)), key=len)]
        else:
            ids, trained = [*ids, self.eos], np.append(trained, trained[-1:])
        return Document(rendered.place, np.array(ids, dtype=np.int32), trained, stop)


def _added(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text: [] or [BOS], [] or [EOS]."""
    for text in ("a", "1", "?"):  # whichever is in the vocabulary
        probe = backend.encode(text)
        if 0 in probe.special_tokens_mask:
            first = probe.special_tokens_mask.index(0)
            last = len(probe.ids) - probe.special_tokens_mask[::-1].index(0)
            return probe.ids[:first], probe.ids[last:]
    return [], []


def _mask(rendered: Rendered, encoding: Encoding, length: int, *, last: int) -> NDArray[np.bool_]:
    """True for the tokens of the trained character ranges; a range up to the end of the text takes what follows it too.

    The text's own tokens end before `last`; an EOS that the tokenizer or the encoder added may follow.
    """
    trained = np.zeros(length, dtype=bool)
    for start, end in rendered.trained:
        begin = 0 if start == 0 else _token_at(encoding, start, len(rendered.text), last)
        if end == len(rendered.text):
            trained[begin:] = True
            continue
        stop = _token_at(encoding, end, len(rendered.text), last)
        span = encoding.token_to_chars(stop) if stop < last else None
        trained[begin : stop + 1 if span is not None and span[0] < end else stop] = True
    return trained


def _token_at(encoding: Encoding, start: int, end: int, nothing: int) -> int:
    """Index of the first token that covers a character in [start, end)."""
    covering = (encoding.char_to_token(position) for position in range(start, end))
    return next((token for token in covering if token is not None), nothing)


def _not_unicode(batch: Sequence[Rendered]) -> DataError:
    for rendered in batch:
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            return DataError(
                f"{rendered.place}: not valid Unicode: {rendered.text[error.start]!r} is half of a surrogate pair; "
                "write the file as UTF-8"
            )
    raise AssertionError("the tokenizer refuses text that is valid Unicode")


def _copy(backend: Tokenizer, *, specials_are_text: bool) -> Tokenizer:
    """The same tokenizer without truncation and padding, which a tokenizer.json can carry."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = specials_are_text
    return copy

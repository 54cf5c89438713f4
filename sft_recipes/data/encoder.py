"""Encode rendered text as token ids with a loss mask.

A document is BOS (if the tokenizer adds it) + text + EOS, encoded in one piece, so its ids are those of the whole text.
Chat templates write BOS and end-of-turn tokens themselves; EOS is appended if the last turn is not closed. A token that
spans the boundary of prompt and answer belongs to the answer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sft_recipes.data.templates import Rendered
from sft_recipes.errors import DataError, ModelError

# Classes whose tokenizer.json transformers 5 uses unchanged, or rebuilds identically. For others, such as LlamaTokenizer,
# it reads only the vocabulary and builds the rest itself.
_UNCHANGED = ("TokenizersBackend", "PreTrainedTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")


@dataclass(frozen=True)
class LightTokenizer:
    """The parts of a tokenizer that the data pipeline needs, without transformers and torch."""

    backend: Tokenizer
    specials: Mapping[str, str]  # bos_token, eos_token, ... -> text
    chat_template: str | None = None
    rebuilt: str = ""  # name of its class, if transformers rebuilds it from the vocabulary, so that it may differ

    @property
    def special_texts(self) -> list[str]:
        """Return the texts that this tokenizer parses as special tokens."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]


def from_directory(folder: Path, new_tokens: Sequence[str] = ()) -> LightTokenizer | None:
    """Load the tokenizer of a model directory; None without tokenizer.json (transformers can convert)."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{file}: invalid tokenizer: {error}. Download it again.") from None
    config = _json(folder / "tokenizer_config.json") | _json(folder / "special_tokens_map.json")
    specials = {}
    for name, token in config.items():
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and name.endswith("_token"):
            specials[name] = token
    template_file = folder / "chat_template.jinja"
    template = _text(template_file) if template_file.is_file() else config.get("chat_template")
    more: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(name)
        more += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in more]
    try:
        # transformers makes these special, even if tokenizer.json does not.
        backend.add_special_tokens([*specials.values(), *(text for text in texts if isinstance(text, str))])
    except Exception as error:
        raise ModelError(f"{folder}: cannot add the special tokens: {error}. Download the tokenizer again.") from None
    backend.add_tokens(list(new_tokens))
    name = str(config.get("tokenizer_class") or _UNCHANGED[0])
    unchanged = name.removesuffix("Fast") in _UNCHANGED or "ByteLevel" in repr(backend.pre_tokenizer)
    rebuilt = "" if unchanged and not config.get("add_prefix_space") else name
    return LightTokenizer(backend, specials, only_template(template), rebuilt)


def from_transformers(tokenizer: Any) -> LightTokenizer:
    """Convert a transformers tokenizer. Copies it, because the encoder changes its settings."""
    specials = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return LightTokenizer(backend, specials, only_template(tokenizer.chat_template))


def only_template(template: Any) -> str | None:
    """Return the chat template; of several named ones, the one named `default`."""
    if isinstance(template, list):
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    text = _text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: invalid JSON: {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected an object (got {type(content).__name__}). Download it again.")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{file}: invalid UTF-8. Download it again.") from None


PER_DOCUMENT = ("stops", "ended", "empty", "lossy", "digests", "prompts")


def alike(batch: Sequence[Rendered]) -> list[list[Rendered]]:
    """Split a batch into runs with the same `writes_specials`."""
    return [list(part) for _, part in groupby(batch, key=lambda rendered: rendered.writes_specials)]


@dataclass(frozen=True)
class Documents:
    """Concatenated tokenized documents: document i has tokens offsets[i] to offsets[i + 1] - 1.

    `ids` and `trained` have shape (tokens,), `offsets` (documents + 1,), the fields in PER_DOCUMENT (documents,).
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]  # in the loss
    offsets: NDArray[np.int64]
    stops: NDArray[np.int32]  # EOS token of each document
    ended: NDArray[np.bool_]  # that token is in the loss
    empty: NDArray[np.bool_]  # the answer is blank
    lossy: NDArray[np.bool_]  # the template drops or rewrites part of the row
    digests: NDArray[np.uint64]  # hash of the ids
    prompts: NDArray[np.uint64]  # hash of the ids before the first trained token; 0 if there are none

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, document: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and loss mask of one document."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        tokens = slice(int(self.offsets[document]), int(self.offsets[document + 1]))
        return self.ids[tokens], self.trained[tokens]


def join(parts: Sequence[Documents]) -> Documents:
    """Concatenate the documents of several batches."""

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))])
    return Documents(column("ids"), column("trained"), offsets, **{name: column(name) for name in PER_DOCUMENT})


# Trained token ranges, shape (3, spans): document, start and end, relative to the document; end -1: up to its last token.
_Spans = NDArray[np.int64]


class Encoder:
    """Encoder of batches of rendered text. Disables truncation and padding of the given tokenizer."""

    def __init__(self, tokenizer: LightTokenizer) -> None:
        self._backend = tokenizer.backend
        self._backend.no_truncation()  # both can be part of a tokenizer.json
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        eos = tokenizer.specials.get("eos_token")
        if eos is None:
            raise ModelError(
                "the tokenizer has no EOS token, so the model could not learn to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        known = {text: self._backend.token_to_id(text) for text in (eos, *tokenizer.special_texts)}
        self._stops = {text: token for text, token in known.items() if token is not None}
        if eos not in self._stops:
            raise ModelError(
                f"the tokenizer's EOS token is not in its vocabulary (got {eos!r}). "
                "Set another eos_token in its tokenizer_config.json."
            )
        self.eos = self._stops[eos]
        self.bos, self._end = _added(self._backend)
        # If the tokenizer appends another token ([SEP]), EOS replaces it.
        self._replaced = 0 if self._end in ([], [self.eos]) else len(self._end)
        self._bytes = _bytes_per_token(self._backend)
        self._normalizer = self._backend.normalizer

    def encode(self, batch: Sequence[Rendered]) -> Documents:
        """Encode a batch of texts. Raises DataError if a text is not valid Unicode."""
        return join([self.documents(part, self.tokenize(part)) for part in alike(batch)])

    def tokenize(self, batch: Sequence[Rendered]) -> list[Encoding]:
        """Run the tokenizer, which releases the GIL. All texts must have the same `writes_specials`.

        Byte-level tokenizers run without offsets, which is faster: spans follow from the bytes of the tokens.
        """
        return self._run(batch, fast=self._bytes is not None)

    def documents(self, batch: Sequence[Rendered], encodings: list[Encoding]) -> Documents:
        """Assemble documents from the encodings of a batch."""
        specials = batch[0].writes_specials
        flat = _Flat(encodings)
        spans = self._spans_by_bytes(batch, flat, specials=specials) if self._bytes is not None else None
        if spans is None:
            if self._bytes is not None:
                encodings = self._run(batch, fast=False)
                flat = _Flat(encodings)
            added = 0 if specials else len(self._end)
            by_offsets = [
                (number, start, end)
                for number, (rendered, encoding) in enumerate(zip(batch, encodings, strict=True))
                for start, end in _spans_by_offsets(rendered, encoding, len(encoding.ids) - added)
            ]
            spans = np.array(by_offsets, dtype=np.int64).reshape(-1, 3).T
        endings = [self._ending(rendered.text, specials=specials) for rendered in batch]
        has_eos = np.array([closed for closed, _ in endings])
        replaced = 0 if specials else self._replaced

        # The tokenizer's ids without the replaced ones, with EOS appended where it is missing.
        lengths = np.diff(flat.offsets) - replaced
        offsets = np.concatenate([[0], np.cumsum(lengths + ~has_eos)])
        ids = np.full(offsets[-1], self.eos, dtype=np.int32)
        encoded = np.ones(len(ids), dtype=bool)
        encoded[offsets[1:][~has_eos] - 1] = False
        if replaced:
            kept = np.ones(len(flat.ids), dtype=bool)
            for at in range(replaced):
                kept[flat.offsets[1:] - 1 - at] = False
            ids[encoded] = flat.ids[kept]
        else:
            ids[encoded] = flat.ids

        # +1 at the start of a span, -1 after its last token: the cumulative sum is the loss mask.
        changes = np.zeros(len(ids) + 1, dtype=np.int8)
        number, start, end = spans
        np.add.at(changes, offsets[number] + start, 1)
        np.add.at(changes, np.where(end < 0, offsets[number + 1], offsets[number] + end), -1)
        trained = np.cumsum(changes[:-1], dtype=np.int8) > 0
        stops = np.array([stop for _, stop in endings], dtype=np.int32)
        digests, prompts = _digests(ids, trained, offsets)
        return Documents(
            ids,
            trained,
            offsets,
            stops,
            _ended(ids, trained, offsets, stops),
            np.array([rendered.empty for rendered in batch], dtype=bool),
            np.array([rendered.lossy for rendered in batch], dtype=bool),
            digests,
            prompts,
        )

    def _run(self, batch: Sequence[Rendered], *, fast: bool) -> list[Encoding]:
        as_text = not batch[0].writes_specials
        if self._backend.encode_special_tokens != as_text:
            self._backend.encode_special_tokens = as_text
        encode = self._backend.encode_batch_fast if fast else self._backend.encode_batch
        try:
            return encode([rendered.text for rendered in batch], add_special_tokens=as_text)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise _not_unicode(batch) or _cannot_encode(error) from None

    def _spans_by_bytes(self, batch: Sequence[Rendered], flat: "_Flat", *, specials: bool) -> _Spans | None:
        """Compute spans from the number of bytes of each token.

        Returns None if these are not the bytes of the texts, e.g. because a normalizer or an added token changes them.
        """
        assert self._bytes is not None
        sizes = self._bytes[flat.ids]
        if not specials:  # tokens that the tokenizer adds have no text
            for at in range(len(self.bos)):
                sizes[flat.offsets[:-1] + at] = 0
            for at in range(len(self._end)):
                sizes[flat.offsets[1:] - 1 - at] = 0
        ends = np.cumsum(sizes)
        before = np.concatenate([[0], ends])[flat.offsets]
        lengths = [len(rendered.text.encode()) for rendered in batch]
        if not np.array_equal(np.diff(before), lengths):
            return None
        if self._normalizer is not None and any(self._normalizer.normalize_str(r.text) != r.text for r in batch):
            return None
        numbers, starts, stops, to_end = [], [], [], []
        for number, (rendered, length) in enumerate(zip(batch, lengths, strict=True)):
            text = rendered.text
            for start, end in rendered.trained:
                if start == end < len(text):
                    continue
                numbers.append(number)
                to_end.append(end == len(text))
                if length != len(text):  # not ASCII: convert characters to bytes
                    start, end = len(text[:start].encode()), len(text[:end].encode())
                starts.append(start)
                stops.append(end)
        documents, first_byte = np.array(numbers, dtype=np.int64), np.array(starts, dtype=np.int64)
        first, base = flat.offsets[documents], before[documents]
        # Start at the first token that ends after the first byte; an empty span starts at the appended tokens.
        begin = np.searchsorted(ends, base + first_byte, side="right") - first
        begin = np.minimum(begin, np.diff(flat.offsets)[documents] - (0 if specials else len(self._end)))
        begin[first_byte == 0] = 0
        # End after the token that contains the last byte.
        stop = np.searchsorted(ends, base + np.array(stops, dtype=np.int64), side="left") + 1 - first
        stop = np.where(to_end, -1, np.maximum(begin, stop))
        return np.stack([documents, begin, stop])

    def _ending(self, text: str, *, specials: bool) -> tuple[bool, int]:
        """Return whether the encoded text already ends with an EOS token, and that token or the one to append."""
        if not specials:
            return self._end == [self.eos], self.eos
        closing = [token for token in self._stops if text.rstrip().endswith(token)]
        return (True, self._stops[max(closing, key=len)]) if closing else (False, self.eos)


class _Flat:
    """Concatenated ids of several encodings, with offsets."""

    def __init__(self, encodings: Sequence[Encoding]) -> None:
        lists = [encoding.ids for encoding in encodings]
        self.offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
        self.ids = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=self.offsets[-1])


def _spans_by_offsets(rendered: Rendered, encoding: Encoding, own: int) -> Iterator[tuple[int, int]]:
    """Compute spans from the characters that each token covers; the first `own` tokens are of the text."""

    def token_at(start: int) -> int:
        """Return the first token that covers a character at or after `start`."""
        covering = (encoding.char_to_token(position) for position in range(start, len(rendered.text)))
        return next((token for token in covering if token is not None), own)

    for start, end in rendered.trained:
        if start == end < len(rendered.text):
            continue
        begin = token_at(start) if start else 0
        if end == len(rendered.text):
            yield begin, -1
            continue
        stop = token_at(end)
        span = encoding.token_to_chars(stop) if stop < own else None
        yield begin, stop + 1 if span is not None and span[0] < end else stop


def _added(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text: [] or [BOS], [] or [EOS]."""
    for text in ("a", "1", "?"):  # at least one is in the vocabulary
        try:
            probe = backend.encode(text)
        except Exception as error:
            raise _cannot_encode(error) from None
        if 0 in probe.special_tokens_mask:
            first = probe.special_tokens_mask.index(0)
            last = len(probe.ids) - probe.special_tokens_mask[::-1].index(0)
            return probe.ids[:first], probe.ids[last:]
    return [], []


def _bytes_per_token(backend: Tokenizer) -> NDArray[np.int64] | None:
    """Return the number of text bytes per token, by id; None if the tokenizer is not byte-level."""
    if "ByteLevel" not in repr(backend.pre_tokenizer):
        return None
    vocabulary = backend.get_vocab()  # byte-level tokens are spelled with one letter per byte
    ids = np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary))
    sizes = np.zeros(ids.max() + 1, dtype=np.int64)
    sizes[ids] = np.fromiter(map(len, vocabulary), dtype=np.int64, count=len(vocabulary))
    for token, added in backend.get_added_tokens_decoder().items():
        sizes[token] = len(added.content.encode())
    return sizes


def _ended(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], offsets: NDArray[np.int64], stops: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Return per document whether its last EOS token is in the loss; whitespace may follow it."""
    last = offsets[1:] - 1
    if not np.array_equal(ids[last], stops):
        positions = np.where(ids == np.repeat(stops, np.diff(offsets)), np.arange(len(ids)), -1)
        last = np.maximum.reduceat(positions, offsets[:-1])
    return trained[last] & (last >= 0)


def _digests(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hash each document and its prompt: the sum of MurmurHash3's mix of each token and position."""
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    mixed = ids.astype(np.uint64) << np.uint64(32) | positions.astype(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(33)
    digests = np.add.reduceat(mixed, offsets[:-1])  # no document is empty: each has an EOS token
    answers = np.append(np.flatnonzero(trained), len(ids))
    ends = np.minimum(answers[np.searchsorted(answers, offsets[:-1])], offsets[1:])  # ends of the prompts
    edges = np.stack([offsets[:-1], np.minimum(ends, len(ids) - 1)], axis=1).ravel()
    prompts = np.add.reduceat(mixed, edges)[::2]
    prompts[ends == offsets[:-1]] = 0  # reduceat returns the first token for an empty range
    prompts[ends == len(ids)] = digests[ends == len(ids)]  # no later trained token: all of the document is prompt
    return digests, prompts


def _cannot_encode(error: Exception) -> ModelError:
    return ModelError(f"the tokenizer cannot encode unknown text: {error}. Download the tokenizer again.")


def _not_unicode(batch: Iterable[Rendered]) -> DataError | None:
    """Return an error for texts that are not valid Unicode; None if all are."""
    problems = []
    for rendered in batch:
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            problems.append(
                f"{rendered.place}: invalid Unicode: {rendered.text[error.start]!r} is half of a surrogate pair. "
                "Write the file as UTF-8."
            )
    return DataError(*problems) if problems else None

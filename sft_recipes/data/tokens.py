"""From rendered text to token ids, and which of them are trained on.

A document is BOS (where the tokenizer adds one) + text + EOS, encoded as a whole: its ids are those the tokenizer gives
the whole text. Chat templates write BOS and the end of turns themselves; where one does not close the last turn, EOS does.
Where a token straddles the border between prompt and answer it counts as part of the answer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sft_recipes.data.templates import Rendered
from sft_recipes.errors import DataError, ModelError

# Classes whose tokenizer.json transformers 5 takes as it is, or rebuilds as it is; of others, such as LlamaTokenizer, it
# reads the vocabulary and makes the rest itself.
_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")


@dataclass(frozen=True)
class LightTokenizer:
    """What the data needs of a tokenizer; needs neither transformers nor torch."""

    backend: Tokenizer
    specials: Mapping[str, str]  # bos_token, eos_token, ... -> text
    chat_template: str | None = None
    rebuilt: str = ""  # name of its class, where transformers makes that from the vocabulary alone, and maybe otherwise

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
        raise ModelError(f"{file}: not a valid tokenizer: {error}; get the file again") from None
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
        given = config.get(name)
        more += given.values() if isinstance(given, dict) else given if isinstance(given, list) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in more]
    try:
        # As transformers has it, whatever the file says of them.
        backend.add_special_tokens([*specials.values(), *(text for text in texts if isinstance(text, str))])
    except Exception as error:
        raise ModelError(f"{folder}: its special tokens cannot be added: {error}; get its files again") from None
    backend.add_tokens(list(new_tokens))
    name = str(config.get("tokenizer_class") or _AS_IT_IS[0])
    as_it_is = name.removesuffix("Fast") in _AS_IT_IS or "ByteLevel" in repr(backend.pre_tokenizer)
    rebuilt = "" if as_it_is and not config.get("add_prefix_space") else name
    return LightTokenizer(backend, specials, only_template(template), rebuilt)


def of_transformers(tokenizer: Any) -> LightTokenizer:
    """One of transformers' own. Works on a copy, because the data stage sets it up in its own way."""
    specials = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return LightTokenizer(backend, specials, only_template(tokenizer.chat_template))


def only_template(template: Any) -> str | None:
    """A chat template, of several by name the one that is called `default`."""
    if isinstance(template, list):
        template = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
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
        raise ModelError(f"{file}: not valid JSON: {error}; get the file again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected an object, got {type(content).__name__}; get the file again")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{file}: not valid UTF-8; get the file again") from None


ONE_EACH = ("stops", "ended", "empty", "left_out", "digests", "prompts")


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end: document i has the tokens from offsets[i] up to offsets[i + 1].

    `ids` (int32) and `trained` (bool) have one entry a token; those named in ONE_EACH one a document: `stops` (the token
    that ends it), `ended` (that token is trained on), `empty` (it has no answer), `left_out` (it lacks something that its
    row says), `digests` (equal for equal ids) and `prompts` (the same of what precedes the first token that is trained on,
    0 where nothing does); `offsets` (int64) one more.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    stops: NDArray[np.int32]
    ended: NDArray[np.bool_]
    empty: NDArray[np.bool_]
    left_out: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    prompts: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, document: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of one document."""
        if not 0 <= document < len(self):
            raise IndexError(document)
        tokens = slice(int(self.offsets[document]), int(self.offsets[document + 1]))
        return self.ids[tokens], self.trained[tokens]


def join(parts: Sequence[Documents]) -> Documents:
    """Documents of several batches, in order."""

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))])
    return Documents(column("ids"), column("trained"), offsets, **{name: column(name) for name in ONE_EACH})


# Of stretches that are trained on, shape (3, stretches): document, first token and last + 1, counted from the document's
# first; -1: to its very end.
_Stretches = NDArray[np.int64]


class Encoder:
    """Encodes batches of rendered text. Takes the tokenizer over: its truncation and padding are switched off."""

    def __init__(self, tokenizer: LightTokenizer) -> None:
        self._backend = tokenizer.backend
        self._backend.no_truncation()  # both can be part of a tokenizer.json
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        eos = tokenizer.specials.get("eos_token")
        if eos is None:
            raise ModelError(
                "the tokenizer has no end token (eos_token), so the model could not learn to stop; "
                "set eos_token in its tokenizer_config.json"
            )
        known = {text: self._backend.token_to_id(text) for text in (eos, *tokenizer.special_texts)}
        self._stops = {text: token for text, token in known.items() if token is not None}
        if eos not in self._stops:
            raise ModelError(
                f"the tokenizer's end token {eos!r} is not in its vocabulary; set another eos_token in its "
                "tokenizer_config.json"
            )
        self.eos = self._stops[eos]
        self.bos, self._end = _added(self._backend)
        # What a tokenizer puts behind a text takes the end token's place, where it is another ([SEP]).
        self._taken_off = 0 if self._end in ([], [self.eos]) else len(self._end)
        self._bytes = _bytes_a_token(self._backend)
        self._normalizer = self._backend.normalizer

    def encode(self, batch: Sequence[Rendered]) -> Documents:
        """Documents of a batch, in order. Raises DataError where the text is no valid Unicode."""
        if len({rendered.writes_specials for rendered in batch}) > 1:
            return join([self.encode([rendered]) for rendered in batch])
        return self.documents(batch, self.tokenise(batch))

    def tokenise(self, batch: Sequence[Rendered]) -> list[Encoding]:
        """The tokenizer's part of `encode`, which leaves Python to others; rows are all of one kind.

        Byte-level tokens go the way without offsets, which is faster: their bytes are the text's.
        """
        return self._tokenise(batch, fast=self._bytes is not None)

    def documents(self, batch: Sequence[Rendered], encodings: list[Encoding]) -> Documents:
        """What the encodings of a batch make."""
        specials = batch[0].writes_specials
        flat = _Flat(encodings)
        stretches = self._by_bytes(batch, flat, specials=specials) if self._bytes is not None else None
        if stretches is None:
            if self._bytes is not None:
                encodings = self._tokenise(batch, fast=False)
                flat = _Flat(encodings)
            added = 0 if specials else len(self._end)
            found = [
                (number, start, end)
                for number, (rendered, encoding) in enumerate(zip(batch, encodings, strict=True))
                for start, end in _by_offsets(rendered, encoding, len(encoding.ids) - added)
            ]
            stretches = np.array(found, dtype=np.int64).reshape(-1, 3).T
        endings = [self._ending(rendered.text, specials=specials) for rendered in batch]
        ends_here = np.array([closed for closed, _ in endings])
        taken_off = 0 if specials else self._taken_off

        # The tokenizer's tokens without what is taken off, and an end token behind those that lack one.
        own = np.diff(flat.offsets) - taken_off
        offsets = np.concatenate([[0], np.cumsum(own + ~ends_here)])
        ids = np.full(offsets[-1], self.eos, dtype=np.int32)
        theirs = np.ones(len(ids), dtype=bool)
        theirs[offsets[1:][~ends_here] - 1] = False
        if taken_off:
            kept = np.ones(len(flat.ids), dtype=bool)
            for at in range(taken_off):
                kept[flat.offsets[1:] - 1 - at] = False
            ids[theirs] = flat.ids[kept]
        else:
            ids[theirs] = flat.ids

        # +1 where a stretch begins, -1 behind its last token: the sum so far says whether a token is trained on.
        changes = np.zeros(len(ids) + 1, dtype=np.int8)
        number, start, end = stretches
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
            np.array([rendered.left_out for rendered in batch], dtype=bool),
            digests,
            prompts,
        )

    def _tokenise(self, batch: Sequence[Rendered], *, fast: bool) -> list[Encoding]:
        as_text = not batch[0].writes_specials
        if self._backend.encode_special_tokens != as_text:
            self._backend.encode_special_tokens = as_text
        encode = self._backend.encode_batch_fast if fast else self._backend.encode_batch
        try:
            return encode([rendered.text for rendered in batch], add_special_tokens=as_text)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise _not_unicode(batch) or _cannot_encode(error) from None

    def _by_bytes(self, batch: Sequence[Rendered], flat: "_Flat", *, specials: bool) -> _Stretches | None:
        """Stretches from the number of bytes that each token stands for. None where these are not the bytes of the texts,
        as where a normalizer or an added token takes away or adds something."""
        assert self._bytes is not None
        sizes = self._bytes[flat.ids]
        if not specials:  # what the tokenizer adds before and after stands for no text
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
                if length != len(text):  # not all of it is ASCII: characters are not bytes
                    start, end = len(text[:start].encode()), len(text[:end].encode())
                starts.append(start)
                stops.append(end)
        documents, first_byte = np.array(numbers, dtype=np.int64), np.array(starts, dtype=np.int64)
        first, base = flat.offsets[documents], before[documents]
        # The first token that ends behind the first byte; a stretch without bytes begins with what is put at the end.
        begin = np.searchsorted(ends, base + first_byte, side="right") - first
        begin = np.minimum(begin, np.diff(flat.offsets)[documents] - (0 if specials else len(self._end)))
        begin[first_byte == 0] = 0
        # Up to the token that holds the last byte.
        stop = np.searchsorted(ends, base + np.array(stops, dtype=np.int64), side="left") + 1 - first
        stop = np.where(to_end, -1, np.maximum(begin, stop))
        return np.stack([documents, begin, stop])

    def _ending(self, text: str, *, specials: bool) -> tuple[bool, int]:
        """Whether a text ends in a stop token as it is, and the one that it ends in then or is given."""
        if not specials:
            return self._end == [self.eos], self.eos
        closing = [token for token in self._stops if text.rstrip().endswith(token)]
        return (True, self._stops[max(closing, key=len)]) if closing else (False, self.eos)


class _Flat:
    """Ids of several encodings end to end, and where each begins."""

    def __init__(self, encodings: Sequence[Encoding]) -> None:
        lists = [encoding.ids for encoding in encodings]
        self.offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
        self.ids = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=self.offsets[-1])


def _by_offsets(rendered: Rendered, encoding: Encoding, own: int) -> Iterator[tuple[int, int]]:
    """Stretches from the characters that each token covers; the text's own tokens end before `own`."""

    def token_at(start: int) -> int:
        """The first token that covers a character from `start` on."""
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
    """The special tokens that a tokenizer puts before and after a text: [] or [BOS], [] or [EOS]."""
    for text in ("a", "1", "?"):  # whichever is in the vocabulary
        try:
            probe = backend.encode(text)
        except Exception as error:
            raise _cannot_encode(error) from None
        if 0 in probe.special_tokens_mask:
            first = probe.special_tokens_mask.index(0)
            last = len(probe.ids) - probe.special_tokens_mask[::-1].index(0)
            return probe.ids[:first], probe.ids[last:]
    return [], []


def _bytes_a_token(backend: Tokenizer) -> NDArray[np.int64] | None:
    """How many bytes of text each token stands for, by id; None where the tokenizer is not byte-level."""
    if "ByteLevel" not in repr(backend.pre_tokenizer):
        return None
    vocabulary = backend.get_vocab()  # byte-level tokens are written with one letter a byte
    ids = np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary))
    sizes = np.zeros(ids.max() + 1, dtype=np.int64)
    sizes[ids] = np.fromiter(map(len, vocabulary), dtype=np.int64, count=len(vocabulary))
    for token, added in backend.get_added_tokens_decoder().items():
        sizes[token] = len(added.content.encode())
    return sizes


def _ended(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], offsets: NDArray[np.int64], stops: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Whether the last stop token of each document is trained on; white space that a template writes behind it may follow."""
    last = offsets[1:] - 1
    if not np.array_equal(ids[last], stops):
        there = np.where(ids == np.repeat(stops, np.diff(offsets)), np.arange(len(ids)), -1)
        last = np.maximum.reduceat(there, offsets[:-1])
    return trained[last] & (last >= 0)


def _digests(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """64 bits of each document, and of its prompt: the sum of the tokens, each scrambled with its position (as in
    MurmurHash3)."""
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    mixed = ids.astype(np.uint64) << np.uint64(32) | positions.astype(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(33)
    digests = np.add.reduceat(mixed, offsets[:-1])  # no document is empty: each has its end
    answers = np.append(np.flatnonzero(trained), len(ids))
    ends = np.minimum(answers[np.searchsorted(answers, offsets[:-1])], offsets[1:])  # of the prompts
    edges = np.stack([offsets[:-1], np.minimum(ends, len(ids) - 1)], axis=1).ravel()
    prompts = np.add.reduceat(mixed, edges)[::2]
    prompts[ends == offsets[:-1]] = 0  # where reduceat gives the first token
    prompts[ends == len(ids)] = digests[ends == len(ids)]  # nothing is trained on: all of the last one is prompt
    return digests, prompts


def _cannot_encode(error: Exception) -> ModelError:
    return ModelError(f"the tokenizer cannot encode what is not in its vocabulary: {error}; get its files again")


def _not_unicode(batch: Iterable[Rendered]) -> DataError | None:
    """What is wrong with texts that no tokenizer takes; None where nothing is."""
    problems = []
    for rendered in batch:
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            problems.append(
                f"{rendered.place}: not valid Unicode: {rendered.text[error.start]!r} is half of a surrogate pair; "
                "write the file as UTF-8"
            )
    return DataError(*problems) if problems else None

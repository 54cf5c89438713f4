"""From rendered text to token ids, and which of them are trained on.

A document is BOS (where the tokenizer adds one) + text + EOS, encoded as a whole: its ids are those the tokenizer gives
the whole text. Chat templates write BOS and the end of turns themselves; where one does not close the last turn, EOS does.
Where a token straddles the border between prompt and answer it counts as part of the answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
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
    backend.add_special_tokens(list(specials.values()))  # as transformers has it, whatever the file says of them
    backend.add_tokens(list(new_tokens))
    return LightTokenizer(backend, specials, only_template(template))


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
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end: document i has the tokens from offsets[i] up to offsets[i + 1].

    `ids` (int32) and `trained` (bool) have one entry a token; `stops` (the token that ends it), `empty` (it has no answer)
    and `digests` (equal for equal ids) one a document; `offsets` (int64) one more.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    stops: NDArray[np.int32]
    empty: NDArray[np.bool_]
    digests: NDArray[np.uint64]

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
    return Documents(column("ids"), column("trained"), offsets, column("stops"), column("empty"), column("digests"))


# First and last + 1 token of a stretch that is trained on, counted from the document's first; None: to its very end.
_Stretch = tuple[int, int | None]


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
            raise ModelError(f"the tokenizer's end token {eos!r} is not in its vocabulary")
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
        specials = batch[0].writes_specials
        texts = [rendered.text for rendered in batch]
        try:
            ids, stretches = self._encode(batch, texts, specials=specials)
        except (TypeError, UnicodeEncodeError):
            raise _not_unicode(batch) from None
        if not specials and self._taken_off:
            ids = [own[: -self._taken_off] for own in ids]
        endings = [self._ending(text, specials=specials) for text in texts]
        lengths = [len(own) + len(added) for own, (added, _) in zip(ids, endings, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = chain.from_iterable(part for own, (added, _) in zip(ids, endings, strict=True) for part in (own, added))
        every = np.fromiter(flat, dtype=np.int32, count=offsets[-1])
        # +1 where a stretch begins, -1 behind its last token: the sum so far says whether a token is trained on.
        changes = np.zeros(len(every) + 1, dtype=np.int8)
        for own, first, behind in zip(stretches, offsets.tolist(), offsets[1:].tolist(), strict=False):
            for start, end in own:
                changes[first + start] += 1
                changes[behind if end is None else first + end] -= 1
        content = every.tobytes()
        return Documents(
            every,
            np.cumsum(changes[:-1], dtype=np.int8) > 0,
            offsets,
            np.array([stop for _, stop in endings], dtype=np.int32),
            np.array([rendered.empty for rendered in batch], dtype=bool),
            np.array(
                [_digest(content[4 * a : 4 * b]) for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)],
                dtype=np.uint64,
            ),
        )

    def _encode(
        self, batch: Sequence[Rendered], texts: list[str], *, specials: bool
    ) -> tuple[list[list[int]], list[list[_Stretch]]]:
        """Ids as the tokenizer gives them, and the stretches of each document that are trained on."""
        self._backend.encode_special_tokens = not specials
        try:
            if self._bytes is not None:
                # Twice as fast as with offsets, which byte-level tokens do without: their bytes are the text's.
                fast = self._backend.encode_batch_fast(texts, add_special_tokens=not specials)
                ids = [encoding.ids for encoding in fast]
                if (stretches := self._stretches(batch, ids, specials=specials)) is not None:
                    return ids, stretches
            encodings = self._backend.encode_batch(texts, add_special_tokens=not specials)
        finally:
            self._backend.encode_special_tokens = False
        added = 0 if specials else len(self._end)
        return (
            [encoding.ids for encoding in encodings],
            [_by_offsets(rendered, e, len(e.ids) - added) for rendered, e in zip(batch, encodings, strict=True)],
        )

    def _stretches(
        self, batch: Sequence[Rendered], ids: list[list[int]], *, specials: bool
    ) -> list[list[_Stretch]] | None:
        """From the number of bytes that each token stands for; None where these are not the bytes of the texts, as
        where a normalizer or an added token takes away or adds something."""
        assert self._bytes is not None
        offsets = np.concatenate([[0], np.cumsum([len(own) for own in ids])])
        sizes = self._bytes[np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=offsets[-1])]
        if not specials:  # what the tokenizer adds before and after stands for no text
            for at in range(len(self.bos)):
                sizes[offsets[:-1] + at] = 0
            for at in range(len(self._end)):
                sizes[offsets[1:] - 1 - at] = 0
        ends = np.cumsum(sizes)
        before = np.concatenate([[0], ends])[offsets]
        encoded = [rendered.text.encode() for rendered in batch]
        if not np.array_equal(np.diff(before), [len(text) for text in encoded]):
            return None
        if self._normalizer is not None and any(self._normalizer.normalize_str(r.text) != r.text for r in batch):
            return None
        stretches: list[list[_Stretch]] = []
        added = 0 if specials else len(self._end)
        for rendered, text, first, behind, base in zip(
            batch, encoded, offsets.tolist(), offsets[1:].tolist(), before.tolist(), strict=False
        ):
            ascii_only = len(text) == len(rendered.text)
            own: list[_Stretch] = []
            for start, end in rendered.trained:
                if start == end < len(rendered.text):
                    continue
                begin = 0
                if start:
                    start_byte = start if ascii_only else len(rendered.text[:start].encode())
                    begin = min(
                        first + int(np.searchsorted(ends[first:behind], base + start_byte, "right")), behind - added
                    )
                    begin -= first
                if end == len(rendered.text):
                    own.append((begin, None))
                    continue
                end_byte = end if ascii_only else len(rendered.text[:end].encode())
                stop = int(np.searchsorted(ends[first:behind], base + end_byte, "left")) + 1
                own.append((begin, max(begin, stop)))
            stretches.append(own)
        return stretches

    def _ending(self, text: str, *, specials: bool) -> tuple[list[int], int]:
        """What has to be put after a text so that it ends in a stop token, and that token."""
        if not specials:
            return ([] if self._end == [self.eos] else [self.eos]), self.eos
        closing = [token for token in self._stops if text.rstrip().endswith(token)]
        return ([], self._stops[max(closing, key=len)]) if closing else ([self.eos], self.eos)


def _by_offsets(rendered: Rendered, encoding: Encoding, own: int) -> list[_Stretch]:
    """Stretches from the characters that each token covers; the text's own tokens end before `own`."""

    def token_at(start: int) -> int:
        """The first token that covers a character from `start` on."""
        covering = (encoding.char_to_token(position) for position in range(start, len(rendered.text)))
        return next((token for token in covering if token is not None), own)

    stretches: list[_Stretch] = []
    for start, end in rendered.trained:
        if start == end < len(rendered.text):
            continue
        begin = token_at(start) if start else 0
        if end == len(rendered.text):
            stretches.append((begin, None))
            continue
        stop = token_at(end)
        span = encoding.token_to_chars(stop) if stop < own else None
        stretches.append((begin, stop + 1 if span is not None and span[0] < end else stop))
    return stretches


def _added(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text: [] or [BOS], [] or [EOS]."""
    for text in ("a", "1", "?"):  # whichever is in the vocabulary
        probe = backend.encode(text)
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
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    sizes[list(vocabulary.values())] = [len(token) for token in vocabulary]
    for token, added in backend.get_added_tokens_decoder().items():
        sizes[token] = len(added.content.encode())
    return sizes


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _not_unicode(batch: Iterable[Rendered]) -> DataError:
    for rendered in batch:
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            return DataError(
                f"{rendered.place}: not valid Unicode: {rendered.text[error.start]!r} is half of a surrogate pair; "
                "write the file as UTF-8"
            )
    raise AssertionError("the tokenizer refuses text that is valid Unicode")

"""Encode rendered text as token ids with a loss mask.

A document is BOS (if the tokenizer adds it) + text + EOS, encoded in one piece, so its ids are those of the whole text.
Chat templates write BOS and end-of-turn tokens themselves; EOS is appended if the last turn is not closed. A token that
spans the boundary of prompt and answer belongs to the answer; after a prompt of a chat template, both are encoded apart, as at
inference.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sft_recipes.data.chat_templates import named
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
    backend.add_tokens(named.to_add(new_tokens))
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


PER_DOCUMENT = ("stops", "ended", "empty", "lossy", "prompted", "digests", "prompts")


def alike(batch: Sequence[Rendered]) -> list[list[Rendered]]:
    """Split a batch into runs with the same `writes_specials`."""
    return [list(part) for _, part in groupby(batch, key=lambda rendered: rendered.writes_specials)]


@dataclass(frozen=True)
class Documents:
    """Concatenated tokenized rows: row i has tokens offsets[i] to offsets[i + 1] - 1.

    `ids` and `trained` have shape (tokens,), `offsets` (rows + 1,), the fields in PER_DOCUMENT (rows,). A row is one document,
    unless its turns are documents of their own: `begins` are the first tokens of all documents.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]  # in the loss
    offsets: NDArray[np.int64]
    begins: NDArray[np.int64]
    stops: NDArray[np.int32]  # EOS token of each row
    ended: NDArray[np.bool_]  # that token is in the loss
    empty: NDArray[np.bool_]  # the answer is blank
    lossy: NDArray[np.str_]  # the keys that the template drops or rewrites, separated by commas
    prompted: NDArray[np.bool_]  # the text begins with the prompt of inference
    digests: NDArray[np.uint64]  # hash of the ids
    prompts: NDArray[np.uint64]  # hash of the ids before the first trained token; 0 if there are none

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and loss mask of one row."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        tokens = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.ids[tokens], self.trained[tokens]

    def pieces(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the documents of rows: the index into `rows`, first and end token of each."""
        first, last = (np.searchsorted(self.begins, self.offsets[rows + by]) for by in (0, 1))
        counts = last - first
        index = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts) + first[index]
        return index, self.begins[number], np.append(self.begins, self.offsets[-1])[number + 1]


def join(parts: Sequence[Documents]) -> Documents:
    """Concatenate the documents of several batches."""

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.offsets) for part in parts]))])
    firsts = np.cumsum([0, *(len(part.ids) for part in parts)])
    begins = np.concatenate([part.begins + first for part, first in zip(parts, firsts, strict=False)])
    return Documents(column("ids"), column("trained"), offsets, begins, **{name: column(name) for name in PER_DOCUMENT})


def range_sums(values: NDArray[Any], start: NDArray[np.int64], end: NDArray[np.int64], dtype: type) -> NDArray[Any]:
    """Sum `values` over each range [start, end), modulo the size of an unsigned `dtype`."""
    totals: NDArray[Any] = np.zeros(len(values) + 1, dtype=dtype)
    np.cumsum(values, dtype=dtype, out=totals[1:])
    sums: NDArray[Any] = totals[end] - totals[start]  # exact even if the totals have wrapped around
    return sums


class Encoder:
    """Encoder of batches of rendered text. Disables truncation, padding and trimmed offsets of the given tokenizer."""

    def __init__(self, tokenizer: LightTokenizer) -> None:
        self._backend = tokenizer.backend
        self._backend.no_truncation()  # both can be part of a tokenizer.json
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        _keep_blanks(self._backend)
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
        self._blank_first = _blank_first(self._backend)

    def encode(self, batch: Sequence[Rendered]) -> Documents:
        """Encode a batch of texts. Raises DataError if a text is not valid Unicode."""
        return join([self.documents(part, self.tokenize(part)) for part in alike(batch)])

    def prompt(self, text: str, *, specials: bool) -> list[int]:
        """Encode a prompt as for inference."""
        [encoding] = self._run([Rendered("", text, [], specials)])
        return encoding.ids[: len(encoding.ids) - (0 if specials else len(self._end))]

    def tokenize(self, batch: Sequence[Rendered]) -> list[Encoding]:
        """Run the tokenizer, which releases the GIL. All texts must have the same `writes_specials`."""
        return self._run([document for rendered in batch for document in (rendered, *rendered.more)])

    def documents(self, batch: Sequence[Rendered], encodings: list[Encoding]) -> Documents:
        """Assemble documents from the encodings of a batch."""
        specials = batch[0].writes_specials
        added = 0 if specials else len(self._end)
        lists, stops, spans = list[list[int]](), list[int](), list[list[tuple[int, int]]]()
        for rendered, whole in zip((one for row in batch for one in (row, *row.more)), encodings, strict=True):
            encoding = self._cut(rendered, whole)
            tokens = encoding.ids
            spans.append(list(_spans(rendered, encoding, len(tokens) - added)))
            if self._replaced and not specials:
                del tokens[-self._replaced :]
            closed, stop = self._ending(rendered.text, specials=specials)
            lists.append(tokens if closed else [*tokens, self.eos])
            stops.append(stop)
        begins = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
        ids = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=begins[-1])
        trained = np.zeros(len(ids), dtype=bool)
        for begin, end, of_document in zip(begins.tolist(), begins[1:].tolist(), spans, strict=False):
            for start, stop in of_document:
                trained[begin + start : end if stop < 0 else begin + stop] = True
        ended = _ended(ids, trained, begins, np.array(stops, dtype=np.int32))
        first = np.concatenate([[0], np.cumsum([1 + len(rendered.more) for rendered in batch])])
        offsets = begins[first]
        digests, prompts = _digests(ids, trained, offsets)
        return Documents(
            ids,
            trained,
            offsets,
            begins[:-1],
            np.array(stops, dtype=np.int32)[first[1:] - 1],
            np.logical_and.reduceat(ended, first[:-1]) | np.array([rendered.flagged for rendered in batch], dtype=bool),
            np.array([rendered.empty for rendered in batch], dtype=bool),
            np.array([rendered.lossy for rendered in batch], dtype=str),
            np.array([rendered.prompted for rendered in batch], dtype=bool),
            digests,
            prompts,
        )

    def _run(self, documents: Sequence[Rendered]) -> list[Encoding]:
        as_text = not documents[0].writes_specials
        if self._backend.encode_special_tokens != as_text:
            self._backend.encode_special_tokens = as_text
        try:
            return self._backend.encode_batch([one.text for one in documents], add_special_tokens=as_text)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise _not_unicode(documents) or _cannot_encode(error) from None

    def _cut(self, rendered: Rendered, encoding: Encoding) -> Encoding:
        """Encode a prompt as for inference, and then the answer, if a token of the whole text spans both."""
        cuts = [cut for cut in rendered.cuts if cut < len(rendered.text) and _inside(cut, encoding)]
        if not cuts or self._blank_first:
            return encoding
        edges = [0, *cuts, len(rendered.text)]
        parts = [Rendered("", rendered.text[one:other], [], True) for one, other in pairwise(edges)]
        return Encoding.merge(self._run(parts), growing_offsets=True)

    def _ending(self, text: str, *, specials: bool) -> tuple[bool, int]:
        """Return whether the encoded text already ends with an EOS token, and that token or the one to append."""
        if not specials:
            return self._end == [self.eos], self.eos
        closing = [token for token in self._stops if text.rstrip().endswith(token)]
        return (True, self._stops[max(closing, key=len)]) if closing else (False, self.eos)


def _inside(position: int, encoding: Encoding) -> bool:
    """Return True if a token spans the border before a character."""
    token = encoding.char_to_token(position)
    covered = encoding.token_to_chars(token) if token is not None else None
    return covered is not None and covered[0] < position


def _spans(rendered: Rendered, encoding: Encoding, own: int) -> Iterator[tuple[int, int]]:
    """Compute the trained [start, end) tokens (end -1: the last) from the characters that each token covers.

    The first `own` tokens are of the text. A token that spans a border is trained.
    """

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
        yield begin, stop + 1 if stop < own and _inside(end, encoding) else stop


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


def _keep_blanks(backend: Tokenizer) -> None:
    """Let tokens cover their leading and trailing blanks, which some byte-level tokenizers leave out of the offsets."""
    processor = backend.post_processor
    state = processor.__getstate__() if processor is not None else b""
    if b'"trim_offsets":true' in state:
        processor.__setstate__(state.replace(b'"trim_offsets":true', b'"trim_offsets":false'))
        backend.post_processor = processor


def _blank_first(backend: Tokenizer) -> bool:
    """Return True if the tokenizer begins a text with a blank, as SentencePiece does, so that it cannot encode parts."""
    text = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
    return (bool(backend.pre_tokenizer) and backend.pre_tokenizer.pre_tokenize_str(text)[0][0] != "a") or text != "a"


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
    answers = np.append(np.flatnonzero(trained), len(ids))
    ends = np.minimum(answers[np.searchsorted(answers, offsets[:-1])], offsets[1:])  # ends of the prompts
    digests, prompts = (range_sums(mixed, offsets[:-1], end, np.uint64) for end in (offsets[1:], ends))
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

"""What a sequence is made of, token by token, for the eye."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.text import Text
from tokenizers import Tokenizer

from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import DataError

_CONTROLS = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {0x7F: 0x2421}  # as Unicode's pictures
LEGEND = "tokens stand between |, and those that are trained on between ⟦ and ⟧"


def choose(sequences: Sequences, count: int, rows: Sequence[str], seed: int) -> list[int]:
    """Numbers of the sequences that hold `rows`, or without any of `count` random ones.

    A row is `file:line` as errors and previews have it, or a number counted from 1 over the rows of the first source.
    Raises DataError for a row that no sequence holds.
    """
    if not rows:
        picked = np.random.default_rng(seed).permutation(len(sequences))[:count]
        return [int(number) for number in picked]
    found: list[int] = []
    for row in rows:
        source, number = (0, int(row) - 1) if row.isdecimal() and len(row) < 19 else _find(sequences, row)
        pieces = np.flatnonzero((sequences.source == source) & (sequences.row == number))
        if not len(pieces):
            raise DataError(
                f"--row {row}: no sequence holds this row of {sequences.account.sources[source].path}; it is beyond the "
                "last, was dropped, or was set aside for validation"
            )
        found += (np.searchsorted(sequences.bounds, pieces, side="right") - 1).tolist()
    return list(dict.fromkeys(found))


def _find(sequences: Sequences, place: str) -> tuple[int, int]:
    """Numbers of the source and the row that stands at a place."""
    for source, each in enumerate(sequences.chosen):
        for row, there in each.places(range(len(each.documents))).items():
            if there == place:
                return source, row
    first = sequences.chosen[0].places([0])[0]
    raise DataError(f"--row {place}: no training row stands there; expected a row's number, or a place such as {first}")


def show(
    sequences: Sequences, numbers: Iterable[int], backend: Tokenizer, *, colours: bool, ids: bool
) -> Iterator[Text]:
    """The sequences with these numbers: a line for each and for each document in it, and the tokens themselves."""
    numbers = list(numbers)
    places = sequences.places(numbers)
    special = {token: added.content for token, added in backend.get_added_tokens_decoder().items() if added.special}
    for number in numbers:
        row = sequences[number]
        trained = [label != IGNORED for label in row["labels"]]
        yield Text(
            f"sequence {number + 1:,} of {len(sequences):,}: {len(trained):,} tokens of {sequences.account.max_length:,}, "
            f"{sum(trained):,} trained on",
            style="bold",
        )
        at = 0
        for piece in range(int(sequences.bounds[number]), int(sequences.bounds[number + 1])):
            length = int(sequences.end[piece] - sequences.start[piece])
            tokens, mask = row["input_ids"][at : at + length], trained[at : at + length]
            source, document = int(sequences.source[piece]), int(sequences.row[piece])
            first = 0 if sequences.isolated else at
            whole = sequences.chosen[source].documents.offsets[document : document + 2].tolist()
            part = "" if [sequences.start[piece], sequences.end[piece]] == whole else ", a part"
            yield Text(
                f"{places[source][document]}{part}: positions {first:,} to {first + length - 1:,}, {sum(mask):,} trained on",
                style="cyan",
            )
            yield _tokens(tokens, mask, backend, special, colours=colours, ids=ids)
            at += length
        yield Text()


def _tokens(
    tokens: Sequence[int],
    trained: Sequence[bool],
    backend: Tokenizer,
    special: dict[int, str],
    *,
    colours: bool,
    ids: bool,
) -> Text:
    text = Text()
    before = False
    for number, (token, is_trained) in enumerate(zip(tokens, trained, strict=True)):
        if is_trained and not before and not colours:
            text.append("⟦")
        elif number:
            text.append("⟧|" if before and not is_trained and not colours else "|", style="dim")
        word = special.get(token) or _word(token, backend)
        style = ("bold green" if is_trained else "dim") + (" reverse" if token in special else "")
        text.append(word.translate(_CONTROLS).replace("\n", "⏎\n") + (f"({token})" if ids else ""), style=style)
        before = is_trained
    if before and not colours:
        text.append("⟧")
    return text


def _word(token: int, backend: Tokenizer) -> str:
    """A token as text; one that is only a part of a character, by its name in the vocabulary."""
    name = str(backend.id_to_token(token))
    if "ByteLevel" not in repr(backend.decoder):  # SentencePiece-like: a decoder drops the blank before a word
        return "\n" if name == "<0x0A>" else name.replace("▁", " ")
    word = str(backend.decode([token], skip_special_tokens=False))
    return name if "\ufffd" in word else word

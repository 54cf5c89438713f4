"""Show the tokens, loss mask and documents of training sequences."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rich.text import Text
from tokenizers import Tokenizer

from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import DataError

_CONTROLS = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {
    0x7F: 0x2421
}  # Unicode control pictures
LEGEND = "tokens are separated by |; trained tokens are between ⟦ and ⟧"


def select_sequences(sequences: Sequences, count: int, rows: Sequence[str], seed: int) -> list[int]:
    """Select the sequences that contain `rows`, or `count` random ones if there are none.

    A row is given as `file:line` or as its number, from 1, in the first source. Raises DataError if no sequence contains it.
    """
    if not rows:
        picked = np.random.default_rng(seed).permutation(len(sequences))[:count]
        return [int(number) for number in picked]
    selected: list[int] = []
    for row in rows:
        source, number = (0, int(row) - 1) if row.isdecimal() and len(row) < 19 else _find(sequences, row)
        pieces = np.flatnonzero((sequences.source == source) & (sequences.row == number))
        if not len(pieces):
            raise DataError(
                f"--row {row}: not in any training sequence. The row does not exist in "
                f"{sequences.stats.sources[source].path}, was dropped, or is held out for evaluation."
            )
        selected += (np.searchsorted(sequences.bounds, pieces, side="right") - 1).tolist()
    return list(dict.fromkeys(selected))


def _find(sequences: Sequences, place: str) -> tuple[int, int]:
    """Return the source number and row number of the row at `file:line`."""
    for number, source in enumerate(sequences.chosen):
        for row, location in source.places(range(len(source.documents))).items():
            if location == place:
                return number, row
    first = sequences.chosen[0].places([0])[0]
    raise DataError(
        f"--row {place}: there is no training row at this location. Give a row number, or FILE:LINE ({first})."
    )


def show(
    sequences: Sequences, numbers: Iterable[int], backend: Tokenizer, *, colors: bool, ids: bool
) -> Iterator[Text]:
    """Format sequences: a line for each sequence and each document in it, and the tokens."""
    numbers = list(numbers)
    places = sequences.places(numbers)
    special = {token: added.content for token, added in backend.get_added_tokens_decoder().items() if added.special}
    for number in numbers:
        row = sequences[number]
        trained = [label != IGNORED for label in row["labels"]]
        yield Text(
            f"sequence {number + 1:,} of {len(sequences):,}: {len(trained):,} of {sequences.stats.max_length:,} tokens, "
            f"{sum(trained):,} trained",
            style="bold",
        )
        at = 0
        for piece in range(int(sequences.bounds[number]), int(sequences.bounds[number + 1])):
            length = int(sequences.end[piece] - sequences.start[piece])
            tokens, mask = row["input_ids"][at : at + length], trained[at : at + length]
            source, document = int(sequences.source[piece]), int(sequences.row[piece])
            first = 0 if sequences.isolated else at
            whole = sequences.chosen[source].documents.offsets[document : document + 2].tolist()
            part = "" if [sequences.start[piece], sequences.end[piece]] == whole else " (part)"
            yield Text(
                f"{places[source][document]}{part}: positions {first:,} to {first + length - 1:,}, {sum(mask):,} trained",
                style="cyan",
            )
            yield _tokens(tokens, mask, backend, special, colors=colors, ids=ids)
            at += length
        yield Text()


def _tokens(
    tokens: Sequence[int],
    trained: Sequence[bool],
    backend: Tokenizer,
    special: dict[int, str],
    *,
    colors: bool,
    ids: bool,
) -> Text:
    text = Text()
    before = False
    for number, (token, is_trained) in enumerate(zip(tokens, trained, strict=True)):
        if is_trained and not before and not colors:
            text.append("⟦")
        elif number:
            text.append("⟧|" if before and not is_trained and not colors else "|", style="dim")
        word = special.get(token) or _word(token, backend)
        style = ("bold green" if is_trained else "dim") + (" reverse" if token in special else "")
        text.append(word.translate(_CONTROLS).replace("\n", "⏎\n") + (f"({token})" if ids else ""), style=style)
        before = is_trained
    if before and not colors:
        text.append("⟧")
    return text


def _word(token: int, backend: Tokenizer) -> str:
    """Decode a token; if it is only part of a character, return its name in the vocabulary."""
    name = str(backend.id_to_token(token))
    if "ByteLevel" not in repr(backend.decoder):  # SentencePiece-like: its decoder drops a word's leading space
        return "\n" if name == "<0x0A>" else name.replace("▁", " ")
    word = str(backend.decode([token], skip_special_tokens=False))
    return name if "\ufffd" in word else word

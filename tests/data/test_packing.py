import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.data import packing

CAPACITY = 16
lengths_that_fit = st.lists(st.integers(1, CAPACITY), max_size=60)


def pieces(layout: packing.Layout) -> list[list[tuple[int, int, int]]]:
    """Sequences of (document, start, end)."""
    sequences: list[list[tuple[int, int, int]]] = []
    for document, start, end, sequence in zip(*(column.tolist() for column in layout), strict=True):
        if sequence == len(sequences):
            sequences.append([])
        assert sequence == len(sequences) - 1
        sequences[-1].append((document, start, end))
    return sequences


def tokens(layout: packing.Layout) -> list[tuple[int, int]]:
    """Every token as (document, position), in order."""
    return [
        (d, position) for sequence in pieces(layout) for d, start, end in sequence for position in range(start, end)
    ]


@pytest.mark.parametrize(
    "pack", [packing.best_fit_decreasing, packing.wrapped, lambda lengths, _: packing.one_each(lengths)]
)
@given(lengths=lengths_that_fit)
def test_every_token_once_and_no_sequence_too_long(pack, lengths: list[int]) -> None:  # type: ignore[no-untyped-def]
    layout = pack(lengths, CAPACITY)

    assert sorted(tokens(layout)) == [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    assert all(0 < sum(end - start for _, start, end in sequence) <= CAPACITY for sequence in pieces(layout))


@given(lengths_that_fit)
def test_best_fit_keeps_documents_whole(lengths: list[int]) -> None:
    assert all(
        start == 0 and end == lengths[d]
        for sequence in pieces(packing.best_fit_decreasing(lengths, CAPACITY))
        for d, start, end in sequence
    )


@given(lengths_that_fit)
def test_best_fit_is_that_of_the_plain_definition(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda index: room[index])] -= length
        else:
            room.append(CAPACITY - length)

    layout = packing.best_fit_decreasing(lengths, CAPACITY)
    assert sorted(CAPACITY - sum(e - s for _, s, e in sequence) for sequence in pieces(layout)) == sorted(room)


def test_a_document_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="document 1 has 5 tokens"):
        packing.best_fit_decreasing([3, 5], 4)


@given(st.lists(st.integers(0, 50), max_size=20))
def test_wrapped_is_the_stream_cut_at_every_capacity(lengths: list[int]) -> None:
    stream = [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    layout = packing.wrapped(lengths, CAPACITY)

    assert tokens(layout) == stream
    assert [sum(end - start for _, start, end in sequence) for sequence in pieces(layout)] == [
        len(stream[i : i + CAPACITY]) for i in range(0, len(stream), CAPACITY)
    ]


@given(st.lists(st.integers(1, 100), max_size=20))
def test_split(lengths: list[int]) -> None:
    layout = packing.split(lengths, CAPACITY)

    assert tokens(layout) == [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    assert all(0 < end - start <= CAPACITY for [(_, start, end)] in pieces(layout))
    parts: dict[int, list[int]] = {}
    for [(document, start, end)] in pieces(layout):
        parts.setdefault(document, []).append(end - start)
    assert all(max(sizes) - min(sizes) <= 1 for sizes in parts.values())
    assert len(layout.document) == sum(-(-length // CAPACITY) for length in lengths)


@given(lengths_that_fit)
def test_best_fit_numbers_sequences_and_documents_as_they_came(lengths: list[int]) -> None:
    sequences = [[d for d, _, _ in sequence] for sequence in pieces(packing.best_fit_decreasing(lengths, CAPACITY))]

    assert [sequence[0] for sequence in sequences] == sorted(sequence[0] for sequence in sequences)
    assert all(sequence == sorted(sequence) for sequence in sequences)

"""Which pieces of which documents make up each sequence. Works on lengths alone."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence

Piece = tuple[int, int, int]  # document, first token, one past the last


def one_each(lengths: Sequence[int]) -> list[list[Piece]]:
    """Each document alone."""
    return [[(document, 0, length)] for document, length in enumerate(lengths)]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Whole documents, longest first, each into the fullest sequence that still has room for it.

    Johnson, Near-optimal bin packing algorithms (1973). No document may be longer than `capacity`. Sequences with the
    same room left are interchangeable, so they are kept by room, of which there are at most `capacity` values.
    """
    sequences: list[list[Piece]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> sequences
    rooms: list[int] = []  # the keys of with_room that are not empty, ascending
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, more than a sequence of {capacity}")
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            sequence = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(at)
        else:
            room, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append((document, 0, length))
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(sequence)
    return sequences


def wrapped(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Documents one after the other, cut every `capacity` tokens; the last sequence may be shorter."""
    sequences: list[list[Piece]] = []
    room = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                sequences.append([])
                room = capacity
            taken = min(room, length - start)
            sequences[-1].append((document, start, start + taken))
            start, room = start + taken, room - taken
    return sequences


def split(length: int, capacity: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `capacity` tokens that make up a document of `length`."""
    return ((start, min(start + capacity, length)) for start in range(0, length, capacity))

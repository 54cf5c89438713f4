"""Which pieces of which documents make up each sequence. Works on lengths alone."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Layout(NamedTuple):
    """Pieces in the order in which they stand: of which document, from its token `start` up to `end`, in which sequence."""

    document: Ints
    start: Ints
    end: Ints
    sequence: Ints


def one_each(lengths: Sequence[int] | Ints) -> Layout:
    """Each document alone."""
    every = np.arange(len(lengths))
    return Layout(every, np.zeros_like(every), np.asarray(lengths, dtype=np.int64), every)


def best_fit_decreasing(lengths: Sequence[int] | Ints, capacity: int) -> Layout:
    """Whole documents, longest first, each into the fullest sequence that still has room for it.

    Johnson, Near-optimal bin packing algorithms (1973). Sequences with the same room left are interchangeable, so they
    are kept by room, of which there are at most `capacity` values. Sequences are numbered, and documents stand in them,
    by the order in which the documents came. Raises ValueError for a document longer than `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    if len(sizes) and sizes[order[0]] > capacity:
        raise ValueError(f"document {order[0]} has {sizes[order[0]]} tokens, more than a sequence of {capacity}")
    opened = 0
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # room -> sequences
    rooms: list[int] = []  # the keys of with_room that are not empty, ascending
    chosen = []
    for length in sizes[order].tolist():
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, sequence = capacity, opened
            opened += 1
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(sequence)
        chosen.append(sequence)
    sequence_of = np.empty(len(sizes), dtype=np.int64)
    sequence_of[order] = chosen
    _, first, number = np.unique(sequence_of, return_index=True, return_inverse=True)
    sequence_of = np.argsort(np.argsort(first))[number]  # by the first document in each
    by_sequence = np.argsort(sequence_of, kind="stable")
    return Layout(by_sequence, np.zeros_like(by_sequence), sizes[by_sequence], sequence_of[by_sequence])


def wrapped(lengths: Sequence[int] | Ints, capacity: int) -> Layout:
    """Documents one after the other, cut every `capacity` tokens; the last sequence may be shorter."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    begins = np.union1d((ends - lengths)[np.asarray(lengths) > 0], np.arange(0, total, capacity))
    document = np.searchsorted(ends, begins, side="right")
    start = begins - (ends - lengths)[document]
    return Layout(document, start, start + np.diff(np.append(begins, total)), begins // capacity)


def split(lengths: Sequence[int] | Ints, capacity: int) -> Layout:
    """Each document alone, in as few pieces of at most `capacity` tokens as it takes, all about as long."""
    sizes = np.asarray(lengths, dtype=np.int64)
    pieces = -(-sizes // capacity)
    document = np.repeat(np.arange(len(sizes)), pieces)
    every = np.arange(len(document))
    number = every - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start, end = (n * sizes[document] // pieces[document] for n in (number, number + 1))
    return Layout(document, start, end, every)

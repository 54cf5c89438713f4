"""Assign pieces of documents to sequences, given only their lengths in tokens."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Layout(NamedTuple):
    """Pieces in order: tokens [start, end) of `document`, placed in `sequence`; shapes (pieces,)."""

    document: Ints
    start: Ints
    end: Ints
    sequence: Ints


def one_each(lengths: Sequence[int] | Ints) -> Layout:
    """Put each document in its own sequence."""
    every = np.arange(len(lengths))
    return Layout(every, np.zeros_like(every), np.asarray(lengths, dtype=np.int64), every)


def best_fit_decreasing(lengths: Sequence[int] | Ints, capacity: int) -> Layout:
    """Put whole documents, longest first, into the fullest sequence that still has space for them.

    Best-fit decreasing (Johnson, Near-optimal bin packing algorithms, 1973). Sequences with the same free space are
    interchangeable, so they are indexed by free space, which has at most `capacity` values. Sequences, and documents
    within them, keep the order of the input. Raises ValueError if a document is longer than `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    if len(sizes) and sizes[order[0]] > capacity:
        raise ValueError(f"document {order[0]} has {sizes[order[0]]} tokens, more than the capacity {capacity}")
    opened = 0
    by_space: defaultdict[int, list[int]] = defaultdict(list)  # free space -> sequences
    spaces: list[int] = []  # free spaces of at least one sequence, ascending
    assigned = []
    for length in sizes[order].tolist():
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            sequence = by_space[space].pop()
            if not by_space[space]:
                del spaces[at]
        else:
            space, sequence = capacity, opened
            opened += 1
        if left := space - length:
            if not by_space[left]:
                insort(spaces, left)
            by_space[left].append(sequence)
        assigned.append(sequence)
    sequence_of = np.empty(len(sizes), dtype=np.int64)
    sequence_of[order] = assigned
    _, first, number = np.unique(sequence_of, return_index=True, return_inverse=True)
    sequence_of = np.argsort(np.argsort(first))[number]  # by the first document in each
    by_sequence = np.argsort(sequence_of, kind="stable")
    return Layout(by_sequence, np.zeros_like(by_sequence), sizes[by_sequence], sequence_of[by_sequence])


def wrapped(lengths: Sequence[int] | Ints, capacity: int) -> Layout:
    """Concatenate the documents and cut every `capacity` tokens; the last sequence may be shorter."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    begins = np.union1d((ends - lengths)[np.asarray(lengths) > 0], np.arange(0, total, capacity))
    document = np.searchsorted(ends, begins, side="right")
    start = begins - (ends - lengths)[document]
    return Layout(document, start, start + np.diff(np.append(begins, total)), begins // capacity)


def split(lengths: Sequence[int] | Ints, capacity: int) -> Layout:
    """Split each document into the fewest pieces of at most `capacity` tokens, of about equal length."""
    sizes = np.asarray(lengths, dtype=np.int64)
    pieces = -(-sizes // capacity)
    document = np.repeat(np.arange(len(sizes)), pieces)
    every = np.arange(len(document))
    number = every - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start, end = (n * sizes[document] // pieces[document] for n in (number, number + 1))
    return Layout(document, start, end, every)

"""From documents to the sequences that are trained on: what fits, what is packed together, and the account of it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sft_recipes.data import packing
from sft_recipes.data.accounting import Account, SourceAccount, percentiles
from sft_recipes.data.packing import Ints
from sft_recipes.data.tokens import Documents
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data

if TYPE_CHECKING:
    import pyarrow

IGNORED = -100  # the label of a token that is not trained on, as torch's cross entropy has it
_BATCH = 4096  # sequences that are put together at once


@dataclass(frozen=True)
class Chosen:
    """Rows of one source, ascending; a row that stands there twice is seen twice."""

    documents: Documents
    rows: Ints
    account: SourceAccount
    places: Callable[[Collection[int]], dict[int, str]]  # file:line of rows


@dataclass
class Sequences:
    """Pieces of documents laid out in sequences: piece p is ids[start[p]:end[p]] of the documents of its source, and
    sequence s the pieces from bounds[s] up to bounds[s + 1]."""

    chosen: Sequence[Chosen]
    source: Ints
    row: Ints
    start: Ints
    end: Ints
    bounds: Ints
    account: Account
    isolated: bool  # documents in one sequence do not see each other

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def table(self) -> "pyarrow.Table":
        """One row a sequence: input_ids, labels (not shifted; IGNORED where not trained), seq_lengths.

        `seq_lengths` are the lengths of what sees itself alone: the documents, or the whole sequence. The first token of
        each has no context within it, so it is not trained on.
        """
        import pyarrow

        return pyarrow.Table.from_batches(self._batches())

    def mean_document(self) -> float:
        """Length in tokens of what sees itself alone, as a token meets it: of all tokens the mean length of theirs."""
        lengths = (self.end - self.start).astype(np.float64)
        if not self.isolated:
            lengths = np.diff(np.concatenate([[0.0], np.cumsum(lengths)])[self.bounds])
        return float((lengths**2).sum() / max(lengths.sum(), 1.0))

    def __getitem__(self, sequence: int) -> dict[str, list[int]]:
        """One row of the table."""
        if not 0 <= sequence < len(self):
            raise IndexError(sequence)
        columns = self._columns(sequence, sequence + 1)
        return {name: values.tolist() for name, (values, _) in columns.items()}

    def places(self, numbers: Iterable[int]) -> list[dict[int, str]]:
        """`file:line` of all documents in these sequences, by source and row; each file is read once."""
        wanted: list[set[int]] = [set() for _ in self.chosen]
        for number in numbers:
            for piece in range(int(self.bounds[number]), int(self.bounds[number + 1])):
                wanted[int(self.source[piece])].add(int(self.row[piece]))
        return [each.places(rows) if rows else {} for each, rows in zip(self.chosen, wanted, strict=True)]

    def _batches(self) -> Iterator["pyarrow.RecordBatch"]:
        import pyarrow

        for first in range(0, len(self), _BATCH):
            columns = self._columns(first, min(first + _BATCH, len(self)))
            arrays = [
                pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets, pyarrow.int64()), pyarrow.array(values))
                for values, offsets in columns.values()
            ]
            yield pyarrow.record_batch(arrays, names=list(columns))

    def _columns(self, first: int, last: int) -> dict[str, tuple[NDArray[np.int32], Ints]]:
        """Columns of the sequences from `first` up to `last`: values end to end, and where each sequence begins."""
        bounds = self.bounds[first : last + 1]
        pieces = slice(int(bounds[0]), int(bounds[-1]))
        bounds = bounds - bounds[0]
        begins, ends = self.start[pieces].tolist(), self.end[pieces].tolist()
        parts = [
            (self.chosen[source].documents, begin, end)
            for source, begin, end in zip(self.source[pieces].tolist(), begins, ends, strict=True)
        ]
        ids = np.concatenate([documents.ids[begin:end] for documents, begin, end in parts])
        trained = np.concatenate([documents.trained[begin:end] for documents, begin, end in parts])
        offsets = np.concatenate([[0], np.cumsum(self.end[pieces] - self.start[pieces])])
        alone = np.arange(len(offsets)) if self.isolated else bounds  # what sees itself alone
        labels = np.where(trained, ids, np.int32(IGNORED))
        labels[offsets[alone[:-1]]] = IGNORED
        lengths = np.diff(offsets[alone]).astype(np.int32)
        per_sequence = bounds if self.isolated else np.arange(len(bounds))
        return {
            "input_ids": (ids, offsets[bounds]),
            "labels": (labels, offsets[bounds]),
            "seq_lengths": (lengths, per_sequence),
        }


def lay_out(chosen: Sequence[Chosen], data: Data, rng: np.random.Generator | None) -> Sequences:
    """Documents into sequences, in the order of `rng`, or as they come. Fills the accounts.

    Raises DataError where rows are too long and `overlong` is `error`.
    """
    isolated = not data.cross_document_attention
    account = Account([each.account for each in chosen], packing=data.packing, max_length=data.max_length)
    _look_at(chosen)
    # Whatever is cut is cut from these: stretches of tokens, by the document they come from.
    source = np.repeat(np.arange(len(chosen)), [len(each.rows) for each in chosen])
    row = np.concatenate([each.rows for each in chosen])
    start = np.concatenate([each.documents.offsets[each.rows] for each in chosen])
    end = np.concatenate([each.documents.offsets[each.rows + 1] for each in chosen])
    document = np.arange(len(row))
    over = (end - start > data.max_length) & (data.packing != "wrapped" or data.overlong in ("drop", "truncate"))
    if over.any():
        if data.overlong == "error":
            raise DataError(_overlong_message(chosen, source, row, end - start, over, data.max_length))
        if data.overlong == "drop":
            for number, each in enumerate(chosen):
                each.account.dropped["overlong"] = int((over & (source == number)).sum())
            document, start, end = document[~over], start[~over], end[~over]
        elif data.overlong == "truncate":
            end = np.minimum(end, start + data.max_length)
        else:
            pieces = packing.split(end - start, data.max_length)
            document = pieces.document
            start, end = start[document] + pieces.start, start[document] + pieces.end

    # A piece without a trained token teaches nothing; its first token is never predicted.
    teaches = _trained(chosen, source[document], start + 1, end) > 0
    document, start, end = document[teaches], start[teaches], end[teaches]
    kept = np.unique(document)
    for number, each in enumerate(chosen):
        mine = kept[source[kept] == number]
        each.account.kept = len(mine)
        each.account.dropped["no trained token"] = each.account.rows - len(mine) - each.account.dropped["overlong"]
        each.account.dropped = +each.account.dropped  # without what is 0
        cut = int(over[mine].sum())
        each.account.truncated_rows = cut if data.overlong == "truncate" else 0
        each.account.split_rows = cut if data.overlong == "split" else 0
        offsets, rows = each.documents.offsets, row[mine]
        whole = int((offsets[rows + 1] - offsets[rows]).sum())
        each.account.cut_tokens = whole - int((end - start)[source[document] == number].sum())

    if rng is not None:
        order = rng.permutation(len(document))
        document, start, end = document[order], start[order], end[order]
    lengths = end - start
    if data.packing == "bfd":
        layout = packing.best_fit_decreasing(lengths, data.max_length)
    elif data.packing == "wrapped":
        layout = packing.wrapped(lengths, data.max_length)
    else:
        layout = packing.one_each(lengths)
    document, start, end = (
        document[layout.document], start[layout.document] + layout.start, start[layout.document] + layout.end,
    )  # fmt: skip
    bounds = np.append(np.flatnonzero(np.diff(layout.sequence, prepend=-1)), len(layout.sequence))
    sequences = Sequences(chosen, source[document], row[document], start, end, bounds, account, isolated)
    account.sequences = len(sequences)
    _count(sequences)
    return sequences


def _look_at(chosen: Sequence[Chosen]) -> None:
    """Rows, lengths, empty answers, duplicates: what is to be said of rows before any is left out."""
    seen = [np.unique(each.rows) for each in chosen]  # a weight is no duplicate
    digests = np.concatenate([each.documents.digests[rows] for each, rows in zip(chosen, seen, strict=True)])
    first = np.zeros(len(digests), dtype=bool)
    first[np.unique(digests, return_index=True)[1]] = True
    at = 0
    for each, rows in zip(chosen, seen, strict=True):
        each.account.rows = len(each.rows)
        each.account.lengths = percentiles(np.diff(each.documents.offsets)[each.rows])
        each.account.empty_answers = int(each.documents.empty[each.rows].sum())
        each.account.left_out = int(each.documents.left_out[each.rows].sum())
        each.account.duplicates = int((~first[at : at + len(rows)]).sum())
        at += len(rows)


def _count(sequences: Sequences) -> None:
    """Tokens and trained tokens of each source, as the table has them."""
    begin = sequences.start.copy()
    begin[slice(None) if sequences.isolated else sequences.bounds[:-1]] += 1  # the first one's label is IGNORED
    order = np.lexsort((begin, sequences.source))
    trained = np.empty(len(order), dtype=np.int64)
    trained[order] = _trained(sequences.chosen, sequences.source[order], begin[order], sequences.end[order])
    for number, each in enumerate(sequences.chosen):
        mine = sequences.source == number
        each.account.tokens = int((sequences.end - sequences.start)[mine].sum())
        each.account.trained_tokens = int(trained[mine].sum())


def _trained(chosen: Sequence[Chosen], source: Ints, start: Ints, end: Ints) -> Ints:
    """How many tokens from `start` up to `end` are trained on; ascending within each source."""
    counts = np.zeros(len(source), dtype=np.int64)
    for number, each in enumerate(chosen):
        mask = each.documents.trained.view(np.int8)
        some = np.flatnonzero((source == number) & (start < end))
        if not len(some):
            continue
        last = len(mask) - 1  # reduceat takes no index behind the last; what ends there is made up for
        edges = np.stack([start[some], np.minimum(end[some], last)], axis=1).ravel()
        sums = np.add.reduceat(mask, edges, dtype=np.int64)[::2]
        sums[start[some] == last] = 0
        counts[some] = sums + np.where(end[some] > last, mask[last], 0)
    return counts


def _overlong_message(
    chosen: Sequence[Chosen], source: Ints, row: Ints, lengths: Ints, over: NDArray[np.bool_], most: int
) -> str:
    spread = percentiles(lengths)
    longest = int(np.argmax(lengths))
    [place] = chosen[source[longest]].places([int(row[longest])]).values()
    sampled = "".join(
        f" ({each.account.sampled} rows of {each.account.path})" for each in chosen if each.account.sampled
    )
    return (
        f"data.max_length: {int(over.sum()):,} of {len(lengths):,} rows{sampled} are longer than {most} tokens: half of all "
        f"have up to {spread['p50']}, 90 % up to {spread['p90']}, 99 % up to {spread['p99']}, the longest {spread['max']} "
        f"({place}); set data.max_length to one of these, or data.overlong: drop, truncate or split"
    )

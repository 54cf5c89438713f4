"""Build training sequences from documents: apply max_length, pack, and count what was dropped."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sft_recipes.data import packing
from sft_recipes.data.encoder import Documents, range_sums
from sft_recipes.data.packing import Ints
from sft_recipes.data.stats import DatasetStats, SourceStats, percentiles
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data

if TYPE_CHECKING:
    import pyarrow

IGNORED = -100  # label of a token that is not in the loss; the default of torch's cross entropy
_BATCH = 4096  # sequences per record batch


@dataclass(frozen=True)
class SelectedRows:
    """Selected rows of one source, ascending; a repeated row is trained repeatedly."""

    documents: Documents
    rows: Ints
    stats: SourceStats
    places: Callable[[Collection[int]], dict[int, str]]  # row number -> file:line


@dataclass
class Sequences:
    """Sequences of pieces of documents, as indices.

    Piece p is ids[start[p]:end[p]] of the documents of source[p]; sequence s consists of pieces bounds[s] to
    bounds[s + 1] - 1.
    """

    chosen: Sequence[SelectedRows]
    source: Ints
    row: Ints
    start: Ints
    end: Ints
    bounds: Ints
    stats: DatasetStats
    isolated: bool  # documents in one sequence do not attend to each other

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def table(self) -> "pyarrow.Table":
        """Return one row per sequence: input_ids, labels (not shifted; IGNORED if not trained), seq_lengths.

        `seq_lengths` are the lengths of the attention segments: the documents, or the whole sequence. The first token of a
        segment has no context, so its label is IGNORED.
        """
        import pyarrow

        return pyarrow.Table.from_batches(self._batches())

    def mean_document(self) -> float:
        """Return the mean attention segment length in tokens, averaged over tokens."""
        lengths = (self.end - self.start).astype(np.float64)
        if not self.isolated:
            lengths = np.diff(np.concatenate([[0.0], np.cumsum(lengths)])[self.bounds])
        return float((lengths**2).sum() / max(lengths.sum(), 1.0))

    def __getitem__(self, sequence: int) -> dict[str, list[int]]:
        """Return one row of the table."""
        if not 0 <= sequence < len(self):
            raise IndexError(sequence)
        columns = self._columns(sequence, sequence + 1)
        return {name: values.tolist() for name, (values, _) in columns.items()}

    def places(self, numbers: Iterable[int]) -> list[dict[int, str]]:
        """Return per source the `file:line` of all rows in these sequences; each file is read once."""
        rows_of: list[set[int]] = [set() for _ in self.chosen]
        for number in numbers:
            for piece in range(int(self.bounds[number]), int(self.bounds[number + 1])):
                rows_of[int(self.source[piece])].add(int(self.row[piece]))
        return [source.places(rows) if rows else {} for source, rows in zip(self.chosen, rows_of, strict=True)]

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
        """Return name -> (concatenated values, offsets of the sequences) for sequences `first` to `last` - 1."""
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
        segments = np.arange(len(offsets)) if self.isolated else bounds  # attention segments
        labels = np.where(trained, ids, np.int32(IGNORED))
        labels[offsets[segments[:-1]]] = IGNORED
        lengths = np.diff(offsets[segments]).astype(np.int32)
        per_sequence = bounds if self.isolated else np.arange(len(bounds))
        return {
            "input_ids": (ids, offsets[bounds]),
            "labels": (labels, offsets[bounds]),
            "seq_lengths": (lengths, per_sequence),
        }


def build_sequences(
    chosen: Sequence[SelectedRows], data: Data, rng: np.random.Generator | None, sufficient: int | None = None
) -> Sequences:
    """Build sequences from documents, shuffled by `rng` if given, and fill in the statistics.

    Raises DataError if rows are too long and `overlong` is `error`; it recommends the `max_length` that is `sufficient`.
    """
    isolated = not data.cross_document_attention
    totals = DatasetStats([selected.stats for selected in chosen], packing=data.packing, max_length=data.max_length)
    _count_rows(chosen)
    # The tokens [start, end) of every document of the selected rows; they are truncated, split and dropped below.
    source, row, occurrence, start, end = _documents(chosen)
    document = np.arange(len(row))
    over = (end - start > data.max_length) & (data.packing != "wrapped" or data.overlong in ("drop", "truncate"))
    if over.any():
        if data.overlong == "error":
            raise DataError(_overlong_message(chosen, source, row, start, end, data.max_length, sufficient))
        if data.overlong == "drop":
            document, start, end = document[~over], start[~over], end[~over]
        elif data.overlong == "truncate":
            end = np.minimum(end, start + data.max_length)
        else:
            pieces = packing.split(end - start, data.max_length)
            document = pieces.document
            start, end = start[document] + pieces.start, start[document] + pieces.end

    # Drop pieces without a trained token. The first token of a piece is never predicted.
    useful = _trained(chosen, source[document], start + 1, end) > 0
    document, start, end = document[useful], start[useful], end[useful]
    kept = np.unique(occurrence[document])
    long = np.unique(occurrence[over])
    for number, selected in enumerate(chosen):
        stats, first = selected.stats, sum(len(earlier.rows) for earlier in chosen[:number])
        of_source, overlong = (at[(at >= first) & (at < first + len(selected.rows))] - first for at in (kept, long))
        stats.kept = len(of_source)
        if data.overlong == "drop":
            stats.dropped["overlong"] = len(np.setdiff1d(overlong, of_source))
        stats.dropped["no trained token"] = stats.rows - len(of_source) - stats.dropped["overlong"]
        stats.dropped = +stats.dropped  # removes zeros
        affected = len(np.intersect1d(overlong, of_source))
        stats.truncated_rows = affected if data.overlong == "truncate" else 0
        stats.split_rows = affected if data.overlong == "split" else 0
        offsets, rows = selected.documents.offsets, selected.rows[of_source]
        total = int((offsets[rows + 1] - offsets[rows]).sum())
        stats.dropped_tokens = total - int((end - start)[source[document] == number].sum())

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
    sequences = Sequences(chosen, source[document], row[document], start, end, bounds, totals, isolated)
    totals.sequences = len(sequences)
    _count(sequences)
    return sequences


def _documents(chosen: Sequence[SelectedRows]) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Return source, row, position in the selected rows, first and end token of every document."""
    parts = [selected.documents.pieces(selected.rows) for selected in chosen]
    firsts = np.cumsum([0, *(len(selected.rows) for selected in chosen)])
    return (
        np.repeat(np.arange(len(chosen)), [len(index) for index, _, _ in parts]),
        np.concatenate([selected.rows[index] for selected, (index, _, _) in zip(chosen, parts, strict=True)]),
        np.concatenate([index + first for first, (index, _, _) in zip(firsts, parts, strict=False)]),
        np.concatenate([start for _, start, _ in parts]),
        np.concatenate([end for _, _, end in parts]),
    )


def _count_rows(chosen: Sequence[SelectedRows]) -> None:
    """Count rows, lengths, empty answers, lossy rows and duplicates, before any row is dropped."""
    distinct = [np.unique(selected.rows) for selected in chosen]  # rows repeated by a weight are not duplicates
    digests = np.concatenate(
        [selected.documents.digests[rows] for selected, rows in zip(chosen, distinct, strict=True)]
    )
    first = np.zeros(len(digests), dtype=bool)
    first[np.unique(digests, return_index=True)[1]] = True
    at = 0
    for selected, rows in zip(chosen, distinct, strict=True):
        stats, documents = selected.stats, selected.documents
        stats.rows = len(selected.rows)
        _, start, end = documents.pieces(selected.rows)
        stats.token_lengths = percentiles(end - start)
        stats.empty_answers = int(documents.empty[selected.rows].sum())
        stats.count_lossy(documents.lossy[selected.rows])
        stats.duplicates = int((~first[at : at + len(rows)]).sum())
        at += len(rows)


def _count(sequences: Sequences) -> None:
    """Count the tokens and trained tokens of each source in the sequences."""
    begin = sequences.start.copy()
    begin[slice(None) if sequences.isolated else sequences.bounds[:-1]] += 1  # the first label of a segment is IGNORED
    trained = _trained(sequences.chosen, sequences.source, np.minimum(begin, sequences.end), sequences.end)
    for number, selected in enumerate(sequences.chosen):
        of_source = sequences.source == number
        selected.stats.tokens = int((sequences.end - sequences.start)[of_source].sum())
        selected.stats.trained_tokens = int(trained[of_source].sum())


def _trained(chosen: Sequence[SelectedRows], source: Ints, start: Ints, end: Ints) -> Ints:
    """Count the trained tokens of each range [start, end)."""
    counts = np.zeros(len(source), dtype=np.int64)
    for number, selected in enumerate(chosen):
        ranges = np.flatnonzero(source == number)
        counts[ranges] = range_sums(selected.documents.trained, start[ranges], end[ranges], np.uint32)
    return counts


def _overlong_message(
    chosen: Sequence[SelectedRows],
    source: Ints,
    row: Ints,
    start: Ints,
    end: Ints,
    max_length: int,
    sufficient: int | None,
) -> str:
    """Describe the lengths of all rows, and recommend only settings that work."""
    lengths = end - start
    over = lengths > max_length
    spread = percentiles(lengths)
    longest = int(np.argmax(lengths))
    [place] = chosen[source[longest]].places([int(row[longest])]).values()
    sampled = "".join(
        f"; counted in {selected.stats.sampled} rows of {selected.stats.path}"
        for selected in chosen
        if selected.stats.sampled
    )
    trained = _trained(chosen, source, start + 1, np.minimum(end, start + max_length)) > 0
    values = [name for name, works in (("drop", trained[~over].any()), ("truncate", trained.any())) if works]
    remedy = f"data.overlong to {', '.join(values)}{' or ' if values else ''}split"
    if sufficient is not None:
        caveat = " (rows that were not counted may be longer)" if sampled else ""
        remedy = f"data.max_length to at least {sufficient}{caveat}, or {remedy}"
    return (
        f"data.max_length: {int(over.sum()):,} of {len(lengths):,} rows exceed {max_length:,} tokens (p50 {spread['p50']:,}, "
        f"p90 {spread['p90']:,}, p99 {spread['p99']:,}, max {spread['max']:,}; longest: {place}{sampled}). Set {remedy}."
    )

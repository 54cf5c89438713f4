"""Count rows and tokens per source (data.json)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_recipes.data.parsers import ReadReport, describe_unused


@dataclass
class SourceStats:
    """Statistics of one source.

    rows_read = held_out + not_sampled + rows, unless a weight above 1 repeats rows; rows = kept + dropped. `tokens` counts
    the tokens in sequences, `trained_tokens` those with a label other than -100.
    """

    path: str
    format: str
    template: str
    rows_read: int = 0  # of the source; for an evaluation split of training rows: the rows of that split
    held_out: int = 0  # for evaluation
    not_sampled: int = 0  # because of a weight below 1 or a limit on samples
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    duplicates: int = 0  # rows with the same tokens as an earlier row
    empty_answers: int = 0
    lossy_template: int = 0  # rows of which the template drops or rewrites some text
    lossy_keys: dict[str, int] = field(default_factory=dict)  # key of messages -> rows in which it is affected
    missing_eos: int = 0  # training rows whose answer has no EOS token in the loss
    train_overlap: int = 0  # evaluation rows that are also training rows
    prompt_overlap: int = 0  # other evaluation rows with the prompt of a training row
    truncated_rows: int = 0
    split_rows: int = 0
    dropped_tokens: int = 0  # of kept rows, in no sequence
    tokens: int = 0
    trained_tokens: int = 0
    token_lengths: dict[str, int] = field(default_factory=dict)  # percentiles over rows, before truncation
    notes: list[str] = field(default_factory=list)  # how the files were read
    bad_rows: int = 0  # invalid rows, dropped because of data.on_bad_row; these and blank rows are not in rows_read
    blank_rows: int = 0  # blank rows of tables, dropped
    nan_cells: int = 0  # cells with nan, read as empty
    null_keys: int = 0  # rows of tables with null keys in nested objects, removed
    unused_columns: dict[str, int] = field(default_factory=dict)  # columns with content that are not used -> rows
    special_text: dict[str, int] = field(default_factory=dict)  # text like a special token, not parsed as one -> rows
    sampled: str = ""  # describes the sample if not all rows were read

    def count_lossy(self, lossy: NDArray[np.str_]) -> None:
        """Count the rows that the template affects, by the comma-separated keys of each."""
        keys = Counter[str]()
        for names, rows in zip(*np.unique(lossy[lossy != ""], return_counts=True), strict=True):
            self.lossy_template += int(rows)
            keys.update(dict.fromkeys(str(names).split(","), int(rows)))
        self.lossy_keys = dict(keys.most_common())

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "template": self.template,
            "notes": self.notes,
            "bad_rows": self.bad_rows,
            "blank_rows": self.blank_rows,
            "nan_cells": self.nan_cells,
            "null_keys": self.null_keys,
            "unused_columns": self.unused_columns,
            "special_text": self.special_text,
            "rows_read": self.rows_read,
            "held_out": self.held_out,
            "not_sampled": self.not_sampled,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "duplicates": self.duplicates,
            "empty_answers": self.empty_answers,
            "lossy_template": self.lossy_template,
            "lossy_keys": self.lossy_keys,
            "missing_eos": self.missing_eos,
            "train_overlap": self.train_overlap,
            "prompt_overlap": self.prompt_overlap,
            "truncated_rows": self.truncated_rows,
            "split_rows": self.split_rows,
            "dropped_tokens": self.dropped_tokens,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "token_lengths": self.token_lengths,
        }

    def add_report(self, report: ReadReport) -> None:
        """Add what was found while the source was read."""
        self.notes, self.bad_rows = report.notes, len(report.bad_rows)
        self.unused_columns = report.unused
        self.special_text = {token: rows for token, (rows, _, _) in report.special_text.items()}
        self.blank_rows, self.nan_cells, self.null_keys = report.blank_rows, report.nan_cells, report.null_keys

    def line(self) -> str:
        """Format as one console line; counts of 0 are omitted."""
        counts = {
            "invalid (dropped)": self.bad_rows,
            "blank (dropped)": self.blank_rows,
            "nan cells read as empty": self.nan_cells,
            "with null keys of nested objects removed": self.null_keys,
            "held out for evaluation": self.held_out,
            "not sampled": self.not_sampled,
            **{f"dropped ({reason})": count for reason, count in self.dropped.items()},
            "identical to an earlier row": self.duplicates,
            "with an empty answer": self.empty_answers,
            "with the text of a special token, encoded as characters": sum(self.special_text.values()),
            f"with text dropped or rewritten by the template ({', '.join(self.lossy_keys)})": self.lossy_template,
            "without an EOS token in the loss": self.missing_eos,
            "also in the training data": self.train_overlap,
            "with the prompt of a training row": self.prompt_overlap,
            "truncated": self.truncated_rows,
            "split": self.split_rows,
            "tokens dropped": self.dropped_tokens,
        }
        fields = [
            f"{self.rows:,} rows" + (f" from {self.sampled}" if self.sampled else ""),
            f"format {self.format}, template {self.template}",
            *self.notes,
            *describe_unused(self.unused_columns),
            ", ".join(f"{count:,} {name}" for name, count in counts.items() if count),
            "tokens per row: " + ", ".join(f"{name} {length:,}" for name, length in self.token_lengths.items()),
        ]
        return f"{self.path}: {'; '.join(filter(None, fields))}"


@dataclass
class DatasetStats:
    """Statistics of the training or the evaluation data."""

    sources: list[SourceStats] = field(default_factory=list)
    sequences: int = 0
    packing: str = "none"
    max_length: int = 0

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def trained_tokens(self) -> int:
        return sum(source.trained_tokens for source in self.sources)

    @property
    def packing_efficiency(self) -> float:
        """Tokens / (sequences x max_length), from 0 to 1."""
        return self.tokens / (self.sequences * self.max_length) if self.sequences else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "sources": [source.as_dict() for source in self.sources],
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "sequences": self.sequences,
            "packing": self.packing,
            "packing_efficiency": round(self.packing_efficiency, 4),
        }

    def lines(self, name: str) -> list[str]:
        """Format as console lines: one per source and one in total."""
        return [
            *(f"{name}: {source.line()}" for source in self.sources),
            f"{name}: {self.sequences:,} sequences, {self.tokens:,} tokens, {self.trained_tokens:,} trained "
            f"({self.trained_tokens / max(self.tokens, 1):.1%}); packing {self.packing}, {self.packing_efficiency:.1%} full",
        ]


def percentiles(lengths: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    """Return minimum, median, 90th and 99th percentile and maximum; {} if there are no lengths."""
    if not len(lengths):
        return {}
    values = np.percentile(lengths, [0, 50, 90, 99, 100], method="higher").astype(int).tolist()
    return dict(zip(("min", "p50", "p90", "p99", "max"), values, strict=True))

"""What became of every row and token: the numbers of data.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class SourceAccount:
    """One source. read = set_aside + not_chosen + rows, but for a weight above 1, by which a row counts as often as it is
    seen; rows = kept + dropped; tokens are those in sequences, trained_tokens those among them that have a label."""

    path: str
    format: str
    template: str
    read: int = 0  # rows of the source; of validation rows set aside from it, as many as these are
    set_aside: int = 0  # for validation
    not_chosen: int = 0  # because of a weight below 1, or the most samples
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    duplicates: int = 0  # rows whose tokens are those of an earlier row
    empty_answers: int = 0
    left_out: int = 0  # rows whose text lacks, or has otherwise, something that a message says
    endless: int = 0  # training rows whose answer ends in no end token that is trained on
    in_training: int = 0  # validation rows that are training rows too
    prompts_in_training: int = 0  # other validation rows that have the prompt of a training row
    truncated_rows: int = 0
    split_rows: int = 0
    cut_tokens: int = 0  # of kept rows, but not in a sequence
    tokens: int = 0
    trained_tokens: int = 0
    lengths: dict[str, int] = field(default_factory=dict)  # percentiles over the rows, before cutting
    sampled: str = ""  # where not all rows were read: what was

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "template": self.template,
            "read": self.read,
            "set_aside": self.set_aside,
            "not_chosen": self.not_chosen,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "duplicates": self.duplicates,
            "empty_answers": self.empty_answers,
            "left_out": self.left_out,
            "endless": self.endless,
            "in_training": self.in_training,
            "prompts_in_training": self.prompts_in_training,
            "truncated_rows": self.truncated_rows,
            "split_rows": self.split_rows,
            "cut_tokens": self.cut_tokens,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "length": self.lengths,
        }

    def line(self) -> str:
        """The account in words."""
        facts = [f"{self.rows:,} rows of {self.format} as {self.template}"]
        facts += [self.sampled] if self.sampled else []
        facts += [f"{self.set_aside:,} more set aside for validation"] if self.set_aside else []
        facts += [f"{self.not_chosen:,} more not chosen"] if self.not_chosen else []
        facts += [f"{count:,} dropped ({reason})" for reason, count in self.dropped.items()]
        facts += [f"{self.duplicates:,} the same as an earlier one"] if self.duplicates else []
        facts += [f"{self.empty_answers:,} without an answer"] if self.empty_answers else []
        facts += [f"{self.left_out:,} of which the template leaves out or rewrites some text"] if self.left_out else []
        facts += [f"{self.endless:,} without an end that is trained on"] if self.endless else []
        facts += [f"{self.in_training:,} that are training rows too"] if self.in_training else []
        facts += [f"{self.prompts_in_training:,} with the prompt of a training row"] if self.prompts_in_training else []
        facts += [f"{self.truncated_rows:,} truncated"] if self.truncated_rows else []
        facts += [f"{self.split_rows:,} split"] if self.split_rows else []
        facts += [f"{self.cut_tokens:,} tokens cut"] if self.cut_tokens else []
        spread = ", ".join(f"{name} {length:,}" for name, length in self.lengths.items())
        return f"{self.path}: {', '.join(facts)}; tokens a row: {spread}"


@dataclass
class Account:
    """The training or the validation rows."""

    sources: list[SourceAccount] = field(default_factory=list)
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
    def fill(self) -> float:
        """Tokens / (sequences x max_length)."""
        return self.tokens / (self.sequences * self.max_length) if self.sequences else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "sources": [source.as_dict() for source in self.sources],
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "sequences": self.sequences,
            "packing": self.packing,
            "fill": round(self.fill, 4),
        }

    def lines(self, name: str) -> list[str]:
        """The account in words, a line a source and one for all."""
        return [
            *(f"{name}: {source.line()}" for source in self.sources),
            f"{name}: {self.tokens:,} tokens, {self.trained_tokens:,} trained on, in {self.sequences:,} sequences "
            f"(packing {self.packing}, {self.fill:.1%} full)",
        ]


def percentiles(lengths: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    """Smallest, median, 90th and 99th percentile, largest; {} of nothing."""
    if not len(lengths):
        return {}
    values = np.percentile(lengths, [0, 50, 90, 99, 100], method="higher").astype(int).tolist()
    return dict(zip(("min", "p50", "p90", "p99", "max"), values, strict=True))

"""What became of every row and token: the numbers of data.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class SourceAccount:
    """One source. Rows read = kept + dropped; tokens are those of the kept rows, after cutting."""

    path: str
    format: str
    template: str
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    truncated_rows: int = 0
    cut_tokens: int = 0
    split_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: list[int] = field(default_factory=list)  # of the rows read, before cutting

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "template": self.template,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "truncated_rows": self.truncated_rows,
            "cut_tokens": self.cut_tokens,
            "split_rows": self.split_rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "length": percentiles(self.lengths),
        }


@dataclass
class Account:
    """The training or the validation rows."""

    sources: list[SourceAccount] = field(default_factory=list)
    sequences: int = 0
    packing: str = "none"
    fill: float = 0.0  # tokens / (sequences x max_length)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def trained_tokens(self) -> int:
        return sum(source.trained_tokens for source in self.sources)

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
        lines = []
        for source in self.sources:
            facts = [f"{source.rows:,} rows of {source.format} as {source.template}"]
            facts += [f"{count:,} dropped ({reason})" for reason, count in source.dropped.items()]
            if source.truncated_rows:
                facts.append(f"{source.truncated_rows:,} truncated ({source.cut_tokens:,} tokens cut)")
            if source.split_rows:
                facts.append(f"{source.split_rows:,} split")
            lines.append(f"{name}: {source.path}: {', '.join(facts)}")
        lines.append(
            f"{name}: {self.tokens:,} tokens, {self.trained_tokens:,} trained on, in {self.sequences:,} sequences "
            f"(packing {self.packing}, {self.fill:.1%} full)"
        )
        return lines


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 90th and 99th percentile, largest; {} of nothing."""
    if not lengths:
        return {}
    values = np.percentile(lengths, [0, 50, 90, 99, 100], method="higher").astype(int).tolist()
    return dict(zip(("min", "p50", "p90", "p99", "max"), values, strict=True))

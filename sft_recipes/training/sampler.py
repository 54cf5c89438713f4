"""Split batches across ranks without repeating rows: together, all ranks get the rows of one process in the same order.

If the number of rows is not divisible by the number of ranks, accelerate repeats rows from the start, which would count
twice in training and evaluation. Here padding rows without labels are appended instead.
"""

from collections.abc import Iterator
from typing import Any

import transformers
from torch.utils.data import RandomSampler, Sampler

from sft_recipes.data.sequences import IGNORED, Sequences


def pad_to_multiple(sequences: Sequences, multiple: int, pad: int) -> Any:
    """Return the table of sequences, padded with unlabeled rows of two pad tokens to a multiple of `multiple` rows."""
    import pyarrow

    table = sequences.table()
    missing = -len(table) % multiple
    if not missing:
        return table
    row = {"input_ids": [pad, pad], "labels": [IGNORED, IGNORED], "seq_lengths": [2]}
    padding = pyarrow.Table.from_pylist([row] * missing, schema=table.schema)
    return pyarrow.concat_tables([table, padding])


class SamplerMixin(transformers.Trainer):
    """Trainer mixin that shuffles the sequences and keeps padding rows at the end."""

    rows: Sequences

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        inner = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # of all ranks, before sharding
        if isinstance(inner.sampler, RandomSampler) and len(self.rows) < len(self.train_dataset):
            inner.sampler.data_source = range(len(self.rows))
            loader.set_sampler(_PaddedSampler(inner.sampler, len(self.train_dataset)))
        return loader


class _PaddedSampler(Sampler[int]):
    """Sampler that yields the rows of another sampler, then the padding rows up to `number`."""

    def __init__(self, rows: Any, number: int) -> None:
        self.rows, self.number = rows, number

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from range(len(self.rows), self.number)

    def __len__(self) -> int:
        return self.number

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

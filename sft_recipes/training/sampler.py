"""Each process's share of the data: together what one process would see, in its order, and nothing twice.

Where the rows do not divide by the processes, accelerate gives some of them rows from the beginning again, which would be
trained on, and validated on, once more. Here they get rows in which nothing is trained on.
"""

from collections.abc import Iterator
from typing import Any

import transformers
from torch.utils.data import RandomSampler, Sampler

from sft_recipes.data.sequences import IGNORED, Sequences


def pad_to_multiple(sequences: Sequences, at_once: int, pad: int) -> Any:
    """The table of sequences, and behind them as many of two pad tokens, without labels, as make a multiple of `at_once`."""
    import pyarrow

    table = sequences.table()
    lacking = -len(table) % at_once
    if not lacking:
        return table
    row = {"input_ids": [pad, pad], "labels": [IGNORED, IGNORED], "seq_lengths": [2]}
    filling = pyarrow.Table.from_pylist([row] * lacking, schema=table.schema)
    return pyarrow.concat_tables([table, filling])


class SamplerMixin(transformers.Trainer):
    """A random order of the sequences alone; what fills the last step up comes last."""

    rows: Sequences

    def _get_train_sampler(self, *args: Any) -> Any:
        sampler = super()._get_train_sampler(*args)
        return RandomSampler(range(len(self.rows))) if isinstance(sampler, RandomSampler) else sampler

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        inner = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # that of all processes
        if isinstance(inner.sampler, RandomSampler) and len(inner.sampler) < len(self.train_dataset):
            loader.set_sampler(_PaddedSampler(inner.sampler, len(self.train_dataset)))
        return loader


class _PaddedSampler(Sampler[int]):
    """A sampler's rows, and then those up to a number."""

    def __init__(self, rows: Any, number: int) -> None:
        self.rows, self.number = rows, number

    def __iter__(self) -> Iterator[int]:
        yield from self.rows
        yield from range(len(self.rows), self.number)

    def __len__(self) -> int:
        return self.number

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

"""Select training and evaluation rows by number: split, weights, limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sft_recipes.data.packing import Ints
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data, WeightedSource


@dataclass(frozen=True)
class Selection:
    """Row numbers per training and per evaluation source, ascending.

    If `data.eval` is a fraction, `eval` refers to the training sources. `held_out` counts the rows held out of each.
    """

    train: list[Ints]
    eval: list[Ints]
    held_out: list[int]


def select_rows(
    sizes: Sequence[int],
    sources: Sequence[WeightedSource],
    eval_sizes: Sequence[int],
    data: Data,
    rng: np.random.Generator,
) -> Selection:
    """Select the training and evaluation rows. Raises DataError if no training rows are left."""
    sampling = rng if data.shuffle else None
    rows = [
        limited([np.arange(size)], source.max_samples, sampling)[0] for size, source in zip(sizes, sources, strict=True)
    ]
    eval_rows = [np.arange(size) for size in eval_sizes]
    held_out = [0] * len(sizes)
    if isinstance(data.eval, float):
        chosen = hold_out([len(source_rows) for source_rows in rows], data.eval, rng)
        eval_rows = [source_rows[index] for source_rows, index in zip(rows, chosen, strict=True)]
        held_out = [len(evaluated) for evaluated in eval_rows]
        rows = [np.setdiff1d(all_rows, evaluated) for all_rows, evaluated in zip(rows, eval_rows, strict=True)]
    rows = [weighted(source_rows, source.weight, rng) for source_rows, source in zip(rows, sources, strict=True)]
    rows = limited(rows, data.max_train_samples, sampling)
    if not sum(map(len, rows)):
        raise DataError("data.train: no training rows are left. Raise the weights of the sources.")
    return Selection(rows, limited(eval_rows, data.max_eval_samples, None), held_out)


def hold_out(sizes: Sequence[int], fraction: float, rng: np.random.Generator) -> list[Ints]:
    """Sample a `fraction` of all rows, at least one; returns row numbers per source."""
    total = sum(sizes)
    count = max(1, round(fraction * total))
    if count >= total:
        raise DataError(
            f"data.eval: no training rows are left (got {fraction} of {total:,} rows). Set data.eval: null, or add rows."
        )
    return _by_source(np.sort(rng.choice(total, count, replace=False)), sizes)


def weighted(rows: Ints, weight: float, rng: np.random.Generator) -> Ints:
    """Repeat each row `weight` times; a fractional part samples that share of the rows."""
    whole, part = divmod(weight, 1)
    sampled = rng.choice(rows, round(part * len(rows)), replace=False)
    return np.sort(np.concatenate([np.repeat(rows, int(whole)), sampled]))


def limited(rows: list[Ints], most: int | None, rng: np.random.Generator | None) -> list[Ints]:
    """Limit all sources to `most` rows in total: a random sample, or the first rows if `rng` is None."""
    sizes = [len(source_rows) for source_rows in rows]
    if most is None or most >= sum(sizes):
        return rows
    chosen = np.sort(rng.choice(sum(sizes), most, replace=False)) if rng else np.arange(most)
    return [source_rows[index] for source_rows, index in zip(rows, _by_source(chosen, sizes), strict=True)]


def _by_source(numbers: Ints, sizes: Sequence[int]) -> list[Ints]:
    """Convert row numbers over all sources to row numbers per source."""
    edges = np.cumsum([0, *sizes])
    return [numbers[(numbers >= a) & (numbers < b)] - a for a, b in pairwise(edges)]

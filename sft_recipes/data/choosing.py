"""Which rows are trained on, and which are validated on. Works on numbers of rows alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sft_recipes.data.packing import Ints
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data


@dataclass(frozen=True)
class Choice:
    """Rows of each training source, and of each source of validation rows, ascending.

    Where `data.eval` is a fraction, the validation rows are of the training sources; `set_aside` says how many of each.
    """

    train: list[Ints]
    eval: list[Ints]
    set_aside: list[int]


def choose(
    sizes: Sequence[int], weights: Sequence[float], eval_sizes: Sequence[int], data: Data, rng: np.random.Generator
) -> Choice:
    """What is trained and validated on. Raises DataError where no rows are left to train on."""
    rows = [np.arange(size) for size in sizes]
    eval_rows = [np.arange(size) for size in eval_sizes]
    aside = [0] * len(sizes)
    if isinstance(data.eval, float):
        eval_rows = set_aside(sizes, data.eval, rng)
        aside = [len(some) for some in eval_rows]
        rows = [np.setdiff1d(all_rows, some) for all_rows, some in zip(rows, eval_rows, strict=True)]
    rows = [weighted(some, weight, rng) for some, weight in zip(rows, weights, strict=True)]
    rows = limited(rows, data.max_train_samples, rng if data.shuffle else None)
    if not sum(map(len, rows)):
        raise DataError("data.train: no rows are left to train on; look at the weights, and at data.eval")
    return Choice(rows, limited(eval_rows, data.max_eval_samples, None), aside)


def set_aside(sizes: Sequence[int], fraction: float, rng: np.random.Generator) -> list[Ints]:
    """Random rows of each source, a `fraction` of all and at least one."""
    total = sum(sizes)
    count = max(1, round(fraction * total))
    if count >= total:
        raise DataError(
            f"data.eval: {fraction} of {total} rows leaves nothing to train on; set data.eval: null, or give more rows"
        )
    return _by_source(np.sort(rng.choice(total, count, replace=False)), sizes)


def weighted(rows: Ints, weight: float, rng: np.random.Generator) -> Ints:
    """Each row as often as the weight says; of a fraction, a random part."""
    whole, part = divmod(weight, 1)
    some = rng.choice(rows, round(part * len(rows)), replace=False)
    return np.sort(np.concatenate([np.repeat(rows, int(whole)), some]))


def limited(rows: list[Ints], most: int | None, rng: np.random.Generator | None) -> list[Ints]:
    """`most` rows over all sources: random ones, or without `rng` the first."""
    sizes = [len(some) for some in rows]
    if most is None or most >= sum(sizes):
        return rows
    chosen = np.sort(rng.choice(sum(sizes), most, replace=False)) if rng else np.arange(most)
    return [some[which] for some, which in zip(rows, _by_source(chosen, sizes), strict=True)]


def _by_source(numbers: Ints, sizes: Sequence[int]) -> list[Ints]:
    """Numbers of rows counted over all sources, as numbers within each."""
    edges = np.cumsum([0, *sizes])
    return [numbers[(numbers >= a) & (numbers < b)] - a for a, b in pairwise(edges)]

"""Compute the number of optimizer steps of a run."""

import math
from dataclasses import dataclass

from sft_recipes.recipe.schema import Recipe


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run."""

    per_epoch: int
    total: int
    warmup: int

    def every(self, interval: float | int | None) -> int | None:
        """Convert an interval of the recipe (a fraction of the run, or a number of steps) to steps."""
        if interval is None:
            return None
        return interval if isinstance(interval, int) else max(1, math.ceil(interval * self.total))


def count(recipe: Recipe, sequences: int) -> Steps:
    """Count the steps over `sequences` training sequences. The last step of an epoch may be smaller than the others."""
    train, world = recipe.train, recipe.launch.world_size
    # The value of auto does not change the number of steps, unless TRL drops incomplete micro-batches.
    micro = train.micro_batch_size_or_1
    if recipe.trl.get("dataloader_drop_last"):
        micro_batches = sequences // (micro * world)
    else:
        micro_batches = math.ceil(sequences / (micro * world))
    per_epoch = max(1, math.ceil(micro_batches / recipe.accumulation))
    by_epochs = math.ceil((train.epochs or 1) * per_epoch)
    total = by_epochs if train.max_steps is None else train.max_steps
    if train.epochs is not None:
        total = min(total, by_epochs)
    warmup = math.ceil(total * train.warmup_ratio_or_default) if train.warmup_steps is None else train.warmup_steps
    # A warmup as long as the run would leave a single step at a learning rate of 0.
    return Steps(per_epoch, total, min(warmup, total - 1))

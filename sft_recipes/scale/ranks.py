"""The processes that train together, as torchrun and its like start them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return int(os.environ.get("RANK") or 0) == 0


@contextmanager
def main_first() -> Iterator[None]:
    """What is done within is done by the main process before the others, which find it done."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    with PartialState(cpu=not torch.accelerator.is_available()).main_process_first():
        yield

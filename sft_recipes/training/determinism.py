"""Switch torch to deterministic algorithms for the length of a run.

By default some CUDA kernels add in an order that differs from run to run, the backward pass of flash attention among them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS reads it when CUDA starts
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # for transformers' flash_attention_2 and 3
}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Allow deterministic algorithms only, if wanted, and restore the process's settings at the end.

    Enter it before CUDA starts. An operation without a deterministic implementation raises RuntimeError. It has to be an
    error: with `warn_only`, torch keeps the nondeterministic kernels of flash and memory-efficient attention. This is
    transformers' enable_full_determinism without CUDA_LAUNCH_BLOCKING, which makes every kernel launch wait.
    """
    if not wanted:
        yield
        return
    before = {name: os.environ.get(name) for name in _VARIABLES}
    was_on, warned_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    os.environ.update(_VARIABLES)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

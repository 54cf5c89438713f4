"""Switch torch to deterministic algorithms during a run.

By default some CUDA kernels, such as the backward pass of flash attention, sum in an order that differs between runs.
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
def deterministic(enabled: bool) -> Iterator[None]:
    """Allow only deterministic algorithms if `enabled`, and restore the previous settings at the end.

    Enter it before CUDA starts. Operations without a deterministic implementation raise RuntimeError, not a
    warning: with `warn_only`, torch keeps the nondeterministic kernels of flash and memory-efficient attention. This is
    transformers' enable_full_determinism without CUDA_LAUNCH_BLOCKING, which makes every kernel launch wait.
    """
    if not enabled:
        yield
        return
    before = {name: os.environ.get(name) for name in _VARIABLES}
    was_on, warned_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.update(_VARIABLES)
    torch.use_deterministic_algorithms(True)
    # Writing to new memory would cost a kernel per tensor, and host memory that FSDP2's other ranks never use.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

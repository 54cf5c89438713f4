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
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    os.environ.update(_VARIABLES)
    torch.use_deterministic_algorithms(True)
    # Writing to new memory would cost a kernel per tensor, and host memory that FSDP2's other ranks never use.
    cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        for name in _VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(variables)

"""Run chat templates in child processes with limits on CPU time and memory, because templates are programs by anyone.

Jinja's sandbox only blocks access to Python: `{{ 1 | round(400000000, 'ceil') }}` is allowed, and computes for hours.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from sft_recipes.errors import RecipeError

_SECONDS = 5  # of CPU time per row; a conversation of 100 turns takes 0.1
_BYTES = 2 << 30  # of memory, beyond what the process has when it starts
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
T = TypeVar("T")


def children(number: int) -> ProcessPoolExecutor:
    """Return a pool of limited processes. They end with this one."""
    import transformers.utils.chat_template_utils  # noqa: F401  # takes half a second, which no child needs to spend again

    linux = sys.platform == "linux"  # fork is unsafe on other systems
    return ProcessPoolExecutor(number, multiprocessing.get_context("fork" if linux else "spawn"), _limit_memory)


def _limit_memory() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its children
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # in case the parent is killed
        with open("/proc/self/statm") as file:  # noqa: PTH123  # Path.open takes ten times as long
            size = int(file.read().split()[0]) * resource.getpagesize()
        _set(resource.RLIMIT_AS, size + _BYTES)


def restart_clock() -> None:
    """Grant this process the CPU time of another row. It is killed when that is used up."""
    _set(resource.RLIMIT_CPU, int(time.process_time()) + _SECONDS)


def _set(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def limited(name: str, function: Callable[..., T], *args: object) -> T:
    """Call a function that renders the template `name` in a limited process. Raises RecipeError if it exceeds the limits."""
    with children(1) as one:
        try:
            return one.submit(_limited, function, *args).result()
        except BrokenProcessPool:
            raise exceeded(name) from None


def _limited(function: Callable[..., T], *args: object) -> T:
    restart_clock()
    return function(*args)


def exceeded(name: str, where: str = "") -> RecipeError:
    return RecipeError(
        f"{name}: the template violates the sandbox: it takes more than {_SECONDS} seconds of CPU time or "
        f"{_BYTES >> 30} GiB of memory{where}. Use another template."
    )

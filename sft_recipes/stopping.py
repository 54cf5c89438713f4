"""Stop a run early on SIGTERM, SIGINT or a time limit."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from sft_recipes.errors import RecipeError, Stopped

_UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal with no work to finish first. Not an Exception, so that no `except Exception` catches it."""


class Stop:
    """Request to stop a run, by signal or time limit (`after`, in seconds from now; None: no limit)."""

    def __init__(self, after: float | None = None) -> None:
        self.deadline = None if after is None else time.monotonic() + after
        self.after = after
        self.signal: str | None = None
        self.waits: str | None = None  # work that is finished before a signal stops the run, as printed

    @property
    def reason(self) -> str | None:
        """Return why the run has to stop, None if it does not."""
        if self.signal is not None:
            return f"stopped by {self.signal}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return f"stopped after {format_seconds(self.after or 0)}"
        return None

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal: the first one stops the run gracefully, the second one exits immediately."""
        if self.signal is not None:
            os._exit(128 + number)  # the shell's exit code for signals
        self.signal = signal.Signals(number).name
        if self.waits is None:
            raise Interrupted
        with suppress(OSError):  # the reader of `| tee log` received the same signal and has exited
            os.write(2, f"\n{self.signal} received: {self.waits}. Send it again to quit immediately.\n".encode())


@contextmanager
def on_request(after: float | None, command: str | None) -> Iterator[Stop]:
    """Stop the enclosed code on SIGTERM, SIGINT or a time limit. Raises Stopped with the `command` that resumes it.

    `command` is None for what cannot be resumed and for single ranks: their launcher prints the command and kills them on
    a second signal. Ranks ignore a repeated signal, because systemd and others signal every process while the launcher
    also forwards its own.
    """
    stop = Stop(after)
    own_pid = os.getpid()
    hint = [f"Resume with: {command}"] if command else []

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own_pid:  # a forked child
            os._exit(128 + number)
        if command is not None or stop.signal is None:
            stop.receive(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()  # required by signal.signal
    before = {number: signal.signal(number, receive) for number in _SIGNALS} if in_main_thread else {}
    try:
        yield stop
    except Interrupted:
        raise Stopped(f"{stop.reason}; no training progress was lost", *hint) from None
    except Stopped as stopped:
        raise Stopped(*stopped.lines, *hint) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds(duration: str) -> float:
    """Parse a duration such as 3h, 90m, 1h30m or 45s to seconds. Raises RecipeError."""
    match = re.fullmatch("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS), duration.strip())
    total = (
        sum(float(part) * size for part, size in zip(match.groups("0"), _UNITS.values(), strict=True)) if match else 0
    )
    if not total:
        raise RecipeError(f"--stop-after: expected a duration such as 3h, 90m, 1h30m or 45s (got {duration}).")
    return total


def format_seconds(length: float) -> str:
    """Format a duration as `seconds` parses it: 5400 is 1h30m."""
    words = ""
    for unit, size in _UNITS.items():
        whole, length = (int(length // size), length % size) if size > 1 else (length, 0)
        words += f"{whole:g}{unit}" if whole else ""
    return words or "0s"

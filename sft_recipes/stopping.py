"""Ending a run early on request: SIGTERM, SIGINT, or a time that is up."""

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
    """A signal where there is nothing to finish first. No `except Exception` on the way holds it up."""


class Stop:
    """Whether the run is to end. `after` is in seconds from now; None: no limit."""

    def __init__(self, after: float | None = None) -> None:
        self.deadline = None if after is None else time.monotonic() + after
        self.after = after
        self.signal: str | None = None
        self.waits: str | None = None  # what a signal does not interrupt, in words

    @property
    def reason(self) -> str | None:
        """Why the run is to end, None where it is not."""
        if self.signal is not None:
            return f"stopped by {self.signal}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return f"stopped after {duration_in_words(self.after or 0)}"
        return None

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """A signal: the first one ends the run in good order, another one at once."""
        if self.signal is not None:
            os._exit(128 + number)  # the shell's code for it; whatever is complete stays
        self.signal = signal.Signals(number).name
        if self.waits is None:
            raise Interrupted
        with suppress(OSError):  # `| tee log` got the signal too, and is gone
            os.write(2, f"\n{self.signal}: {self.waits}; another one ends it at once\n".encode())


@contextmanager
def on_request(after: float | None, command: str | None) -> Iterator[Stop]:
    """Lets SIGTERM, SIGINT and the time end what is done within. Raises Stopped, with the `command` that continues it.

    None is for what is not continued, and for one of several ranks: its launcher says the command, and ends the ranks at a
    second signal. For the rank that is the first once more, which systemd and the like send to every process, while the
    launcher hands its own on.
    """
    stop = Stop(after)
    mine = os.getpid()
    more = [f"continue with: {command}"] if command else []

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a process that was forked off
            os._exit(128 + number)
        if command is not None or stop.signal is None:
            stop.receive(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()  # no other may
    before = {number: signal.signal(number, receive) for number in _SIGNALS} if in_main_thread else {}
    try:
        yield stop
    except Interrupted:
        raise Stopped(f"{stop.reason}; nothing that was trained is lost", *more) from None
    except Stopped as stopped:
        raise Stopped(*stopped.lines, *more) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds(duration: str) -> float:
    """A duration such as 3h, 90m, 1h30m or 45s in seconds. Raises RecipeError."""
    found = re.fullmatch("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS), duration.strip())
    total = (
        sum(float(part) * size for part, size in zip(found.groups("0"), _UNITS.values(), strict=True)) if found else 0
    )
    if not total:
        raise RecipeError(f"--stop-after {duration}: expected a time such as 3h, 90m, 1h30m or 45s")
    return total


def duration_in_words(length: float) -> str:
    """Seconds as seconds() reads them: 5400 is 1h30m."""
    words = ""
    for unit, size in _UNITS.items():
        whole, length = (int(length // size), length % size) if size > 1 else (length, 0)
        words += f"{whole:g}{unit}" if whole else ""
    return words or "0s"

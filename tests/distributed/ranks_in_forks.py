"""Fork ranks from the test process, which has the libraries loaded, instead of starting fresh ones as `run` does."""

import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from tests import commands


class Forked:
    """A forked rank with the interface of Popen."""

    def __init__(self, process: BaseProcess) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)


def fork_ranks(folder: Path, first: Callable[[int], object] = int) -> None:
    """Fork the ranks that this process launches from now on; each calls `first` with its rank before it starts.

    Console output goes to `out` and `err` in the folder.
    """

    def popen(self: Any, command: Any, env: dict[str, str]) -> Forked:
        def prepare() -> None:
            os.setsid()
            first(int(env["RANK"]))

        out = self._stdout.name if self._stdout else folder / "out"
        err = self._stderr.name if self._stderr else folder / "err"
        arguments = command[command.index("run") :]
        return Forked(commands.start(*arguments, out=Path(out), err=Path(err), environment=env, first=prepare))

    SubprocessHandler._popen = popen

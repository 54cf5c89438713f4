"""`sft-recipe` in a forked child of the tests' process, which has loaded the libraries: a fresh process takes 10 s for that.

All else is as in a process of its own: output, exit code, signals, environment, working directory.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from sft_recipes import cli
from tests.kills import mend_torch


def start(
    *arguments: str,
    out: Path,
    err: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    first: Callable[[], object] = int,
) -> BaseProcess:
    """A child that does what the command line says, writing to these files; `first` is called in it before."""
    if arguments and arguments[0] in ("run", "generate", "merge"):
        pass
    return forked(_command, arguments, out, err, cwd, dict(environment), first)


def forked(act: Callable[..., object], *arguments: object) -> BaseProcess:
    """A child that does it."""
    # What has used a GPU cannot fork a process that will: there, all of them are forked from one that has not.
    used = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
    child = multiprocessing.get_context("forkserver" if used else "fork").Process(target=_child, args=(act, arguments))
    child.start()
    return child


def _child(act: Callable[..., object], arguments: tuple[object, ...]) -> None:
    mend_torch()
    gc.freeze()  # what is loaded is no garbage to be looked for in each training
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers hang in a fork of a process that has used their threads
    act(*arguments)


def _command(
    arguments: tuple[str, ...],
    out: Path,
    err: Path,
    cwd: Path | None,
    environment: dict[str, str],
    first: Callable[[], object],
) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(cwd or ".")
    os.environ.clear()
    os.environ.update(environment | {"TOKENIZERS_PARALLELISM": "false"})
    sys.modules["__main__"].__package__ = None  # or the name in its help is that of the tests
    sys.argv = ["sft-recipe", *arguments]
    first()
    cli.main()


def sft_recipe(
    *arguments: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    first: Callable[[], object] = int,
) -> subprocess.CompletedProcess[str]:
    """The command from its beginning to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = start(*arguments, out=out, err=err, cwd=cwd, environment=environment, first=first)
        child.join()
        return subprocess.CompletedProcess(
            arguments, child.exitcode or 0, out.read_text("utf-8"), err.read_text("utf-8")
        )

"""Launch the ranks of this node and wait for them; if one fails, stop the others and raise the first error.

torch starts them as torchrun does. Its agent is not used, because that stops all ranks as soon as one exits with a code other
than 0, which 75 after a checkpoint is.
"""

import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipes.distributed import ranks
from sft_recipes.errors import InputError, RecipeError, RunError, SFTRecipeError, Stopped, reason_of
from sft_recipes.recipe.schema import Launch, Recipe

# Seconds in which other ranks may report their own errors after one failed, by whether it only lost another one.
_GRACE_SECONDS = {False: 1.0, True: 4.5}
_EXTERNAL_ADDRESS = "198.51.100.1"  # reserved for documentation (RFC 5737)
_STOPPED = Stopped.exit_code
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(recipe: Recipe, arguments: Sequence[str], *, debug: bool = False) -> None:
    """Run `sft-recipe ARGUMENTS` in each rank of this node and wait; the node's first rank has the console.

    Signals are forwarded, so that all ranks stop at the same step. Raises the error of the rank that failed first.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    settings = recipe.launch
    if 0 < (gpus := torch.cuda.device_count()) < settings.processes:
        raise RecipeError(
            f"launch.processes: only {gpus} GPU{'s are' if gpus > 1 else ' is'} visible, one is needed per process "
            f"(got {settings.processes}). Pass --processes {gpus}."
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # errors are reported here
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are handled here
    with tempfile.TemporaryDirectory(prefix="sft-recipes-") as folder:
        first_rank, rendezvous = _rendezvous(settings)
        local_ranks = range(settings.processes)
        # The libraries print pages about a lost connection. _describe_exit shows the last line if a rank reports no error.
        redirects = {local: Std.NONE if debug else Std.ERR if local == 0 else Std.ALL for local in local_ranks}
        command = ("-P", "-m", "sft_recipes.cli", *arguments)
        started = start_processes(
            name="rank", entrypoint=sys.executable,
            args=dict.fromkeys(local_ranks, command),
            envs={local: rendezvous | _rank_environment(first_rank + local, local, settings) for local in local_ranks},
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=redirects),
        )  # fmt: skip
        try:
            with _forwarded_signals([handler.proc for handler in started.subprocess_handlers.values()]) as signals:
                failures, running = _wait(started, first_rank, signals)
        finally:
            started.close(signal.SIGKILL)
    if failures:
        failure = min(failures)
        if failure.lost and running:
            line, *others = failure.error.lines
            raise RunError(f"{line} (Killed, still running: {ranks.format_ranks(running)}.)", *others)
        raise failure.error


def _rendezvous(settings: Launch) -> tuple[int, dict[str, str]]:
    """Return this node's first rank and the variables with the rendezvous address; node 0 starts the store there."""
    from torch.distributed import TCPStore

    environment, node = os.environ, ranks.node_rank(settings)
    address, port = "127.0.0.1", 0  # any free port
    if settings.machines > 1:
        if not environment.get("MASTER_ADDR"):
            raise RecipeError(ranks.no_rendezvous(settings))
        address, port = environment["MASTER_ADDR"], ranks.int_from_env("MASTER_PORT") or int(ranks.PORT)
    global _store
    if node == 0:
        try:
            _store = TCPStore(address, port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            reason = "the address is in use" if "EADDRINUSE" in str(error) else reason_of(error)
            raise RecipeError(
                f"MASTER_PORT: cannot listen on {address}:{port}: {reason}. Stop the program that uses it, or set "
                "MASTER_PORT to a free port."
            ) from None
        port = _store.port
    variables = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if settings.machines > 1 and (interface := _interface_for(address)):
        variables["GLOO_SOCKET_IFNAME"] = environment.get("GLOO_SOCKET_IFNAME", interface)
    return node * settings.processes, variables


_store: Any = None  # garbage collection would stop the server


def _interface_for(address: str) -> str | None:
    """Return the network interface that reaches an address; gloo would use that of the host name.

    Many hosts resolve their own name to 127.0.1.1, which is no use to other nodes; then take the default route's interface.
    """
    is_name = not address.startswith("127.") and address != "localhost"
    return (
        _interface(address, loopback=not is_name) or _interface(_EXTERNAL_ADDRESS) or _interface(address, loopback=True)
    )


def _interface(destination: str, *, loopback: bool = False) -> str | None:
    import psutil

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((destination, 9))  # sends nothing
        own = probe.getsockname()[0]
        if loopback or not own.startswith("127."):
            interfaces = psutil.net_if_addrs().items()
            return next((name for name, addresses in interfaces if any(a.address == own for a in addresses)), None)
    return None


def _rank_environment(rank: int, local_rank: int, settings: Launch) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        ranks.LAUNCHER_PID: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(settings.world_size),
        "LOCAL_WORLD_SIZE": str(settings.processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // settings.processes)),
    }


@contextmanager
def _forwarded_signals(processes: Sequence[Any]) -> Iterator[list[int]]:
    """Forward signals to the ranks, which finish the step; on a second one, kill them. Yields the received signals."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        for process in processes:
            if process.poll() is None:  # while rank 0 exports, the pids of the other ranks may have been reused
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL if received else number)
        if received:
            os._exit(128 + number)
        received.append(number)
        with suppress(OSError):
            name = signal.Signals(number).name
            os.write(2, f"\n{name} received: forwarded to all ranks. Send it again to quit immediately.\n".encode())

    before = {}
    with suppress(ValueError):  # not in the main thread
        before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(order=True)
class _Failure:
    """How a rank failed. The least one is the cause: ranks that only lost another one come last."""

    lost: bool
    at: float  # seconds since 1970
    rank: int
    error: SFTRecipeError = field(compare=False)


def _wait(started: Any, first_rank: int, signals: Sequence[int]) -> tuple[list[_Failure], list[int]]:
    """Wait for the ranks. Returns the failures, and the ranks that were still running some time after the first one."""
    failures, running, deadline = list[_Failure](), dict(started.subprocess_handlers), math.inf
    while running and time.monotonic() < deadline:
        for local, handler in list(running.items()):
            if (code := handler.proc.poll()) is not None:
                del running[local]
            if code:
                files = started.error_files[local], started.stderrs[local]
                failures.append(_failure(first_rank + local, code, *files, signals))
                if code != _STOPPED:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS[failures[-1].lost])
        time.sleep(0.05)
    return failures, [first_rank + local for local in running]


def _failure(rank: int, code: int, error_file: str, stderr: str, signals: Sequence[int]) -> _Failure:
    """Return the error that a rank reported, or what its exit code says."""
    found: dict[str, Any] = {
        "lines": [_describe_exit(rank, code, stderr)],
        "exit_code": 1,
        "lost": False,
        "at": time.time(),
    }
    with suppress(OSError, ValueError):
        found |= json.loads(Path(error_file).read_text("utf-8"))
    if -code in signals:  # the rank had no handler yet
        name = signal.Signals(-code).name
        found |= {"lines": [f"stopped by {name}; no training progress was lost"], "exit_code": _STOPPED}
    kinds: dict[int, type[SFTRecipeError]] = {InputError.exit_code: InputError, _STOPPED: Stopped}
    return _Failure(found["lost"], found["at"], rank, kinds.get(found["exit_code"], RunError)(*found["lines"]))


def _describe_exit(rank: int, code: int, stderr: str) -> str:
    """Return the error line of a rank that reported none; `stderr` is the file of its output, if it has one."""
    if code == -signal.SIGKILL:
        return f"rank {rank} was killed (SIGKILL), probably because host memory ran out. Continue with --resume."
    reason = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    last_line = ""
    with suppress(OSError):
        last_line = Path(stderr).read_text("utf-8", "replace").strip().rpartition("\n")[2][:300]
    return f"rank {rank} {reason}{f': {last_line}' if last_line else ''}"

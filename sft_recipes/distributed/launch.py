"""Starting the ranks of this machine, and ending them: all come to their end, or the first error is shown and none is left."""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sft_recipes.distributed import ranks
from sft_recipes.errors import InputError, RecipeError, RunError, SFTRecipeError, Stopped
from sft_recipes.recipe.schema import Launch, Recipe

# Seconds that other ranks have for an error of their own, after one has failed: by itself, or for want of another.
_PATIENCE = {False: 1.0, True: 4.5}
_ELSEWHERE = "198.51.100.1"  # an address that is nobody's (RFC 5737)
_STOPPED = Stopped.exit_code
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(recipe: Recipe, arguments: Sequence[str], *, debug: bool = False) -> None:
    """Run `sft-recipe ARGUMENTS` in each rank of this machine, to the end. The first rank has the console.

    A signal is handed on: the ranks stop at the same step. Raises what the rank that failed first has raised.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    wanted = recipe.launch
    if 0 < (gpus := torch.cuda.device_count()) < wanted.processes:
        raise RecipeError(
            f"launch.processes: {wanted.processes}, and this machine shows {gpus} GPU{'s' if gpus > 1 else ''}; each takes "
            f"one of its own; say --processes {gpus}"
        )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said here
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are handled here
    with tempfile.TemporaryDirectory(prefix="sft-recipes-") as folder:
        first, meeting = _meeting(wanted)
        numbers = range(wanted.processes)
        # What the libraries say of a lost connection is pages long; the last line is shown where a rank says nothing itself.
        quiet = {number: Std.NONE if debug else Std.ERR if number == 0 else Std.ALL for number in numbers}
        command = ("-P", "-m", "sft_recipes.cli", *arguments)
        started = start_processes(
            name="rank", entrypoint=sys.executable,
            args=dict.fromkeys(numbers, command),
            envs={number: meeting | _of(first + number, number, wanted) for number in numbers},
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=quiet),
        )  # fmt: skip
        try:
            with _handed_on([handler.proc for handler in started.subprocess_handlers.values()]) as signals:
                codes, ended = _wait(started)
        finally:
            started.close(signal.SIGKILL)
        if any(codes.values()):
            errors = {n: Path(file) for n, file in started.error_files.items()}
            raise _first(codes, ended, errors, {n: Path(f) for n, f in started.stderrs.items() if f}, first, signals)


def _meeting(wanted: Launch) -> tuple[int, dict[str, str]]:
    """The number of this machine's first rank, and where all meet. The first machine keeps the place."""
    from torch.distributed import TCPStore

    environment, machine = os.environ, ranks.machine(wanted)
    address, port = "127.0.0.1", 0  # whatever is free
    if wanted.machines > 1:
        if not environment.get("MASTER_ADDR"):
            raise RecipeError(ranks.no_address(wanted))
        address, port = environment["MASTER_ADDR"], ranks.from_environment("MASTER_PORT") or int(ranks.PORT)
    global _place
    if machine == 0:
        try:
            _place = TCPStore(address, port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise RecipeError(
                f"MASTER_PORT: {address}:{port} cannot be opened: {_reason(error)}; another program, or an earlier run, "
                "may be using it; set another"
            ) from None
        port = _place.port
    found = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if wanted.machines > 1 and (interface := _towards(address)):
        found["GLOO_SOCKET_IFNAME"] = environment.get("GLOO_SOCKET_IFNAME", interface)
    return machine * wanted.processes, found


_place: Any = None  # it is there as long as it has a name


def _reason(error: Exception) -> str:
    return "the address is in use" if "EADDRINUSE" in str(error) else " ".join(str(error).split())[:200]


def _towards(address: str) -> str | None:
    """The network interface by which an address is reached; gloo would take that of the host's name. Many hosts know their own
    name as 127.0.1.1, where no other machine finds them: then it is the way to everywhere else."""
    named = not address.startswith("127.") and address != "localhost"
    return _interface(address, loopback=not named) or _interface(_ELSEWHERE) or _interface(address, loopback=True)


def _interface(towards: str, *, loopback: bool = False) -> str | None:
    import psutil

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        own = probe.getsockname()[0]
        if loopback or not own.startswith("127."):
            here = psutil.net_if_addrs().items()
            return next((name for name, found in here if any(each.address == own for each in found)), None)
    return None


def _of(number: int, local: int, wanted: Launch) -> dict[str, str]:
    """The environment of one rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        ranks.BY_US: str(os.getpid()),
        "RANK": str(number),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(wanted.processes * wanted.machines),
        "LOCAL_WORLD_SIZE": str(wanted.processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // wanted.processes)),
    }


@contextmanager
def _handed_on(processes: Sequence[Any]) -> Iterator[list[int]]:
    """Signals go to the ranks, which finish the step; a second one ends all at once. Yields those that came."""
    came: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        for process in processes:
            if (
                process.poll() is None
            ):  # rank 0 exports for long after the others, whose numbers others may have by then
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL if came else number)
        if came:
            os._exit(128 + number)
        came.append(number)
        with suppress(OSError):
            name = signal.Signals(number).name
            os.write(2, f"\n{name} received: forwarded to all ranks. Send it again to quit immediately.\n".encode())

    before = {}
    with suppress(ValueError):  # not in the main thread
        before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(started: Any) -> tuple[dict[int, int], dict[int, float]]:
    """Exit codes of the ranks, and when each ended; those that had to be ended are not among them."""
    codes: dict[int, int] = {}
    ended: dict[int, float] = {}
    failed: dict[bool, float] = {}  # when the first did, by itself or for want of another
    while len(codes) < len(started.subprocess_handlers):
        for number, handler in started.subprocess_handlers.items():
            if number not in codes and (code := handler.proc.poll()) is not None:
                codes[number], ended[number] = code, time.time()
                if code not in (0, _STOPPED):
                    failed.setdefault(_said(started.error_files[number]).get("lost", False), time.monotonic())
        if any(time.monotonic() - since > _PATIENCE[lost] for lost, since in failed.items()):
            break
        time.sleep(0.05)
    return codes, ended


def _first(
    codes: Mapping[int, int],
    ended: Mapping[int, float],
    errors: Mapping[int, Path],
    stderrs: Mapping[int, Path],
    first: int,
    signals: Sequence[int],
) -> SFTRecipeError:
    """The error of the rank that failed first: of those that say more than that another does not answer, if there are any."""
    found = []
    for number, code in codes.items():
        if code == 0:
            continue
        said: dict[str, Any] = {
            "lines": [_how_it_ended(first + number, code, stderrs.get(number))],
            "exit_code": 1,
            "lost": False,
        }
        said |= {"at": ended[number]} | _said(errors[number])
        if -code in signals:  # it came before the rank was ready for it
            name = signal.Signals(-code).name
            said |= {"lines": [f"stopped by {name}; no training progress was lost"], "exit_code": _STOPPED}
        found.append((said["lost"], said["at"], first + number, said))
    _, _, number, said = min(found, key=lambda each: each[:3])
    lines = list(said["lines"])
    if said["exit_code"] == InputError.exit_code:
        return InputError(*lines)
    if said["exit_code"] == _STOPPED:
        return Stopped(*lines)
    silent = [first + n for n in errors if n not in codes]
    if said["lost"] and silent:
        lines[0] += f" ({ranks.format_ranks(silent)} was still running, and was ended)"
    return RunError(*lines)


def _said(error_file: Path | str) -> dict[str, Any]:
    """What a rank has reported; {} where it could not."""
    with suppress(OSError, ValueError):
        return dict(json.loads(Path(error_file).read_text("utf-8")))
    return {}


def _how_it_ended(number: int, code: int, stderr: Path | None) -> str:
    """Of a rank that could not say it itself."""
    if code == -signal.SIGKILL:
        return f"rank {number} was killed (SIGKILL), as the system does where memory runs out; continue with --resume"
    how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    said = ""
    with suppress(OSError, AttributeError):
        said = stderr.read_text("utf-8", "replace").strip().rpartition("\n")[2][:300]  # type: ignore[union-attr]
    return f"rank {number} {how}{f': {said}' if said else ''}"

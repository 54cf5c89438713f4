"""The processes that train together: whether this is one of them, which, and how they meet.

torchrun's names in the environment are ours too: RANK of WORLD_SIZE, LOCAL_RANK of LOCAL_WORLD_SIZE on this machine,
MASTER_ADDR and MASTER_PORT where they meet.
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from sft_recipes.errors import RecipeError, RunError, SFTRecipeError
from sft_recipes.recipe.schema import Launch, Recipe

BY_US = "SFT_RECIPES_LAUNCHER"  # in the environment of ranks: the process that has started them with `launch`
PORT = "29500"  # where ranks of another launcher meet, unless MASTER_PORT says otherwise; torch's own
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# What launchers other than torchrun call the four. Under Slurm mpirun starts helpers by srun, one a machine, whose names its
# processes have beside their own: those count that say of more.
_THEIRS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
_LOST = re.compile(  # what torch says of the network, and of processes that do not answer
    r"closed by peer|reset by peer|[Tt]imed? ?out|timeout|Broken pipe|refused|unreachable|No route to host|"
    r"NCCL|gloo/|recvValue failed|sendBytes failed|[Ss]ocket|\b[Ss]tore\b|Store\b"
)
_NOISE = re.compile(r"\[\S*/gloo/\S+\] | This is typically caused by .*?GLHF! \S+")
_T = TypeVar("_T")
_ANSWERS = 3.0  # seconds in which ranks that have lost another say so


def rank() -> int:
    """The number of this process among those that train together."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return rank() == 0


def machine(launch: Launch) -> int:
    """The number of this machine, as its launcher says; 0 where there is but one. Raises RecipeError where it is not said."""
    if launch.machines == 1:
        return 0
    number = from_environment("NODE_RANK", from_environment("SLURM_NODEID"))
    if number is None:
        raise RecipeError(no_address(launch))
    if number >= launch.machines:
        raise RecipeError(f"launch.machines: NODE_RANK is {number}, and there are {launch.machines}, from 0 on")
    return number


def from_environment(name: str, otherwise: int | None = None) -> int | None:
    """A number in the environment, or `otherwise` where there is none. Raises RecipeError where it is something else."""
    text = os.environ.get(name)
    if not text:
        return otherwise
    if not text.isdecimal():
        raise RecipeError(f"{name}: '{text}' in the environment is not a whole number; set one, or unset it")
    return int(text)


def is_local_main() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


def exit_with_launcher() -> None:
    """Let the kernel end this process when the one that started it is killed, which could not say so any more."""
    if BY_US in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[BY_US]):  # it was faster
            os.kill(os.getpid(), signal.SIGKILL)


# --- Started already? ---


def to_be_started(launch: Launch) -> bool:
    """Whether the processes that a recipe wants are yet to be started on this machine; else this is one of them, or alone.

    Those of Slurm (srun), Open MPI and MPICH are given torchrun's names. One process a machine, of several that are wanted
    there, is the one that is to start them. Raises RecipeError where another number of processes was started, or they
    cannot know where to meet.
    """
    wanted = launch.processes * launch.machines
    environment = os.environ
    if "LOCAL_RANK" not in environment:
        theirs = [names for names in _THEIRS if names[1] in environment]
        number, size, local, beside = max(
            theirs, key=lambda names: from_environment(names[1]) or 1, default=("RANK", "WORLD_SIZE", "", "")
        )
        started = from_environment(size) or 1
        if started > 1 and from_environment(number) is None:
            raise RecipeError(f"{size} is {started} in the environment, and {number} is not there; set both, or none")
        if launch.machines > 1 and launch.processes > 1 and started == launch.machines:
            environment.setdefault("NODE_RANK", environment[number])
            return True
        if started == 1:
            return wanted > 1 or launch.strategy != "ddp"
        environment["WORLD_SIZE"] = str(started)
        if started == wanted:
            environment["RANK"] = environment[number]
            environment["LOCAL_RANK"] = environment.get(local) or str(int(environment[number]) % launch.processes)
            environment["LOCAL_WORLD_SIZE"] = re.sub(r"\D.*", "", environment.get(beside) or "") or str(
                launch.processes
            )
            environment.setdefault("MASTER_PORT", PORT)
            if launch.machines == 1:
                environment.setdefault("MASTER_ADDR", "127.0.0.1")
    if world_size() != wanted:
        raise RecipeError(
            f"launch.processes: {wanted} by the recipe ({launch.processes} x {launch.machines} machine"
            f"{'s' if launch.machines > 1 else ''}), and {world_size()} were started; say --processes "
            f"{environment.get('LOCAL_WORLD_SIZE') or world_size()}, or start {wanted}"
        )
    if "MASTER_ADDR" not in environment and wanted > 1:
        raise RecipeError(no_address(launch))
    return False


def no_address(launch: Launch) -> str:
    """What is said where machines do not know each other."""
    return (
        f"launch.machines: {launch.machines} machines meet at MASTER_ADDR, the address of the first, and MASTER_PORT, each "
        "with its NODE_RANK from 0 on, and the environment lacks one of them; under Slurm: export MASTER_PORT=29500 "
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1), and srun one task a machine'
    )


# --- Together ---


@contextmanager
def process_group(recipe: Recipe, facts: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Within, this process is in the group of those that train together, as the recipe's strategy wants it. `leave` ends that
    earlier.

    `facts` have to be the same in all: recipe, code, data. Raises RecipeError where they are not, RunError where not all
    come within the time that they wait for each other (trl.ddp_timeout, in seconds).
    """
    if "LOCAL_RANK" not in os.environ or (world_size() == 1 and recipe.launch.strategy == "ddp"):
        yield
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    patience = timedelta(seconds=float(recipe.trl.get("ddp_timeout", 1800)))
    strategy, cpu = recipe.launch.strategy, not torch.cuda.is_available()
    try:
        _meet(facts(), patience)
        if strategy == "fsdp2" and not cpu:
            # What is in host memory (checkpoints, cpu_offload) is gathered there.
            PartialState(backend="cuda:nccl,cpu:gloo", timeout=patience)
        else:
            PartialState(cpu=cpu, timeout=patience)
    except SFTRecipeError:
        raise
    except Exception as error:  # as many types as there are layers
        raise RunError(f"rank {rank()} could not join the others: {' '.join(str(error).split())[:300]}") from error
    if strategy == "fsdp2":
        # Of CPUs accelerate takes any strategy for DDP; it goes by this word alone.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif strategy in ("zero2", "zero3"):
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed("gloo" if cpu else "nccl", auto_mpi_discovery=False, verbose=False)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    try:
        yield
    except Exception as error:
        reason = error.__cause__ if isinstance(error, RunError) else error
        together = torch.distributed.is_initialized()
        if together and isinstance(reason, Exception) and (who := unreachable_ranks(reason)):
            raise LostError(f"{who}: {_NOISE.sub('', ' '.join(str(error).split()))}; continue with --resume") from error
        raise
    leave()


def leave() -> None:
    """End the process group, in all ranks at the same time; without one, do nothing.

    NCCL can hang if a rank destroys its communicators long before the others do, so no rank may leave while another still
    has work of its own before it. Afterwards nothing in this process may need a collective, or ask accelerate for its state.
    """
    import torch

    if not torch.distributed.is_initialized():
        return
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    PartialState().wait_for_everyone()
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _meet(facts: Mapping[str, Any], patience: timedelta) -> None:
    """Waits for all, and compares what they are about to do with what the first is."""
    store, size = _store(patience), world_size()
    mine = {name: _digest(value) for name, value in facts.items()} | {"host": socket.gethostname()}
    store.set(f"facts/{rank()}", json.dumps(mine))
    keys = [f"facts/{number}" for number in range(size)]
    try:
        store.wait(keys, patience)
    except RuntimeError:
        lacking = [number for number, key in enumerate(keys) if not store.check([key])]
        raise RunError(
            f"{size - len(lacking)} of {size} processes came within {patience.total_seconds():g} s; "
            f"{format_ranks(lacking)} did not; look at what it said where it was to start"
        ) from None
    first, *others = map(json.loads, store.multi_get(keys))
    store.set(f"read/{rank()}", b"1")
    if is_main():  # it may be the one that keeps the store
        with suppress(RuntimeError):
            store.wait([f"read/{number}" for number in range(size)], timedelta(seconds=_ANSWERS))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if name != "host" and name in other and other[name] != value:
                raise RecipeError(
                    f"launch: rank {number} on {other['host']} has another {name} than rank 0 on {first['host']}; all "
                    "machines need the same recipe, code, library versions and data files"
                )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _store(patience: timedelta) -> Any:
    """Where ranks leave word for each other, and find each other's addresses."""
    import torch.distributed as dist

    here = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and is_main()  # else the launcher keeps it
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=here, timeout=patience,
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    global _kept
    _kept = store  # what it serves ends with it
    return dist.PrefixStore("sft-recipes", store)


_kept: Any = None


@contextmanager
def main_first() -> Iterator[None]:
    """What is done within is done by the main process before the others, which find it done."""
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def run_on_main(decide: Callable[[], _T]) -> _T:
    """What the main process decides; all have to come here. What it raises for the user is raised in all."""
    if world_size() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    decided: list[Any] = [None, None]
    if is_main():
        try:
            decided[0] = decide()
        except SFTRecipeError as error:
            decided[1] = error
    broadcast_object_list(decided)
    if decided[1] is not None:
        raise decided[1]
    return cast(_T, decided[0])


# --- When something goes wrong ---


def format_ranks(numbers: list[int]) -> str:
    """rank 3, or ranks 0, 2."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def unreachable_ranks(error: Exception) -> str | None:
    """Where an error says no more than that another rank does not answer: who it is, as far as that can be told."""
    if world_size() == 1 or not (
        _is_distributed(error) or (isinstance(error, RuntimeError) and _LOST.search(str(error)))
    ):
        return None
    silent: list[int] = []
    with suppress(Exception):  # the store may be on the other side
        store = _store(timedelta(seconds=_ANSWERS))
        store.set(f"lost/{rank()}", b"1")
        time.sleep(_ANSWERS)
        silent = [number for number in range(world_size()) if not store.check([f"lost/{number}"])]
    return f"{format_ranks(silent)} does not answer" if silent else "another rank does not answer"


def _is_distributed(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError)


def report(error: SFTRecipeError) -> bool:
    """Leave an error for `launch`, which shows the first one; whether it is there to do so."""
    lines = list(error.lines)
    if isinstance(error, RunError) and world_size() > 1:
        lines[0] = f"rank {rank()}: {lines[0]}"
        error.args = ("\n".join(lines),)
    file = os.environ.get(_ERROR_FILE)
    if file:
        found = {"lines": lines, "exit_code": error.exit_code, "at": time.time(), "lost": isinstance(error, LostError)}
        # What torchrun reads, and shows in a box of its own.
        message = {"message": "; ".join(lines), "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(found | {"message": message}), "utf-8")
    return bool(file) and BY_US in os.environ


def is_reported_elsewhere(error: SFTRecipeError) -> bool:
    """Whether another rank, where another launcher has started them, says the same: what is wrong with the recipe, or the
    end on request."""
    return not isinstance(error, RunError) and not is_local_main() and world_size() > 1


class LostError(RunError):
    """Another rank does not answer: what it has to say is the reason."""

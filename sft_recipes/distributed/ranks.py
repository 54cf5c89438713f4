"""The ranks of a run: who launches them, how they find each other, and how their failures are reported.

Whatever started them, ranks use torchrun's environment variables: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and so on.
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

from sft_recipes.errors import RecipeError, RunError, SFTRecipeError, reason_of
from sft_recipes.recipe.schema import Launch, Recipe

LAUNCHER_PID = "SFT_RECIPES_LAUNCHER"  # environment variable of the ranks that `launch.launch` started: its process id
PORT = "29500"  # default of MASTER_PORT, as torch's
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# Other launchers' names of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Under Slurm, mpirun's processes also inherit
# srun's variables (of its helpers, one per node), so the launcher with the largest world size counts.
_LAUNCHER_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
_CONNECTION_ERROR = re.compile(  # torch's errors if a rank or the network is gone
    r"closed by peer|reset by peer|[Tt]imed? ?out|timeout|Broken pipe|refused|unreachable|No route to host|"
    r"NCCL|gloo/|recvValue failed|sendBytes failed|[Ss]ocket|\b[Ss]tore\b|Store\b"
)
_NOISE = re.compile(r"\[\S*/gloo/\S+\] | This is typically caused by .*?GLHF! \S+")
_T = TypeVar("_T")
_RESPONSE_SECONDS = 3.0  # for ranks that have lost another one to report it


def rank() -> int:
    """Return the global rank of this process."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return the number of ranks on all nodes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Return True for rank 0, which writes files and prints."""
    return rank() == 0


def node_rank(launch: Launch) -> int:
    """Return the index of this node: NODE_RANK or SLURM_NODEID. Raises RecipeError if several nodes have neither."""
    if launch.machines == 1:
        return 0
    node = int_from_env("NODE_RANK", int_from_env("SLURM_NODEID"))
    if node is None:
        raise RecipeError(no_rendezvous(launch))
    if node >= launch.machines:
        raise RecipeError(
            f"NODE_RANK: must be 0 to {launch.machines - 1}, as launch.machines is {launch.machines} (got {node})."
        )
    return node


def int_from_env(name: str, default: int | None = None) -> int | None:
    """Return an environment variable as int, or `default` if it is unset. Raises RecipeError if it is not a number."""
    text = os.environ.get(name)
    if not text:
        return default
    if not text.isdecimal():
        raise RecipeError(f"{name}: the environment variable is not an integer (got '{text}'). Correct or unset it.")
    return int(text)


def is_local_main() -> bool:
    """Return True for the first rank of each node."""
    return int(os.environ.get("LOCAL_RANK") or 0) == 0


def exit_with_launcher() -> None:
    """Let the kernel kill this process when its launcher dies: a killed launcher cannot stop its ranks."""
    if LAUNCHER_PID in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[LAUNCHER_PID]):  # the launcher died before prctl took effect
            os.kill(os.getpid(), signal.SIGKILL)


# --- Launchers ---


def set_launcher_env(launch: Launch) -> None:
    """Translate the variables of Slurm, Open MPI or MPICH into torchrun's; for one task per node, only NODE_RANK.

    Raises RecipeError if the launcher's variables are incomplete.
    """
    environment = os.environ
    if "LOCAL_RANK" in environment:
        return
    started, (rank_name, size_name, local_rank, local_size) = _started_tasks()
    if started == 1:
        return
    if int_from_env(rank_name) is None:
        raise RecipeError(
            f"{rank_name}: not in the environment, but {size_name} is (got {started}). Set both or neither."
        )
    if _one_task_per_node(launch, started):
        environment.setdefault("NODE_RANK", environment[rank_name])
    elif started == launch.world_size:
        environment["WORLD_SIZE"], environment["RANK"] = str(started), environment[rank_name]
        environment["LOCAL_RANK"] = environment.get(local_rank) or str(int(environment["RANK"]) % launch.processes)
        # Slurm writes 2(x2) for 2 tasks on each of 2 nodes.
        per_node = re.sub(r"\D.*", "", environment.get(local_size) or "")
        environment["LOCAL_WORLD_SIZE"] = per_node or str(launch.processes)
        environment.setdefault("MASTER_PORT", PORT)
        if launch.machines == 1:
            environment.setdefault("MASTER_ADDR", "127.0.0.1")


def needs_launch(launch: Launch) -> bool:
    """Return True if the recipe's ranks are still to be started on this node. Call `set_launcher_env` before.

    Raises RecipeError if the number of started processes does not match the recipe, or MASTER_ADDR is missing.
    """
    started = world_size() if "LOCAL_RANK" in os.environ else _started_tasks()[0]
    if "LOCAL_RANK" not in os.environ and (started == 1 or _one_task_per_node(launch, started)):
        return launch.world_size > 1 or launch.strategy != "ddp"
    if started != launch.world_size:
        raise RecipeError(
            f"launch.processes: the number of ranks must be {launch.world_size} ({launch.processes} x {launch.machines} node"
            f"{'s' if launch.machines > 1 else ''}; got {started}). Pass --processes "
            f"{os.environ.get('LOCAL_WORLD_SIZE') or started}, or start {launch.world_size} ranks."
        )
    if "MASTER_ADDR" not in os.environ and started > 1:
        raise RecipeError(no_rendezvous(launch))
    return False


def _started_tasks() -> tuple[int, tuple[str, str, str, str]]:
    """Return how many processes a launcher started (1 without one), and its names of torchrun's four variables."""
    present = [names for names in _LAUNCHER_VARIABLES if names[1] in os.environ]
    names = max(present, key=lambda names: int_from_env(names[1]) or 1, default=("RANK", "WORLD_SIZE", "", ""))
    return int_from_env(names[1]) or 1, names


def _one_task_per_node(launch: Launch, started: int) -> bool:
    return launch.processes > 1 and started == launch.machines > 1


def no_rendezvous(launch: Launch) -> str:
    """Return the error for nodes that cannot find each other."""
    return (
        f"launch.machines: {launch.machines} nodes need MASTER_ADDR (address of node 0), MASTER_PORT and NODE_RANK "
        "(0, 1, ...), and at least one is missing from the environment. Set them on each node. Under Slurm: export "
        'MASTER_PORT=29500 MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1), then '
        "srun one task per node."
    )


# --- Process group ---


@contextmanager
def process_group(recipe: Recipe, must_match: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Join the process group that the recipe's strategy needs, until the end of the block or `leave`.

    Raises:
        RecipeError: `must_match` (recipe, code, versions, data) differs between ranks.
        RunError: A rank did not join within trl.ddp_timeout seconds, or another rank was lost in the block.
    """
    if "LOCAL_RANK" not in os.environ or (world_size() == 1 and recipe.launch.strategy == "ddp"):
        yield
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    timeout = timedelta(seconds=float(recipe.trl.get("ddp_timeout", 1800)))
    strategy, cpu = recipe.launch.strategy, not torch.cuda.is_available()
    try:
        _rendezvous(must_match(), timeout)
        if strategy == "fsdp2" and not cpu:
            # Tensors in host memory (checkpoints, cpu_offload) are gathered over gloo.
            state = PartialState(backend="cuda:nccl,cpu:gloo", timeout=timeout)
        else:
            state = PartialState(cpu=cpu, timeout=timeout)
    except SFTRecipeError:
        raise
    except Exception as error:  # of accelerate, torch, NCCL or gloo
        raise RunError(f"rank {rank()} could not join the process group: {reason_of(error)}") from error
    if strategy == "fsdp2":
        # On CPUs accelerate treats every strategy as DDP; this value is all it checks.
        state.distributed_type = DistributedType.MULTI_GPU
    elif strategy in ("zero2", "zero3"):
        if cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.init_distributed("gloo" if cpu else "nccl", auto_mpi_discovery=False, verbose=False)
        state.distributed_type = DistributedType.DEEPSPEED
    try:
        yield
    except Exception as error:
        reason = error.__cause__ if isinstance(error, RunError) else error
        joined = torch.distributed.is_initialized()
        if joined and isinstance(reason, Exception) and (unreachable := unreachable_ranks(reason)):
            text = _NOISE.sub("", " ".join(str(error).split())).rstrip(".")
            raise LostError(f"{unreachable}: {text}. Continue with --resume.") from error
        raise
    leave()


def leave() -> None:
    """Destroy the process group in all ranks at the same time, if there is one.

    NCCL can hang if a rank destroys its communicators long before the others. Afterwards this process must not use
    collectives or accelerate's state.
    """
    import torch

    if not torch.distributed.is_initialized():
        return
    from accelerate import PartialState

    from sft_recipes.upstream import reset_accelerate

    PartialState().wait_for_everyone()
    torch.distributed.destroy_process_group()
    reset_accelerate()


def _rendezvous(must_match: Mapping[str, Any], timeout: timedelta) -> None:
    """Wait for all ranks, and compare what must match with rank 0."""
    store, size = _store(timeout), world_size()
    local = {name: _digest(value) for name, value in must_match.items()} | {"host": socket.gethostname()}
    store.set(f"must_match/{rank()}", json.dumps(local))
    keys = [f"must_match/{number}" for number in range(size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        missing = [number for number, key in enumerate(keys) if not store.check([key])]
        raise RunError(
            f"only {size - len(missing)} of {size} ranks joined within {timeout.total_seconds():g} s "
            f"(missing: {format_ranks(missing)}). Read the log of the node where the missing rank starts."
        ) from None
    first, *others = map(json.loads, store.multi_get(keys))
    store.set(f"read/{rank()}", b"1")
    if is_main():  # it may host the store
        with suppress(RuntimeError):
            store.wait([f"read/{number}" for number in range(size)], timedelta(seconds=_RESPONSE_SECONDS))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if name != "host" and name in other and other[name] != value:
                raise RecipeError(
                    f"launch: {name} of rank {number} on {other['host']} differs from rank 0 on {first['host']}. Use the same "
                    "recipe, code, library versions and data files on all nodes."
                )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _store(timeout: timedelta) -> Any:
    """Return the store in which ranks exchange messages and addresses; rank 0 hosts it unless the launcher does."""
    import torch.distributed as dist

    host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and is_main()
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=host, timeout=timeout,
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    global _open_store
    _open_store = store  # garbage collection would stop the server
    return dist.PrefixStore("sft-recipes", store)


_open_store: Any = None


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in rank 0 first and then in the others, which find its results, e.g. in a cache."""
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def run_on_main(function: Callable[[], _T]) -> _T:
    """Return rank 0's result in all ranks; an SFTRecipeError is raised in all. All ranks have to call this."""
    if world_size() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]  # result, error
    if is_main():
        try:
            outcome[0] = function()
        except SFTRecipeError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(_T, outcome[0])


# --- Failures ---


def format_ranks(numbers: list[int]) -> str:
    """Return "rank 3" or "ranks 0, 2"."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def unreachable_ranks(error: Exception) -> str | None:
    """Return which ranks do not respond if that is all `error` is about, else None.

    Each rank that lost another one reports it in the store; ranks that do not are the unreachable ones.
    """
    from torch.distributed import DistError

    if world_size() == 1 or not (
        isinstance(error, DistError) or (isinstance(error, RuntimeError) and _CONNECTION_ERROR.search(str(error)))
    ):
        return None
    missing: list[int] = []
    with suppress(Exception):  # the store may be unreachable too
        store = _store(timedelta(seconds=_RESPONSE_SECONDS))
        store.set(f"lost/{rank()}", b"1")
        time.sleep(_RESPONSE_SECONDS)
        missing = [number for number in range(world_size()) if not store.check([f"lost/{number}"])]
    return f"no response from {format_ranks(missing) if missing else 'another rank'}"


def report(error: SFTRecipeError) -> bool:
    """Write an error to the launcher's error file. Returns True if our launcher prints the first one."""
    lines = list(error.lines)
    if isinstance(error, RunError) and world_size() > 1:
        lines[0] = f"rank {rank()}: {lines[0]}"
        error.args = ("\n".join(lines),)
    file = os.environ.get(_ERROR_FILE)
    if file:
        fields = {"lines": lines, "exit_code": error.exit_code, "at": time.time(), "lost": isinstance(error, LostError)}
        # "message" is for torchrun, which prints it in a box.
        message = {"message": "; ".join(lines), "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(fields | {"message": message}), "utf-8")
    return bool(file) and LAUNCHER_PID in os.environ


def is_reported_elsewhere(error: SFTRecipeError) -> bool:
    """Return True if the node's first rank prints the same error: a wrong recipe, or a stop on request."""
    return not isinstance(error, RunError) and not is_local_main() and world_size() > 1


class LostError(RunError):
    """Another rank does not respond; its own error, if any, is the cause."""

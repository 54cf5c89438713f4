"""Runs of two ranks, forked from a process that has the libraries loaded."""

import json
import os
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.kills import forked, in_a_child, outcome, recipe, start


def both(act: Callable[[int], object], *, number: int = 2) -> list[str]:
    """Call `act` with the rank in each process of a group. Returns each process's result: "done", or its error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(number)}
        act(rank)

    pipes = [forked(partial(one, rank))[1] for rank in range(number)]
    results = []
    for reader in pipes:
        with os.fdopen(reader, "rb") as stream:
            results.append(stream.read().decode())
    for _ in pipes:
        os.wait()
    return results


def stopped(file: Path, rank: int, *, resume: bool, at: int) -> None:
    """Send a signal to rank 1 only, during a step. Writes the model classes seen in preflight and training to a file."""
    from sft_recipes.stopping import on_request
    from sft_recipes.training import trainer

    step = trainer.Trainer.training_step
    models: dict[str, list[str]] = {"tried": [], "trained": []}

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        models["tried" if self.preflight is None else "trained"].append(type(args[0]).__name__)
        (file.parent / f"models_{rank}.json").write_text(json.dumps(models))
        if rank == 1 and self.state.global_step + 1 == at and self.stop.signal is None:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    trainer.Trainer.training_step = training_step
    with on_request(None, "again") as stop:
        start(file, resume=resume, stop=stop)


def observed(file: Path, rank: int) -> None:
    """Write to a file what this rank loaded, and how many elements of weights and optimizer states it holds at the end."""
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    from sft_recipes.training import trainer as module

    train, from_pretrained, read = module.train, AutoModelForCausalLM.from_pretrained, []

    def record_load(*args: Any, **kwargs: Any) -> Any:
        read.append(str(args[0]))
        return from_pretrained(*args, **kwargs)

    AutoModelForCausalLM.from_pretrained = record_load

    def local_size(weight: Any) -> int:
        if isinstance(weight, DTensor):
            return int(weight.to_local().numel())
        return int(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else weight.numel())

    def train_and_record(trainer: Any, *args: Any) -> None:
        train(trainer, *args)
        weights = list(trainer.model.parameters())
        states = [state for each in trainer.optimizer.state.values() for state in each.values() if state.dim()]
        recorded = {
            "whole": sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights),
            "weights": sum(map(local_size, weights)),
            "kind": type(weights[0]).__name__,
            "states": sum(map(local_size, states)),
            "read": read,
        }
        (file.parent / f"rank_{rank}.json").write_text(json.dumps(recorded))

    module.train = train_and_record
    start(file, resume=False)


def alone(folder: Path, method: str, sections: dict[str, Any]) -> None:
    """Run the recipe in one process."""
    folder.mkdir()
    file = recipe(folder, method, **sections)
    results = in_a_child(lambda: start(file, resume=False), under=folder)
    assert results == "done", results


def main(
    folder: Path,
    method: str = "lora",
    strategy: str = "ddp",
    sections: dict[str, Any] | None = None,
    stops: Sequence[int] = (3, 5),
) -> None:
    """Print the results of an uninterrupted run, and of one with a preflight that a signal to rank 1 stops; resume it."""
    made = {}
    for name in ("whole", "stopped"):
        (folder / name).mkdir()
        more = {"launch": {"processes": 2, "strategy": strategy}, **(sections or {})}
        if name == "stopped":
            more["train"] = {**more.get("train", {}), "preflight": True}
        made[name] = recipe(folder / name, method, **more)
    results = {"whole": both(lambda rank: observed(made["whole"], rank))}
    for number, step in enumerate(stops):
        act = partial(stopped, made["stopped"], resume=bool(number), at=step)
        results[f"stopped at {step}"] = both(act)
    if stops:
        results["resumed"] = both(lambda rank: start(made["stopped"], resume=True))
    same = bool(stops) and outcome(folder / "whole" / "run") == outcome(folder / "stopped" / "run")
    print(json.dumps({"results": results, "same": same}))


def exported(folder: Path, strategy: str, sections: dict[str, Any], disk_full: bool = False) -> None:
    """Fine-tune all weights. Rank 0 saves them next to the export, and each rank records what it gathers."""
    folder.mkdir()
    sections = {"checkpoint": {"every": 9, "export_best": False}, **sections}
    file = recipe(folder, "full", launch={"processes": 2, "strategy": strategy}, **sections)

    def act(rank: int) -> None:
        watch_export(folder, rank, strategy, disk_full=disk_full)
        start(file, resume=False)

    print(json.dumps({"results": both(act)}))


def watch_export(folder: Path, rank: int, strategy: str, *, disk_full: bool) -> None:
    import errno
    import time
    import weakref

    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from sft_recipes.distributed import ranks
    from sft_recipes.export import safetensors_io, verify
    from sft_recipes.models import strategies
    from sft_recipes.training import trainer as module

    found: dict[str, Any] = {"alive": [], "gathered": [], "put": []}
    train, gather, put, leave, original_verify = (
        module.train,
        strategies._gather,
        safetensors_io.Writer.put,
        ranks.leave,
        verify.verify,
    )
    seen: list[Any] = []

    def trained(trainer: Any, *args: Any) -> None:
        train(trainer, *args)
        if strategy == "fsdp2":
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(trainer.model, options=options)
        else:
            weights = trainer.deepspeed._zero3_consolidated_16bit_state_dict()
        if rank == 0:
            torch.save(weights, folder / "expected.pt")

    def recording_gather(weight: Any, dtype: Any) -> Any:
        found["alive"].append(sum(ref() is not None for ref in seen))
        whole = gather(weight, dtype)
        seen.append(weakref.ref(whole))
        found["gathered"].append(list(whole.shape))
        return whole

    def recording_put(self: Any, name: str, tensor: Any) -> None:
        found["put"].append(name)
        if disk_full and len(found["put"]) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, name, tensor)

    def recording_leave() -> None:
        if rank == 1:
            time.sleep(0.5)
            (folder / "rank 1 leaves").touch()
        leave()
        (folder / f"rank_{rank}.json").write_text(json.dumps(found))

    def recording_verify(request: Any) -> Any:
        alone = not torch.distributed.is_initialized() and (folder / "rank 1 leaves").exists()
        (folder / "alone").write_text(json.dumps(alone))
        return original_verify(request)

    module.train, strategies._gather, safetensors_io.Writer.put = trained, recording_gather, recording_put
    ranks.leave, verify.verify = recording_leave, recording_verify


def tried(folder: Path, method: str, strategy: str) -> None:
    """Print the results of two steps with and without the preflight, in bfloat16 with checkpointing and accumulation."""
    results = {}
    for preflight in (True, False):
        (folder / str(preflight)).mkdir()
        train = {"max_steps": 2, "mixed_precision": "bf16", "gradient_checkpointing": True, "preflight": preflight}
        more = {"launch": {"processes": 2, "strategy": strategy}, "checkpoint": {"every": None, "export_best": False}}
        made = recipe(folder / str(preflight), method, train=train, eval={"every": None}, **more)
        results[str(preflight)] = both(lambda _: start(made, resume=False))  # noqa: B023
    same = outcome(folder / "True" / "run") == outcome(folder / "False" / "run")
    print(json.dumps({"results": results, "same": same}))


def failing(folder: Path) -> None:
    """Print the errors if rank 1's preflight finds a NaN loss, or fails."""
    from sft_recipes.training import trainer

    def fail(rank: int, how: str) -> None:
        step = trainer.Trainer.training_step

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if rank == 1 and how == "fails":
                raise MemoryError("no memory here")
            loss = step(self, *args, **kwargs)
            return loss * float("nan") if rank == 1 else loss

        trainer.Trainer.training_step = training_step
        start(made, resume=False)

    made = recipe(folder, "lora", launch={"processes": 2}, train={"preflight": True})
    found = {how: both(partial(fail, how=how)) for how in ("not a number", "fails")}
    print(json.dumps({"results": found, "left": (folder / "run").exists()}))


def fewer(folder: Path, method: str, strategy: str, sections: dict[str, Any]) -> None:
    """Print the results of a run of two ranks that is stopped, and resumed with one rank, without and with --force."""
    folder.mkdir()
    file = recipe(folder, method, launch={"processes": 2, "strategy": strategy}, **sections)
    results = {"two": both(partial(stopped, file, resume=False, at=3))}
    for force in (False, True):
        results[str(force)] = both(lambda _: start(file, "launch.processes=1", resume=True, force=force), number=1)  # noqa: B023
    print(json.dumps(results))


def meet() -> None:
    """Print the results of ranks with the same data, with different data, and of one that waits for a missing rank."""
    from sft_recipes.distributed import ranks
    from sft_recipes.recipe.schema import Recipe

    wanted = {"model": {"name": "builtin:tiny"}, "data": {"train": "x.jsonl"}, "output_dir": "run"}
    wanted |= {"launch": {"processes": 2}, "trl": {"ddp_timeout": 1}}

    def join(rank: int, differ: bool, absent: bool) -> None:
        if not (absent and rank == 1):
            with ranks.process_group(Recipe.model_validate(wanted), lambda: {"data": rank if differ else 0}):
                pass

    found = {
        "the same": both(partial(join, differ=False, absent=False)),
        "different data": both(partial(join, differ=True, absent=False)),
        "alone": both(partial(join, differ=False, absent=True)),
    }
    print(json.dumps(found))

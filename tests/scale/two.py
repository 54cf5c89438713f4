"""Two processes that train together, forked from one that has the libraries loaded.

A run of both, undisturbed; one that is stopped by a signal to one of them, resumed, and stopped again; what comes of it.
"""

import json
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.kills import forked, outcome, recipe, start


def both(act: Callable[[int], object]) -> list[str]:
    """Do it in two processes of one group; what each says: "done", or its error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        act(rank)

    pipes = [forked(partial(one, rank))[1] for rank in (0, 1)]
    said = []
    for reader in pipes:
        with os.fdopen(reader, "rb") as stream:
            said.append(stream.read().decode())
    for _ in pipes:
        os.wait()
    return said


def stopped(file: Path, rank: int, *, resume: bool, at: int) -> None:
    """Only the second process gets the signal, within a step."""
    from sft_recipes.stopping import on_request
    from sft_recipes.training import trainer

    step = trainer.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and self.state.global_step + 1 == at and self.stop.signal is None:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    trainer.Trainer.training_step = training_step
    with on_request(None, "again") as stop:
        start(file, resume=resume, stop=stop)


def main(folder: Path) -> None:
    made = {}
    for name in ("whole", "stopped"):
        (folder / name).mkdir()
        made[name] = recipe(folder / name, "lora", launch={"processes": 2})
    said = {"whole": both(lambda rank: start(made["whole"], resume=False))}
    for step, resume in ((3, False), (5, True)):
        said[f"stopped at {step}"] = both(lambda rank: stopped(made["stopped"], rank, resume=resume, at=step))  # noqa: B023
    said["resumed"] = both(lambda rank: start(made["stopped"], resume=True))
    same = outcome(folder / "whole" / "run") == outcome(folder / "stopped" / "run")
    print(json.dumps({"said": said, "same": same}))

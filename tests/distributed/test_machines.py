"""Two nodes: two network namespaces with a link between them, which is taken down during a run."""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sft_recipes.run  # noqa: F401  # once, and not in each child
from tests import commands
from tests.conftest import WriteRecipe, metrics
from tests.distributed.ranks_in_forks import fork_ranks

CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that only reach each other."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"sft{os.getpid()}{end}" for end in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot create network namespaces: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def enter_namespace(name: str, folder: Path) -> None:
    """Move this process, and the ranks that it launches, to a node."""
    with Path(f"/var/run/netns/{name}").open() as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) == 0
    fork_ranks(folder, slow_down)


def slow_down(rank: int) -> None:
    from sft_recipes.training import trainer

    step = trainer.Trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return step(*args, **kwargs)

    trainer.Trainer.training_step = training_step


class Run:
    """The same command on both nodes."""

    def __init__(self, folder: Path, nodes: list[str], *arguments: str) -> None:
        folder.mkdir()
        self.files = [folder / str(number) for number in range(2)]
        self.processes = []
        for number, name in enumerate(nodes):
            self.files[number].mkdir()
            out, err = (self.files[number] / part for part in ("out", "err"))
            environment = os.environ | {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511", "NODE_RANK": str(number)}
            enter = partial(enter_namespace, name, self.files[number])
            started = commands.start("run", *arguments, out=out, err=err, environment=environment, first=enter)
            self.processes.append(started)

    def end(self) -> list[tuple[int | None, str]]:
        """Return exit code and stderr of each node."""
        for process in self.processes:
            process.join(120)
        return [(p.exitcode, (f / "err").read_text("utf-8")) for p, f in zip(self.processes, self.files, strict=True)]


def test_a_lost_link(write_recipe: WriteRecipe, tmp_path: Path, nodes: list[str]) -> None:
    recipe = write_recipe(
        launch={"machines": 2}, train={"max_steps": 8, "micro_batch_size": 1}, checkpoint={"every": 1},
        data={"eval": None}, trl={"ddp_timeout": 4}, log={"every": 1},
    )  # fmt: skip
    checkpoints = tmp_path / "run" / "checkpoints"
    cut = Run(tmp_path / "cut", nodes, str(recipe))
    while not (checkpoints / "checkpoint-2").exists():
        assert all(process.is_alive() for process in cut.processes), cut.end()
        time.sleep(0.05)
    ip("-n", nodes[1], "link", "set", "cable", "down")
    for (code, stderr), missing in zip(cut.end(), ("rank 1", "another rank"), strict=True):
        assert code == 1, stderr
        assert f"no response from {missing}: {tmp_path}/run: training failed after step" in stderr
        assert "Last checkpoint: " in stderr
        # The launcher's store (socket.cpp) warns on stderr if it cannot resolve an address.
        assert len([line for line in stderr.splitlines() if "socket.cpp" not in line]) == 1, stderr

    ip("-n", nodes[1], "link", "set", "cable", "up")
    resumed = Run(tmp_path / "resumed", nodes, str(recipe), "--resume")
    assert [code for code, _ in resumed.end()] == [0, 0], resumed.end()
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()

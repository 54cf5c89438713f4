"""`sft-recipe run --processes N`: ranks are launched, stopped and fail."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.distributed import launch, ranks
from sft_recipes.errors import RecipeError, RunError
from sft_recipes.recipe import parse
from tests import commands
from tests.conftest import WriteRecipe, metrics
from tests.distributed.ranks_in_forks import fork_ranks


@pytest.fixture
def in_ranks(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the command; each rank calls `first` with its rank before it starts."""

    def run(*arguments: str, first: Callable[[int], object] = int) -> Any:
        return commands.sft_recipe("run", *arguments, first=partial(fork_ranks, tmp_path, first))

    return run


def in_step(step_number: int, acting_rank: int, act: Callable[[], object], rank: int) -> None:
    """Call `act` in one of the ranks during a step."""
    from sft_recipes.training import trainer

    step = trainer.Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == acting_rank and self.state.global_step + 1 == step_number:
            act()
        return step(self, *args, **kwargs)

    trainer.Trainer.training_step = training_step


def stop_launcher() -> None:
    os.kill(int(os.environ[ranks.LAUNCHER_PID]), signal.SIGTERM)


def test_one_rank_prints_and_writes(write_recipe: WriteRecipe, tmp_path: Path, in_ranks: Callable[..., Any]) -> None:
    done = in_ranks(str(write_recipe(launch={"processes": 2})))

    assert (done.returncode, done.stderr) == (0, ""), done
    output = (tmp_path / "out").read_text("utf-8")
    assert output.count("3 steps; 4 sequences per step (micro-batch 2 x accumulation 1 x 2 processes)") == 1
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 3]
    assert not list(tmp_path.glob("run/**/.*"))


def test_stopped_killed_and_resumed(write_recipe: WriteRecipe, tmp_path: Path, in_ranks: Callable[..., Any]) -> None:
    recipe = str(write_recipe(train={"max_steps": 6}, checkpoint={"every": 2}))
    stopped = in_ranks(recipe, "--processes", "2", first=partial(in_step, 3, 0, stop_launcher))
    assert stopped.returncode == 75, stopped
    run, resume_hint = tmp_path / "run", f"Resume with: sft-recipe run {recipe} --processes 2 --resume"
    checkpoint = run / "checkpoints" / "checkpoint-3"
    assert stopped.stderr.splitlines() == [
        "",
        "SIGTERM received: forwarded to all ranks. Send it again to quit immediately.",
        f"{run}: stopped by SIGTERM after step 3 of 6. Last checkpoint: {checkpoint}.",
        resume_hint,
    ]

    kill = partial(in_step, 5, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    killed = in_ranks(recipe, "--processes", "2", "--resume", first=kill)
    assert killed.returncode == 1, killed
    assert killed.stderr.startswith("rank 1 was killed (SIGKILL)")
    assert len(killed.stderr.splitlines()) == 1

    resumed = in_ranks(recipe, "--processes", "2", "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "Resuming from" in (tmp_path / "out").read_text("utf-8")


def test_only_the_first_error_is_shown(write_recipe: WriteRecipe, tmp_path: Path, in_ranks: Callable[..., Any]) -> None:
    def fail() -> None:
        raise ValueError("no more")

    recipe = str(write_recipe())
    failed = in_ranks(recipe, "--processes", "2", first=partial(in_step, 2, 1, fail))
    assert failed.returncode == 1, failed
    assert re.fullmatch(
        rf"rank 1: {tmp_path}/run: training failed after step 1: no more\. .* Rows in this step: .*train.jsonl:\d+.*",
        failed.stderr.strip(),
    ), failed.stderr

    wrong = in_ranks(recipe, "--processes", "3")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert "4 is not divisible by micro_batch_size 2 x 3 processes" in wrong.stderr
    data = in_ranks(recipe, "--processes", "2", "--set", "data.train=nowhere.jsonl", "--set", "output_dir=other")
    assert data.returncode == 2
    assert len(data.stderr.splitlines()) == 1


def test_a_rank_that_hangs(write_recipe: WriteRecipe, tmp_path: Path, in_ranks: Callable[..., Any]) -> None:
    recipe = str(write_recipe(trl={"ddp_timeout": 2}))
    hung = in_ranks(recipe, "--processes", "2", first=partial(in_step, 2, 1, lambda: time.sleep(100)))
    assert hung.returncode == 1, hung
    assert hung.stderr.startswith(
        f"rank 0: no response from rank 1: {tmp_path}/run: training failed after step 1: Timed out"
    )
    assert hung.stderr.endswith("Continue with --resume. (Killed, still running: rank 1.)\n")


def export_alone(folder: Path, act: Callable[[], object], rank: int) -> None:
    """Replace the verification in rank 0 by `act`, some time after the other rank has exited."""
    from sft_recipes.export import verify

    if rank == 1:
        (folder / "pid").write_text(str(os.getpid()))

    def verify_later(_request: Any) -> Any:
        while Path(f"/proc/{(folder / 'pid').read_text()}").exists():
            time.sleep(0.05)
        time.sleep(1.5)  # longer than the grace period for other ranks' errors
        return act()

    verify.verify = verify_later


def test_rank_0_exports_after_the_others_exited(
    write_recipe: WriteRecipe, tmp_path: Path, in_ranks: Callable[..., Any]
) -> None:
    """Errors are then reported, and a signal stops it, as with one process."""

    def fail() -> None:
        raise RunError("no more")

    def stop() -> None:
        stop_launcher()
        time.sleep(100)

    recipe = write_recipe(train={"max_steps": 1}, export={"dtype": "float32"})
    failed = in_ranks(str(recipe), "--processes", "2", first=partial(export_alone, tmp_path, fail))
    assert failed.stderr == f"rank 0: {tmp_path}/run/model: verification failed: no more\n"
    assert failed.returncode == 1

    options = ("--processes", "2", "--resume")
    stopped = in_ranks(str(recipe), *options, first=partial(export_alone, tmp_path, stop))
    assert stopped.returncode == 75, stopped
    assert "stopped by SIGTERM; no training progress was lost" in stopped.stderr
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob(".*"))


# --- set_launcher_env and needs_launch ---


@pytest.fixture
def launch_needed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)

    def evaluate(environment: dict[str, str], **launch: Any) -> bool:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        settings = parse.Recipe.model_fields["launch"].annotation(**launch)
        ranks.set_launcher_env(settings)
        return ranks.needs_launch(settings)

    return evaluate


def test_without_a_launcher(launch_needed: Callable[..., bool]) -> None:
    assert not launch_needed({})
    assert launch_needed({}, processes=2)
    assert launch_needed({}, strategy="fsdp2")


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "PMI_RANK": "1", "PMI_SIZE": "4"},
    ],
    ids=["torchrun", "Slurm", "Open MPI", "MPICH", "MPICH under Slurm"],
)
def test_ranks_of_another_launcher(launch_needed: Callable[..., bool], environment: dict[str, str]) -> None:
    assert not launch_needed({**environment, "MASTER_ADDR": "10.0.0.1"}, processes=2, machines=2)
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == [
        "1",
        "4",
        "1",
        "2",
    ]
    with pytest.raises(RecipeError, match=r"launch.processes: the number of ranks must be 8 \(4 x 2 nodes; got 4\)"):
        launch_needed({}, processes=4, machines=2)


def test_one_task_per_node_launches_the_ranks(launch_needed: Callable[..., bool]) -> None:
    assert launch_needed(
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, processes=8, machines=2
    )
    assert os.environ["NODE_RANK"] == "1"


def test_nodes_without_a_rendezvous(write_recipe: WriteRecipe, launch_needed: Callable[..., bool]) -> None:
    recipe = parse.load(write_recipe(), ["launch.machines=2"]).recipe
    with pytest.raises(RecipeError, match=r"launch.machines: 2 nodes need MASTER_ADDR"):
        launch.launch(recipe, [])
    launch_needed({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"})
    with pytest.raises(RecipeError, match=r"launch.processes: the number of ranks must be 1 \(1 x 1 node; got 2\)"):
        launch_needed({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"})


def test_two_nodes_train_one_model(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The same command twice, as on two machines, with a rank each."""
    recipe = str(write_recipe(launch={"machines": 2}, export={"merge": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    folders = [tmp_path / name for name in ("first", "second")]
    nodes = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        nodes.append(
            commands.start(
                "run", recipe,
                out=folder / "launcher_out", err=folder / "launcher_err",
                environment=os.environ | rendezvous | {"NODE_RANK": str(number)},
                first=partial(fork_ranks, folder),
            )
        )  # fmt: skip
    for node in nodes:
        node.join(120)

    assert [node.exitcode for node in nodes] == [0, 0], [(f / "err").read_text("utf-8") for f in folders]
    outputs = [(folder / "out").read_text("utf-8") for folder in folders]
    assert "(micro-batch 2 x accumulation 1 x 2 processes)" in outputs[0]
    assert "schedule: " not in outputs[1]  # only rank 0 has the console
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 3]


def test_variables_that_are_not_numbers(write_recipe: WriteRecipe, launch_needed: Callable[..., bool]) -> None:
    recipe = parse.load(write_recipe(), ["launch.machines=2"]).recipe
    with pytest.raises(RecipeError, match=r"^RANK: not in the environment, but WORLD_SIZE is \(got 2\)"):
        launch_needed({"WORLD_SIZE": "2"}, processes=2)
    with pytest.raises(RecipeError, match=r"^WORLD_SIZE: the environment variable is not an integer \(got 'two'\)"):
        launch_needed({"WORLD_SIZE": "two"})
    launch_needed({"WORLD_SIZE": "", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "first"}, machines=2)
    with pytest.raises(RecipeError, match=r"^NODE_RANK: the environment variable is not an integer \(got 'first'\)"):
        launch.launch(recipe, [])
    launch_needed({"NODE_RANK": "0", "MASTER_PORT": "http"}, machines=2)
    with pytest.raises(RecipeError, match=r"^MASTER_PORT: the environment variable is not an integer \(got 'http'\)"):
        launch.launch(recipe, [])


def test_more_processes_than_gpus(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse.load(write_recipe(), ["launch.processes=4"]).recipe
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        RecipeError, match=r"^launch.processes: only 2 GPUs are visible, .* \(got 4\). Pass --processes 2.$"
    ):
        launch.launch(recipe, [])


def test_a_port_in_use(
    write_recipe: WriteRecipe, launch_needed: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse.load(write_recipe(), ["launch.machines=2"]).recipe
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        launch_needed(
            {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1"}, machines=2
        )
        with pytest.raises(RecipeError, match=f"MASTER_PORT: cannot listen on 127.0.0.1:{port}: the address is in use"):
            launch.launch(recipe, [])


def test_loopback_host_names_use_the_default_route() -> None:
    interface = launch._interface("127.0.1.1", loopback=True)
    assert interface is not None
    assert launch._interface("127.0.1.1") is None
    assert launch._interface_for("127.0.0.1") == launch._interface_for("localhost") == interface


def test_two_separate_processes(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Started as users do; other tests fork."""
    recipe = write_recipe(lora={"rank": 2}, export={"merge": False}, data={"eval": None}, train={"max_steps": 2})
    command = [sys.executable, "-P", "-m", "sft_recipes.cli", "run", str(recipe), "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "(micro-batch 2 x accumulation 1 x 2 processes)" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 1000

"""Stopping by signals and time limits."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes import stopping
from sft_recipes.errors import RecipeError, Stopped
from tests import commands
from tests.conftest import WriteRecipe, metrics


@pytest.mark.parametrize(
    ("said", "meant"),
    [("3h", 10_800), ("90m", 5_400), ("1h30m", 5_400), ("45s", 45), ("1d12h", 129_600), ("0.5h", 1_800), (" 2m ", 120)],
)
def test_times(said: str, meant: float) -> None:
    assert stopping.seconds(said) == meant


@pytest.mark.parametrize("said", ["", "3", "h", "3x", "-3h", "30m1h", "0h", "3 h", "nan", "infh", "1:30"])
def test_what_is_no_time(said: str) -> None:
    with pytest.raises(
        RecipeError, match=r"--stop-after: expected a duration such as 3h, 90m, 1h30m or 45s \(got .*\)"
    ):
        stopping.seconds(said)


@given(st.integers(1, 10**7))
def test_words_are_read_back(length: int) -> None:
    assert stopping.seconds(stopping.format_seconds(length)) == length


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_where_nothing_waits(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, stopping.on_request(None, "sft-recipe run r.yaml --resume"):
        signal.raise_signal(number)

    assert caught.value.lines == (
        f"stopped by {number.name}; no training progress was lost",
        "Resume with: sft-recipe run r.yaml --resume",
    )
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) == before


def test_a_signal_that_waits(capfd: pytest.CaptureFixture[str]) -> None:
    with stopping.on_request(None, "") as stop:
        stop.waits = "finishing this step"
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "stopped by SIGTERM"

    assert "SIGTERM received: finishing this step. Send it again to quit immediately." in capfd.readouterr().err


def test_a_rank_takes_the_same_signal_twice_for_one(capfd: pytest.CaptureFixture[str]) -> None:
    with stopping.on_request(None, None) as stop:
        stop.waits = "finishing this step"
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
        assert stop.reason == "stopped by SIGTERM"

    assert capfd.readouterr().err.count("SIGTERM") == 1


def test_a_time_that_is_up() -> None:
    assert stopping.Stop(after=0).reason == "stopped after 0s"
    assert stopping.Stop(after=3600).reason is None


def test_no_exception_on_the_way_holds_a_signal_up() -> None:
    with pytest.raises(Stopped), stopping.on_request(None, ""), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)


# --- The command, in a process of its own ---


def slowly(group: int | None = None) -> None:
    """Make each step slow and print when it begins; join a process group."""
    from sft_recipes.training import trainer

    if group is not None:
        os.setpgid(0, group)
    step = trainer.Trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            print("in a step", flush=True)
        time.sleep(0.5)
        return step(*args, **kwargs)

    trainer.Trainer.training_step = training_step


class Started:
    """A run in a separate process that the test stops."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.out, self.err = (folder.parent / f"{folder.name}.{name}" for name in ("out", "err"))
        for file in (self.out, self.err):
            file.write_text("")
        self.process = commands.start(*map(str, arguments), out=self.out, err=self.err, first=slowly)

    def wait_for_steps(self, number: int) -> None:
        while self.out.read_text("utf-8").count("in a step") < number:
            assert self.process.is_alive(), self.err.read_text("utf-8")
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int | None, str]:
        """Return exit code and stderr."""
        self.process.join(120)
        return self.process.exitcode, self.err.read_text("utf-8")


def test_the_step_is_finished_and_the_command_told_that_resumes(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(
        train={"max_steps": 500, "micro_batch_size": 4}, data={"eval": None}, checkpoint={"every": None}
    )
    run = Started(tmp_path, "run", recipe, "--set", "log.every=1")
    run.wait_for_steps(3)
    run.send(signal.SIGTERM)
    code, said = run.end()

    assert code == 75
    lines = said.strip().splitlines()
    assert lines[0] == (
        "SIGTERM received: finishing this step and saving a checkpoint. Send it again to quit immediately."
    )
    assert lines[1].startswith(f"{tmp_path / 'run'}: stopped by SIGTERM after step 3 of 500. Last checkpoint: ")
    assert lines[2:] == [f"Resume with: sft-recipe run {recipe} --set log.every=1 --resume"]
    assert metrics(tmp_path / "run")[-1]["step"] == 3

    code, said = Started(tmp_path, "run", recipe, "--set", "log.every=1", "--resume", "--stop-after", "0.1s").end()
    assert code == 75
    assert "stopped after 0.1s after step 4 of 500. Last checkpoint: " in said
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_the_whole_group_is_asked(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """As Ctrl-C does: also to data loader workers and to `| tee`, which exits."""
    recipe = write_recipe(
        train={"max_steps": 500}, data={"eval": None}, checkpoint={"every": None}, trl={"dataloader_num_workers": 2}
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True, process_group=0) as reader:
        run = commands.start("run", str(recipe), out=pipe, err=pipe, first=partial(slowly, reader.pid))
        assert reader.stdout is not None
        for _ in range(3):
            while "in a step" not in reader.stdout.readline():
                assert run.is_alive()
        os.killpg(reader.pid, signal.SIGINT)
    run.join(120)

    assert list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


def test_a_second_signal_ends_it_at_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"max_steps": 500}, data={"eval": None}, checkpoint={"every": None})
    run = Started(tmp_path, "run", recipe)
    run.wait_for_steps(3)
    run.send(signal.SIGINT)
    time.sleep(0.05)
    run.send(signal.SIGINT)
    code, _ = run.end()

    assert code == 128 + signal.SIGINT
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_before_the_first_step_nothing_is_left(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Stopped during setup: the same line, and no directory."""
    recipe = write_recipe()
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "sft_recipes.cli", "run", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1.5)
        process.terminate()
        _, said = process.communicate(timeout=120)

    assert process.returncode in (75, -signal.SIGTERM)  # the latter where Python itself had not started yet
    if process.returncode == 75:
        assert said.splitlines() == [
            "stopped by SIGTERM; no training progress was lost",
            f"Resume with: sft-recipe run {recipe} --resume",
        ]
    assert sorted(tmp_path.rglob("*")) == before

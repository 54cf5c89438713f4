import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from sft_recipes import files, run_folder
from sft_recipes.report import page
from sft_recipes.training import logging
from tests.commands import sft_recipe
from tests.conftest import WriteRecipe, metrics, run
from tests.test_files import no_file_over


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trackers' own variables as a user has them: none but wandb's offline mode."""
    for name in ("WANDB_DIR", "WANDB_PROJECT", "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "x")  # so that what the run sets is taken back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("clean_environment")
def test_trackers_write_into_the_run_directory(write_recipe: WriteRecipe) -> None:
    """Weights & Biases really run, offline; TensorBoard and trackio too. What they hold is what metrics.jsonl holds."""
    folder, said = run(write_recipe(log={"to": ["wandb", "tensorboard", "trackio"], "every": 1}), "train.max_steps=4")
    losses = [line["loss"] for line in metrics(folder) if "loss" in line]

    assert "warning: log.to" not in said
    [record] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert wandb_history(record, "train/loss") == pytest.approx(losses)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 1, 2, 3, 4]

    assert any(file.stat().st_size > 1000 for file in (folder / "trackio").rglob("*") if file.is_file())


def wandb_history(record: Path, key: str) -> list[float]:
    """The values of a metric in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    values = []
    for data in leveldb_records(record.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        for item in message.history.item:
            if key in (item.key, "/".join(item.nested_key)):
                values.append(json.loads(item.value_json))
    return values


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, parts with checksum, length and kind. Seven bytes of wandb's precede."""
    at, record = 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:  # no room for another header in this block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_a_tracker_that_fails_never_stops_a_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With a key that cannot be one, wandb refuses to start."""
    environment = os.environ | {"WANDB_MODE": "online", "WANDB_API_KEY": "too-short"}
    done = sft_recipe("run", str(write_recipe(log={"to": ["wandb"]})), environment=environment)

    assert done.returncode == 0, done.stderr
    [warning] = [line for line in done.stdout.splitlines() if line.startswith("warning: log.to")]
    assert "wandb failed and is left out from here on" in warning
    assert "too-short" not in done.stdout
    assert (tmp_path / "run" / "model").is_dir()


def test_a_tracker_that_cannot_be_made_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(logging, "get_reporting_integration_callbacks", lambda names: [lambda: 1 / 0])

    assert logging.trackers(["wandb"], tmp_path, warnings.append) == []
    assert "cannot be started and is left out: ZeroDivisionError" in warnings[0]


def test_lines_where_there_is_no_terminal(write_recipe: WriteRecipe) -> None:
    _, said = run(write_recipe(log={"every": 1}))
    lines = [line for line in said.splitlines() if line.startswith("step ")]

    assert [line.split("  ")[0] for line in lines] == ["step 0/3", *(f"step {n}/3" for n in (1, 1, 2, 2, 3, 3))]
    assert "eval loss" in lines[0]
    assert "perplexity" in lines[0]
    for word in ("loss", "lr ", "tokens/s", "GiB", "left"):
        assert word in lines[1]
    assert "\x1b" not in said


def test_a_bar_on_a_terminal() -> None:
    from transformers import TrainerControl, TrainerState

    said = io.StringIO()
    display = logging.Display(Console(file=said, force_terminal=True, width=120))
    state = TrainerState(max_steps=10, global_step=4)
    display.on_train_begin(None, state, TrainerControl())
    display.show({"step": 4, "loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 100.0, "memory": 1.0})
    display.on_step_end(None, state, TrainerControl())
    assert display.progress is not None
    display.progress.refresh()
    display.show({"step": 4, "eval_loss": 2.0, "eval_perplexity": 7.4})
    display.on_train_end(None, state, TrainerControl())

    assert "4/10" in said.getvalue()
    assert "loss 1.5000" in said.getvalue()
    assert "eval loss 2.0000" in said.getvalue()
    assert display.progress is None


def test_every_so_many_steps_and_the_last(write_recipe: WriteRecipe) -> None:
    folder, _ = run(write_recipe(log={"every": 2}, data={"eval": None}), "train.max_steps=5")

    assert [line["step"] for line in metrics(folder)] == [1, 2, 4, 5]


def test_tokens_are_those_of_the_data(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(data={"eval": None}, train={"max_steps": None, "epochs": 2}, log={"every": 1})
    folder, _ = run(recipe)
    tokens = json.loads((folder / "data.json").read_text("utf-8"))["train"]["tokens"]

    assert metrics(folder)[-1]["tokens"] == 2 * tokens
    assert metrics(folder)[-1]["epoch"] == 2.0


def test_metrics_that_cannot_be_written_are_a_warning(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The disk is full for a while: those lines are missing, and said to be, and no line is half there."""
    recipe = write_recipe(log={"every": 1}, train={"max_steps": 5}, data={"eval": None}, checkpoint={"every": None})
    append, room = files.append, iter([True, False, False, True, True])

    def appended(file: Path, text: str) -> None:
        with no_file_over(2**40 if next(room) else file.stat().st_size + 20):
            append(file, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "append", appended)
        folder, said = run(recipe)

    assert [line["step"] for line in metrics(folder)] == [1, 4, 5]
    assert "metrics.jsonl: step 2 is not recorded: OSError" in said
    assert "metrics.jsonl: step 3 is not recorded: OSError" in said
    assert (folder / "model").is_dir()


def test_a_console_that_nobody_reads_ends_no_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """`sft-recipe run r.yaml | head -1`"""
    command = [Path(sys.executable).with_name("sft-recipe"), "run", write_recipe(log={"every": 1})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == ("", 0)

    assert run_folder.is_finished(tmp_path / "run")


def test_tokens_and_rates_of_all_and_of_those_trained_on(write_recipe: WriteRecipe) -> None:
    folder, _ = run(write_recipe(log={"every": 2}, eval={"every": None}), "train.max_steps=5", "train.preflight=true")

    lines = [line for line in metrics(folder) if "loss" in line]
    data = json.loads((folder / "data.json").read_text("utf-8"))["train"]
    assert lines[-1]["step"] == 5
    for line in lines:
        share = line["trained_tokens_per_second"] / line["tokens_per_second"]
        assert 0 < share < 1
        assert line["tflops"] > 0
        assert "mfu" not in line  # nobody says what this CPU could
    # 5 steps of 4 of the sequences, which are fewer than 20: whole epochs and a part
    per_token = data["trained_tokens"] / data["tokens"]
    assert lines[-1]["trained_tokens"] / lines[-1]["tokens"] == pytest.approx(per_token, rel=0.2)
    first, second = lines[:2]
    between = (second["trained_tokens"] - first["trained_tokens"]) / (second["tokens"] - first["tokens"])
    rates = second["trained_tokens_per_second"] / second["tokens_per_second"]
    assert rates == pytest.approx(between, rel=0.01)


def test_a_plot_that_fails_is_a_warning(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(page, "learning_curve", fail)
    folder, said = run(write_recipe())

    assert "warning: the report could not be made: no fonts" in said
    assert run_folder.is_finished(folder)
    assert not list(folder.rglob("*.partial"))


def test_answers_that_cannot_be_written_are_a_warning(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = files.append

    def appended(file: Path, text: str) -> None:
        with no_file_over(20 if file.name == "samples.jsonl" else 2**40):
            append(file, text)

    monkeypatch.setattr(files, "append", appended)
    folder, said = run(write_recipe(eval={"generate": ["Say the word number 1."], "max_new_tokens": 2}))

    assert "samples.jsonl: the answers of step 0 are not recorded: " in said
    assert run_folder.is_finished(folder)

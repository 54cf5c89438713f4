"""What experiment trackers record of a run, read from their own files."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.trackers.base import COLUMNS, Tracker, kinds
from sft_recipes.trackers.tensorboard import TensorBoard, markdown_table
from sft_recipes.training import nonfatal_trackers
from tests.commands import sft_recipe
from tests.conftest import WriteRecipe, metrics, minimal, write_rows
from tests.conftest import run as run_here

ALL = [*kinds()]
ODD = "What *is* <b>a|b</b>,\nand `c`?"
ASKED = [{"prompt": "Say the word number 1.", "expected": "word 1"}, ODD]


def without_settings(folder: Path) -> dict[str, str]:
    """The environment of a user who has never used a tracker."""
    prefixes = ("WANDB_", "TENSORBOARD_", "TRACKIO_", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    own = {f"WANDB_{name}_DIR": str(folder / "wandb") for name in ("CONFIG", "CACHE", "DATA")}
    return environment | own | {"HOME": str(folder), "NETRC": str(folder / "netrc")}


def fails_in_step_4() -> None:
    """Make the training of this process fail."""
    from sft_recipes.training.trainer import Trainer

    step = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("no power")
        return step(self, *args, **kwargs)

    setattr(Trainer, "training_step", training_step)  # noqa: B010


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with all trackers that failed after step 3 and was resumed from step 2, and the output of both."""
    folder = tmp_path_factory.mktemp("followed")
    write_rows(folder / "train.jsonl")
    recipe = minimal(folder) | {
        "lora": {"rank": 2},
        "log": {"to": ALL, "every": 1, "project": "course", "name": "first try", "group": "tiny"},
        "eval": {"generate": ASKED, "every": 1, "max_new_tokens": 4},
        "checkpoint": {"every": 2},
    }
    recipe["train"] |= {"max_steps": 5, "preflight": True}
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    environment = without_settings(folder)
    failed = sft_recipe("run", str(file), environment=environment, cwd=folder, first=fails_in_step_4)
    assert failed.returncode == 1, failed.stderr
    assert "no power" in failed.stderr
    resumed = sft_recipe("run", str(file), "--resume", environment=environment, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from" in resumed.stdout
    assert resumed.stderr == ""
    return folder / "run", failed.stdout + resumed.stdout


def history(folder: Path, tracker: str, key: str) -> list[tuple[int, float]]:
    """Step and value of a metric in the files of a tracker, in the order in which they were logged."""
    return {"wandb": of_wandb, "tensorboard": of_tensorboard, "trackio": of_trackio, "mlflow": of_mlflow}[tracker](
        folder, key
    )


@pytest.mark.parametrize("tracker", ALL)
@pytest.mark.parametrize(
    "key",
    [
        "loss",
        "learning_rate",
        "trained_tokens",
        "tokens_per_second",
        "tflops",
        "peak_memory_gib",
        "eval_loss",
        "eval_exact_match",
    ],
)
def test_each_step_is_logged_once(followed: tuple[Path, str], tracker: str, key: str) -> None:
    """Also after a failure and resume. Times of steps that were trained twice are the first ones."""
    folder, _ = followed
    kind = key if key.startswith("eval") else "loss"
    expected = [(line["step"], line[key]) for line in metrics(folder) if kind in line]
    assert [step for step, _ in expected] == list(range(0 if key.startswith("eval") else 1, 6))
    told = history(folder, tracker, key)

    assert [step for step, _ in told] == [step for step, _ in expected]
    again = 3 if key in ("tokens_per_second", "tflops", "peak_memory_gib") else 0
    assert [value for step, value in told if step != again] == pytest.approx([v for s, v in expected if s != again])


@pytest.mark.parametrize("tracker", ALL)
def test_the_answers_are_a_table(followed: tuple[Path, str], tracker: str) -> None:
    folder, _ = followed
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    rows = [[s["step"], s["messages"][-1]["content"], s["answer"], s["expected"]] for s in samples]

    tables = {"wandb": tables_of_wandb, "trackio": tables_of_trackio, "mlflow": tables_of_mlflow}
    if tracker == "tensorboard":
        assert tables_of_tensorboard(folder) == [
            markdown_table([as_row(r) for r in rows[i : i + 2]]) for i in range(0, 12, 2)
        ]
    else:
        assert tables[tracker](folder) == rows


def as_row(values: list[Any]) -> dict[str, Any]:
    return dict(zip(COLUMNS, values, strict=True))


def test_tensorboard_tables_escape_text() -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    page = markdown_to_safe_html(markdown_table([as_row([0, ODD, "_a_ [b](c) # d", None])]))

    assert page.count("<td>") == 4
    assert "<td>What *is* &lt;b&gt;a|b&lt;/b&gt;,<br>and `c`?</td>" in page
    assert "<td>_a_ [b](c) # d</td>" in page


@pytest.mark.parametrize("tracker", ALL)
def test_the_recipe_is_logged(followed: tuple[Path, str], tracker: str) -> None:
    folder, _ = followed
    resolved = json.loads((folder / "recipe.resolved.json").read_text("utf-8"))
    found = {
        "wandb": recipe_of_wandb,
        "tensorboard": recipe_of_tensorboard,
        "trackio": recipe_of_trackio,
        "mlflow": recipe_of_mlflow,
    }[tracker](folder)

    assert found("lora.rank") == 2
    assert found("train.learning_rate") == 0.001
    assert found("train.lr_scheduler") == resolved["train"]["lr_scheduler"]
    assert found("output_dir") == str(folder)


def test_names_and_groups(followed: tuple[Path, str]) -> None:
    folder, _ = followed
    for run in runs_of_wandb(folder):
        assert (run.project, run.display_name, run.run_group) == ("course", "first try", "tiny")
    [(name, config)] = trackio_rows(folder, "SELECT run_name, config FROM configs")
    assert (name, json.loads(config)["_Group"]) == ("first try", "tiny")
    assert (folder / "trackio" / "course.db").is_file()
    run = run_of_mlflow(folder)
    assert (run.info.run_name, run.data.tags["group"], run.info.status) == ("first try", "tiny", "FINISHED")


def test_resume_continues_the_run_of_each_tracker(followed: tuple[Path, str]) -> None:
    folder, _ = followed
    kept = json.loads((folder / "trackers.json").read_text("utf-8"))

    assert {run.run_id for run in runs_of_wandb(folder)} == {kept["wandb"]}
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    assert run_of_mlflow(folder).info.run_id == kept["mlflow"]
    assert kept["trackio"] == "first try"


def test_without_a_login_everything_is_in_the_run_directory(followed: tuple[Path, str]) -> None:
    folder, said = followed
    run = json.loads((folder / "trackers.json").read_text("utf-8"))["wandb"]

    assert "warning: log.to" not in said
    for line in (
        f"wandb: offline; upload it with: wandb sync {folder}/wandb/offline-run-*-{run}",
        f"tensorboard: tensorboard --logdir {folder}/tensorboard",
        f"trackio: TRACKIO_DIR={folder}/trackio trackio show --project course",
        f"mlflow: mlflow ui --backend-store-uri sqlite:///{folder}/mlflow/mlflow.db",
    ):
        assert said.splitlines().count(line) == 2, line
    assert "Trackio" not in said  # its own words
    here = {file.name for file in folder.parent.iterdir()}
    assert here <= {"run", "recipe.json", "train.jsonl", ".cache", ".config", ".local", "wandb"}


def test_environment_variables_of_the_trackers(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    """A tracker's own variables apply where the recipe sets nothing."""
    own = {"WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_RUN_GROUP": "ours", "WANDB_NAME": "it"}
    own |= {"MLFLOW_EXPERIMENT_NAME": "mine", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/all.db"}
    own |= {name: str(tmp_path / name) for name in ("WANDB_DIR", "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR")}
    (tmp_path / "WANDB_DIR").mkdir()
    recipe = write_recipe(log={"to": ALL}, train={"max_steps": 1}, data={"eval": None})
    done = sft_recipe("run", str(recipe), environment=without_settings(tmp_path) | own, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "warning: log.to" not in done.stdout
    [run] = runs_of_wandb(tmp_path / "WANDB_DIR")
    assert (run.project, run.run_group, run.display_name) == ("mine", "ours", "it")
    assert list((tmp_path / "TENSORBOARD_LOGGING_DIR").glob("events*"))
    assert (tmp_path / "TRACKIO_DIR" / "sft-recipes.db").is_file()
    [mine] = of_mlflow_store(f"sqlite:///{tmp_path}/all.db", "mine")
    assert (mine.info.run_name, "group" in mine.data.tags) == ("run", False)
    assert not {"wandb", "tensorboard", "trackio", "mlflow"} & {file.name for file in (tmp_path / "run").iterdir()}


def test_a_tracker_that_fails_does_not_stop_the_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With an invalid key, wandb does not start."""
    environment = without_settings(tmp_path) | {"WANDB_MODE": "online", "WANDB_API_KEY": "too-short"}
    done = sft_recipe("run", str(write_recipe(log={"to": ["wandb"]})), environment=environment)

    assert done.returncode == 0, done.stderr
    [warning] = [line for line in done.stdout.splitlines() if line.startswith("warning: log.to")]
    assert "wandb failed and is disabled for the rest of the run" in warning
    assert "too-short" not in done.stdout
    assert (tmp_path / "run" / "model").is_dir()


def test_a_tracker_that_cannot_start_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_recipes.recipe.schema import Recipe

    def cannot(*_: object) -> None:
        raise OSError("no such library\n")

    monkeypatch.setattr(nonfatal_trackers, "kinds", lambda: {"wandb": cannot, "tensorboard": TensorBoard})
    recipe = Recipe.model_validate(minimal(tmp_path) | {"log": {"to": ["wandb", "tensorboard"]}})
    warnings: list[str] = []
    [made] = nonfatal_trackers.start_trackers(recipe, tmp_path, print, warnings.append)

    assert warnings == ["log.to: wandb failed to start and is disabled: OSError: no such library"]
    assert callable(made.on_save)
    with pytest.raises(AttributeError):
        made.nothing()


def test_a_failed_tracker_receives_nothing_more(tmp_path: Path) -> None:
    from sft_recipes.recipe.schema import Recipe

    class Broken(Tracker):
        name = package = "broken"
        calls = 0

        def connect(self) -> None:
            pass

        def table(self, step: int, rows: list[dict[str, Any]]) -> None:
            self.calls += 1
            raise OSError("no\nnetwork")

    warnings: list[str] = []
    broken = Broken(Recipe.model_validate(minimal(tmp_path)).resolved(), tmp_path)
    guarded = nonfatal_trackers.NonFatalTracker(broken, print, warnings.append)
    guarded.table(1, [])
    guarded.table(2, [])

    assert warnings == ["log.to: broken failed and is disabled for the rest of the run: OSError: no network"]
    assert broken.calls == 1


ADDED = '''
"""A tracker that nobody else has."""

from sft_recipes.trackers.base import Tracker


class Lines(Tracker):
    """Steps and answers are lines of `lines.txt`."""

    name = "lines"
    package = "json"

    def connect(self):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_log(_, args, state, control, logs, **kwargs):
                self.write(f"step {state.global_step}")

        return Callback()

    def write(self, line):
        with (self.run_dir / "lines.txt").open("a") as file:
            file.write(f"{self.title}: {line}\\n")

    def table(self, step, rows):
        self.write(f"{len(rows)} answers")

    def where(self):
        return "cat lines.txt"
'''
WITH_ADDED = """
import sys

from sft_recipes import trackers

trackers.__path__.append(sys.argv.pop(1))  # instead of a file in the package

from sft_recipes.cli import main

main()
"""


def test_a_tracker_is_added_by_one_file(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Schema, `check`, `run` and the advice to install it follow from the file."""
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "lines.py").write_text(ADDED)
    recipe = str(write_recipe(log={"to": ["lines"], "name": "first", "every": 1}, eval={"generate": ["Say one."]}))

    def added(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITH_ADDED, str(tmp_path / "added"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    names = json.loads(added("schema").stdout)["$defs"]["Log"]["properties"]["to"]["items"]["enum"]
    assert names == ["lines", *kinds()]
    checked = added("check", recipe)
    assert (checked.returncode, checked.stderr) == (0, "")
    done = added("run", recipe)
    assert done.returncode == 0, done.stderr
    assert "lines: cat lines.txt" in done.stdout
    lines = (tmp_path / "run" / "lines.txt").read_text("utf-8").splitlines()
    assert lines[:3] == ["first: 1 answers", "first: step 0", "first: step 1"]
    (tmp_path / "added" / "lines.py").write_text(ADDED.replace('"json"', '"no_such_package"'))
    assert "log.to: lines is not installed. Run pip install 'no_such_package'." in added("check", recipe).stderr


def test_every_extra_of_a_tracker_is_one(request: pytest.FixtureRequest) -> None:
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text("utf-8"))["project"]

    assert {kind.extra for kind in kinds().values()} - {None} <= set(project["optional-dependencies"])


def test_two_runs_of_one_process(tmp_path: Path) -> None:
    """In the first, mlflow fails and is closed. trackio cannot change its directory, which is a warning."""
    recipes = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl")
        recipe = minimal(tmp_path / name) | {"log": {"to": ["trackio", "mlflow"]}, "eval": {"generate": ASKED}}
        recipe["train"] |= {"max_steps": 1}
        recipes.append(tmp_path / name / "recipe.json")
        recipes[-1].write_text(json.dumps(recipe), encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError("no network")

    def first() -> None:
        mlflow = kinds()["mlflow"]
        table = mlflow.table
        setattr(mlflow, "table", fail)  # noqa: B010
        run_here(recipes[0])
        setattr(mlflow, "table", table)  # noqa: B010

    done = sft_recipe("run", str(recipes[1]), environment=without_settings(tmp_path), cwd=tmp_path, first=first)

    assert done.returncode == 0, done.stderr
    folders = [recipe.parent / "run" for recipe in recipes]
    stores = [of_mlflow_store(f"sqlite:///{folder}/mlflow/mlflow.db", "sft-recipes") for folder in folders]
    assert [[one.info.status for one in store] for store in stores] == [["FAILED"], ["FINISHED"]]
    [warning] = [line for line in done.stdout.splitlines() if line.startswith("warning: log.to")]
    assert f"trackio logs to {folders[0]}/trackio, not {folders[1]}/trackio" in warning
    assert f"trackio: TRACKIO_DIR={folders[0]}/trackio trackio show" in done.stdout


# --- Weights & Biases ------------------------------------------------------------------------------------------------


def records(folder: Path) -> Iterator[Any]:
    """Everything in the files of offline runs, in the order of time."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(data)
            yield message


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


def values_of(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def slashed(key: str) -> str:
    return f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"


def of_wandb(folder: Path, key: str) -> list[tuple[int, float]]:
    found = [values_of(record.history.item) for record in records(folder)]
    return [(line["train/global_step"], line[slashed(key)]) for line in found if slashed(key) in line]


def runs_of_wandb(folder: Path) -> list[Any]:
    return [record.run for record in records(folder) if record.WhichOneof("record_type") == "run"]


def recipe_of_wandb(folder: Path) -> Callable[[str], Any]:
    config = values_of(runs_of_wandb(folder)[0].config.update)["recipe"]
    return lambda key: walk(config, key)


def walk(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def tables_of_wandb(folder: Path) -> list[list[Any]]:
    rows = []
    for record in records(folder):
        entry = values_of(record.history.item)
        if entry.get("samples/_type") == "table-file":
            [file] = (folder / "wandb").glob(f"offline-run-*/files/{entry['samples/path']}")
            table = json.loads(file.read_text("utf-8"))
            assert table["columns"] == list(COLUMNS)
            rows += table["data"]
    return rows


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()


def of_tensorboard(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(slashed(key))]


def tables_of_tensorboard(folder: Path) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events(folder).Tensors("samples/text_summary")]


def recipe_of_tensorboard(folder: Path) -> Callable[[str], Any]:
    [event] = events(folder).Tensors("recipe/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    recipe = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    return lambda key: walk(recipe, key)


# --- trackio ---------------------------------------------------------------------------------------------------------


def trackio_rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "trackio" / "course.db") as database:
        return database.execute(query).fetchall()


def told_to_trackio(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(row[0]) for row in trackio_rows(folder, "SELECT metrics FROM metrics ORDER BY step")]


def of_trackio(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(line["train/global_step"], line[slashed(key)]) for line in told_to_trackio(folder) if slashed(key) in line]


def tables_of_trackio(folder: Path) -> list[list[Any]]:
    tables = [line["samples"] for line in told_to_trackio(folder) if "samples" in line]
    return [[row[name] for name in COLUMNS] for table in tables for row in table["_value"]]


def recipe_of_trackio(folder: Path) -> Callable[[str], Any]:
    [(config,)] = trackio_rows(folder, "SELECT config FROM configs")
    return lambda key: json.loads(config)[f"recipe.{key}"]


# --- MLflow ----------------------------------------------------------------------------------------------------------


def client(uri: str) -> Any:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def of_mlflow_store(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return list(client(uri).search_runs([found.experiment_id]))


def run_of_mlflow(folder: Path) -> Any:
    [run] = of_mlflow_store(f"sqlite:///{folder}/mlflow/mlflow.db", "course")
    return run


def of_mlflow(folder: Path, key: str) -> list[tuple[int, float]]:
    run = run_of_mlflow(folder)
    found = client(f"sqlite:///{folder}/mlflow/mlflow.db").get_metric_history(run.info.run_id, key)
    return [(metric.step, metric.value) for metric in sorted(found, key=lambda metric: metric.step)]


def tables_of_mlflow(folder: Path) -> list[list[Any]]:
    [file] = (folder / "mlflow" / "artifacts").rglob("samples.json")
    table = json.loads(file.read_text("utf-8"))
    assert table["columns"] == list(COLUMNS)
    return list(table["data"])


def recipe_of_mlflow(folder: Path) -> Callable[[str], Any]:
    parameters = run_of_mlflow(folder).data.params
    return lambda key: type_of(parameters[f"recipe.{key}"])


def type_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

"""Experiment trackers: transformers' callbacks, and what these leave out: names and groups, the recipe, tables of answers, and
a run that goes on there where it is resumed here."""

import html
import io
import json
import os
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils.generic import flatten_dict

from sft_recipes import atomic_files
from sft_recipes.recipe.schema import Recipe

KEPT = "trackers.json"  # in the run directory: what each tracker calls the run
PROJECT = "sft-recipes"
COLUMNS = ("step", "prompt", "answer", "expected")
_RECORDS = ("loss", "eval_loss", "eval_exact_match")  # each line of metrics.jsonl has the first that it has of these


class Tracker(TrainerCallback):
    """What all have in common. Making one imports its library."""

    name: ClassVar[str]
    caveat: str | None = None  # what is otherwise than one expects

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        super().__init__()
        self.recipe, self.run_dir = recipe, run_dir
        self.before = kept(run_dir).get(self.name)  # what the tracker calls the run, where it has it already
        self.title = recipe.log.name or run_dir.name

    def keep(self, run: str) -> None:
        """Write down what the tracker calls the run, to go on with it when the run is resumed."""
        atomic_files.write_json(self.run_dir / KEPT, kept(self.run_dir) | {self.name: run})

    def parameters(self) -> dict[str, Any]:
        """The recipe with every default, by dotted keys."""
        return {f"recipe.{key}": value for key, value in flatten_dict(self.recipe.resolved()).items()}

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Show answers: a dict of COLUMNS each."""
        raise NotImplementedError

    def where(self) -> str:
        """Where to look, or the command that shows it."""
        raise NotImplementedError

    def fail(self) -> None:
        """The training has failed: no `on_train_end` comes."""
        raise NotImplementedError


class Wandb(Tracker, WandbCallback):
    name = "wandb"

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        log, mode = self.recipe.log, None
        # Without a login wandb would ask for one, and fail where there is no terminal.
        if "WANDB_MODE" not in os.environ and not self._wandb.login(prompt=False, verify=False):
            mode = "offline"
        run = self._wandb.init(
            id=self.before,
            resume="allow" if self.before else None,
            project=log.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=log.name or os.environ.get("WANDB_NAME") or self.title,
            group=log.group,  # None: WANDB_RUN_GROUP
            config={"recipe": self.recipe.resolved()},
            dir=os.environ.get("WANDB_DIR") or self.run_dir,
            mode=mode,
            settings=self._wandb.Settings(silent=True),
        )
        self.keep(run.id)
        super().setup(args, state, model, **kwargs)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        table = self._wandb.Table(columns=[*COLUMNS], data=[[*row.values()] for row in rows])
        self._wandb.log({"samples": table, "train/global_step": step})

    def where(self) -> str:
        run = self._wandb.run
        if not run.offline:
            return str(run.url or "disabled")
        folder = Path(run.dir).parent.parent  # a run that was resumed has several in there
        return f"offline; upload it with: wandb sync {shlex.quote(str(folder))}/offline-run-*-{run.id}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._wandb.finish()  # transformers leaves it open for the life of the process

    def fail(self) -> None:
        self._wandb.finish(exit_code=1)


class TensorBoard(Tracker, TensorBoardCallback):
    name = "tensorboard"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.logging_dir: str = self.logging_dir or str(self.run_dir / "tensorboard")  # of TENSORBOARD_LOGGING_DIR
        super().on_train_begin(args, state, control, **kwargs)
        if not self.before:
            recipe = json.dumps(self.recipe.resolved(), indent=2, ensure_ascii=False)
            self.tb_writer.add_text("recipe", f"```json\n{recipe}\n```")
        self.keep(self.logging_dir)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.tb_writer.add_text("samples", table_in_markdown(rows), step)

    def where(self) -> str:
        return f"tensorboard --logdir {shlex.quote(self.logging_dir)}"

    def fail(self) -> None:
        self.tb_writer.close()


class Trackio(Tracker, TrackioCallback):
    name = "trackio"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        own = os.environ.get("TRACKIO_DIR")
        folder = Path(own or run_dir / "trackio")
        os.environ["TRACKIO_DIR"] = str(folder)  # is read once, when it is imported
        import trackio.run

        if not own:  # or the next run of this process would take it for the user's
            del os.environ["TRACKIO_DIR"]

        # It asks the hub for the name behind the token, where there is one, also for runs that stay here.
        setattr(trackio.run.Run, "_get_username", lambda _: None)  # noqa: B010
        super().__init__(recipe, run_dir)
        if folder != (used := self._trackio.TRACKIO_DIR):
            self.caveat = f"logs into {used}, not {folder}: it has one directory a process; start each run in its own"

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """In place of transformers' own, which knows no groups, and takes another run of the same name for this one."""
        with redirect_stdout(io.StringIO()):
            run = self._trackio.init(
                project=self.recipe.log.project or PROJECT,
                name=self.before or self.title,
                group=self.recipe.log.group,
                config=self.parameters(),
                resume="allow" if self.before else "never",
                embed=False,
                space_id=args.trackio_space_id,
                private=args.hub_private_repo,
                bucket_id=getattr(args, "trackio_bucket_id", None),  # a field of late
            )
        self._space_id = self._trackio.context_vars.current_space_id.get()
        self.keep(run.name)
        self._initialized = True

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._trackio.log({"samples": self._trackio.Table(data=rows), "train/global_step": step})

    def where(self) -> str:
        if server := self._trackio.context_vars.current_server.get():
            return str(server)
        folder, project = self._trackio.TRACKIO_DIR, self._trackio.context_vars.current_project.get()
        return f"TRACKIO_DIR={shlex.quote(str(folder))} trackio show --project {shlex.quote(project)}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with redirect_stdout(io.StringIO()):
            super().on_train_end(args, state, control, **kwargs)

    def fail(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


class MLflow(Tracker, MLflowCallback):
    name = "mlflow"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        super().__init__(recipe, run_dir)
        self.ours = False  # whether it is kept in the run directory

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        mlflow, log = self._ml_flow, self.recipe.log
        experiment = log.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        if not mlflow.is_tracking_uri_set():
            self.ours = True
            folder = (self.run_dir / "mlflow").absolute()
            folder.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if mlflow.get_experiment_by_name(experiment) is None:  # or its files would go to the working directory
                mlflow.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment)
        tags = {"group": log.group} if log.group else None
        self.keep(mlflow.start_run(run_id=self.before, run_name=self.title, tags=tags).info.run_id)
        if self.before:  # what was told then cannot be changed, and transformers would tell its arguments again
            super().setup(SimpleNamespace(run_name=self.title, to_dict=dict), state, None)
        else:
            longest, most = self._MAX_PARAM_VAL_LENGTH, self._MAX_PARAMS_TAGS_PER_BATCH
            parameters = [(key, str(value)[:longest]) for key, value in self.parameters().items()]
            for start in range(0, len(parameters), most):
                mlflow.log_params(dict(parameters[start : start + most]))
            super().setup(args, state, model)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        self._ml_flow.log_table(columns, "samples.json")  # adds to what is there

    def where(self) -> str:
        uri = self._ml_flow.get_tracking_uri()
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if self.ours else str(uri)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._end("FINISHED" if state.global_step >= state.max_steps else "KILLED")

    def fail(self) -> None:
        self._end("FAILED")

    def _end(self, status: str) -> None:
        with ExitStack() as last:  # done from below, each also where another fails
            if self.ours:  # the next run of this process has its own
                last.callback(self._ml_flow.set_tracking_uri, None)
            last.callback(self._ml_flow.end_run, status)
            last.callback(self._ml_flow.flush_async_logging)


class NonFatalTracker:
    """A tracker that can fail without stopping the run: it is then left alone, with one warning.

    It hears of each record once. What it knows from before the run was resumed would come again, and be the same.
    """

    def __init__(self, tracker: Tracker, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._tracker, self._say, self._warn = tracker, say, warn
        self._known = _recorded(tracker.run_dir) if tracker.before else set()
        self._open = self._failed = False

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._attempt, getattr(self._tracker, event))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        def begin() -> None:
            self._open = True
            self._tracker.on_train_begin(args, state, control, **kwargs)
            self._say(f"{self._tracker.name}: {self._tracker.where()}")

        self._attempt(begin)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if (state.global_step, _record(logs)) not in self._known:
            self._attempt(self._tracker.on_log, args, state, control, logs=logs, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._attempt(self._tracker.on_train_end, args, state, control, **kwargs)
        self._open = self._open and self._failed

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Show the answers of a step, a dict of COLUMNS each."""
        if (step, "samples") not in self._known:
            self._attempt(self._tracker.table, step, rows)

    def close(self) -> None:
        """What is still open was left by a training, or a tracker, that has failed. Of the latter no more is said."""
        if self._open:
            self._open = False
            if self._failed:
                with suppress(Exception):
                    self._tracker.fail()
            else:
                self._attempt(self._tracker.fail)

    def _attempt(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            act(*args, **kwargs)
        except Exception as error:
            self._failed = True
            self._warn(in_short(f"log.to: {self._tracker.name} failed and is left out from here on: {error!r}"))


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, TensorBoard, Trackio, MLflow)}


def trackers(
    recipe: Recipe, run_dir: Path, say: Callable[[str], None], warn: Callable[[str], None]
) -> list[NonFatalTracker]:
    """The trackers of log.to as callbacks, before metrics.jsonl is rewound. What they write on this machine goes into the run
    directory, unless the user says otherwise by the tracker's own variables."""
    guarded = []
    for name in recipe.log.to:
        try:
            tracker = KINDS[name](recipe, run_dir)
            if tracker.caveat:
                warn(f"log.to: {name} {tracker.caveat}")
            guarded.append(NonFatalTracker(tracker, say, warn))
        except Exception as error:
            warn(in_short(f"log.to: {name} cannot be started and is left out: {error!r}"))
    return guarded


def kept(run_dir: Path) -> dict[str, str]:
    """What each tracker calls the run; {} where none has it yet."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run_dir / KEPT).read_text(encoding="utf-8")))
    return {}


def in_short(text: str) -> str:
    return " ".join(text.split())[:300]


def _recorded(run_dir: Path) -> set[tuple[int, str | None]]:
    """Steps of metrics.jsonl and samples.jsonl, and what each line records."""
    found: set[tuple[int, str | None]] = set()
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in atomic_files.lines(run_dir / name) if (run_dir / name).is_file() else ():
            with suppress(ValueError, KeyError, TypeError):  # a power cut can leave anything
                values = json.loads(line)
                found.add((int(values["step"]), _record(values) or "samples"))
    return found


def _record(values: dict[str, Any]) -> str | None:
    """Which record it is of its step; None for what metrics.jsonl does not hold."""
    return next((name for name in _RECORDS if name in values), None)


def table_in_markdown(rows: list[dict[str, Any]]) -> str:
    """Answers, a dict of COLUMNS each, as a table in which every text stays what it is."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    text = html.escape("" if value is None else str(value), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("\n", "<br>")

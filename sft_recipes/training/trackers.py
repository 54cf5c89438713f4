"""Log to experiment trackers with transformers' callbacks, plus run names, groups, the recipe, sample tables and resume."""

import html
import io
import json
import os
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils.generic import flatten_dict

from sft_recipes import atomic_files
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import keep_trackio_offline, trackio_is_set_up

IDS_FILE = "trackers.json"  # in the run directory: the run id of each tracker
PROJECT = "sft-recipes"
COLUMNS = ("step", "prompt", "answer", "expected")
_RECORDS = ("loss", "eval_loss", "eval_exact_match")  # the first key present identifies a record of its step


class Tracker(TrainerCallback):
    """Base class of trackers. Creating an instance imports the tracker's library."""

    name: ClassVar[str]
    caveat: str | None = None  # printed as a warning

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        super().__init__()
        self.recipe, self.run_dir = recipe, run_dir
        self.run_id = saved_ids(run_dir).get(self.name)  # None if the tracker does not have the run yet
        self.title = recipe.log.name or run_dir.name

    @property
    def library(self) -> Any:
        return import_module(self.name)

    def save_id(self, run_id: str) -> None:
        """Record the tracker's run id, so that a resumed run continues it."""
        atomic_files.write_json(self.run_dir / IDS_FILE, saved_ids(self.run_dir) | {self.name: run_id})

    def parameters(self) -> dict[str, Any]:
        """Return the recipe with all defaults, by dotted keys."""
        return {f"recipe.{key}": value for key, value in flatten_dict(self.recipe.resolved()).items()}

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log sample answers, one dict with the keys COLUMNS each."""
        raise NotImplementedError

    def where(self) -> str:
        """Return the URL of the run, or the command that shows it."""
        raise NotImplementedError

    def fail(self) -> None:
        """Close the run as failed. `on_train_end` is not called in this case."""
        raise NotImplementedError


class Wandb(Tracker, WandbCallback):
    name = "wandb"

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        log, mode = self.recipe.log, None
        # Without a login, wandb prompts for one, which fails without a terminal.
        if "WANDB_MODE" not in os.environ and not self.library.login(prompt=False, verify=False):
            mode = "offline"
        run = self.library.init(
            id=self.run_id,
            resume="allow" if self.run_id else None,
            project=log.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=log.name or os.environ.get("WANDB_NAME") or self.title,
            group=log.group,  # None: WANDB_RUN_GROUP
            config={"recipe": self.recipe.resolved()},
            dir=os.environ.get("WANDB_DIR") or self.run_dir,
            mode=mode,
            settings=self.library.Settings(silent=True),
        )
        self.save_id(run.id)
        super().setup(args, state, model, **kwargs)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        table = self.library.Table(columns=[*COLUMNS], data=[[*row.values()] for row in rows])
        self.library.log({"samples": table, "train/global_step": step})

    def where(self) -> str:
        run = self.library.run
        if not run.offline:
            return str(run.url or "disabled")
        folder = Path(run.dir).parent.parent  # a resumed run has several directories in it
        return f"offline; upload it with: wandb sync {shlex.quote(str(folder))}/offline-run-*-{run.id}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.library.finish()  # transformers leaves the run open until the process exits

    def fail(self) -> None:
        self.library.finish(exit_code=1)


class TensorBoard(Tracker, TensorBoardCallback):
    name = "tensorboard"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.logging_dir: str = self.logging_dir or str(self.run_dir / "tensorboard")  # set by TENSORBOARD_LOGGING_DIR
        super().on_train_begin(args, state, control, **kwargs)
        if not self.run_id:
            recipe = json.dumps(self.recipe.resolved(), indent=2, ensure_ascii=False)
            self.tb_writer.add_text("recipe", f"```json\n{recipe}\n```")
        self.save_id(self.logging_dir)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.tb_writer.add_text("samples", markdown_table(rows), step)

    def where(self) -> str:
        return f"tensorboard --logdir {shlex.quote(self.logging_dir)}"

    def fail(self) -> None:
        self.tb_writer.close()


class Trackio(Tracker, TrackioCallback):
    name = "trackio"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        own = os.environ.get("TRACKIO_DIR")
        folder = Path(own or run_dir / "trackio")
        os.environ["TRACKIO_DIR"] = str(folder)  # read once, on import
        keep_trackio_offline()

        if not own:  # otherwise the next run of this process would treat it as set by the user
            del os.environ["TRACKIO_DIR"]

        super().__init__(recipe, run_dir)
        if folder != (used := self.library.TRACKIO_DIR):
            self.caveat = (
                f"logs to {used}, not {folder}, because it uses one directory per process. "
                "Start each run in its own process."
            )

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Replace transformers' setup, which has no groups and continues a different run of the same name."""
        with redirect_stdout(io.StringIO()):
            run = self.library.init(
                project=self.recipe.log.project or PROJECT,
                name=self.run_id or self.title,
                group=self.recipe.log.group,
                config=self.parameters(),
                resume="allow" if self.run_id else "never",
                embed=False,
                space_id=args.trackio_space_id,
                private=args.hub_private_repo,
                bucket_id=getattr(args, "trackio_bucket_id", None),  # missing in older versions
            )
        trackio_is_set_up(self, self.library.context_vars.current_space_id.get())
        self.save_id(run.name)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.library.log({"samples": self.library.Table(data=rows), "train/global_step": step})

    def where(self) -> str:
        if server := self.library.context_vars.current_server.get():
            return str(server)
        folder, project = self.library.TRACKIO_DIR, self.library.context_vars.current_project.get()
        return f"TRACKIO_DIR={shlex.quote(str(folder))} trackio show --project {shlex.quote(project)}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with redirect_stdout(io.StringIO()):
            super().on_train_end(args, state, control, **kwargs)

    def fail(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.library.finish()


class MLflow(Tracker, MLflowCallback):
    name = "mlflow"

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        super().__init__(recipe, run_dir)
        self.in_run_dir = False  # whether the tracking store is in the run directory

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        mlflow, log = self.library, self.recipe.log
        experiment = log.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        if not mlflow.is_tracking_uri_set():
            self.in_run_dir = True
            folder = (self.run_dir / "mlflow").absolute()
            folder.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if mlflow.get_experiment_by_name(experiment) is None:  # otherwise its files go to the working directory
                mlflow.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment)
        tags = {"group": log.group} if log.group else None
        self.save_id(mlflow.start_run(run_id=self.run_id, run_name=self.title, tags=tags).info.run_id)
        if self.run_id:  # parameters are immutable in MLflow, and transformers would log them again
            super().setup(SimpleNamespace(run_name=self.title, to_dict=dict), state, None)
        else:
            limits = mlflow.utils.validation
            max_length, batch = limits.MAX_PARAM_VAL_LENGTH, limits.MAX_PARAMS_TAGS_PER_BATCH
            parameters = [(key, str(value)[:max_length]) for key, value in self.parameters().items()]
            for start in range(0, len(parameters), batch):
                mlflow.log_params(dict(parameters[start : start + batch]))
            super().setup(args, state, model)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        self.library.log_table(columns, "samples.json")  # appends

    def where(self) -> str:
        uri = self.library.get_tracking_uri()
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if self.in_run_dir else str(uri)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._end("FINISHED" if state.global_step >= state.max_steps else "KILLED")

    def fail(self) -> None:
        self._end("FAILED")

    def _end(self, status: str) -> None:
        with ExitStack() as cleanup:  # runs in reverse order, each step even if another fails
            if self.in_run_dir:  # the next run of this process has its own store
                cleanup.callback(self.library.set_tracking_uri, None)
            cleanup.callback(self.library.end_run, status)
            cleanup.callback(self.library.flush_async_logging)


class NonFatalTracker:
    """Wrapper that disables a failing tracker with one warning instead of stopping the run.

    On resume it skips records that the tracker already has: the resumed steps log them again with the same values.
    """

    def __init__(self, tracker: Tracker, print_line: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._tracker, self._print_line, self._warn = tracker, print_line, warn
        self._known = _recorded(tracker.run_dir) if tracker.run_id else set()
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
            self._print_line(f"{self._tracker.name}: {self._tracker.where()}")

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
        """Log the sample answers of a step, one dict with the keys COLUMNS each."""
        if (step, "samples") not in self._known:
            self._attempt(self._tracker.table, step, rows)

    def close(self) -> None:
        """Close the tracker after a failed training, silently if the tracker itself failed before."""
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
            self._warn(
                shorten(f"log.to: {self._tracker.name} failed and is disabled for the rest of the run: {error!r}")
            )


KINDS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, TensorBoard, Trackio, MLflow)}


def trackers(
    recipe: Recipe, run_dir: Path, print_line: Callable[[str], None], warn: Callable[[str], None]
) -> list[NonFatalTracker]:
    """Create the trackers of log.to as callbacks. Call it before metrics.jsonl is rolled back, as it reads known records.

    Local files go into the run directory, unless the tracker's own environment variables are set.
    """
    guarded = []
    for name in recipe.log.to:
        try:
            tracker = KINDS[name](recipe, run_dir)
            if tracker.caveat:
                warn(f"log.to: {name} {tracker.caveat}")
            guarded.append(NonFatalTracker(tracker, print_line, warn))
        except Exception as error:
            warn(shorten(f"log.to: {name} failed to start and is disabled: {error!r}"))
    return guarded


def saved_ids(run_dir: Path) -> dict[str, str]:
    """Return the run id of each tracker; {} if there are none yet."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run_dir / IDS_FILE).read_text(encoding="utf-8")))
    return {}


def shorten(text: str) -> str:
    """Put text on one line of at most 300 characters."""
    return " ".join(text.split())[:300]


def _recorded(run_dir: Path) -> set[tuple[int, str | None]]:
    """Return (step, kind of record) for each line of metrics.jsonl and samples.jsonl."""
    records: set[tuple[int, str | None]] = set()
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in atomic_files.lines(run_dir / name) if (run_dir / name).is_file() else ():
            with suppress(ValueError, KeyError, TypeError):  # a power loss can leave any content
                values = json.loads(line)
                records.add((int(values["step"]), _record(values) or "samples"))
    return records


def _record(values: dict[str, Any]) -> str | None:
    """Return the kind of record, or None if metrics.jsonl does not hold it."""
    return next((name for name in _RECORDS if name in values), None)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Format sample answers as a Markdown table, with all text escaped."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    text = html.escape("" if value is None else str(value), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("\n", "<br>")

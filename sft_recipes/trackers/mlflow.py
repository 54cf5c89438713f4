"""MLflow."""

import os
import shlex
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from sft_recipes.trackers.base import COLUMNS, PROJECT, Tracker


class MLflow(Tracker):
    """A run is in `mlflow/mlflow.db` and `mlflow/artifacts/`, which
    `mlflow ui --backend-store-uri sqlite:///runs/mine/mlflow/mlflow.db` shows. Set `MLFLOW_TRACKING_URI` to a server, or to a
    database shared by several runs. `project` is the experiment, `group` the tag `group`. The recipe is in the parameters as
    `recipe.…`, answers are in `samples.json`, metrics have no slash (`eval_loss`). `MLFLOW_EXPERIMENT_NAME` applies if the
    recipe does not set `project`; the other variables (`MLFLOW_TAGS`, ...) work as usual. The extra installs the client
    (mlflow-skinny); `mlflow ui` is in the package `mlflow`.
    """

    name = package = extra = "mlflow"

    def connect(self) -> Any:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow
        from transformers.integrations import MLflowCallback

        self.mlflow: Any = mlflow
        self.in_run_dir = False  # whether the tracking store is in the run directory
        return MLflowCallback()

    def begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mlflow = self.mlflow
        experiment = self.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        if not mlflow.is_tracking_uri_set():
            self.in_run_dir = True
            folder = (self.run_dir / "mlflow").absolute()
            folder.mkdir(exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if mlflow.get_experiment_by_name(experiment) is None:  # otherwise its files go to the working directory
                mlflow.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment)
        tags = {"group": self.group} if self.group else None
        self.save_id(mlflow.start_run(run_id=self.run_id, run_name=self.title, tags=tags).info.run_id)
        if self.run_id:  # parameters are immutable in MLflow, and transformers would log them again
            self.callback.setup(SimpleNamespace(run_name=self.title, to_dict=dict), state, None)
            return
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        parameters = [(key, str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in self.parameters().items()]
        for start in range(0, len(parameters), MAX_PARAMS_TAGS_PER_BATCH):
            mlflow.log_params(dict(parameters[start : start + MAX_PARAMS_TAGS_PER_BATCH]))
        super().begin(args, state, control, **kwargs)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.mlflow.log_table({name: [row[name] for row in rows] for name in COLUMNS}, "samples.json")  # appends

    def where(self) -> str:
        uri = self.mlflow.get_tracking_uri()
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if self.in_run_dir else str(uri)

    def end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().end(args, state, control, **kwargs)
        self._close("FINISHED" if state.global_step >= state.max_steps else "KILLED")

    def fail(self) -> None:
        self._close("FAILED")

    def _close(self, status: str) -> None:
        with ExitStack() as cleanup:  # runs in reverse order, each step even if another fails
            if self.in_run_dir:  # the next run of this process has its own store
                cleanup.callback(self.mlflow.set_tracking_uri, None)
            cleanup.callback(self.mlflow.end_run, status)
            cleanup.callback(self.mlflow.flush_async_logging)

"""Weights & Biases."""

import os
import shlex
from pathlib import Path
from typing import Any

from sft_recipes.trackers.base import COLUMNS, PROJECT, Tracker


class Wandb(Tracker):
    """Without a login, a run is in `wandb/`, offline; `wandb sync` uploads it. After `wandb login`, or with `WANDB_API_KEY`,
    it goes to wandb.ai or `WANDB_BASE_URL`. `WANDB_MODE=offline` keeps it on this machine even if you are logged in; `online`
    requires a login. The recipe is in the run's config under `recipe`, answers are in the table `samples`. `WANDB_PROJECT`,
    `WANDB_NAME` and `WANDB_RUN_GROUP` apply if the recipe does not set the key; the other variables (`WANDB_ENTITY`,
    `WANDB_TAGS`, ...) work as usual. Metrics of the last second or two before a process is killed are lost. A resumed offline
    run has several directories with one id, which `wandb sync` uploads into one run (according to its help; not tested).
    """

    name = package = extra = "wandb"

    def connect(self) -> Any:
        import wandb
        from transformers.integrations import WandbCallback

        self.wandb = wandb
        return WandbCallback()

    def begin(self, *event: Any, **kwargs: Any) -> None:
        # Without a login, wandb prompts for one, which fails without a terminal.
        offline = "WANDB_MODE" not in os.environ and not self.wandb.login(prompt=False, verify=False)
        run = self.wandb.init(
            id=self.run_id,
            resume="allow" if self.run_id else None,
            project=self.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=self.recipe["log"]["name"] or os.environ.get("WANDB_NAME") or self.title,
            group=self.group,  # None: WANDB_RUN_GROUP
            config={"recipe": self.recipe},
            dir=os.environ.get("WANDB_DIR") or self.run_dir,
            mode="offline" if offline else None,
            settings=self.wandb.Settings(silent=True),
        )
        self.save_id(run.id)
        super().begin(*event, **kwargs)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        table = self.wandb.Table(columns=[*COLUMNS], data=[[*row.values()] for row in rows])
        self.wandb.log({"samples": table, "train/global_step": step})

    def where(self) -> str:
        run: Any = self.wandb.run
        if not run.offline:
            return str(run.url or "disabled")
        folder = Path(run.dir).parent.parent  # a resumed run has several directories in it
        return f"offline; upload it with: wandb sync {shlex.quote(str(folder))}/offline-run-*-{run.id}"

    def end(self, *event: Any, **kwargs: Any) -> None:
        super().end(*event, **kwargs)
        self.wandb.finish()  # transformers leaves the run open until the process exits

    def fail(self) -> None:
        self.wandb.finish(exit_code=1)

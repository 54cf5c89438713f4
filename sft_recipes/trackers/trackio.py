"""trackio."""

import io
import os
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from sft_recipes.trackers.base import PROJECT, Tracker


class Trackio(Tracker):
    """A run is in `trackio/`; `TRACKIO_DIR=runs/mine/trackio trackio show` shows it. Set `TRACKIO_DIR` to share a directory
    between runs, `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` to log elsewhere. The recipe is in the run's config as `recipe.…`,
    answers are in the table `samples`. Several runs of one Python process use the directory of the first, with a warning.
    """

    name = package = extra = "trackio"

    def connect(self) -> Any:
        own = os.environ.get("TRACKIO_DIR")
        folder = Path(own or self.run_dir / "trackio")
        os.environ["TRACKIO_DIR"] = str(folder)  # read once, on import
        import trackio
        from transformers.integrations import TrackioCallback

        from sft_recipes.upstream import keep_trackio_offline

        if not own:  # otherwise the next run of this process would treat it as set by the user
            del os.environ["TRACKIO_DIR"]
        keep_trackio_offline()
        self.trackio: Any = trackio
        if folder != (used := self.trackio.TRACKIO_DIR):
            self.caveat = (
                f"logs to {used}, not {folder}, because it uses one directory per process. "
                "Start each run in its own process."
            )
        return TrackioCallback()

    def begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
        """Replace transformers' setup, which has no groups and continues a different run of the same name."""
        with redirect_stdout(io.StringIO()):
            run = self.trackio.init(
                project=self.project or PROJECT,
                name=self.run_id or self.title,
                group=self.group,
                config=self.parameters(),
                resume="allow" if self.run_id else "never",
                embed=False,
                space_id=args.trackio_space_id,
                private=args.hub_private_repo,
                bucket_id=getattr(args, "trackio_bucket_id", None),  # missing in older versions
            )
        from sft_recipes.upstream import trackio_is_set_up

        trackio_is_set_up(self.callback, self.trackio.context_vars.current_space_id.get())
        self.save_id(run.name)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.trackio.log({"samples": self.trackio.Table(data=rows), "train/global_step": step})

    def where(self) -> str:
        if server := self.trackio.context_vars.current_server.get():
            return str(server)
        folder, project = self.trackio.TRACKIO_DIR, self.trackio.context_vars.current_project.get()
        return f"TRACKIO_DIR={shlex.quote(str(folder))} trackio show --project {shlex.quote(project)}"

    def end(self, *event: Any, **kwargs: Any) -> None:
        with redirect_stdout(io.StringIO()):
            super().end(*event, **kwargs)

    def fail(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()

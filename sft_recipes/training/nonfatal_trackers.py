"""Start the trackers of log.to, so that one that fails does not stop the run."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sft_recipes.errors import reason_of
from sft_recipes.recipe.schema import Recipe
from sft_recipes.run_dir import LOGS
from sft_recipes.trackers.base import Tracker, kinds
from sft_recipes.training.checkpoint_dirs import intact_lines

_RECORDS = ("loss", "eval_loss", "eval_exact_match")  # the first key present identifies a record of its step


class NonFatalTracker:
    """Callback that passes events to a tracker, and disables it with one warning if it fails.

    On resume it skips records that the tracker already has: the resumed steps log them again with the same values.
    """

    def __init__(self, tracker: Tracker, print_line: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._tracker, self._print_line, self._warn = tracker, print_line, warn
        self._known = _recorded(tracker.run_dir) if tracker.run_id else set()
        self._open = self._failed = False

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._attempt, getattr(self._tracker.callback, event))

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        def begin() -> None:
            self._open = True
            self._tracker.begin(*event, **kwargs)
            self._print_line(f"{self._tracker.name}: {self._tracker.where()}")

        self._attempt(begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if (state.global_step, _record(logs)) not in self._known:
            self._attempt(self._tracker.callback.on_log, args, state, control, logs=logs, **kwargs)

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        self._attempt(self._tracker.end, *event, **kwargs)
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
            reason = f"{type(error).__name__}: {reason_of(error)}"
            self._warn(f"log.to: {self._tracker.name} failed and is disabled for the rest of the run: {reason}")


def start_trackers(
    recipe: Recipe, run_dir: Path, print_line: Callable[[str], None], warn: Callable[[str], None]
) -> list[NonFatalTracker]:
    """Create the trackers of log.to as callbacks. Call it before metrics.jsonl is rolled back, as it reads known records.

    Local files go into the run directory, unless the tracker's own environment variables are set.
    """
    started = []
    for name in recipe.log.to:
        try:
            tracker = kinds()[name](recipe.resolved(), run_dir)
            if tracker.caveat:
                warn(f"log.to: {name} {tracker.caveat}")
            started.append(NonFatalTracker(tracker, print_line, warn))
        except Exception as error:
            warn(f"log.to: {name} failed to start and is disabled: {type(error).__name__}: {reason_of(error)}")
    return started


def _recorded(run_dir: Path) -> set[tuple[int, str | None]]:
    """Return (step, kind of record) for each line of metrics.jsonl and samples.jsonl."""
    logs = [run_dir / name for name in LOGS if (run_dir / name).is_file()]
    return {(values["step"], _record(values) or "samples") for log in logs for _, values in intact_lines(log)}


def _record(values: dict[str, Any]) -> str | None:
    """Return the kind of record, or None if metrics.jsonl does not hold it."""
    return next((name for name in _RECORDS if name in values), None)

"""The base class of experiment trackers, and the list of them: each other module of this package is one.

Their libraries, transformers and torch are imported when a run starts: the recipe's schema, `check` and the docs follow from
these classes without them.
"""

import importlib
import json
import pkgutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from sft_recipes import atomic_files, trackers
from sft_recipes.run_dir import TRACKERS

PROJECT = "sft-recipes"
COLUMNS = ("step", "prompt", "answer", "expected")


class Tracker:
    """A value of log.to. The docstring of a subclass is its paragraph in docs/trackers.md."""

    name: ClassVar[str]
    package: ClassVar[str]  # as Python imports it
    extra: ClassVar[str | None] = None  # of sft-recipes, which installs the package; None: pip installs it by its name
    has_names: ClassVar[bool] = True  # whether log.project, log.name and log.group have an effect
    caveat: str | None = None  # printed as a warning

    def __init__(self, recipe: dict[str, Any], run_dir: Path) -> None:
        """Import the tracker's library. `recipe` has every key with its value."""
        self.recipe, self.run_dir = recipe, run_dir
        self.project, self.group = recipe["log"]["project"], recipe["log"]["group"]
        self.title = recipe["log"]["name"] or run_dir.name
        self.run_id = saved_ids(run_dir).get(self.name)  # None if the tracker does not have the run yet
        self.callback = self.connect()

    @classmethod
    def install(cls) -> str:
        """Return what pip has to install."""
        return f"sft-recipes[{cls.extra}]" if cls.extra else cls.package

    def save_id(self, run_id: str) -> None:
        """Record the tracker's run id, so that a resumed run continues it."""
        atomic_files.write_json(self.run_dir / TRACKERS, saved_ids(self.run_dir) | {self.name: run_id})

    def parameters(self) -> dict[str, Any]:
        """Return the recipe by dotted keys."""
        from transformers.utils.generic import flatten_dict

        return {f"recipe.{key}": value for key, value in flatten_dict(self.recipe).items()}

    def connect(self) -> Any:
        """Import the library and return a TrainerCallback, which receives the events of the run: most are in transformers."""
        raise NotImplementedError

    def begin(self, *event: Any, **kwargs: Any) -> None:
        """Start the tracker's run, or continue `run_id`. The arguments are those of `on_train_begin`."""
        self.callback.on_train_begin(*event, **kwargs)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Log sample answers, one dict with the keys COLUMNS each."""
        raise NotImplementedError

    def where(self) -> str:
        """Return the URL of the run, or the command that shows it."""
        raise NotImplementedError

    def end(self, *event: Any, **kwargs: Any) -> None:
        """Close the run. The arguments are those of `on_train_end`."""
        self.callback.on_train_end(*event, **kwargs)

    def fail(self) -> None:
        """Close the run as failed, instead of `end`."""
        raise NotImplementedError


@cache
def kinds() -> dict[str, type[Tracker]]:
    """Return the trackers of this package by name."""
    names = [f"{trackers.__name__}.{module.name}" for module in pkgutil.iter_modules(trackers.__path__)]
    for name in names:
        importlib.import_module(name)
    found = [kind for kind in Tracker.__subclasses__() if kind.__module__ in names]
    return {kind.name: kind for kind in sorted(found, key=lambda kind: kind.name)}


def saved_ids(run_dir: Path) -> dict[str, str]:
    """Return the run id of each tracker; {} if there are none yet."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run_dir / TRACKERS).read_text(encoding="utf-8")))
    return {}

"""TensorBoard."""

import html
import json
import re
import shlex
from typing import Any

from sft_recipes.trackers.base import COLUMNS, Tracker


class TensorBoard(Tracker):
    """Event files are in `tensorboard/`, or in `TENSORBOARD_LOGGING_DIR`; `tensorboard --logdir runs` shows all runs. The
    recipe is the text `recipe`, answers are the text `samples`, one table per step. `project`, `name` and `group` have no
    effect: a run is named by its directory.
    """

    name = package = extra = "tensorboard"
    has_names = False

    def connect(self) -> Any:
        from transformers.integrations import TensorBoardCallback

        return TensorBoardCallback()

    def begin(self, *event: Any, **kwargs: Any) -> None:
        # Set already if TENSORBOARD_LOGGING_DIR is.
        self.callback.logging_dir = self.callback.logging_dir or str(self.run_dir / "tensorboard")
        super().begin(*event, **kwargs)
        if not self.run_id:
            recipe = json.dumps(self.recipe, indent=2, ensure_ascii=False)
            self.callback.tb_writer.add_text("recipe", f"```json\n{recipe}\n```")
        self.save_id(self.callback.logging_dir)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.callback.tb_writer.add_text("samples", markdown_table(rows), step)

    def where(self) -> str:
        return f"tensorboard --logdir {shlex.quote(self.callback.logging_dir)}"

    def fail(self) -> None:
        self.callback.tb_writer.close()


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Format sample answers as a Markdown table, with all text escaped."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    text = html.escape("" if value is None else str(value), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("\n", "<br>")

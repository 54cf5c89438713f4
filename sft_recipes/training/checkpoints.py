"""Checkpoints to resume from."""

import json
from pathlib import Path

from sft_recipes.errors import OutputError


def newest(run_dir: Path) -> Path:
    """The latest checkpoint that is complete: the Trainer writes trainer_state.json last. Raises OutputError."""
    found = [
        folder for folder in (run_dir / "checkpoints").glob("checkpoint-*") if (folder / "trainer_state.json").is_file()
    ]
    if not found:
        raise OutputError(
            f"output_dir: {run_dir} holds no complete checkpoint to resume from: the run stopped before its first; start "
            "again with --set output_dir=DIR, or remove it"
        )
    return max(found, key=_step)


def rewind(run_dir: Path, checkpoint: Path) -> None:
    """Take back what was logged after the checkpoint: those steps will be run again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = run_dir / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = (line for line in lines if line.endswith("\n"))  # a run that is killed can leave half a line
            file.write_text("".join(line for line in whole if json.loads(line)["step"] <= _step(checkpoint)), "utf-8")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])

"""A few of the kills of tests/kills.py, in a process that has not used torch before it forks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_killed_runs_come_to_the_same_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kills", "--trials", "4", "--seed", "1", "--methods", "full", "lora"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 trials, " in done.stdout
    assert "killed at an operation" in done.stdout

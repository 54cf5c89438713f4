import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

from sft_recipes import atomic_files, run_dir
from sft_recipes.report import page
from sft_recipes.training.metrics import ProgressDisplay
from tests.commands import sft_recipe, start
from tests.conftest import WriteRecipe, metrics, run
from tests.test_atomic_files import no_file_over


def test_lines_without_a_terminal(write_recipe: WriteRecipe) -> None:
    _, said = run(write_recipe(log={"every": 1}))
    lines = [line for line in said.splitlines() if line.startswith("step ")]

    assert [line.split("  ")[0] for line in lines] == ["step 0/3", *(f"step {n}/3" for n in (1, 1, 2, 2, 3, 3))]
    assert "eval loss" in lines[0]
    assert "perplexity" in lines[0]
    for word in ("loss", "lr ", "tokens/s", "GiB", "ETA"):
        assert word in lines[1]
    assert "\x1b" not in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("columns", "figures"),
    [
        (140, "loss 1.5000  ETA 0:00:00  lr 1.00e-04  12,345 tokens/s  peak 1.0 GiB"),
        (83, "loss 1.5000  ETA 0:00:00  lr 1.00e-04  12,345 tokens/s  peak 1.0 GiB"),
        (72, "loss 1.5000  ETA 0:00:00  lr 1.00e-04  12,345 tokens/s"),
        (50, "loss 1.5000  ETA 0:00:00"),
        (30, "loss 1.5000"),
    ],
)
def test_a_bar_on_a_terminal(columns: int, figures: str) -> None:
    """One line with as many metrics as fit; below it the progress of the evaluation."""
    said = Terminal()
    display = ProgressDisplay(Console(file=said, force_terminal=True, color_system=None, width=columns))
    state, control = TrainerState(max_steps=10, global_step=4), TrainerControl()
    display.on_train_begin(None, state, control)
    display.on_step_begin(None, state, control)
    state.global_step = 5
    display.show({"step": 5, "loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 12345.0, "peak_memory_gib": 1.0})
    display.on_step_end(None, state, control)
    assert display.progress is not None
    display.progress.refresh()
    bar = lines_of(said)[-1]
    assert re.fullmatch(f"━+ + 5/10 {re.escape(figures)}", bar.rstrip())
    assert len(bar) <= columns

    for _ in range(2):
        display.on_prediction_step(None, state, control, eval_dataloader=[0, 0, 0])
    display.progress.refresh()
    assert "2/3" in lines_of(said)[-1]
    display.show({"step": 5, "eval_loss": 2.0, "eval_perplexity": 7.4})
    display.on_evaluate(None, state, control)
    display.on_train_end(None, state, control)

    assert "step 5/10  eval loss 2.0000  perplexity 7.40" in lines_of(said)
    assert display.progress is None


def lines_of(said: io.StringIO) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue())
    return [line for line in re.split(r"[\r\n]+", plain) if line]


@pytest.mark.parametrize("no_color", [{}, {"NO_COLOR": "1"}])
def test_a_run_on_a_terminal(write_recipe: WriteRecipe, tmp_path: Path, no_color: dict[str, str]) -> None:
    """A pseudoterminal of 60 columns."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {name: value for name, value in os.environ.items() if "COLOR" not in name and name != "COLUMNS"}
    recipe = write_recipe(log={"every": 1}, model={"dtype": "bfloat16"})
    child = start(
        "run", str(recipe), out=Path(os.ttyname(other)), err=tmp_path / "err",
        environment=environment | {"TERM": "xterm-256color"} | no_color,
    )  # fmt: skip
    said = Terminal()
    while child.is_alive() or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.2)[0]:
            said.write(os.read(main, 65536).decode(errors="replace"))
    for end in (main, other):
        os.close(end)

    assert child.exitcode == 0, (tmp_path / "err").read_text("utf-8")
    lines = lines_of(said)
    bars = [line for line in lines if "━" in line]
    assert any("3/3 loss" in line for line in bars)
    assert any(line.startswith("step 3/3  eval loss") for line in lines)
    assert not any(line.startswith("step 3/3  loss") for line in lines)  # is on the bar
    assert max(map(len, bars)) <= 60
    coloured = re.search(r"\x1b\[(\d+;)*(3\d|38;[0-9;]+)m", said.getvalue())
    assert bool(coloured) == (not no_color)


def test_lines_in_a_file_with_force_color(write_recipe: WriteRecipe) -> None:
    done = sft_recipe("run", str(write_recipe(log={"every": 1})), environment=os.environ | {"FORCE_COLOR": "1"})

    assert done.returncode == 0, done.stderr
    assert "━" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if re.match(r"step \d/3  loss", line)]) == 3


def test_lines_in_a_notebook() -> None:
    assert not ProgressDisplay(Console(file=Terminal(), force_jupyter=True)).show_bar


def test_every_nth_step_and_the_last(write_recipe: WriteRecipe) -> None:
    folder, _ = run(write_recipe(log={"every": 2}, data={"eval": None}), "train.max_steps=5")

    assert [line["step"] for line in metrics(folder)] == [1, 2, 4, 5]


def test_tokens_are_those_of_the_data(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(data={"eval": None}, train={"max_steps": None, "epochs": 2}, log={"every": 1})
    folder, _ = run(recipe)
    tokens = json.loads((folder / "data.json").read_text("utf-8"))["train"]["tokens"]

    assert metrics(folder)[-1]["tokens"] == 2 * tokens
    assert metrics(folder)[-1]["epoch"] == 2.0


def test_micro_batches_do_not_synchronize_the_device(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these methods of a tensor on a GPU synchronizes it. TRL calls some per micro-batch;
    this package, and transformers on its behalf, only per step."""
    waits: Counter[str] = Counter()

    def spied(method: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any) -> Any:
            module = sys._getframe(1).f_globals["__name__"]
            own = module.startswith("sft_recipes.") and not module.endswith(".attention")  # which loops on a CPU alone
            if own or module.startswith("transformers.trainer"):
                waits[f"{module}.{sys._getframe(1).f_code.co_name}"] += 1
            return method(tensor, *args)

        return call

    for name in ("item", "tolist", "__int__", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, spied(getattr(torch.Tensor, name)))
    recipe, found = write_recipe(data={"eval": None}, log={"every": 4}, checkpoint={"every": None}), []
    for micro in (1, 4):
        waits.clear()
        folder, _ = run(recipe, f"train.micro_batch_size={micro}", f"output_dir={recipe.parent / str(micro)}")
        found.append((dict(waits), [line["tokens"] for line in metrics(folder)]))

    assert found[0] == found[1]


def test_metrics_that_cannot_be_written_are_a_warning(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The disk is full for two steps: their lines are missing, with a warning each, and no line is partial."""
    recipe = write_recipe(log={"every": 1}, train={"max_steps": 5}, data={"eval": None}, checkpoint={"every": None})
    append, room = atomic_files.append, iter([True, False, False, True, True])

    def appended(file: Path, text: str) -> None:
        with no_file_over(2**40 if next(room) else file.stat().st_size + 20):
            append(file, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_files, "append", appended)
        folder, said = run(recipe)

    assert [line["step"] for line in metrics(folder)] == [1, 4, 5]
    assert "metrics.jsonl: cannot write metrics of step 2: " in said
    assert "metrics.jsonl: cannot write metrics of step 3: " in said
    assert (folder / "model").is_dir()


def test_a_closed_console_does_not_stop_the_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """`sft-recipe run r.yaml | head -1`"""
    command = [
        Path(sys.executable).with_name("sft-recipe"),
        "run",
        write_recipe(log={"every": 1}, lora={}, export={"merge": False}),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == ("", 0)

    assert run_dir.is_finished(tmp_path / "run")


def test_rates_of_all_tokens_and_of_trained_ones(write_recipe: WriteRecipe) -> None:
    folder, _ = run(write_recipe(log={"every": 2}, eval={"every": None}), "train.max_steps=5", "train.preflight=true")

    lines = [line for line in metrics(folder) if "loss" in line]
    data = json.loads((folder / "data.json").read_text("utf-8"))["train"]
    assert lines[-1]["step"] == 5
    for line in lines:
        share = line["trained_tokens_per_second"] / line["tokens_per_second"]
        assert 0 < share < 1
        assert line["tflops"] > 0
        assert "mfu" not in line  # nobody says what this CPU could
    # 5 steps of 4 of the sequences, which are fewer than 20: whole epochs and a part
    per_token = data["trained_tokens"] / data["tokens"]
    assert lines[-1]["trained_tokens"] / lines[-1]["tokens"] == pytest.approx(per_token, rel=0.2)
    first, second = lines[:2]
    between = (second["trained_tokens"] - first["trained_tokens"]) / (second["tokens"] - first["tokens"])
    rates = second["trained_tokens_per_second"] / second["tokens_per_second"]
    assert rates == pytest.approx(between, rel=0.01)


def test_a_plot_that_fails_is_a_warning(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(page, "learning_curve", fail)
    folder, said = run(write_recipe())

    assert "warning: cannot create the report: no fonts" in said
    assert run_dir.is_finished(folder)
    assert not list(folder.rglob("*.partial"))


def test_answers_that_cannot_be_written_are_a_warning(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = atomic_files.append

    def appended(file: Path, text: str) -> None:
        with no_file_over(20 if file.name == "samples.jsonl" else 2**40):
            append(file, text)

    monkeypatch.setattr(atomic_files, "append", appended)
    folder, said = run(write_recipe(eval={"generate": ["Say the word number 1."], "max_new_tokens": 2}))

    assert "samples.jsonl: cannot write the answers of step 0: " in said
    assert run_dir.is_finished(folder)

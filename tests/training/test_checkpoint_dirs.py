"""Only complete checkpoints are resumed from; the latest and the best are never removed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from sft_recipes import atomic_files
from sft_recipes.errors import RunError
from sft_recipes.models import model
from sft_recipes.models.tokenizer import tokenizer_bytes
from sft_recipes.planning import disk
from sft_recipes.training import checkpoint_dirs, trainer
from tests.conftest import WriteRecipe, build, metrics, run
from tests.test_atomic_files import no_file_over


def made(run_dir: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoint_dirs.checkpoint_path(run_dir, step)
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
        atomic_files.write_checksums(folder)


def names(run_dir: Path) -> list[str]:
    return sorted(child.name for child in (run_dir / "checkpoints").iterdir())


def test_latest_complete_and_why_others_are_skipped(tmp_path: Path) -> None:
    assert checkpoint_dirs.latest_complete(tmp_path) == (None, [])
    made(tmp_path, 2, 10, 9, 30, 40, 50)
    folder = tmp_path / "checkpoints"
    (folder / "checkpoint-30" / "checksums.json").unlink()
    (folder / "checkpoint-40" / "weights").write_text("41")
    (folder / "checkpoint-50" / "weights").unlink()
    (folder / ".checkpoint-60.partial").mkdir()
    (folder / "checkpoint-of-mine").mkdir()
    (folder / ".checkpoint-2.removed").mkdir()

    assert checkpoint_dirs.latest_complete(tmp_path) == (
        folder / "checkpoint-10",
        [
            f"Skipping {folder}/checkpoint-60: incomplete (the run ended while writing it)",
            f"Skipping {folder}/checkpoint-50: incomplete (weights is missing)",
            f"Skipping {folder}/checkpoint-40: corrupt (SHA-256 of weights differs)",
            f"Skipping {folder}/checkpoint-30: incomplete (checksums.json is missing)",
        ],
    )


def test_partial_files_are_removed(tmp_path: Path) -> None:
    for name in ("checkpoints/.checkpoint-6.partial", "checkpoints/.checkpoint-1.removed", ".model.partial", ".mine"):
        (tmp_path / name).mkdir(parents=True)
    made(tmp_path, 2)
    checkpoint_dirs.discard_after(tmp_path, checkpoint_dirs.checkpoint_path(tmp_path, 2))

    assert names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / ".mine").is_dir()


def test_lines_after_the_checkpoint_are_discarded(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 3)) + '{"st')
    checkpoint_dirs.discard_after(tmp_path, checkpoint_dirs.checkpoint_path(tmp_path, 2))
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2]
    checkpoint_dirs.discard_after(tmp_path, None)
    assert metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [8]), (2, None, [6, 8]), (2, 2, [2, 6, 8]), (1, 8, [8]), (9, None, [2, 6, 8, 12])],
)
def test_rotation(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    """Incomplete checkpoints are removed and not counted; later ones, from before a resume, are kept."""
    made(tmp_path, 2, 4, 6, 8, 12)
    (checkpoint_dirs.checkpoint_path(tmp_path, 4) / "weights").unlink()
    checkpoint_dirs.rotate(
        checkpoint_dirs.checkpoint_path(tmp_path, 8),
        keep,
        checkpoint_dirs.checkpoint_path(tmp_path, best) if best else None,
    )

    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in {*left, 12})


def fill_the_disk(sft: trainer.Trainer, at: int) -> None:
    """Limit files to 50 kB while the optimizer's state is saved at that step."""
    save = sft._save_optimizer_and_scheduler

    def limited(*args: Any) -> None:
        with no_file_over(50_000 if sft.state.global_step == at else 2**40):
            save(*args)

    sft._save_optimizer_and_scheduler = limited


def test_a_full_disk_keeps_the_earlier_checkpoint(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"max_steps": 6}, checkpoint={"every": 2, "keep": 1})
    sft = build(recipe, tmp_path / "run")
    fill_the_disk(sft, 4)
    with pytest.raises(RunError) as caught:
        trainer.train(sft, None)

    [line] = caught.value.lines
    assert "checkpoint-4: checkpoint not saved: " in line
    assert line.endswith("checkpoint-2. Continue with --resume.")
    assert names(tmp_path / "run") == ["checkpoint-2"]

    again = build(recipe, tmp_path / "run")
    trainer.train(again, checkpoint_dirs.latest_complete(tmp_path / "run")[0])
    assert names(tmp_path / "run") == ["checkpoint-6"]


def test_a_full_disk_with_on_failure_continue(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    import io

    said = io.StringIO()
    recipe = write_recipe(train={"max_steps": 6}, checkpoint={"every": 2, "on_failure": "continue"})
    sft = build(recipe, tmp_path / "run", console=Console(file=said, width=200))
    fill_the_disk(sft, 4)
    trainer.train(sft, None)

    assert "checkpoint-4: checkpoint not saved: " in said.getvalue()
    assert "checkpoint-2. Training continues." in said.getvalue()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-6"]
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_the_best_checkpoint_is_one_that_was_written(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The checkpoint with the lowest loss could not be written: the best of the others is exported."""
    sections = {"every": None, "export_best": True, "keep": 1, "on_failure": "continue"}
    recipe = write_recipe(train={"max_steps": 10}, eval={"every": 2}, checkpoint=sections)
    sft = build(recipe, tmp_path / "run")
    fill_the_disk(sft, 6)
    losses = {0: 5.0, 2: 3.0, 4: 2.0, 6: 1.0, 8: 1.5, 10: 1.7}
    evaluate = sft.evaluation_loop

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = losses[sft.state.global_step]
        return output

    sft.evaluation_loop = evaluation_loop
    trainer.train(sft, None)

    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-8"]
    best = load_file(checkpoint_dirs.checkpoint_path(tmp_path / "run", 8) / "model.safetensors")
    assert all((sft.model.state_dict()[name] == value).all() for name, value in best.items())


@pytest.mark.parametrize(
    "overrides",
    [[], ["lora={'rank': 8}"], ["train.optimizer=adamw_8bit_sr", "model.dtype=bfloat16", "train.mixed_precision=bf16"]],
)
def test_the_size_of_a_checkpoint_is_predicted(write_recipe: WriteRecipe, tmp_path: Path, overrides: list[str]) -> None:
    sft = build(write_recipe(checkpoint={"every": 3}, data={"eval": None}), tmp_path / "run", *overrides)
    trainer.train(sft, None)
    there = sum(file.stat().st_size for file in checkpoint_dirs.checkpoint_path(tmp_path / "run", 3).iterdir())
    trained, tokenizer = model.count_parameters(sft.model)[1], tokenizer_bytes(sft.processing_class)

    assert 0.9 * there < disk.of_checkpoint(sft.recipe, trained, tokenizer) < 1.2 * there + disk._CONFIGS


def spoil_best(run_dir: Path) -> None:
    (checkpoint_dirs.checkpoint_path(run_dir, 2) / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [spoil_best, lambda run_dir: atomic_files.remove(checkpoint_dirs.checkpoint_path(run_dir, 2))]
)
def test_a_damaged_best_checkpoint(write_recipe: WriteRecipe, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """A later one is exported instead, with a warning."""
    recipe = write_recipe(
        train={"max_steps": 6, "learning_rate": 0.1}, eval={"every": 2}, checkpoint={"every": 4, "export_best": True}
    )
    folder, _ = run(recipe)
    state = json.loads((checkpoint_dirs.checkpoint_path(folder, 4) / "trainer_state.json").read_text("utf-8"))
    assert state["best_global_step"] == 2
    atomic_files.remove(checkpoint_dirs.checkpoint_path(folder, 6))
    atomic_files.remove(folder / "model")
    spoil(folder)
    _, said = run(recipe, resume=True)

    assert "checkpoint-2: the checkpoint with the lowest eval loss so far cannot be used: " in said
    assert (folder / "model").is_dir()


def test_a_best_checkpoint_that_is_missing_at_the_end(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """That is an error; no other checkpoint is exported instead."""
    sections = {"every": 2, "export_best": True}
    recipe = write_recipe(train={"max_steps": 6, "learning_rate": 0.1}, eval={"every": 2}, checkpoint=sections)
    sft = build(recipe, tmp_path / "run")
    save = sft._save_checkpoint

    def saved(*args: Any) -> None:
        save(*args)
        if sft.state.global_step == 6:
            spoil_best(tmp_path / "run")

    sft._save_checkpoint = saved
    with pytest.raises(
        RunError, match=r"checkpoint-2: the best checkpoint cannot be exported: corrupt \(model.safetensors has 0 bytes"
    ):
        trainer.train(sft, None)


def test_resuming_in_a_moved_run_directory(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Another path to the same run directory: the best checkpoint is found by its step."""
    recipe = write_recipe(
        train={"max_steps": 6, "learning_rate": 0.1}, eval={"every": 2}, checkpoint={"every": 4, "export_best": True}
    )
    folder, _ = run(recipe)
    expected = (folder / "model" / "model.safetensors").read_bytes()
    atomic_files.remove(checkpoint_dirs.checkpoint_path(folder, 6))
    atomic_files.remove(folder / "model")
    folder.rename(tmp_path / "elsewhere")
    _, said = run(recipe, f"output_dir={tmp_path / 'elsewhere'}", resume=True)

    assert "Resuming from" in said
    assert "warning" not in said.replace("warning: model.dtype", "")
    assert (tmp_path / "elsewhere" / "model" / "model.safetensors").read_bytes() == expected


def test_checkpoints_contain_only_tensors_and_numbers(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    import torch

    sft = build(write_recipe(checkpoint={"every": 3}), tmp_path / "run")
    trainer.train(sft, None)
    folder = checkpoint_dirs.checkpoint_path(tmp_path / "run", 3)
    stored = sorted(file.name for file in folder.iterdir())

    assert "training_args.bin" not in stored
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(folder / name, weights_only=True)
    assert {name.rpartition(".")[2] for name in stored} == {"safetensors", "pt", "pth", "json", "jinja"} - (
        set() if "chat_template.jinja" in stored else {"jinja"}
    )


def test_two_runs_in_one_directory(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_PATIENCE", 0)
    from sft_recipes.errors import OutputError

    recipe = write_recipe(checkpoint={"every": 1})
    folder, _ = run(recipe)
    shutil.rmtree(folder / "model")
    with atomic_files.locked(folder):
        child = os.fork()
        if child == 0:
            try:
                run(recipe, resume=True)
            except OutputError as error:
                os._exit(7 if "in use by another process" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

"""NaN and Inf: the error names the step and its rows, or the step is skipped without a trace."""

import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.errors import RunError
from sft_recipes.training import checkpoint_dirs, guards, trainer
from tests.conftest import WriteRecipe, build, metrics

Bad = Callable[[trainer.Trainer, int], bool]


def spoil_losses(sft: trainer.Trainer, bad: Bad, value: float = float("nan")) -> list[list[dict[str, Any]]]:
    """Make the loss of some micro-batches (step from 1, micro-batch from 0) NaN; return the inputs of each step."""
    compute, seen = sft.compute_loss, list[list[dict[str, Any]]]()

    def compute_loss(network: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(network, inputs, *args, **kwargs)
        if not network.training:
            return loss
        while len(seen) <= sft.state.global_step:
            seen.append([])
        seen[-1].append(inputs)
        return loss * value if bad(sft, len(seen[-1]) - 1) else loss

    sft.compute_loss = compute_loss
    return seen


def spoil_gradients(sft: trainer.Trainer, bad: Bad) -> None:
    weight = next(parameter for parameter in sft.model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf") if bad(sft, 0) else gradient)


def rows_of(sft: trainer.Trainer, inputs: dict[str, Any]) -> set[str]:
    """Places of the documents in a micro-batch, found by their tokens."""
    ids = inputs["input_ids"].flatten().tolist()
    starts = [n for n, position in enumerate(inputs["position_ids"].flatten().tolist()) if position == 0] + [len(ids)]
    batch = {tuple(ids[start:end]) for start, end in pairwise(starts)}
    return {
        place
        for number, row in enumerate(sft.train_dataset)
        if tuple(row["input_ids"][: row["seq_lengths"][0]]) in batch
        for source in sft.rows.places([number])
        for place in source.values()
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_loss_names_the_rows_of_its_micro_batch(
    write_recipe: WriteRecipe, tmp_path: Path, value: float
) -> None:
    recipe = write_recipe(train={"micro_batch_size": 1, "max_steps": 6}, checkpoint={"every": 2})
    sft = build(recipe, tmp_path / "run")
    seen = spoil_losses(sft, lambda sft, micro: sft.state.global_step == 4 and micro == 2, value)
    before = {}
    step = sft.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        before.update({name: weight.clone() for name, weight in sft.model.state_dict().items()})
        return step(*args, **kwargs)

    sft.training_step = training_step
    with pytest.raises(RunError) as caught:
        trainer.train(sft, None)

    [line] = caught.value.lines
    assert f"run: step 5: loss is {value}. The step was not applied. Last checkpoint: " in line
    assert "checkpoint-4. Inspect " in line
    named = {word.rstrip(";,") for word in line.split() if "train.jsonl" in word}
    assert named == rows_of(sft, seen[4][2])
    assert all(torch.equal(before[name], weight) for name, weight in sft.model.state_dict().items())
    assert checkpoint_dirs.latest_complete(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "checkpoint-4"


@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_a_nonfinite_gradient_names_the_rows_of_its_step(
    write_recipe: WriteRecipe, tmp_path: Path, max_grad_norm: float
) -> None:
    recipe = write_recipe(train={"micro_batch_size": 1, "max_steps": 6, "max_grad_norm": max_grad_norm})
    sft = build(recipe, tmp_path / "run")
    seen = spoil_losses(sft, lambda sft, micro: False)
    spoil_gradients(sft, lambda sft, micro: sft.state.global_step == 1)
    with pytest.raises(RunError, match=r"step 2: gradient norm is (nan|inf)") as caught:
        trainer.train(sft, None)

    named = {word.rstrip(";,") for word in str(caught.value).split() if "train.jsonl" in word}
    assert named == set().union(*(rows_of(sft, inputs) for inputs in seen[1]))


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_step_with_a_nonfinite_loss_is_skipped_and_counted(
    write_recipe: WriteRecipe, tmp_path: Path, spoil: str
) -> None:
    """The skipped step changes neither weights nor optimizer nor averages."""
    recipe = write_recipe(train={"max_steps": 6}, log={"every": 3})
    sft = build(recipe, tmp_path / "run", "train.on_nonfinite=skip")
    if spoil == "loss":
        spoil_losses(sft, lambda sft, micro: sft.state.global_step == 1)
    else:
        spoil_gradients(sft, lambda sft, micro: sft.state.global_step == 1)
    kept = []
    take = sft.create_optimizer().step

    def step(*args: Any, **kwargs: Any) -> Any:
        kept.append([parameter.detach().clone() for parameter in sft.model.parameters()])
        return take(*args, **kwargs)

    sft.optimizer.step = step
    trainer.train(sft, None)

    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1]
    assert all(line["loss"] < 20 and line["token_accuracy"] >= 0 for line in lines)
    assert len(kept) == 6
    assert all(torch.equal(*pair) for pair in zip(kept[1], kept[2], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(kept[2], kept[3], strict=True))
    assert {state["step"].item() for state in sft.optimizer.state.values()} == {5}


def test_too_many_skipped_steps_stop_the_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    sft = build(write_recipe(train={"max_steps": 60}), tmp_path / "run", "train.on_nonfinite=skip")
    spoil_losses(sft, lambda sft, micro: sft.state.global_step >= 3)
    with pytest.raises(RunError, match=f"loss is nan, after {guards._IN_A_ROW - 1} skipped steps in a row. "):
        trainer.train(sft, None)

    assert sft.state.global_step == 3 + guards._IN_A_ROW - 1


def test_skipped_steps_are_counted_across_resume(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(train={"max_steps": 4}, checkpoint={"every": 2})
    sft = build(recipe, tmp_path / "run", "train.on_nonfinite=skip")
    spoil_losses(sft, lambda sft, micro: sft.state.global_step == 0)
    trainer.train(sft, None)
    again = build(recipe, tmp_path / "run", "train.on_nonfinite=skip")
    trainer.train(again, tmp_path / "run" / "checkpoints" / "checkpoint-2")

    assert metrics(tmp_path / "run")[-2]["skipped_steps"] == 1


def test_a_nonfinite_eval_loss(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    sft = build(write_recipe(eval={"every": 1}), tmp_path / "run")
    compute = sft.compute_loss

    def compute_loss(network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(network, *args, **kwargs)
        return loss if network.training or sft.state.global_step < 2 else loss * float("nan")

    sft.compute_loss = compute_loss
    with pytest.raises(RunError, match="step 2: eval loss is nan"):
        trainer.train(sft, None)


def test_a_data_worker_that_dies_is_an_error_that_names_rows(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A worker of the data loader is killed while it makes the batches of a step."""
    recipe = write_recipe(train={"max_steps": 6}, trl={"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1})
    sft = build(recipe, tmp_path / "run")
    collate = sft.data_collator

    class Dies:
        calls = 0

        def __call__(self, rows: list[dict[str, Any]]) -> Any:
            self.calls += 1
            if self.calls == 5 and torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return collate(rows)

    sft.data_collator = Dies()
    with pytest.raises(
        RunError, match=r"training failed after step \d: .*(?i:worker).* Rows in this step: .*train.jsonl:\d+"
    ) as caught:
        trainer.train(sft, None)

    assert len(caught.value.lines) == 1

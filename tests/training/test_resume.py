"""A stopped and resumed run is bitwise identical to an uninterrupted one: weights, metrics, order of the data."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_recipes.errors import Stopped
from sft_recipes.models import model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse
from sft_recipes.stopping import Stop, on_request
from sft_recipes.training import checkpoint_dirs, trainer
from tests.conftest import WriteRecipe, build, metrics
from tests.kills import TIMES

# 18 training rows: with these lengths 7 sequences packed at 128, 9 steps of 2 an epoch where each row is alone.
LORA = {"lora": {"rank": 2, "dropout": 0.1}}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "QLoRA, 4 bit": LORA | {"model": {"quantization": "nf4"}, "train": {"mixed_precision": "bf16"}},
    "QLoRA, 8 bit": LORA | {"model": {"quantization": "int8"}, "train": {"mixed_precision": "bf16"}},
    "new tokens": LORA | {"model": {"new_tokens": ["<a>"]}},
    "embeddings in full": {"lora": {"rank": 2, "modules_to_save": ["embed_tokens"]}},
    "not packed": LORA | {"data": {"packing": "none"}},
    "wrapped": {"data": {"packing": "wrapped"}},
    "in file order": {"data": {"shuffle": False}},
    "accumulation with a rest": LORA | {"train": {"micro_batch_size": 1, "global_batch_size": 3}},
    "the best": LORA | {"checkpoint": {"export_best": True}, "train": {"learning_rate": 0.05}},
    "bfloat16, 8-bit states, stochastic rounding": {
        "model": {"dtype": "bfloat16"},
        "train": {"optimizer": "adamw_8bit_sr", "mixed_precision": "bf16"},
    },
    "8-bit states of bitsandbytes": {"train": {"optimizer": "adamw_bnb_8bit"}},
    "adafactor": {"train": {"optimizer": "adafactor"}},
    "a preflight": LORA | {"train": {"preflight": True}},
    "noise": {"trl": {"neftune_noise_alpha": 5.0}},
}


def train(
    recipe: Path, folder: Path, overrides: Sequence[str], *, stop_at: int | None = None
) -> dict[str, torch.Tensor]:
    """Train in a directory from its latest checkpoint to a SIGTERM in the given step, or to the end. Return the weights."""
    folder.mkdir(exist_ok=True)
    checkpoint, passed_over = checkpoint_dirs.latest_complete(folder)
    assert passed_over == []
    with on_request(None, "again") as stop:
        sft = build(recipe, folder, *overrides, stop=stop)
        step = sft.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            if sft.state.global_step + 1 == stop_at and stop.signal is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        sft.training_step = training_step
        trainer.train(sft, checkpoint)
    return {name: value.clone() for name, value in sft.model.state_dict().items()}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_repeatedly_and_resumed(write_recipe: WriteRecipe, tmp_path: Path, name: str) -> None:
    """Stopped in an epoch and at the end of one; once also after the first step and before the last of 9."""
    recipe = write_recipe(log={"every": 4}, eval={"every": 3}, lora=None)
    overrides = [
        f"{part}.{key}={json.dumps(value)}" for part, keys in RUNS[name].items() for key, value in keys.items()
    ]
    overrides += ["train.max_steps=9", "checkpoint.every=2"]
    whole = train(recipe, tmp_path / "whole", overrides)
    per_epoch = int(9 / metrics(tmp_path / "whole")[-1]["epoch"] + 0.5)
    assert per_epoch < 9
    for step in sorted({1, per_epoch, 8} if name == "LoRA" else {3, per_epoch}):
        with pytest.raises(
            Stopped, match=rf"stopped by SIGTERM after step {step} of 9\. Last checkpoint: .*-{step}\.\n"
        ):
            train(recipe, tmp_path / "stopped", overrides, stop_at=step)
    resumed = train(recipe, tmp_path / "stopped", overrides)

    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]


def test_resuming_with_smaller_micro_batches(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """After memory ran out, smaller micro-batches and recomputed layers change a run by rounding."""
    recipe = write_recipe(
        data={"packing": "none"}, log={"every": 1}, checkpoint={"every": 2}, lora=None,
        train={"micro_batch_size": 2, "global_batch_size": 4, "max_steps": 7},
    )  # fmt: skip
    train(recipe, tmp_path / "whole", [])
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped", [], stop_at=3)
    train(recipe, tmp_path / "stopped", ["train.micro_batch_size=1", "train.gradient_checkpointing=true"])

    whole, resumed = (
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("whole", "stopped")
    )
    assert resumed == pytest.approx(whole, rel=1e-5)


def test_a_run_that_ended_is_not_trained_further(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """In the middle of an epoch, where transformers 5.23 runs one more step."""
    recipe = write_recipe(checkpoint={"every": 2}, train={"max_steps": 2})
    whole = train(recipe, tmp_path / "run", [])
    assert metrics(tmp_path / "run")[-1]["epoch"] < 1
    again = train(recipe, tmp_path / "run", [])

    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 2


def test_a_stopped_run_does_not_load_the_best_checkpoint(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Loading it would delay the stop."""
    recipe = write_recipe(
        eval={"every": 1}, checkpoint={"every": 1, "export_best": True}, train={"max_steps": 9, "learning_rate": 5}
    )

    def stopped() -> trainer.Trainer:
        stop = Stop()
        sft = build(recipe, tmp_path, stop=stop)
        save = sft._save_checkpoint

        def asked(*args: Any) -> None:
            save(*args)
            if sft.state.global_step == 4:
                stop.signal = "SIGTERM"

        sft._save_checkpoint = asked
        with pytest.raises(Stopped):
            trainer.train(sft, None)
        return sft

    sft = stopped()
    assert sft.state.best_global_step != 4
    last = load_file(tmp_path / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(sft.model.state_dict()[name], value) for name, value in last.items())


def test_loading_the_model_leaves_the_recipe_unchanged(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """PEFT modifies the lists that it receives."""
    for layers in (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]):
        recipe = write_recipe(lora={"rank": 2, "modules_to_save": layers, "target_modules": ["q_proj"]})
        wanted = parse.load(recipe, []).recipe
        before = json.dumps(wanted.resolved())
        model.load_model(wanted, load_tokenizer(wanted.model))
        assert json.dumps(wanted.resolved()) == before


def test_prompts_without_evaluation_data_are_answered_once_per_step(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    asked = {"generate": ["first line\u2028second line"], "every": 3, "max_new_tokens": 2}
    recipe = write_recipe(eval=asked, data={"eval": None}, train={"max_steps": 5}, checkpoint={"every": 2})
    train(recipe, tmp_path / "whole", [])
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "stopped", [], stop_at=4)
    train(recipe, tmp_path / "stopped", [])

    samples = [(tmp_path / name / "samples.jsonl").read_text("utf-8") for name in ("whole", "stopped")]
    assert samples[0] == samples[1]
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


def test_a_signal_after_the_last_step_is_saved(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """While the best checkpoint is read: it ends, and is resumed to the export."""
    recipe = write_recipe(checkpoint={"every": 1, "export_best": True})

    def stopped() -> None:
        with on_request(None, "") as stop:
            sft = build(recipe, tmp_path, stop=stop)
            read = sft._load_best_model

            def interrupted() -> None:
                signal.raise_signal(signal.SIGTERM)
                read()

            sft._load_best_model = interrupted
            trainer.train(sft, None)

    with pytest.raises(Stopped, match=r"after step 3 of 3\. Last checkpoint: .*checkpoint-3"):
        stopped()


def test_stop_after_a_time(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    sft = build(recipe, tmp_path, stop=Stop(after=0))
    with pytest.raises(Stopped, match=r"stopped after 0s after step 1 of 3\. Last checkpoint: .*checkpoint-1\.$"):
        trainer.train(sft, None)

    assert checkpoint_dirs.latest_complete(tmp_path) == (tmp_path / "checkpoints" / "checkpoint-1", [])


@pytest.mark.parametrize("when", ["evaluate", "_save_checkpoint"])
def test_a_signal_between_two_steps(write_recipe: WriteRecipe, tmp_path: Path, when: str) -> None:
    """The signal takes effect without another step."""
    every = 2 if when == "_save_checkpoint" else None
    recipe = write_recipe(eval={"every": 2}, checkpoint={"every": every})

    def stopped() -> None:
        with on_request(None, "") as stop:
            sft = build(recipe, tmp_path, stop=stop)
            act = getattr(sft, when)

            def interrupted(*args: Any, **kwargs: Any) -> Any:
                if sft.state.global_step == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                return act(*args, **kwargs)

            setattr(sft, when, interrupted)
            trainer.train(sft, None)

    with pytest.raises(Stopped, match=r"after step 2 of 3\. Last checkpoint: .*checkpoint-2"):
        stopped()
    assert metrics(tmp_path)[-1]["step"] == 2
    assert "eval_loss" in metrics(tmp_path)[-1]

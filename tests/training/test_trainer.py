"""Each recipe key changes the SFTConfig argument that it should."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from sft_recipes.errors import RecipeError, RunError
from sft_recipes.planning.steps import Steps, count
from sft_recipes.recipe import parse
from sft_recipes.recipe.library_names import OWNED
from sft_recipes.training import build
from sft_recipes.training.sft_config import CHECKPOINTING, sft_config
from tests.conftest import WriteRecipe

SEQUENCES = 400
# Names we send without a recipe key that decides them; `trl:` may set them otherwise.
UNOWNED = {"dataloader_pin_memory", "prediction_loss_only", "logging_first_step", "logging_nan_inf_filter"}
UNOWNED |= {"disable_tqdm", "use_cpu", "accelerator_config"}


def config(recipe: Path, *overrides: str, validates: bool = True) -> SFTConfig:
    loaded = parse.load(recipe, overrides).recipe
    return SFTConfig(**sft_config(loaded, count(loaded, SEQUENCES), recipe.parent / "run", validates=validates))


def test_the_arguments_are_fields_of_sft_config_with_an_owner(write_recipe: WriteRecipe) -> None:
    recipe = parse.load(write_recipe(), ["train.optimizer=adamw_8bit_sr"]).recipe
    sent = set(sft_config(recipe, Steps(1, 1, 1), Path("run"), validates=True))

    assert sent <= {field.name for field in dataclasses.fields(SFTConfig)}
    assert sent - set(OWNED) == UNOWNED | {"optim_args"}


@pytest.mark.parametrize(
    ("override", "moved"),
    [
        ("train.epochs=2", {"max_steps": 200}),
        ("train.max_steps=7", {"max_steps": 7}),
        ("train.micro_batch_size=4", {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}),
        ("train.global_batch_size=8", {"gradient_accumulation_steps": 4}),
        ("train.learning_rate=3e-4", {"learning_rate": 3e-4}),
        ("train.lr_scheduler=linear", {"lr_scheduler_type": "linear"}),
        ("train.warmup_ratio=0.5", {"warmup_steps": 50}),
        ("train.warmup_steps=7", {"warmup_steps": 7}),
        ("train.weight_decay=0.1", {"weight_decay": 0.1}),
        ("train.max_grad_norm=0.3", {"max_grad_norm": 0.3}),
        ("train.mixed_precision=bf16", {"bf16": True, "fp16": False}),
        ("train.optimizer=adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}),
        ("train.optimizer=adamw_8bit_sr", {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}),
        (
            "train.gradient_checkpointing=true",
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": None},
        ),
        (
            "train.gradient_checkpointing=3",
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"every_n_layers": 3}},
        ),
        ("train.seed=5", {"seed": 5}),
        ("data.shuffle=false", {"train_sampling_strategy": "sequential"}),
        ("data.packing=none", {"padding_free": False}),
        ("eval.every=0.25", {"eval_steps": 25}),
        ("eval.every=30", {"eval_steps": 30}),
        ("checkpoint.every=0.5", {"save_steps": 50, "save_strategy": "steps"}),
        ("checkpoint.every=null", {"save_strategy": "no"}),
        ("checkpoint.export_best=true", {"metric_for_best_model": "eval_loss", "greater_is_better": False}),
        ("log.every=3", {"logging_steps": 3}),
        ("trl.neftune_noise_alpha=5", {"neftune_noise_alpha": 5}),
        ("log.project=mine", {"project": "mine"}),
        ("log.name=mine", {"run_name": "mine"}),
    ],
)
def test_a_recipe_key_changes_its_argument(write_recipe: WriteRecipe, override: str, moved: dict[str, Any]) -> None:
    recipe = write_recipe(train={"max_steps": None})
    before, after = config(recipe), config(recipe, override)

    assert {name: getattr(after, name) for name in moved} == moved
    assert any(getattr(before, name) != value for name, value in moved.items()) or override.endswith("=true")


def test_accumulation_instead_of_a_global_batch(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(train={"global_batch_size": None, "max_steps": None})

    assert config(recipe).gradient_accumulation_steps == 16  # 32 sequences a step by default
    assert config(recipe, "train.gradient_accumulation_steps=3").gradient_accumulation_steps == 3
    assert config(recipe, "train.gradient_accumulation_steps=3").max_steps == 67


def test_wrapped_with_cross_document_attention_is_plain_causal(write_recipe: WriteRecipe) -> None:
    assert config(write_recipe(), "data.packing=wrapped").padding_free
    assert not config(write_recipe(), "data.packing=wrapped", "data.cross_document_attention=true").padding_free


def test_best_without_intervals_saves_at_each_new_best_and_at_the_end(write_recipe: WriteRecipe) -> None:
    made = config(write_recipe(), "checkpoint.every=null", "checkpoint.export_best=true")

    assert made.save_strategy == "steps"
    assert made.save_steps == made.max_steps


def test_without_validation(write_recipe: WriteRecipe) -> None:
    made = config(write_recipe(), validates=False)

    assert made.eval_strategy == "no"
    assert not made.eval_on_start


def test_out_of_memory_is_not_a_recipe_error(write_recipe: WriteRecipe) -> None:
    recipe = parse.load(write_recipe(), []).recipe
    said = r"out of memory before the first step \(predicted peak .*, device memory .*\)\. This should fit: "
    with pytest.raises(RunError, match=said), build._as_recipe_error(recipe, "trl"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RecipeError, match="trl: no"), build._as_recipe_error(recipe, "trl"):
        raise RuntimeError("no")

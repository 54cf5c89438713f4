"""Fails if a name that we rely on disappears from an installed library."""

import dataclasses

from sft_recipes.recipe import library_names
from sft_recipes.recipe.parse import field_names


def test_sft_config_fields_are_those_of_the_class() -> None:
    from trl import SFTConfig

    assert library_names.sft_config_fields() == {field.name for field in dataclasses.fields(SFTConfig)}


def test_owned_fields_exist_and_point_to_recipe_keys() -> None:
    assert set(library_names.OWNED) <= library_names.sft_config_fields()
    assert set(library_names.OWNED.values()) - {"the flag --resume", "the environment variable HF_TOKEN"} <= set(
        field_names()
    )


def test_synonyms_point_to_recipe_keys() -> None:
    assert set(library_names.SYNONYMS.values()) <= set(field_names())


def test_schedulers_and_optimizers() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert library_names.schedulers() == {member.value for member in SchedulerType}
    assert library_names.optimizers() == {member.value for member in OptimizerNames}


def test_private_names_exist() -> None:
    from bitsandbytes.nn import Linear4bit
    from peft.utils.other import TrainableTokensWrapper
    from transformers import Trainer
    from trl import SFTTrainer

    assert "support_avx512bf16_for_cpu" in vars(Linear4bit(4, 4))
    assert hasattr(TrainableTokensWrapper, "_getattr_wrapped")
    assert all(hasattr(Trainer, name) for name in ("evaluation_loop", "prediction_step", "_load_best_model"))
    assert hasattr(SFTTrainer, "create_model_card")

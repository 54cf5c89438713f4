"""Only deterministic algorithms are allowed during a run; afterwards the settings are restored."""

import json
import os

import pytest
import torch

from sft_recipes.training.determinism import deterministic
from sft_recipes.training.trainer import Trainer
from tests.conftest import WriteRecipe, run


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, str | None, str | None]]:
    """What holds at each training step."""
    seen: list[tuple[bool, bool, str | None, str | None]] = []
    step = Trainer.training_step

    def training_step(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        on, lax = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        on = on and not torch.utils.deterministic.fill_uninitialized_memory
        seen.append((on, lax, *map(os.environ.get, ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"))))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen


def test_deterministic_algorithms_during_a_run(write_recipe: WriteRecipe, during: list[object]) -> None:
    folder, said = run(
        write_recipe(lora={}, export={"merge": False}), "train.deterministic=true", "train.preflight=true"
    )

    assert set(during) == {(True, False, ":4096:8", "1")}
    assert "deterministic algorithms only (train.deterministic has no effect on CPUs)" in said
    assert json.loads((folder / "manifest.json").read_text("utf-8"))["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_without_the_key_torch_is_unchanged(write_recipe: WriteRecipe, during: list[object]) -> None:
    _, said = run(write_recipe(lora={}, export={"merge": False}))

    assert set(during) == {(False, False, None, None)}
    assert "deterministic" not in said


def test_settings_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError

    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert not torch.backends.cudnn.deterministic

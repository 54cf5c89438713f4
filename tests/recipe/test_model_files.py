from pathlib import Path

import pytest

from sft_recipes.errors import ModelError
from sft_recipes.recipe import model_files


def touch(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file.parent


def test_the_adapter_of_a_run_or_directory(tmp_path: Path) -> None:
    adapter = touch(tmp_path / "run" / "adapter" / "adapter_config.json")

    assert model_files.find_adapter(adapter) == model_files.find_adapter(tmp_path / "run") == adapter
    with pytest.raises(ModelError, match="no adapter here"):
        model_files.find_adapter(tmp_path)


def test_the_model_of_a_run_is_the_merged_one_where_there_is_one(tmp_path: Path) -> None:
    adapter = touch(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert model_files.find_model(tmp_path / "run") == adapter
    model = touch(tmp_path / "run" / "model" / "config.json")

    assert model_files.find_model(tmp_path / "run") == model_files.find_model(model) == model
    with pytest.raises(ModelError, match="no model here"):
        model_files.find_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}, "max_position_embeddings": 5}, 8192),
        ({"alibi": True}, None),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_positions(config: dict[str, object], positions: int | None) -> None:
    assert model_files.positions(config) == positions

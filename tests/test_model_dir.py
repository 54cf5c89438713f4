import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from sft_recipes import model_dir
from sft_recipes.errors import ModelError


def touch(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file.parent


def test_the_adapter_of_a_run_or_directory(tmp_path: Path) -> None:
    adapter = touch(tmp_path / "run" / "adapter" / "adapter_config.json")

    assert model_dir.find_adapter(adapter) == model_dir.find_adapter(tmp_path / "run") == adapter
    with pytest.raises(ModelError, match="no adapter found"):
        model_dir.find_adapter(tmp_path)


def test_the_model_of_a_run_is_the_merged_one_if_it_exists(tmp_path: Path) -> None:
    adapter = touch(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert model_dir.find_model(tmp_path / "run") == adapter
    model = touch(tmp_path / "run" / "model" / "config.json")

    assert model_dir.find_model(tmp_path / "run") == model_dir.find_model(model) == model
    with pytest.raises(ModelError, match="no model found"):
        model_dir.find_model(tmp_path)


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
    assert model_dir.positions(config) == positions


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    assert model_dir.parameters("builtin:tiny") == 869_504
    assert model_dir.parameters("owner/name") is None
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert model_dir.parameters(str(tmp_path)) is None
    for number, shape in enumerate([(3, 4), (5,)]):
        save_file({"a": np.zeros(shape, np.float16)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert model_dir.parameters(str(tmp_path)) == 17
    (tmp_path / "model-00003-of-00002.safetensors").write_bytes(b"\xff" * 20)
    assert model_dir.parameters(str(tmp_path)) is None


def test_unknown_parameter_counts(tmp_path: Path) -> None:
    shutil.copytree(model_dir.BUILTIN / "tiny", tmp_path / "tiny")
    for key in ("quantization_config", "text_config"):
        content = json.loads((model_dir.BUILTIN / "tiny" / "config.json").read_text()) | {key: {}}
        (tmp_path / "tiny" / "config.json").write_text(json.dumps(content))
        assert model_dir.parameters(str(tmp_path / "tiny")) is None


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        ('{"eos_token_id": 7}', [7]),
        ('{"eos_token_id": [7, 8]}', [7, 8]),
        ('{"eos_token_id": null}', []),
        ("{", []),
        ("[]", []),
    ],
)
def test_end_tokens(tmp_path: Path, content: str, ends: list[int]) -> None:
    (tmp_path / "generation_config.json").write_text(content)

    assert model_dir.end_tokens(str(tmp_path)) == ends
    assert model_dir.end_tokens("owner/name") == []


def test_weights_are_read_ahead_from_a_directory_or_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: calls.append(arguments[1:]), raising=False)
    snapshot = tmp_path / "models--some--one" / "snapshots" / "1234"
    for folder in (tmp_path / "here", snapshot):
        for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
            touch(folder / name)
    touch(snapshot.parent.parent / "refs" / "main").joinpath("main").write_text("1234", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    model_dir.read_ahead(str(tmp_path / "here"), None)
    assert calls == [(0, 0, os.POSIX_FADV_WILLNEED)] * 2
    model_dir.read_ahead("some/one", None)
    assert len(calls) == 4
    model_dir.read_ahead("some/other", None)  # missing: the loader reports it
    model_dir.read_ahead("nowhere at all!", None)
    assert len(calls) == 4

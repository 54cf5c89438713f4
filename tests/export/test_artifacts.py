import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.distributed import ranks
from sft_recipes.errors import RunError
from sft_recipes.export import artifacts, reference, safetensors_io, save_model, verify
from sft_recipes.export.save_model import GatheredWeights
from sft_recipes.training import trainer
from tests.conftest import WriteRecipe, run


def test_full_fine_tuning_is_verified(write_recipe: WriteRecipe) -> None:
    folder, said = run(write_recipe(export={"dtype": "bfloat16"}))
    report = json.loads((folder / "model" / "export.json").read_text("utf-8"))

    assert "verify: passed in a separate process; max logit difference" in said
    assert "; loss on evaluation samples: exported " in said
    assert report["verification"]["max_logit_diff"] < 4 * report["verification"]["rounding_logit_diff"]
    assert report["verification"]["max_logit_diff_from_base"] > 0.1
    assert report["files"].keys() == {file.name for file in (folder / "model").iterdir()} - {"export.json"}


def test_new_tokens_of_a_model_trained_in_full(write_recipe: WriteRecipe) -> None:
    """The base has no rows for them; it is compared on the others."""
    model = {"name": "builtin:tiny", "dtype": "float32", "new_tokens": ["word"]}
    folder, _ = run(write_recipe(model=model, export={"dtype": "float32"}))
    assert json.loads((folder / "model" / "export.json").read_text("utf-8"))["verification"]["max_logit_diff"] < 1e-3


def broken_files(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
    _SAVE(model, tokenizer, folder, **options)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def another_model(trainer: Any, *args: Any) -> Any:
    norm = trainer.model.model.norm.weight
    with torch.no_grad():
        norm *= 1.01
    recorded = _RECORD(trainer, *args)
    with torch.no_grad():
        norm /= 1.01
    return recorded


_SAVE, _RECORD = save_model.save_model, reference.record


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [
        ((save_model, "save_model"), broken_files, "in the file is not the weight in memory"),
        ((reference, "record"), another_model, "the exported model is not the trained model"),
    ],
    ids=["a damaged file", "another model"],
)
def test_an_export_that_fails_verification_is_removed(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, where: Any, what: Any, said: str
) -> None:
    monkeypatch.setattr(*where, what)
    recipe = write_recipe(export={"dtype": "float32"})
    with pytest.raises(RunError, match=rf"run/model: verification failed: .*{said}"):
        run(recipe)

    folder = recipe.parent / "run"
    assert not (folder / "model").exists()
    assert not list(folder.glob(".*"))


def test_a_full_disk_waits_until_no_rank_needs_this_one(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trained model computes is written when the process group has ended."""
    order: list[str] = []

    def full(*_: Any) -> None:
        order.append("record")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ranks, "leave", lambda: order.append("leave"))
    monkeypatch.setattr(reference.Record, "save", full)
    with pytest.raises(RunError, match=r"run: export failed: .*No space left on device"):
        run(write_recipe(train={"max_steps": 1}))

    assert order == ["leave", "record"]


def test_a_gathered_weight_that_is_damaged_on_its_way_to_the_disk(tmp_path: Path) -> None:
    weights = {"a": torch.ones(4, 2), "b": torch.zeros(3)}
    writer = safetensors_io.Writer(
        {name: (torch.float32, tuple(w.shape)) for name, w in weights.items()}, tmp_path, "5GB"
    )
    for name, weight in weights.items():
        writer.put(name, weight)
    writer.close({})
    written = GatheredWeights(tmp_path, writer.sha256)
    artifacts._check_hashes(written, tmp_path, tmp_path)

    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"verification failed: b in the file is not the weight that was gathered"):
        artifacts._check_hashes(written, tmp_path, tmp_path)


@pytest.mark.parametrize("method", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_the_optimizer_is_gone_when_the_model_is_verified(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    """On a GPU its states can take more memory than the model."""
    held: list[Any] = []
    train, prove = trainer.train, verify.verify

    def trained(sft: Any, *args: Any) -> None:
        train(sft, *args)
        held.append(weakref.ref(sft.optimizer.optimizer))

    def proves(request: Any) -> Any:
        gc.collect()
        held.append(held[0]())
        return prove(request)

    monkeypatch.setattr(trainer, "train", trained)
    monkeypatch.setattr(verify, "verify", proves)
    run(write_recipe(train={"max_steps": 1}, **method))
    assert held[1] is None


def test_an_adapter_is_exported_with_its_probe(write_recipe: WriteRecipe) -> None:
    folder, said = run(write_recipe(lora={"rank": 2}, export={"merge": False}))
    probe = json.loads((folder / "probe.json").read_text("utf-8"))

    assert "verify: passed" not in said
    assert 0 < len(probe["rows"]) <= 16
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in probe["rows"])
    assert probe["prompt"]["messages"][-1]["role"] == "user"
    assert probe["quantization"] is None

"""What the rest of the package asks a machine with a GPU: facts, log, chat, ranks.

The device on which an export is verified belongs here too, once it is chosen by free memory.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_recipes import model_dir
from sft_recipes.commands import generate
from sft_recipes.distributed import ranks
from sft_recipes.errors import ModelError
from sft_recipes.export import save_model
from sft_recipes.models import strategies
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import metrics, run_info
from tests.conftest import WriteRecipe
from tests.cuda import fake_gpu
from tests.cuda.fake_gpu import GPU
from tests.cuda.training import built, recipe_of, settings


def test_the_device_is_named_with_its_memory() -> None:
    with fake_gpu.installed(GPU(memory=80 * 2**30)):
        assert run_info.device() == {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 80.0, "cuda": "13.0"}


def test_a_run_says_what_it_runs_on(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with built(write_recipe(**settings(lora={"rank": 4})), tmp_path / "run", GPU()) as found:
        said = " ".join(run_info.summary_lines(found.trainer.recipe, found.trainer))
        used = run_info.settings_in_effect(found.trainer)

    assert "attention varlen" in said
    assert "NVIDIA H100 80GB HBM3" in said
    assert used["device"]["name"] == "NVIDIA H100 80GB HBM3"


def test_the_log_knows_the_peak_rate_of_the_gpu(tmp_path: Path) -> None:
    """100 TFLOP a second are 10 % of an H100."""
    gpu = GPU()
    with fake_gpu.installed(gpu):
        recorder = metrics.Metrics(tmp_path / "metrics.jsonl", print)
        recorder.flops_per_token, recorder.seconds = 1e9, 2.0
        recorder.before = {"tokens": 0, "trained_tokens": 0}
        found = recorder._speed({"tokens": 200_000, "trained_tokens": 100}, 1)
    assert found["tflops"] == 100
    assert found["mfu"] == pytest.approx(0.1, rel=0.02)
    assert "get_device_name" in gpu.calls


def test_chat_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes where the current accelerator is."""
    moved: list[Any] = []

    class Stop(Exception):
        """Raised in place of generating."""

    def answer(model: Any, *_: Any, **__: Any) -> Any:
        moved.append({weight.device.type for weight in model.parameters()})
        raise Stop

    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    with pytest.raises(ModelError, match="Stop"):
        generate.generate(model_dir.BUILTIN / "tiny", "Say it.", max_new_tokens=4, temperature=0.0)
    assert moved == [{"meta"}]


# --- Ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "asked"),
    [("fsdp2", {"backend": "cuda:nccl,cpu:gloo"}), ("ddp", {"cpu": False})],
)
def test_ranks_meet_over_nccl(strategy: Any, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """fsdp2 also gathers what is in host memory, over gloo."""
    import accelerate

    class Met(Exception):
        """Raised in place of joining."""

    given: dict[str, Any] = {}

    def state(**options: Any) -> Any:
        given.update(options)
        raise Met

    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_rendezvous", lambda *_: None)
    monkeypatch.setattr(accelerate, "PartialState", state)
    recipe: Recipe = recipe_of(launch={"strategy": strategy, "processes": 2})
    with fake_gpu.installed(GPU()), pytest.raises(Exception, match="could not join"), ranks.process_group(recipe, dict):
        pass
    assert asked.items() <= given.items()


def test_offloading_is_from_the_gpu() -> None:
    recipe = recipe_of(launch={"strategy": "fsdp2", "processes": 2, "cpu_offload": True})
    with fake_gpu.installed(GPU()):
        assert strategies.arguments(recipe)["fsdp_config"]["cpu_offload"] is True
    if not torch.accelerator.is_available():  # there is nothing to offload from
        assert strategies.arguments(recipe)["fsdp_config"]["cpu_offload"] is False


def test_other_ranks_wait_for_each_gathered_weight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NCCL's time-out starts when a collective is enqueued: they are not to run ahead of rank 0, which writes."""
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    weights = ((name, SimpleNamespace(is_cuda=True)) for name in "ab")
    with save_model.write_gathered(None, {}, weights, tmp_path / "files", main=False, max_shard_size="1GB"):
        assert len(waits) == 2

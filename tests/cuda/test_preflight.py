"""The preflight on the fake GPU."""

from pathlib import Path
from typing import Any

from tests.conftest import WriteRecipe
from tests.cuda.fake_gpu import GPU
from tests.cuda.training import built, settings

LAYERS = 4  # of the built-in model


def calls(write_recipe: WriteRecipe, folder: Path, **train: Any) -> int:
    """Return how often a run, preflight included, calls the attention kernel."""
    gpu = GPU()
    with built(write_recipe(**settings(lora={"rank": 4}, train=train)), folder, gpu) as found:
        before = gpu.attention_calls
        found.train()
    return before + gpu.attention_calls


def test_the_preflight_recomputes_as_training_does(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With checkpointing, each backward pass of a layer runs its attention once more: of two passes in the preflight."""
    more = {}
    for recomputed in (False, True):
        without, with_it = (
            calls(write_recipe, tmp_path / f"{recomputed} {preflight}", preflight=preflight, gradient_checkpointing=recomputed)
            for preflight in (False, True)
        )  # fmt: skip
        more[recomputed] = with_it - without

    assert more[False] > 0
    assert more[True] - more[False] == 2 * LAYERS


def test_documents_share_the_kernel(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Figures are read from tensors without values; that each part runs on the GPU is what counts."""
    gpu = GPU()
    recipe = write_recipe(**settings(lora={"rank": 4}, train={"preflight": True}, data={"eval": 0.25}))
    with built(recipe, tmp_path / "run", gpu) as found:
        found.train()
        preflight = found.trainer.preflight

    assert preflight is not None
    assert any("preflight.py" in line for line in gpu.syncs) or gpu.attention_calls
    assert {"empty_cache"} <= gpu.calls

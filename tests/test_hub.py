"""Models on the hub, as the hub's cache holds them: no network is needed once they are there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import WriteRecipe

TINY = Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny"


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """An environment whose hub cache holds me/tiny: `main` is the embedded model, `v2` has its weights halved."""
    repository = tmp_path / "hub" / "models--me--tiny"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(TINY, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        if revision == "v2":
            weights = load_file(snapshot / "model.safetensors")
            save_file({n: w / 2 for n, w in weights.items()}, snapshot / "model.safetensors", {"format": "pt"})
    return os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def sft_recipe(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sft_recipes.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_revision_of_a_model_on_the_hub(write_recipe: WriteRecipe, tmp_path: Path, hub: dict[str, str]) -> None:
    """Loss before training, and what an adapter is merged into, are those of the revision."""
    recipe = str(write_recipe(model={"name": "me/tiny"}, lora={"rank": 1}, export={"dtype": "bfloat16"}))
    losses, norms = {}, {}
    for revision in ("null", "v2"):
        out = tmp_path / revision
        done = sft_recipe(hub, "run", recipe, "--set", f"model.revision={revision}", "--set", f"output_dir={out}")
        assert done.returncode == 0, done.stderr
        losses[revision] = json.loads((out / "metrics.jsonl").read_text("utf-8").splitlines()[0])["eval_loss"]
        norms[revision] = load_file(out / "model" / "model.safetensors")["model.norm.weight"].float()

    assert losses["null"] != losses["v2"]
    assert (norms["v2"] * 2).allclose(norms["null"])


def test_check_counts_with_the_tokenizer_of_the_hub(write_recipe: WriteRecipe, hub: dict[str, str]) -> None:
    done = sft_recipe(hub, "check", str(write_recipe(model={"name": "me/tiny"})))

    assert done.returncode == 0, done.stderr
    assert "steps: 3 of 4 sequences" in done.stdout

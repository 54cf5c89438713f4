"""What a user does most, on the built-in model: quick enough for each set of versions (`constraints-*.txt`)."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WriteRecipe, build, metrics, run

pytestmark = pytest.mark.compatibility
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"rank": 4}},
    "qlora": {"lora": {"rank": 4}, "model": {"quantization": "nf4"}},
}
TRAIN = {"preflight": True, "mixed_precision": "bf16", "micro_batch_size": 1, "gradient_checkpointing": True}


@pytest.mark.parametrize("method", METHODS)
def test_a_method(write_recipe: WriteRecipe, method: str) -> None:
    """Checked, predicted, tried, trained with attention to packed documents, merged and verified."""
    from sft_recipes.commands import check
    from sft_recipes.export.merge import merge

    log = {"every": 1}
    recipe = write_recipe(
        **METHODS[method], train=TRAIN, log=log, checkpoint={"every": 1, "export_best": True}, eval={"every": 1}
    )
    check.check(str(recipe))
    folder, said = run(recipe)

    tried = json.loads((folder / "manifest.json").read_text("utf-8"))["preflight"]
    assert tried["isolation"]["attention"] == "varlen"
    assert tried["isolation"]["gradient_leak"] == 0
    assert tried["predicted_peak_gib"] is not None
    assert "verif" in said
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3]
    assert (folder / "model" / "model.safetensors").is_file()
    if method != "full":
        merge(folder / "adapter", folder.with_name("again"))


def test_stopped_and_resumed_it_is_the_same_run(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    from sft_recipes.errors import Stopped
    from sft_recipes.stopping import on_request
    from sft_recipes.training import checkpoint_dirs, trainer

    recipe, logged = write_recipe(**METHODS["lora"], log={"every": 2}, checkpoint={"every": 1}), []
    for name in ("whole", "stopped"):
        with on_request(None, "") as stop:
            sft = build(recipe, tmp_path / name, stop=stop)
            if name == "stopped":
                stop.signal = signal.Signals.SIGTERM.name
                with pytest.raises(Stopped):
                    trainer.train(sft, None)
                sft = build(recipe, tmp_path / name)
            trainer.train(sft, checkpoint_dirs.latest_complete(tmp_path / name)[0])
        logged.append([(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / name) if "loss" in line])

    assert logged[0] == logged[1]

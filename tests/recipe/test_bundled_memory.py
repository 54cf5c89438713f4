"""What docs/recipes.py has predicted of the recipes that ship. All are held to what they were predicted from; one of each way
of training is predicted anew, so that a change of the prediction shows (then: python docs/recipes.py all)."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.memory import prediction
from sft_recipes.recipe import bundled, parse

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "recipes.py"))
FOUND: dict[str, Any] = SCRIPT["known"]()
# As published, with as many digits: tests/model_configs/README.md.
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M": "134,515,008",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "134,515,008",
    "HuggingFaceTB/SmolLM3-3B-Base": "3.08B",
    "google/gemma-3-1b-pt": "999,885,952",
    "Qwen/Qwen3-4B-Instruct-2507": "4.02B",
    "Qwen/Qwen3-8B-Base": "8.19B",
    "meta-llama/Llama-3.1-8B": "8.03B",
    "meta-llama/Llama-3.1-70B": "70.6B",
    "microsoft/phi-4": "14.7B",
    "mistralai/Mistral-Small-24B-Base-2501": "23,572,403,200",
}
# Full in float32, with an 8-bit optimizer, adapters on fused layers, shares of all weights, shares of 4-bit weights.
ANEW = ["gemma3_1b_full", "smollm3_3b_full", "phi4_14b_lora", "llama8b_full_8gpu", "llama70b_qlora_fsdp"]
each_recipe = pytest.mark.parametrize("said", bundled.recipes(), ids=lambda said: said.name)


@each_recipe
def test_predictions_are_of_the_recipes_as_they_are(said: bundled.BundledRecipe) -> None:
    """Write them anew with `python docs/recipes.py`."""
    assert FOUND[said.name]["of"] == SCRIPT["fingerprint"](said.name)
    assert said.memory == SCRIPT["format_memory"](FOUND[said.name])


def test_the_page_has_them() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")

    assert SCRIPT["page"](text) == text
    assert list(FOUND) == [said.name for said in bundled.recipes()]
    for name in FOUND:
        assert text.count(f"\n| {name} |") == 2
        assert f"\n| [{name}](../recipes/{name}.yaml) |" in text


@each_recipe
def test_headers_name_the_smallest_gpu_that_it_fits(said: bundled.BundledRecipe) -> None:
    fits = FOUND[said.name]["fits"]

    if gpu := re.match(r"\w+ (\d+) GB GPU", said.hardware):
        assert int(gpu[1]) == min(fits)
    else:
        assert fits == list(SCRIPT["SIZES"])


@each_recipe
def test_auto_fits_the_card_of_the_header(said: bundled.BundledRecipe) -> None:
    recipe, settled = parse.load(SCRIPT["_file"](said.name)).recipe, FOUND[said.name]["auto"]

    assert (settled is not None) == (recipe.train.micro_batch_size == "auto")
    if settled is not None:
        card = FOUND[said.name]["fits"][0] * 1e9
        assert FOUND[said.name]["peak"] <= settled["peak"] <= prediction.SHARE * card - prediction.CONTEXT
        assert recipe.sequences_per_step % settled["micro_batch_size"] == 0


@each_recipe
def test_preflight_and_training_fit_the_gpu_of_the_header(said: bundled.BundledRecipe) -> None:
    """The preflight makes training steps, so that its peak is theirs, and checks isolation, which is not checkpointed. That it
    runs as training does, tests/cuda shows: a run allocates no more than is predicted, preflight included."""
    found, gpu = FOUND[said.name], re.match(r"\w+ (\d+) GB GPU", said.hardware)
    peak = max(found["peak"], found["preflight"], (found.get("auto") or {}).get("peak", 0))

    recipe = parse.load(SCRIPT["_file"](said.name)).recipe
    assert (found["preflight"] > 0) == (recipe.train.preflight and recipe.padding_free)
    size = 1e9 * (int(gpu[1]) if gpu else min(found["fits"]))
    assert peak <= prediction.SHARE * size - prediction.CONTEXT


@each_recipe
def test_models_have_the_parameters_that_are_published(said: bundled.BundledRecipe) -> None:
    found = FOUND[said.name]
    of_model = found["parameters"] - (found["trained"] if parse.load(SCRIPT["_file"](said.name)).recipe.lora else 0)

    if said.model == "builtin:tiny":
        return
    published = PARAMETERS[said.model]
    digits = len(published.partition(".")[2]) - 1
    assert published == (f"{of_model / 1e9:.{digits}f}B" if published.endswith("B") else f"{of_model:,}")
    assert published in (ROOT / "tests" / "model_configs" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ANEW)
def test_predicted_anew_it_is_the_same(name: str) -> None:
    found = SCRIPT["predict"](name)

    assert found.keys() == FOUND[name].keys()
    assert found["fits"] == FOUND[name]["fits"]
    assert found["parameters"] == FOUND[name]["parameters"]
    for key in ("peak", "loading", "preflight"):
        assert found[key] == pytest.approx(FOUND[name][key], rel=1e-3), key
    if found["auto"]:
        assert found["auto"] == FOUND[name]["auto"] | {"peak": pytest.approx(FOUND[name]["auto"]["peak"], rel=1e-3)}


def test_what_changes_the_memory_changes_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "recipes" / "llama8b_lora.yaml").read_text("utf-8")
    monkeypatch.setattr(bundled, "folder", lambda: tmp_path)

    def fingerprint(old: str = "", new: str = "") -> Any:
        assert old in text
        (tmp_path / "x.yaml").write_text(text.replace(old, new), encoding="utf-8")
        return SCRIPT["fingerprint"]("x")

    before = fingerprint()
    assert fingerprint("every: 0.1", "every: 0.2") == fingerprint("runs/llama8b-lora", "runs/x") == before
    assert fingerprint("rank: 16", "rank: 32") != before
    assert fingerprint("max_length: 1024", "max_length: 512") != before
    assert fingerprint("Llama-3.1-8B ", "Llama-3.1-70B ") != before

from pathlib import Path

import pytest

from sft_recipes.errors import RecipeError
from sft_recipes.recipe import check, shipped

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def test_all_are_found() -> None:
    assert len(RECIPES) == 10
    assert {name for name, _ in shipped.recipes()} == {file.stem for file in RECIPES}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_accepted_without_a_warning(file: Path) -> None:
    loaded, verdict = check.verdict_on(file)

    assert loaded is not None
    assert verdict.problems == []
    assert verdict.warnings == []
    assert loaded.recipe.output_dir.startswith("runs/")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_header_says_purpose_hardware_launch_and_result(file: Path) -> None:
    header = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]

    assert header[0].endswith(".")
    for wanted in ("# Hardware: ", f"# Launch:   sft-recipe run recipes/{file.name}", "# Result:   "):
        assert any(line.startswith(wanted) for line in header), wanted


def test_copy_keeps_the_comments(tmp_path: Path) -> None:
    out = shipped.copy("quickstart", tmp_path / "new" / "mine.yaml")

    assert out.read_text("utf-8") == next(f for f in RECIPES if f.stem == "quickstart").read_text("utf-8")
    with pytest.raises(RecipeError, match="exists"):
        shipped.copy("quickstart", out)


def test_copy_of_what_does_not_ship(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there are llama70b_full_fsdp"):
        shipped.copy("nothing", tmp_path / "x.yaml")


def test_the_users_recipe() -> None:
    """The assignment: Llama 3.1 8B, Alpaca, loss on all tokens, packed the classic way, 32 sequences in micro-batches of 2."""
    recipe = check.accepted(next(f for f in RECIPES if f.stem == "llama8b_full"))[0].recipe

    assert recipe.model.name == "meta-llama/Llama-3.1-8B"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.lora is None
    assert (recipe.data.train_on, recipe.data.packing, recipe.data.max_length) == ("all", "wrapped", 512)
    assert (recipe.train.micro_batch_size, recipe.accumulation, recipe.sequences_per_step) == (2, 16, 32)
    assert (recipe.train.learning_rate, recipe.train.lr_scheduler, recipe.train.warmup_ratio) == (2e-5, "cosine", 0.03)
    assert recipe.train.epochs == 1

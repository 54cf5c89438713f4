import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from sft_recipes import model_dir
from sft_recipes.commands import check
from sft_recipes.errors import RecipeError
from sft_recipes.recipe import bundled, editor_schema, parse, validate
from sft_recipes.recipe.schema import Recipe
from tests.conftest import ROWS, write_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
each_recipe = pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
NUMBERS = {"one": 1, "two": 2, "four": 4, "eight": 8, "sixteen": 16}


def header(file: Path) -> bundled.BundledRecipe:
    return bundled.parse_header(file.stem, file.read_text("utf-8"))


def test_all_are_found() -> None:
    assert len(RECIPES) == 16
    assert [recipe.name for recipe in bundled.recipes()] == [file.stem for file in RECIPES]


@each_recipe
def test_every_recipe_is_accepted_without_a_warning(file: Path) -> None:
    loaded, validation = validate.validate_file(file)

    assert loaded is not None
    assert validation.problems == []
    assert validation.warnings == []


@each_recipe
def test_every_header_matches_its_recipe(file: Path) -> None:
    fields, recipe = header(file), parse.load(file).recipe

    method = "full" if recipe.lora is None else "QLoRA" if recipe.model.quantization else "LoRA"
    assert fields.method == method + (f", {recipe.launch.strategy}" if recipe.launch.strategy != "ddp" else "")
    assert fields.model == recipe.model.name
    assert fields.purpose.endswith(".")
    assert fields.launch.startswith(f"sft-recipe run recipes/{file.name}")
    # a measurement has its date and a reference to its command
    assert fields.result == "not measured" or re.search(
        r"\(20\d\d-\d\d-\d\d, .*; benchmarks/RESULTS\.md\)$", fields.result
    )
    gpus = re.match(r"(\w+) \d+ GB GPU", fields.hardware)
    assert gpus is None or NUMBERS[gpus[1]] == recipe.launch.world_size
    assert ("torchao" in fields.needs) == (recipe.train.optimizer in validate.TORCHAO)
    gated = fields.model.startswith(("meta-llama/", "google/"))
    assert not gated or "access to the model on the Hub" in fields.needs


def test_recipes_differ() -> None:
    recipes = [parse.load(file).recipe for file in RECIPES]
    outputs, purposes = {recipe.output_dir for recipe in recipes}, {header(file).purpose for file in RECIPES}

    assert len(outputs) == len(purposes) == len(RECIPES)
    assert all(output.startswith("runs/") for output in outputs)


# --- `check` of each recipe with a local model and data ---

TURNS = [
    {"role": "system", "content": "You are short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
]
SPECIAL = ("<|im_start|>", "<|im_end|>")


def rows_for(recipe: Recipe) -> list[dict[str, Any]]:
    """Create rows in the format of the recipe's data."""
    if "smoltalk" in str(recipe.data.train):
        turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(24)]
        return [{"messages": [*TURNS[n % 2 :], *more]} for n, more in enumerate(turns)]
    if recipe.data.columns:
        return [{"question": f"What is {n} and {n}?", "answer": f"{2 * n}"} for n in range(24)]
    return ROWS


def stand_in(model: str, folder: Path) -> Path:
    """Create a model directory: its config, the built-in model's tokenizer, a chat template of TRL, no weights."""
    folder.mkdir()
    config = ROOT / "tests" / "model_configs" / model.replace("/", "--") / "config.json"
    shutil.copy(config, folder)
    tiny = model_dir.BUILTIN / "tiny"
    shutil.copy(tiny / "tokenizer.json", folder)
    specials = json.loads((tiny / "tokenizer_config.json").read_text("utf-8")) | {"additional_special_tokens": SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials), encoding="utf-8")
    trl = find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    template = Path(trl.origin).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    save_file({}, folder / "model.safetensors")
    return folder


@each_recipe
def test_every_recipe_passes_check(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse.load(file).recipe
    monkeypatch.chdir(tmp_path)
    overrides = []
    if file.stem != "quickstart":  # quickstart needs no download
        model, rows = (
            stand_in(recipe.model.name, tmp_path / "model"),
            write_rows(tmp_path / "rows.jsonl", rows_for(recipe)),
        )
        overrides = [f"model.name={model}", f"data.train={rows}", "data.eval=0.25"]

    result = check.check(str(file), overrides)

    [schedule] = [line for line in result.lines if line.startswith("schedule: ")]
    assert f"; {recipe.sequences_per_step} sequences per step" in schedule
    assert result.warnings == []


# --- Copies ---


def test_copy_keeps_the_comments_and_names_itself(tmp_path: Path) -> None:
    out = bundled.copy("quickstart", tmp_path / "new" / "mine.yaml")

    text = (ROOT / "recipes" / "quickstart.yaml").read_text("utf-8")
    assert out.read_text("utf-8") == text.replace("recipes/quickstart.yaml", str(out))
    assert f"# Launch:   sft-recipe run {out}\n" in out.read_text("utf-8")
    with pytest.raises(RecipeError, match="exists"):
        bundled.copy("quickstart", out)


@each_recipe
def test_a_copy_is_the_recipe(file: Path, tmp_path: Path) -> None:
    copy = bundled.copy(file.name, tmp_path / "a copy.yaml")

    assert parse.load(copy).recipe == parse.load(file).recipe
    assert f"sft-recipe run '{copy}'" in copy.read_text("utf-8")


def test_copies_find_the_schema(tmp_path: Path) -> None:
    editor_schema.write(tmp_path / editor_schema.FILE)

    out = bundled.copy("quickstart", tmp_path / "mine" / "quick.yaml")

    first, second, *_ = out.read_text("utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=../.sft-recipe.schema.json"
    assert second.startswith("# Fine-tune the built-in model")


def test_copy_of_an_unknown_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Choose one of gemma3_1b_full, llama70b_full_fsdp"):
        bundled.copy("nothing", tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Purpose.\nmodel:\n", "x: missing in the header: method, model"),
        ("# Purpose.\n# Method:   full\n# Method:   LoRA\n", "x: 'Method' is duplicate"),
        ("# Purpose.\n# Speed:    high\n", "'Speed' is duplicate or not one of method"),
    ],
)
def test_invalid_headers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bundled.parse_header("x", text)


def test_a_field_can_continue_on_the_next_line() -> None:
    fields = "".join(f"# {field.capitalize()}: {field}\n" for field in bundled.FIELDS)

    assert bundled.parse_header("x", f"# It is.\n#\n{fields}#         and more\nmodel:\n").result == "result and more"


def test_the_users_recipe() -> None:
    """The assignment: Llama 3.1 8B, Alpaca, loss on all tokens, concatenate-and-chunk packing, 32 sequences per step."""
    recipe = validate.load_valid(next(f for f in RECIPES if f.stem == "llama8b_full"))[0].recipe

    assert recipe.model.name == "meta-llama/Llama-3.1-8B"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.lora is None
    assert (recipe.data.train_on, recipe.data.packing, recipe.data.max_length) == ("all", "wrapped", 512)
    assert (recipe.train.micro_batch_size, recipe.accumulation, recipe.sequences_per_step) == (2, 16, 32)
    assert (recipe.train.learning_rate, recipe.train.lr_scheduler, recipe.train.warmup_ratio) == (2e-5, "cosine", 0.03)
    assert recipe.train.epochs == 1

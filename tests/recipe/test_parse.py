from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.errors import RecipeError
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Recipe

MINIMAL = "model: {name: x}\ndata: {train: x.jsonl}\noutput_dir: out\n"


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Return the problems of a recipe without the file name."""
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        parse.load(file, overrides)
    return [line.replace(f"{file}:", "") for line in caught.value.lines]


def good(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return parse.load(file, overrides).recipe


def test_a_minimal_recipe(tmp_path: Path) -> None:
    recipe = good(tmp_path, MINIMAL)

    assert (recipe.model.name, recipe.data.train, recipe.output_dir) == ("x", "x.jsonl", "out")


def test_yaml_is_1_2(tmp_path: Path) -> None:
    recipe = good(tmp_path, MINIMAL + "train: {learning_rate: 1e-5, mixed_precision: no, weight_decay: 1E+0}\n")

    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.mixed_precision == "no"
    assert recipe.train.weight_decay == 1.0


def test_off_is_text(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "train:\n  compile: off\n") == [
        "5: train.compile: expected true or false (got 'off')."
    ]


def test_every_problem_at_once_with_line_and_suggestion(tmp_path: Path) -> None:
    text = """\
model: {name: x, dtype: bf16}
data:
  train: x.jsonl
  colums: {}
  max_length: 0
train:
  learning_ratee: 1e-5
  num_warmup_steps: 10
  micro_batch_size: two
lora: {r: 8}
output_dir: out
"""
    assert problems(tmp_path, text) == [
        "1: model.dtype: expected one of bfloat16, float16, float32 (got 'bf16').",
        "4: unknown key 'data.colums'. Did you mean 'data.columns'?",
        "5: data.max_length: expected an integer >= 2 (got 0).",
        "7: unknown key 'train.learning_ratee'. Did you mean 'train.learning_rate'?",
        "8: unknown key 'train.num_warmup_steps'. Did you mean 'train.warmup_steps'?",
        "9: train.micro_batch_size: expected an integer > 0 or auto (got 'two').",
        "10: unknown key 'lora.r'. Use 'lora.rank' instead.",
    ]


def test_key_in_the_wrong_section(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "learning_rate: 1\n") == [
        "4: unknown key 'learning_rate'. Use 'train.learning_rate' instead."
    ]


def test_a_duplicate_key(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "train:\n  seed: 1\n  seed: 2\n") == [
        "6: duplicate key 'train.seed' (first at 5). Remove one."
    ]


def test_an_empty_section_is_an_error(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "lora:\n") == [
        "4: section 'lora' is empty. Write `lora: {}` for its defaults, or remove it."
    ]
    assert good(tmp_path, MINIMAL + "lora: {}\n").lora is not None
    assert good(tmp_path, MINIMAL + "lora: null\n").lora is None


def test_missing_keys(tmp_path: Path) -> None:
    assert sorted(line.lstrip("1: ") for line in problems(tmp_path, "model: {}\n")) == [
        "missing required key 'model.name'. Add it, for example `name: HuggingFaceTB/SmolLM2-135M`.",
        "missing required key 'output_dir'. Add it, for example `output_dir: runs/mine`.",
        "missing required section 'data'. Add it, for example `data: {train: data/train.jsonl}`.",
    ]


def test_the_place_of_an_error_inside_a_list(tmp_path: Path) -> None:
    text = "model: {name: x}\ndata:\n  train:\n    - a.jsonl\n    - {path: b.jsonl, wieght: 2}\noutput_dir: out\n"

    assert problems(tmp_path, text) == ["5: unknown key 'data.train[1].wieght'. Did you mean 'data.train[1].weight'?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "invalid YAML"),
        ("- a\n", "a recipe must be a mapping"),
        ("", "a recipe must be a mapping"),
        ("a: b: c\n", "invalid YAML"),
        ("a: !!python/object:os.system x\n", "a:"),
        ("\tx: 1\n", "invalid YAML"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(tmp_path, text)[0]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="file not found"):
        parse.load(tmp_path / "none.yaml")


def test_set_replaces_and_adds(tmp_path: Path) -> None:
    recipe = good(
        tmp_path, MINIMAL, "train.learning_rate=3e-4", "lora.rank=4", "data.columns={prompt: q}", "data.eval=null"
    )

    assert recipe.train.learning_rate == 3e-4
    assert recipe.lora is not None
    assert recipe.lora.rank == 4
    assert recipe.data.columns == {"prompt": "q"}
    assert recipe.data.eval is None


def test_set_removes_a_section(tmp_path: Path) -> None:
    assert good(tmp_path, MINIMAL + "lora: {rank: 3}\n", "lora=null").lora is None


def test_set_is_the_location(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "train.sed=1", "train.epochs=x", "seed", "output_dir.x=1") == [
        "--set seed: expected KEY=VALUE, for example --set train.learning_rate=1e-4.",
        "--set output_dir.x=1: 'output_dir' is not a section.",
        "--set: train.epochs: expected a number > 0 or null (got 'x').",
        "--set: unknown key 'train.sed'. Did you mean 'train.seed'?",
    ]


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    import json

    recipe = good(tmp_path, MINIMAL + "train: {max_steps: 7}\neval: {generate: [a, {prompt: b}]}\nlora: {}\n")
    again = good(tmp_path, json.dumps(recipe.resolved()))

    assert again.resolved() == recipe.resolved()
    assert again.train.max_steps == 7
    assert again.train.epochs is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_value_is_a_recipe_or_a_problem(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    import json

    file = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    file.write_text(json.dumps(value), encoding="utf-8")
    loaded, problems = parse.parse_recipe(file)

    assert loaded is not None or problems
    assert all("\n" not in line for line in problems)

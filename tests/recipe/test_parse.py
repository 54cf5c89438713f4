from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.errors import RecipeError
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Recipe

LEAST = "model: {name: x}\ndata: {train: x.jsonl}\noutput_dir: out\n"


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The problems of a recipe, without the name of its file."""
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        parse.load(file, overrides)
    return [line.replace(f"{file}:", "") for line in caught.value.lines]


def good(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return parse.load(file, overrides).recipe


def test_the_least_recipe(tmp_path: Path) -> None:
    recipe = good(tmp_path, LEAST)

    assert (recipe.model.name, recipe.data.train, recipe.output_dir) == ("x", "x.jsonl", "out")


def test_yaml_is_1_2(tmp_path: Path) -> None:
    recipe = good(tmp_path, LEAST + "train: {learning_rate: 1e-5, mixed_precision: no, weight_decay: 1E+0}\n")

    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.mixed_precision == "no"
    assert recipe.train.weight_decay == 1.0


def test_off_is_a_word(tmp_path: Path) -> None:
    assert problems(tmp_path, LEAST + "train:\n  compile: off\n") == [
        "5: train.compile: got 'off'; expected true or false"
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
  warmup_steps: 10
  micro_batch_size: two
lora: {r: 8}
output_dir: out
"""
    assert problems(tmp_path, text) == [
        "1: model.dtype: got 'bf16'; expected one of bfloat16, float16, float32",
        "4: unknown key 'data.colums'; did you mean 'columns'?",
        "5: data.max_length: got 0; expected a whole number of at least 2",
        "7: unknown key 'train.learning_ratee'; did you mean 'learning_rate'?",
        "8: unknown key 'train.warmup_steps'; a recipe calls it 'train.warmup_ratio'",
        "9: train.micro_batch_size: got 'two'; expected a whole number above 0 or auto",
        "10: unknown key 'lora.r'; a recipe calls it 'lora.rank'",
    ]


def test_key_in_the_wrong_section(tmp_path: Path) -> None:
    assert problems(tmp_path, LEAST + "learning_rate: 1\n") == [
        "4: unknown key 'learning_rate'; a recipe calls it 'train.learning_rate'"
    ]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    assert problems(tmp_path, LEAST + "train:\n  seed: 1\n  seed: 2\n") == [
        "6: key 'train.seed' stands twice, first in 5"
    ]


def test_an_empty_section_is_not_a_switch(tmp_path: Path) -> None:
    assert problems(tmp_path, LEAST + "lora:\n") == [
        "4: section 'lora:' is empty; write 'lora: {}' for its defaults, or leave it out"
    ]
    assert good(tmp_path, LEAST + "lora: {}\n").lora is not None
    assert good(tmp_path, LEAST + "lora: null\n").lora is None


def test_missing_keys(tmp_path: Path) -> None:
    assert sorted(line.split(": ")[-1].strip() for line in problems(tmp_path, "model: {}\n")) == [
        "missing key 'data'; expected a section with keys",
        "missing key 'model.name'; expected text",
        "missing key 'output_dir'; expected text",
    ]


def test_the_place_of_an_error_inside_a_list(tmp_path: Path) -> None:
    text = "model: {name: x}\ndata:\n  train:\n    - a.jsonl\n    - {path: b.jsonl, wieght: 2}\noutput_dir: out\n"

    assert problems(tmp_path, text) == ["5: unknown key 'data.train[1].wieght'; did you mean 'weight'?"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("a: b: c\n", "not valid YAML"),
        ("a: !!python/object:os.system x\n", "a:"),
        ("\tx: 1\n", "not valid YAML"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    assert said in problems(tmp_path, text)[0]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        parse.load(tmp_path / "none.yaml")


def test_set_replaces_and_adds(tmp_path: Path) -> None:
    recipe = good(
        tmp_path, LEAST, "train.learning_rate=3e-4", "lora.rank=4", "data.columns={prompt: q}", "data.eval=null"
    )

    assert recipe.train.learning_rate == 3e-4
    assert recipe.lora is not None
    assert recipe.lora.rank == 4
    assert recipe.data.columns == {"prompt": "q"}
    assert recipe.data.eval is None


def test_set_takes_a_section_away(tmp_path: Path) -> None:
    assert good(tmp_path, LEAST + "lora: {rank: 3}\n", "lora=null").lora is None


def test_set_is_named_as_the_place(tmp_path: Path) -> None:
    assert problems(tmp_path, LEAST, "train.sed=1", "train.epochs=x", "seed", "output_dir.x=1") == [
        "--set seed: expected key=value, such as --set train.learning_rate=1e-4",
        "--set output_dir.x=1: 'output_dir' is not a section",
        "--set: train.epochs: got 'x'; expected a number above 0 or null",
        "--set: unknown key 'train.sed'; did you mean 'seed'?",
    ]


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    import json

    recipe = good(tmp_path, LEAST + "train: {max_steps: 7}\neval: {generate: [a, {prompt: b}]}\nlora: {}\n")
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
    loaded, found = parse.parse_recipe(file)

    assert loaded is not None or found
    assert all("\n" not in line for line in found)

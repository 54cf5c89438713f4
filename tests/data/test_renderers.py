from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft_recipes.data import prepare
from sft_recipes.data.encoder import from_transformers
from sft_recipes.errors import DataError
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe, write_rows
from tests.data import tokenizers

SAY = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
ROWS = [
    {"messages": [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": "fox"}]} for n in range(4)
]


def prepared(
    write_recipe: WriteRecipe, folder: Path, source: str, date: str | None = None, data: dict[str, Any] | None = None
) -> tuple[prepare.Prepared, Any]:
    """The data of a run with this template, and transformers' tokenizer with the template that it exports."""
    write_rows(folder / "train.jsonl", ROWS)
    (folder / "t.jinja").write_text(source, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tokenizers.save("chat", folder / "model"))
    recipe = parse.load(write_recipe(data={"template": str(folder / "t.jinja"), "eval": None, **(data or {})})).recipe
    made = prepare.prepare(recipe, from_transformers(tokenizer), date=date)
    tokenizer.chat_template = made.chat_template
    return made, tokenizer


def exported(tokenizer: Any, **arguments: Any) -> str:
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False, **arguments))


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("\n  {{ strftime_now('%d %b %Y') }}" + SAY, "\n  03 Feb 2031"),
        (
            "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ day('%Y') | int + 1 }}, %d %b %-d" + SAY,
            "2032, %d %b %-d",
        ),
        (
            "{% if strftime_now is defined %}{% set f = '%Y-%m-%d' %}{{ strftime_now(f) }}{% endif %}" + SAY,
            "2031-02-03",
        ),
    ],
)
@pytest.mark.parametrize("key", [True, False])
def test_one_date_wherever_it_is_rendered(
    source: str, written: str, write_recipe: WriteRecipe, tmp_path: Path, *, key: bool
) -> None:
    how: dict[str, Any] = {"data": {"date": "2031-02-03"}} if key else {"date": "2031-02-03"}
    made, tokenizer = prepared(write_recipe, tmp_path, source, **how)

    assert exported(tokenizer) == f"{written}the<|im_end|>"
    ids = made.train[0]["input_ids"]
    assert written.strip() in tokenizer.decode(ids)


def test_the_date_of_the_day_by_default(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    _, tokenizer = prepared(write_recipe, tmp_path, "{{ strftime_now('%Y') }}" + SAY)

    assert exported(tokenizer)[:4].isdigit()


def test_a_template_without_a_date_is_exported_as_it_is(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    made, _ = prepared(write_recipe, tmp_path, SAY, "2031-02-03")

    assert made.chat_template == SAY


def test_arguments_of_the_template_become_its_defaults(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    macro = "{% macro a() %}[{{ enable_thinking }}{{ words }}]{% endmacro %}"
    source = macro + "{% if enable_thinking is false %}{{ a() }}{% endif %}"
    kwargs = {"enable_thinking": False, "words": ["it's", 'a "ä"', None]}
    made, tokenizer = prepared(write_recipe, tmp_path, source + SAY, data={"chat_template_kwargs": kwargs})

    text = f"[False{kwargs['words']}]the<|im_end|>"
    assert exported(tokenizer) == text
    assert exported(tokenizer, enable_thinking=True) == "the<|im_end|>"
    assert made.prompt is not None
    assert tokenizer.decode(made.prompt.ids).startswith("[False[")
    assert made.train[0]["input_ids"][: len(made.prompt.ids) - 4] == made.prompt.ids[:-4]


@pytest.mark.parametrize("name", ["enable_thinkin", "messages"])
def test_an_argument_that_the_template_does_not_have(name: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data.chat_template_kwargs: the chat template has no argument '{name}'"):
        prepared(write_recipe, tmp_path, SAY, data={"chat_template_kwargs": {name: False}})


def test_a_date_that_is_none(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.date: month must be in 1..12 \(got '2031-13-01'\)"):
        prepared(write_recipe, tmp_path, SAY, data={"date": "2031-13-01"})


def test_rows_that_do_not_begin_with_the_prompt_of_inference(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    source = SAY + "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    made, _ = prepared(write_recipe, tmp_path, source)

    [warning] = [line for line in made.warnings if "rows (first" in line]
    assert "data.template: 4 of 4 rows (first: " in warning
    assert "do not begin with the prompt that the template writes at inference" in warning

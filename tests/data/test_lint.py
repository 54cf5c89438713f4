"""Data that trains without errors but teaches the wrong thing."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data import prepare
from sft_recipes.data.encoder import LightTokenizer
from sft_recipes.data.prepare import Prepared
from sft_recipes.errors import DataError
from sft_recipes.recipe import parse
from tests.conftest import ROWS, WriteRecipe, write_rows
from tests.data import tokenizers

# The generation mark excludes the end-of-turn token, which follows a space.
NO_EOS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": row["instruction"] + row["input"]},
            {"role": "assistant", "content": row["output"]},
        ]
    }
    for row in ROWS
]


def prepared(recipe: Path, *overrides: str, tokenizer: LightTokenizer | None = None) -> Prepared:
    loaded = parse.load(recipe, ["data.max_length=300", *overrides]).recipe
    return prepare.prepare(loaded, tokenizer or tokenizers.make("bytes+bos"))


def chat(template: str = tokenizers.CHAT) -> LightTokenizer:
    made = tokenizers.make("chat")
    return LightTokenizer(made.backend, made.specials, template)


def overlap(data: Prepared) -> tuple[int, int]:
    assert data.eval is not None
    [account] = data.as_dict()["eval"]["sources"]
    return account["train_overlap"], account["prompt_overlap"]


# --- Evaluation rows that are training rows ---------------------------------------------------------------------------


def test_separate_evaluation_rows_give_no_warning(write_recipe: WriteRecipe) -> None:
    data = prepared(write_recipe())

    assert data.warnings == []
    assert overlap(data) == (0, 0)


def test_evaluation_rows_that_are_training_rows_are_counted_and_named(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    other_answer = ROWS[7] | {"output": "another word"}
    new = ROWS[8] | {"instruction": "Say what nobody asked for."}
    held_out = write_rows(tmp_path / "eval.jsonl", [new, ROWS[3], other_answer, ROWS[5]])
    data = prepared(write_recipe(), f"data.eval={held_out}")

    assert overlap(data) == (2, 1)
    [warning] = data.warnings
    assert warning.startswith(f"data.eval: 2 of 4 evaluation rows are also training rows (first: {held_out}:2; 1 more")
    assert warning.endswith("Remove them from data.train or from data.eval.")
    assert "2 also in the training data, 1 with the prompt of a training row" in "".join(data.lines())


def test_shared_prompts_are_counted_without_a_warning(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "eval.jsonl", [ROWS[7] | {"output": "another word"}])
    data = prepared(write_recipe(), f"data.eval={held_out}")

    assert overlap(data) == (0, 1)
    assert data.warnings == []


def test_duplicates_on_both_sides_of_a_split(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    write_rows(tmp_path / "train.jsonl", ROWS[:6] * 4)

    [warning] = prepared(recipe).warnings
    assert "6 of 6 evaluation rows are also training rows" in warning
    assert warning.endswith("Remove the duplicates from data.train.")


def test_rows_without_a_prompt_do_not_share_one(write_recipe: WriteRecipe) -> None:
    """With train_on: all, every prompt is empty."""
    data = prepared(write_recipe(), "data.train_on=all")

    assert overlap(data) == (0, 0)
    assert data.warnings == []


# --- Answers without an EOS token in the loss -------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_answers_end_with_an_eos_token_in_the_loss(write_recipe: WriteRecipe, train_on: str, template: str) -> None:
    data = prepared(write_recipe(), f"data.train_on={train_on}", f"data.template={template}", tokenizer=chat())

    assert [source.missing_eos for source in data.train.stats.sources] == [0]
    assert not any("EOS" in warning for warning in data.warnings)


def test_no_answer_ends(write_recipe: WriteRecipe) -> None:
    with pytest.raises(DataError) as caught:
        prepared(write_recipe(), "data.template=chat", tokenizer=chat(NO_EOS))

    [line] = caught.value.lines
    assert line.startswith("data.template: none of the 18 answers ends with an EOS token that is in the loss, so")
    assert line.endswith("or set data.train_on: all.")
    assert prepared(write_recipe(), "data.template=chat", "data.train_on=all", tokenizer=chat(NO_EOS)).warnings == []


def test_some_answers_do_not_end(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    template = f"{{% if 'number 4' in messages[0].content %}}{NO_EOS}{{% else %}}{tokenizers.CHAT}{{% endif %}}"
    write_rows(tmp_path / "train.jsonl", CONVERSATIONS)
    data = prepared(recipe, "data.eval=null", tokenizer=chat(template))

    [account] = data.as_dict()["train"]["sources"]
    assert account["missing_eos"] == 1
    [warning] = data.warnings
    assert f"1 of 24 answers (first: {tmp_path / 'train.jsonl'}:5) do not end with an EOS token" in warning
    assert "1 without an EOS token in the loss" in "".join(data.lines())


def test_text_ends(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    write_rows(tmp_path / "train.jsonl", [{"text": f"{n} bottles"} for n in range(9)])

    assert prepared(recipe, "data.eval=null").warnings == []


def test_ends_that_are_cut_off(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(data={"eval": None, "overlong": "truncate", "train_on": "all"})
    short, long = ({"instruction": "a", "output": "b " * times} for times in (1, 300))
    for number, warned in ((8, False), (13, True)):
        write_rows(tmp_path / "train.jsonl", [short] * (20 - number) + [long] * number)
        data = prepared(recipe)
        assert data.train.stats.sources[0].truncated_rows == number
        assert [line.split(", so")[0] for line in data.warnings] == [
            f"data.overlong: truncate removes the EOS token of {number} of 20 rows"
        ] * warned


# --- A template that is not the model's own ---------------------------------------------------------------------------


def named(name: str) -> dict[str, Any]:
    return {"name": name, "dtype": "float32"}


@pytest.mark.parametrize(
    ("name", "template", "eos", "warned"),
    [
        ("owner/Some-1B-Instruct", "alpaca", "<|endoftext|>", True),
        ("owner/some-1b-it", "alpaca", "<|endoftext|>", True),
        ("owner/Some-1B-Instruct", "chat", "<|im_end|>", False),
        ("owner/some-1b", "alpaca", "<|im_end|>", True),  # its EOS token ends the turns of its template
        ("owner/some-1b", "alpaca", "<|endoftext|>", False),  # a base model with a chat template
        ("owner/Some-1B-Base", "alpaca", "<|im_end|>", False),
    ],
)
def test_alpaca_on_an_instruct_model(
    write_recipe: WriteRecipe, name: str, template: str, eos: str, *, warned: bool
) -> None:
    made = tokenizers.make("chat")
    tokenizer = LightTokenizer(made.backend, {**made.specials, "eos_token": eos}, tokenizers.CHAT)
    data = prepared(write_recipe(model=named(name)), f"data.template={template}", tokenizer=tokenizer)

    expected = [f"data.template: alpaca writes different prompts than the chat template of {name}, which looks "
                "instruction-tuned. Set data.template: chat to use the prompts of its template."]  # fmt: skip
    assert data.warnings == (expected if warned else [])


def test_a_model_that_says_where_it_stops(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    made = tokenizers.make("chat")
    tokenizer = LightTokenizer(made.backend, {**made.specials, "eos_token": "<|endoftext|>"}, tokenizers.CHAT)
    folder = tmp_path / "model"
    folder.mkdir()
    recipe = write_recipe(model=named(str(folder)))
    assert prepared(recipe, tokenizer=tokenizer).warnings == []

    ends = [made.backend.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    assert len(prepared(recipe, tokenizer=tokenizer).warnings) == 1


def test_a_model_that_has_learned_the_alpaca_template(write_recipe: WriteRecipe) -> None:
    """A model exported by a run with this template, trained further."""
    exported = prepared(write_recipe(), tokenizer=chat()).chat_template
    assert exported is not None
    assert prepared(write_recipe(model=named("some-instruct")), tokenizer=chat(exported)).warnings == []


def test_a_template_file_that_writes_the_same_prompts(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    marked = tmp_path / "marked.jinja"
    marked.write_text(tokenizers.CHAT.replace("{{ bos_token }}", ""), encoding="utf-8")
    recipe = write_recipe(model=named("some-instruct"))
    assert prepared(recipe, f"data.template={marked}", tokenizer=chat()).warnings == []

    marked.write_text("Be brief.\n" + tokenizers.CHAT, encoding="utf-8")
    [warning] = prepared(recipe, f"data.template={marked}", tokenizer=chat()).warnings
    assert "writes different prompts" in warning

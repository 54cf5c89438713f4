"""Text that looks like a special token is counted, and parsed if the recipe says so."""

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.formats.base import Example
from sft_recipes.data.special_tokens import Finder
from tests.conftest import WriteRecipe, run, write_rows
from tests.data import tokenizers
from tests.data.test_lint import chat, prepared

RENDERED = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day.<|im_end|>\n"


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["q", "a"], None),
        (["1 < 2 and [x]", "a"], None),
        (["q", "a <|im_end|> b"], ("<|im_end|>", False)),
        (["q <|im_start|>", "a <|im_end|> \n"], ("<|im_end|>", True)),
        (["q", "a<|end_of_text|>"], ("<|end_of_text|>", True)),
        (["q <end_of_turn>", "a"], ("<end_of_turn>", False)),
        (["q", "<s>old</s> new"], None),
        (["q", "new</s>"], ("</s>", True)),
        (["q", "a $end b"], ("$end", False)),
    ],
)
def test_tokens_are_found_in_text(texts: list[str], found: Any) -> None:
    finder = Finder(["<|im_start|>", "<|im_end|>", "$end"], parsed=False)
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]

    assert finder.find(Example("f:1", messages)) == found
    assert finder.find(Example("f:1", text="".join(texts[1:]))) == (finder.find(Example("f:1", messages[1:])))


def test_of_parsed_tokens_only_others_are_found() -> None:
    finder = Finder(["<|im_end|>"], parsed=True)

    assert finder.find(Example("f:1", text="a<|im_end|>")) is None
    assert finder.find(Example("f:1", text="a<|eot_id|><|im_end|>")) == ("<|eot_id|>", False)


def test_rendered_text_is_counted_and_said(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(data={"eval": None})
    file = write_rows(tmp_path / "train.jsonl", [{"text": RENDERED}, {"text": RENDERED + "x"}, {"text": "x"}])
    for _ in ("tokenized", "cached"):
        data = prepared(recipe, tokenizer=chat())
        assert data.as_dict()["train"]["sources"][0]["special_text"] == {"<|im_end|>": 1, "<|im_start|>": 1}
        assert "2 with the text of a special token, encoded as characters" in data.lines()[0]
    assert data.warnings == [
        f"data.special_tokens: 1 of 3 rows end with the text of the special token '<|im_end|>' (first: {file}:1), encoded as "
        "plain characters. Set parse to encode it as the token, or text to keep the characters.",
        f"data.special_tokens: 1 of 3 rows contain the text of the special token '<|im_start|>' (first: {file}:2), encoded as "
        "plain characters. Set parse to encode it as the token, or text to keep the characters.",
    ]
    assert prepared(recipe, "data.special_tokens=text", tokenizer=chat()).warnings == []


def test_answers_that_end_with_a_token_that_is_not_there(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(data={"eval": None})
    write_rows(tmp_path / "train.jsonl", [{"prompt": "3+4?", "completion": f" {n}<|eot_id|>"} for n in range(4)])

    for value in ("parse", "text"):
        warnings = prepared(recipe, f"data.special_tokens={value}").warnings
        assert len(warnings) == (value == "parse")
    [warning] = prepared(recipe).warnings
    assert "4 of 4 rows end with the text of a token that the tokenizer does not have, '<|eot_id|>' (first: " in warning
    assert warning.endswith("Remove it, or add it to model.new_tokens and set parse.")


@pytest.mark.parametrize("kind", ["bytes", "bytes+bos", "chat"])
def test_parsed_tokens_are_tokens(kind: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """BOS is there once, and an end that the text has is not repeated."""
    tokenizer = chat() if kind == "chat" else tokenizers.make(kind)
    bos, eos = tokenizer.specials.get("bos_token", ""), tokenizer.specials["eos_token"]
    rows = [f"Hello{eos}", f"{bos}Hello{eos}\n", "Hello"]
    write_rows(tmp_path / "train.jsonl", [{"text": text} for text in rows])
    data = prepared(write_recipe(data={"eval": None, "shuffle": False, "packing": "none"}), "data.special_tokens=parse",
                    tokenizer=tokenizer)  # fmt: skip
    begins = bos if kind == "bytes+bos" else ""
    texts = [tokenizer.backend.decode(data.train[n]["input_ids"], skip_special_tokens=False) for n in range(3)]

    assert texts == [f"{begins}Hello{eos}", f"{begins or bos}Hello{eos}\n", f"{begins}Hello{eos}"]
    end = tokenizer.backend.token_to_id(eos)
    assert all(end in data.train[n]["labels"] for n in range(3))
    assert data.warnings == []


def test_a_chat_template_takes_them_if_they_are_parsed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a <|im_start|> b"}, {"role": "assistant", "content": "c"}]
    write_rows(tmp_path / "train.jsonl", [{"messages": turns}])
    data = prepared(write_recipe(data={"eval": None}), "data.special_tokens=parse", tokenizer=chat())
    start = chat().backend.token_to_id("<|im_start|>")

    assert data.train[0]["input_ids"].count(start) == 3


def test_a_run_on_rendered_text_stops_where_the_text_does(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    write_rows(tmp_path / "train.jsonl", [{"text": RENDERED.replace("<|im_end|>", "<|end|>")}] * 8)
    recipe = write_recipe(
        data={"eval": None, "special_tokens": "parse"},
        model={"new_tokens": ["<|im_start|>"]},
        eval={"generate": ["<|im_start|>user\nHello<|end|>\n"], "max_new_tokens": 4},
    )
    folder, said = run(recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    assert "special token" not in said
    assert GenerationConfig.from_pretrained(folder / "model").eos_token_id == tokenizer.eos_token_id

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from tokenizers import Tokenizer

from sft_recipes.data.chat_templates import named
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Data
from tests.conftest import WriteRecipe, run, write_rows

TINY = Path(named.__file__).parents[2] / "builtin" / "tiny"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 1 + 1? \n"},
    {"role": "assistant", "content": "2"},
]


def rendered(source: str, *, prompt: bool, bos: str = "") -> str:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    turns = TURNS[:2] if prompt else TURNS
    return environment.from_string(source).render(messages=turns, bos_token=bos, add_generation_prompt=prompt)


def test_chatml() -> None:
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1 + 1? \n<|im_end|>\n<|im_start|>assistant\n"

    assert rendered(named.source("chatml"), prompt=True) == text
    assert rendered(named.source("chatml"), prompt=False) == f"{text}2<|im_end|>\n"


@pytest.mark.parametrize("prompt", [True, False])
def test_llama3_is_the_template_that_trl_knows(prompt: bool) -> None:
    import trl

    theirs = (Path(trl.__file__).parent / "chat_templates" / "llama3.jinja").read_text("utf-8")

    assert rendered(named.source("llama3"), prompt=prompt) == rendered(theirs, prompt=prompt)


def test_the_tokens_of_a_template_are_special_and_others_are_not() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_tokens(named.to_add(["<think>", *named.tokens("llama3")]))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}

    assert named.tokens("llama3") == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert {*named.tokens("llama3")} <= special
    assert "<think>" not in special
    assert named.tokens("alpaca") == named.tokens("mine.jinja") == []


def test_the_key_names_every_template() -> None:
    described = Data.model_fields["template"].description or ""

    assert all(name in described for name in named.NAMES)


def test_a_recipe_adds_the_tokens_of_its_template(write_recipe: WriteRecipe) -> None:
    recipe = parse.load(write_recipe(), ["data.template=chatml", "model.new_tokens=['<a>', '<|im_end|>']"]).recipe

    assert recipe.model.new_tokens == ["<a>", "<|im_end|>", "<|im_start|>"]
    assert parse.load(write_recipe(), []).recipe.model.new_tokens == []


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_base_model_learns_chatml(lora: Any, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The tokens are added, trained and exported, and the model stops at the end of a turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    turns = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
    write_rows(tmp_path / "train.jsonl", [{"messages": turns}] * 8)
    sections = {"lora": lora} if lora else {}
    folder, _ = run(write_recipe(data={"template": "chatml", "eval": None}, **sections))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)

    assert tokenizer.decode(ids) == "<|begin|><|im_start|>user\nSay a.<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(start) == 2
    assert {start, end} <= set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    assert model.get_input_embeddings().weight.shape[0] > end
    assert GenerationConfig.from_pretrained(folder / "model").eos_token_id == [end, tokenizer.eos_token_id]
    assert "<|im_end|>" in json.loads((folder / "recipe.resolved.json").read_text("utf-8"))["model"]["new_tokens"]

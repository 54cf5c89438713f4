from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.data import encoder, prepare
from sft_recipes.models.tokenizer import set_pad_token
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe
from tests.data import tokenizers


@pytest.mark.parametrize(
    ("kind", "template"),
    [*((kind, template) for kind in tokenizers.KINDS for template in ("alpaca", "file")), ("chat", "chat")],
)
def test_the_chat_template_gives_the_trained_prompt(
    kind: str, template: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    if template == "file":
        (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tokenizers.save(kind, tmp_path / "model"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    recipe = parse.load(
        write_recipe(
            data={"template": str(tmp_path / "t.jinja") if template == "file" else template, "overlong": "split"}
        )
    ).recipe
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer))

    tokenizer.chat_template = data.chat_template

    assert data.prompt is not None
    assert tokenizer.chat_template is not None
    assert (
        tokenizer.apply_chat_template(data.prompt.messages, add_generation_prompt=True, return_dict=False)
        == data.prompt.ids
    )


def tokenizer_of(special: dict[str, str], *others: str) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens and a vocabulary of two letters."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"extra_special_tokens": list(others)})
    return tokenizer


@pytest.mark.parametrize(
    ("special", "others", "pad"),
    [
        ({"eos_token": "</s>", "pad_token": "<pad>"}, [], "<pad>"),  # its own
        ({"eos_token": "<|eot|>", "bos_token": "<|bot|>"}, ["<|reserved_0|>", "<|right_pad_id|>"], "<|right_pad_id|>"),
        ({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, ["<|vision_pad|>", "<|fim_pad|>"], "<|vision_pad|>"),
        ({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}, [], "<unk>"),  # Llama 2
        ({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, [], "<|endoftext|>"),  # SmolLM2
        ({"eos_token": "</s>", "bos_token": "<s>"}, ["<|reserved_0|>"], "<|reserved_0|>"),
        ({"eos_token": "<e>", "bos_token": "<e>", "unk_token": "<e>"}, [], "<|pad|>"),  # GPT-2: there is none to take
    ],
)  # fmt: skip
def test_a_pad_token_differs_from_eos(special: dict[str, str], others: list[str], pad: str) -> None:
    tokenizer = tokenizer_of(special, *others)
    set_pad_token(tokenizer)

    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id

"""Every chat template that comes with TRL, with ten conversations, against transformers' own ids and masks."""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.commands import check
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import Encoder, LightTokenizer, from_transformers
from sft_recipes.data.formats.base import Example
from sft_recipes.data.templates import Rendered
from sft_recipes.errors import DataError, SFTRecipeError
from tests.conftest import WriteRecipe, run, write_rows
from tests.data import tokenizers

MATRIX = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "chat_templates.py"))
CONVERSATIONS: dict[str, Example] = MATRIX["CONVERSATIONS"]
TEMPLATES: dict[str, str] = dict(MATRIX["sources"]())
TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
SPECIAL = r"<[|｜][^|｜<>{}'\"]{1,40}[|｜]>|<\w+[|]>|<(?:start|end)_of_turn>|\[/?INST\]|<end_of_utterance>"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The built-in tokenizer with the special tokens of all templates."""
    made = AutoTokenizer.from_pretrained(TINY)
    assert isinstance(made, PreTrainedTokenizerFast)
    specials = dict.fromkeys(token for source in TEMPLATES.values() for token in re.findall(SPECIAL, source))
    made.add_special_tokens({"bos_token": made.bos_token or "<s>", "additional_special_tokens": [*specials]})
    made.add_tokens(["<think>", "</think>"])
    return made


@cache
def encoder() -> tuple[LightTokenizer, Encoder]:
    light = from_transformers(tokenizer())
    return light, Encoder(light)


def encoded(
    source: str, example: Example, train_on: str
) -> tuple[Rendered, list[int], list[bool], list[dict[str, Any]]]:
    """Ids and loss mask of a row, and its messages as the template takes them."""
    light, encode = encoder()
    chat = Chat(source, train_on, light.specials, light.special_texts)
    rendered = chat(example)
    documents = encode.encode([rendered])
    return rendered, documents.ids.tolist(), documents.trained.tolist(), chat.accepted(example.messages, example)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name: str) -> None:
    source, marked, refused = TEMPLATES[name], "endgeneration" in TEMPLATES[name], list[str]()
    for title, example in CONVERSATIONS.items():
        try:
            rendered, ids, trained, messages = encoded(source, example, "assistant")
        except DataError:
            refused.append(title)
            continue
        theirs = tokenizer().apply_chat_template(
            messages, tools=example.tools, chat_template=source, return_dict=True, return_assistant_tokens_mask=marked
        )
        expected = theirs["input_ids"]
        if rendered.more:
            assert not marked
            continue
        # EOS is appended if the template does not close the turn.
        assert ids in (expected, [*expected, tokenizer().eos_token_id]), title
        if marked:
            masks = [bool(one) for one in theirs["assistant_masks"]]
            if (
                title == "emoji"
            ):  # of a character of several tokens at the end of a mark, transformers masks all but the first
                masks = [ours or one for ours, one in zip(trained, masks, strict=False)]
                assert sum(masks) - sum(bool(one) for one in theirs["assistant_masks"]) < len("👍🏽".encode())
            assert trained[: len(expected)] == masks, title
    assert set(refused) <= {"tool", "tool, thought", "system"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_answer_follows_the_prompt_of_inference(name: str) -> None:
    for title, example in CONVERSATIONS.items():
        for train_on in ("completion", "assistant"):
            try:
                rendered, ids, trained, messages = encoded(TEMPLATES[name], example, train_on)
            except DataError:
                continue
            *_, last = [rendered, *rendered.more]
            ids, trained = ids[-len(encode_alone(last)) :], trained[-len(encode_alone(last)) :]
            prompt = tokenizer().apply_chat_template(
                messages[:-1], tools=example.tools, chat_template=TEMPLATES[name], add_generation_prompt=True,
                return_dict=False,
            )  # fmt: skip
            assert (ids[: len(prompt)] == prompt) == last.prompted, title
            if last.prompted and "endgeneration" not in TEMPLATES[name]:
                assert all(trained[len(prompt) :]), title
                assert train_on == "assistant" or not any(trained[: len(prompt)]), title


def encode_alone(document: Rendered) -> list[int]:
    alone = Rendered("", document.text, document.trained, True, cuts=document.cuts)
    return encoder()[1].encode([alone]).ids.tolist()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if f"{name}_training" in TEMPLATES])
def test_what_trl_marks_is_trained(name: str) -> None:
    """TRL's training template of a template marks the answers, from its prompt on or earlier, if it writes the same text."""
    compared = 0
    for title, example in CONVERSATIONS.items():
        try:
            _, ids, trained, _ = encoded(TEMPLATES[name], example, "assistant")
            marked = encoded(TEMPLATES[f"{name}_training"], example, "assistant")
        except DataError:
            continue
        if ids == marked[1]:
            compared += 1
            more = tokenizer().decode([i for i, a, b in zip(ids, trained, marked[2], strict=True) if a and not b])
            missing = tokenizer().decode([i for i, a, b in zip(ids, trained, marked[2], strict=True) if b and not a])
            for message in example.messages:
                other = missing if message["role"] == "assistant" else more
                assert not message["content"].strip() or message["content"].strip() not in other, title
    assert compared or name == "glm4moe"


def test_one_document_per_turn() -> None:
    """Each as the model sees it at inference: with the thought of this turn, without those of earlier ones."""
    rendered, *_ = encoded(TEMPLATES["qwen3"], CONVERSATIONS["thoughts"], "assistant")

    first, second = [rendered, *rendered.more]
    assert trained_text(first) == ["<think>\nHm.\n</think>\n\nBecause.<|im_end|>\n"]
    assert trained_text(second) == ["<think>\nOh.\n</think>\n\nSo.<|im_end|>\n"]
    assert second.text.startswith(first.text.replace("<think>\nHm.\n</think>\n\n", ""))
    assert not rendered.lossy


def test_a_thought_before_a_tool_call_is_in_the_prompt_of_the_answer() -> None:
    """gpt-oss removes it from the text once there is an answer."""
    rendered, *_ = encoded(TEMPLATES["gptoss"], CONVERSATIONS["tool, thought"], "completion")

    assert "<|channel|>analysis<|message|>Hm.<|end|>" in rendered.text
    [answer] = trained_text(rendered)
    assert answer.startswith("<|channel|>analysis<|message|>Oh.")
    assert answer.endswith("No.<|return|>")


def trained_text(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.trained]


def test_a_token_across_the_border_is_cut_as_at_inference() -> None:
    made = tokenizers.make("chat")
    newlines = made.backend.encode("\n\n").ids
    assert len(newlines) == 1
    example = Example("row", [MATRIX["user"]("the?"), MATRIX["answer"]("\nfox")])
    chat = Chat(tokenizers.CHAT, "completion", made.specials, made.special_texts)
    document = Encoder(made).encode([chat(example)])

    prompt = made.backend.encode(chat.prompt(example.messages[:1], "row")).ids
    assert document.ids.tolist()[: len(prompt)] == prompt
    assert document.trained.tolist() == [False] * len(prompt) + [True] * (len(document.ids) - len(prompt))


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_by_any_name(name: str) -> None:
    rendered, *_ = encoded(TEMPLATES["qwen3"], Example("row", [user(), answer(**{name: "Hm."})]), "completion")

    assert trained_text(rendered) == ["<think>\nHm.\n</think>\n\nBecause.<|im_end|>\n"]
    assert not rendered.lossy


def user() -> dict[str, Any]:
    return {"role": "user", "content": "Why?"}


def answer(content: str = "Because.", **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


@pytest.mark.parametrize(
    ("name", "row", "trained"),
    [
        ("qwen3", answer(reasoning_content="Hm."), ["<think>\n", "\n</think>\n\nBecause.<|im_end|>\n"]),
        ("qwen3", answer("<think>\nHm.\n</think>\n\nBecause."), ["<think>", "</think>\n\nBecause.<|im_end|>\n"]),
        ("qwen3_5_think", answer(reasoning_content="Hm."), ["\n</think>\n\nBecause.<|im_end|>\n"]),
        ("qwen3_training", answer(reasoning_content="Hm."), ["<think>\n", "\n</think>\n\nBecause.<|im_end|>\n"]),
        ("qwen3", answer(), ["<think>", "</think>\n\nBecause.<|im_end|>\n"]),
        ("llama3_1", answer(), ["Because.<|eot_id|>"]),
    ],
)
def test_thoughts_out_of_the_loss(name: str, row: dict[str, Any], trained: list[str]) -> None:
    light, _ = encoder()
    chat = Chat(TEMPLATES[name], "completion", light.specials, light.special_texts, reasoning=False)

    assert trained_text(chat(Example("row", [user(), row]))) == trained


def test_what_a_template_leaves_out() -> None:
    def lossy(name: str, *messages: dict[str, Any], tools: list[Any] | None = None) -> str:
        return encoded(TEMPLATES[name], Example("row", [user(), *messages], tools=tools), "completion")[0].lossy

    assert lossy("gemma4", answer(reasoning_content="Hm.")) == "reasoning_content"
    assert not lossy("qwen3", *CONVERSATIONS["tool"].messages[1:], tools=MATRIX["TOOLS"])
    assert lossy("qwen3", answer(mood="good", thinking="Hm.")) == "mood"
    assert lossy("qwen3", answer(mood="", name=None)) == ""
    with pytest.raises(DataError, match="does not render 'tools'"):
        lossy("deepseekv3", answer(), tools=MATRIX["TOOLS"])
    with pytest.raises(DataError, match="does not render 'tool_calls'"):
        lossy("lfm2", *CONVERSATIONS["tool"].messages[1:], tools=MATRIX["TOOLS"])


def test_arguments_as_the_template_takes_them() -> None:
    messages = CONVERSATIONS["tool"].messages
    for name, call in (("deepseekv3", '{"place": "Oslo", "unit": null}'), ("qwen3", '{"place": "Oslo", "unit": null}')):
        rendered, *_ = encoded(TEMPLATES[name], Example("row", messages), "assistant")
        assert call in rendered.text


@pytest.mark.parametrize(
    ("flags", "train_on", "trained"),
    [
        ([None, False, None, True], "assistant", ["Like so.<|im_end|>\n"]),
        ([None, True, None, None], "completion", ["Because.<|im_end|>\n", "Like so.<|im_end|>\n"]),
        ([None, None, None, False], "completion", []),
        ([None, [(0, 2), (7, 8)], None, [(5, 7)]], "assistant", ["Be", ".<|im_end|>\n", "so"]),
    ],
)
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507_training", "qwen3"])
def test_flags_of_messages(name: str, flags: list[Any], train_on: str, trained: list[str]) -> None:
    example = Example("row", CONVERSATIONS["several"].messages, flags=flags)
    rendered, *_ = encoded(TEMPLATES[name], example, train_on)

    found = [text for document in (rendered, *rendered.more) for text in trained_text(document)]
    assert [text.removeprefix("<think>\n\n</think>\n\n") for text in found] == trained


def test_flags_that_cannot_be_honored() -> None:
    example = Example("row", [user(), answer()], flags=[True, None])
    with pytest.raises(DataError, match=r"row: message 1: only assistant messages can be trained \(got 'user'\)"):
        encoded(TEMPLATES["qwen2_5"], example, "assistant")


def test_flags_where_everything_else_is_trained() -> None:
    example = Example("row", CONVERSATIONS["several"].messages, flags=[None, False, None, None])
    rendered, *_ = encoded(TEMPLATES["qwen3_instruct_2507"], example, "all")

    before, after = trained_text(rendered)
    assert before.endswith("<|im_start|>assistant\n")
    assert after.startswith("<|im_start|>user\nHow?")


def test_an_empty_mark_trains_nothing() -> None:
    marked = "{% generation %}{% if loop.last %}{{ m.content }}{% endif %}{% endgeneration %}"
    source = f"{{% for m in messages %}}{marked}</s>{{% endfor %}}"
    example = Example("row", [user(), answer("a"), user(), answer("b")])
    chat = Chat(source, "assistant", {"eos_token": "</s>"}, ("</s>",))

    assert trained_text(chat(example)) == ["b</s>"]


# --- The same by the command line ------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The built-in model with the special tokens of all templates."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "title", "train_on", "code"),
    [
        ("qwen3_5_think", "one turn", "completion", 0),
        ("qwen3", "thoughts", "assistant", 0),
        ("deepseek_r1_distill", "one turn", "completion", 0),
        ("lfm2", "tool", "completion", 2),
    ],
)
def test_check_and_run_agree(
    name: str,
    title: str,
    train_on: str,
    code: int,
    model: Path,
    write_recipe: WriteRecipe,
    tmp_path: Path,
) -> None:
    example = CONVERSATIONS[title]
    write_rows(tmp_path / "rows.jsonl", [{"messages": example.messages, "tools": example.tools}] * 8)
    (tmp_path / "t.jinja").write_text(TEMPLATES[name], "utf-8")
    recipe = write_recipe(
        model={"name": str(model), "new_tokens": ["<|im_start|>", "<|im_end|>"] if code else []},
        data={"train": str(tmp_path / "rows.jsonl"), "template": str(tmp_path / "t.jinja"), "train_on": train_on,
              "eval": None, "max_length": 512, "packing": "none"},
        train={"max_steps": 1},
    )  # fmt: skip

    assert [exit_code(check.check, str(recipe)), exit_code(run, recipe)] == [code, code]
    if not code:
        stats = json.loads((tmp_path / "run" / "data.json").read_text("utf-8"))["train"]
        assert stats["sources"][0]["kept"] == 8
        assert stats["sequences"] == (16 if title == "thoughts" else 8)


def exit_code(function: Callable[..., object], recipe: object) -> int:
    try:
        function(recipe)
    except SFTRecipeError as error:
        return error.exit_code
    return 0

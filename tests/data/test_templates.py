from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.data.formats.base import Example
from sft_recipes.data.templates import Alpaca, Rendered, alpaca_prompt, plain

texts = st.text(max_size=30)


def test_alpaca_to_the_byte() -> None:
    assert alpaca_prompt("Do it.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Do it.\n"
        "\n"
        "### Response:\n"
    )
    assert alpaca_prompt("Do it.", "This.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Do it.\n"
        "\n"
        "### Input:\n"
        "This.\n"
        "\n"
        "### Response:\n"
    )


@given(texts, texts, texts)
def test_braces_and_all_are_text(instruction: str, input: str, output: str) -> None:
    rendered = Alpaca()(
        Example(
            "f:1", [{"role": "user", "content": instruction, "input": input}, {"role": "assistant", "content": output}]
        )
    )

    assert rendered.text == alpaca_prompt(instruction, input) + output
    [(start, end)] = rendered.trained
    assert rendered.text[start:end] == output
    assert end == len(rendered.text)


def test_plain_text() -> None:
    assert plain(Example("f:1", text="abc")) == Rendered("f:1", "abc", [(0, 3)], writes_specials=False)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.data.chat import Chat, as_chat
from sft_recipes.data.formats.base import Example
from sft_recipes.data.templates import BOS, alpaca_chat_template, alpaca_prompt
from sft_recipes.errors import DataError, RecipeError

pytestmark = pytest.mark.compatibility
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
texts = st.text(max_size=30)


def example(*turns: str, role: str = "assistant") -> Example:
    roles = ["user", "assistant"] * len(turns)
    roles[len(turns) - 1] = role
    return Example("f:1", [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)])


def alpaca_chat(train_on: str = "completion") -> Chat:
    return Chat(alpaca_chat_template(), train_on, SPECIALS, ("<s>", "</s>"))


@given(texts, texts)
def test_the_chat_template_renders_the_alpaca_prompt(instruction: str, input: str) -> None:
    messages = [{"role": "user", "content": instruction, "input": input}]

    assert alpaca_chat().prompt(messages, "") == alpaca_prompt(instruction, input)


def test_the_input_as_a_template_argument() -> None:
    """As a server's chat endpoint passes it (`chat_template_kwargs`)."""
    chat = Chat(alpaca_chat_template(), "completion", SPECIALS | {"input": "This."}, ())

    assert chat.prompt([{"role": "user", "content": "Do it."}], "") == alpaca_prompt("Do it.", "This.")


def test_alpaca_in_several_turns() -> None:
    rendered = alpaca_chat("assistant")(example("One?", "1", "Two?", "2"))

    assert rendered.text == alpaca_prompt("One?") + "1</s>\n\n### Instruction:\nTwo?\n\n### Response:\n2</s>"
    assert [rendered.text[start:end] for start, end in rendered.trained] == ["1</s>", "2</s>"]


def test_a_system_message_takes_the_place_of_the_preamble() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Do it."}]

    assert alpaca_chat().prompt(messages, "") == "Be brief.\n\n### Instruction:\nDo it.\n\n### Response:\n"


def test_a_role_that_alpaca_does_not_know() -> None:
    with pytest.raises(DataError, match=r"f:1: the chat template rejects these messages: .*\(got 'tool'\)"):
        alpaca_chat()(Example("f:1", [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]))


def test_an_input_in_a_template_that_has_no_place_for_it() -> None:
    assert as_chat([{"role": "user", "content": "Do it.", "input": "This."}]) == [
        {"role": "user", "content": "Do it.\n\nThis."}
    ]
    assert as_chat([{"role": "user", "content": "Do it.", "input": ""}]) == [
        {"role": "user", "content": "Do it.", "input": ""}
    ]


def test_text_that_would_become_a_special_token_is_refused() -> None:
    with pytest.raises(DataError, match="f:1: text contains the special token '</s>'"):
        alpaca_chat()(example("What is </s>?", "The end."))


def test_the_last_message_must_be_the_assistants() -> None:
    with pytest.raises(DataError, match=r"the last message must have the role assistant \(got 'user'\)"):
        alpaca_chat()(example("a", "b", "c", role="user"))


def test_generation_marks_render_what_they_hold() -> None:
    chat = Chat("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "all", {}, ())

    assert chat(example("a", "b")).text == "ab"


MARKED = (
    "{{ messages | length }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<a>{% generation %}{{ m.content }}{% endgeneration %}</s>{% else %}<u>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("train_on", "trained"), [("completion", ["d</s>"]), ("assistant", ["b</s>", "d</s>"])])
def test_generation_marks_where_earlier_turns_change(train_on: str, trained: list[str]) -> None:
    """Includes the special token that ends the turn, even directly after the mark."""
    rendered = Chat(MARKED, train_on, SPECIALS, ("<s>", "</s>"))(example("a", "b", "c", "d"))

    assert rendered.text == "4<u>a<a>b</s><u>c<a>d</s>"
    assert [rendered.text[start:end] for start, end in rendered.trained] == trained


def test_generation_marks_say_what_the_assistant_wrote() -> None:
    """Even if turns could be located without them."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A[{% generation %}{{ m.content }}{% endgeneration %}</s>]"
        "{% else %}U[{{ m.content }}]{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    for train_on, trained in (("assistant", ["b</s>", "d</s>"]), ("completion", ["d</s>"])):
        rendered = Chat(source, train_on, SPECIALS, ("<s>", "</s>"))(example("a", "b", "c", "d"))
        assert [rendered.text[start:end] for start, end in rendered.trained] == trained


def test_a_generation_mark_that_holds_the_end_of_the_turn() -> None:
    """The text after it belongs to the next turn."""
    source = (
        "{% for m in messages %}<s>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    rendered = Chat(source, "assistant", SPECIALS, ("<s>", "</s>"))(example("a", "b", "c", "d"))

    assert rendered.text == "<s>a</s><s>b</s><s>c</s><s>d</s>"
    assert [rendered.text[start:end] for start, end in rendered.trained] == ["b</s>", "d</s>"]


def test_text_that_the_template_drops_is_detected() -> None:
    messages = [{"role": r, "content": c} for r, c in (("developer", "Be brief."), ("user", "a"), ("assistant", "b"))]
    whole = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
    without = "{% for m in messages if m.role != 'developer' %}{{ m.content }}|{% endfor %}"

    assert not Chat(whole, "all", {}, ())(Example("f:1", messages)).lossy
    thought = [*messages[:2], {**messages[2], "reasoning_content": "It is b."}]
    assert Chat(whole, "all", {}, ())(Example("f:1", thought)).lossy
    assert not Chat(whole + "{{ messages[2].reasoning_content }}", "all", {}, ())(Example("f:1", thought)).lossy
    assert Chat(without, "all", {}, ())(Example("f:1", messages)).lossy


def test_a_message_that_answers_nothing() -> None:
    """If the assistant begins a conversation, its first message has no prompt."""
    messages = [{"role": r, "content": c} for r, c in (("assistant", "Hello."), ("user", "One?"), ("assistant", "1"))]
    source = (
        "{% if messages[0].role == 'x' %}{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
    )
    rendered = Chat(source + "{% if add_generation_prompt %}a:{% endif %}", "assistant", {}, ())(
        Example("f:1", messages)
    )

    assert [rendered.text[start:end] for start, end in rendered.trained] == ["1|"]


def test_tool_calls_where_the_template_has_a_place() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    source = (
        "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = Example("f:1", messages, tools=[{"name": "add <b>"}])
    rendered = Chat(source, "assistant", {}, ())(row)

    assert rendered.text == '[[{"name": "add <b>"}]]<user>1+1?<assistant>add({"a": 1})<tool>2<assistant>2'
    assert [rendered.text[start:end] for start, end in rendered.trained] == ['add({"a": 1})', "2"]
    with pytest.raises(DataError, match="the chat template does not render 'tool_calls'"):
        alpaca_chat()(row)
    with pytest.raises(DataError, match="text contains the special token '</s>'"):
        Chat(source, "assistant", {}, ("</s>",))(Example("f:1", messages, tools=[{"name": "</s>"}]))


def test_bos_once_where_a_template_writes_it_for_some_rows() -> None:
    source = "{% for m in messages %}{% if m.role == 'system' %}<s>{% endif %}{{ m.content }}|{% endfor %}"
    chat = Chat(source, "completion", SPECIALS, ("<s>", "</s>"), "<s>")
    with_system = [{"role": "system", "content": "S"}, *example("a", "b").messages]

    for row in (example("a", "b"), Example("f:1", with_system)):
        rendered = chat(row)
        assert rendered.text.count("<s>") == 1
        assert rendered.text.startswith("<s>")
        assert [rendered.text[start:end] for start, end in rendered.trained] == ["b|"]
    both = Chat(BOS + source, "all", SPECIALS, (), "<s>")(Example("f:1", with_system))
    assert (both.text, both.trained) == ("<s>S|a|b|", [(0, 9)])


def test_special_tokens_in_the_names_of_arguments() -> None:
    call = {"function": {"name": "f", "arguments": {"</s>": 1}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    with pytest.raises(DataError, match="text contains the special token '</s>'"):
        Chat("{{ messages[1].tool_calls }}", "all", SPECIALS, ("</s>",))(Example("f:1", messages))


def test_whatever_a_template_does_is_one_line() -> None:
    with pytest.raises(DataError, match="f:1: the chat template rejects these messages: division by zero"):
        Chat("{{ 1 / 0 }}", "all", {}, ())(example("a", "b"))


def test_a_template_that_changes_earlier_turns() -> None:
    chat = Chat("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "assistant", {}, ())

    with pytest.raises(DataError, match="renders message 2 differently depending on the others"):
        chat(example("a", "b", "c", "d"))


def test_a_template_is_run_in_a_sandbox() -> None:
    chat = Chat("{{ messages.__class__.__mro__ }}", "all", {}, ())

    with pytest.raises(RecipeError, match="the template violates the sandbox: access to attribute '__class__'"):
        chat(example("a", "b"))


def test_a_broken_template() -> None:
    with pytest.raises(RecipeError, match=r"data\.template: the chat template: invalid Jinja template"):
        Chat("{% for %}", "all", {}, ())(example("a", "b"))

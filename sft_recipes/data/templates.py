"""Render rows of one instruction and its answer, and plain text. `chat` renders conversations.

Both write no special tokens: the data is encoded as plain text, even if it looks like a special token, and the encoder adds
BOS and EOS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from sft_recipes.data.chat_templates import named
from sft_recipes.data.formats.base import Example

_PREAMBLE = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"


BOS = "{{- bos_token }}"  # prepended to a chat template that does not write BOS


@dataclass(slots=True)
class Rendered:
    """Text of one document; `trained` are [start, end) character ranges."""

    place: str
    text: str
    trained: list[tuple[int, int]]
    writes_specials: bool  # the text contains special tokens to be parsed
    empty: bool = False  # the answer is blank
    lossy: str = ""  # the keys of messages that the template drops or rewrites, separated by commas
    prompted: bool = True  # the text begins with the prompt of inference
    flagged: bool = False  # flags of the row leave text out of the loss, perhaps its end
    cuts: list[int] = field(default_factory=list)  # where a prompt of inference ends, so that a token must end too
    more: list["Rendered"] = field(default_factory=list)  # other turns of the row, each as a document of its own


Template = Callable[[Example], Rendered]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the Alpaca prompt, including the newline after `### Response:`."""
    if input:
        return f"{_PREAMBLE}{_WITH_INPUT}{_REQUEST}### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    return f"{_PREAMBLE}{_REQUEST}### Instruction:\n{instruction}\n\n### Response:\n"


def alpaca_chat_template() -> str:
    """Return the Alpaca prompt as a chat template, so that chat endpoints use the training format."""
    return named.source("alpaca")


def needs_chat(example: Example) -> bool:
    """Return True if a row is more than one instruction and its answer."""
    return example.chat or bool(example.tools) or len(example.messages) > 2


class Alpaca:
    """Template for one instruction and its response; the encoder adds EOS, which is trained too.

    `chat` renders the rows with more than that: a system prompt, earlier turns, tools.
    """

    def __init__(self, train_on: str = "completion", chat: Template | None = None) -> None:
        self.train_all, self.chat = train_on == "all", chat

    def __call__(self, example: Example) -> Rendered:
        if self.chat is not None and needs_chat(example):
            return self.chat(example)
        user, assistant = example.messages
        prompt = alpaca_prompt(user["content"], user.get("input", ""))
        text = prompt + assistant["content"]
        trained = [(0 if self.train_all else len(prompt), len(text))]
        return Rendered(example.place, text, trained, writes_specials=False, empty=example.empty)


def plain(example: Example) -> Rendered:
    """Render plain text; all of it is trained."""
    whole = [(0, len(example.text))] if example.text else []
    return Rendered(example.place, example.text, whole, writes_specials=False, empty=example.empty)

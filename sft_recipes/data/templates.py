"""From an example to the text the model reads, and which stretches of it are trained on.

Two kinds of text come out. The Alpaca template and plain text hold no special tokens: whatever looks like one in the data
is encoded as text, and the encoder adds BOS and EOS. A chat template (the tokenizer's own, a Jinja file) writes its special
tokens itself: the encoder reads them from the text, and an example whose own text contains one is refused, because it
could end a turn that the data did not end.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_recipes.data.formats import Example
from sft_recipes.errors import DataError, RecipeError

_PREAMBLE = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n"


BOS = "{{- bos_token }}"  # goes before a chat template that does not write BOS


@dataclass(slots=True)
class Rendered:
    """Text of one document; `trained` are [start, end) character ranges; `writes_specials`: it holds special tokens."""

    place: str
    text: str
    trained: list[tuple[int, int]]
    writes_specials: bool
    empty: bool = False  # nothing but white space is there to be answered
    left_out: bool = False  # the text lacks something that a message says


Template = Callable[[Example], Rendered]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of the Alpaca template, up to and with the newline after `### Response:`."""
    if input:
        return f"{_PREAMBLE}{_WITH_INPUT}{_REQUEST}### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    return f"{_PREAMBLE}{_REQUEST}### Instruction:\n{instruction}\n\n### Response:\n"


def alpaca_chat_template() -> str:
    """The Alpaca prompt as a chat template, so that a server's chat endpoint speaks the format of the training."""
    return resources.files("sft_recipes.data").joinpath("alpaca.jinja").read_text(encoding="utf-8")


class Alpaca:
    """One instruction and its response; the encoder adds EOS, which is trained on with the response."""

    def __init__(self, train_on: str = "completion") -> None:
        self.train_all = train_on == "all"

    def __call__(self, example: Example) -> Rendered:
        user, assistant = example.messages
        prompt = alpaca_prompt(user["content"], user.get("input", ""))
        text = prompt + assistant["content"]
        trained = [(0 if self.train_all else len(prompt), len(text))]
        return Rendered(example.place, text, trained, writes_specials=False, empty=example.empty)


def plain(example: Example) -> Rendered:
    """Plain text, all of it trained on."""
    whole = [(0, len(example.text))] if example.text else []
    return Rendered(example.place, example.text, whole, writes_specials=False, empty=example.empty)


class Chat:
    """A chat template: a Jinja program from `messages` to text, run in a sandbox.

    `train_on`: `completion` is the last message, `assistant` every assistant message, each with what the template writes
    to close it; `all` is the whole text. `variables` are the tokenizer's special tokens by name (`bos_token`, ...);
    `forbidden` the texts that the tokenizer would read as special tokens; `bos` one that every text begins with, once.
    """

    def __init__(
        self,
        source: str,
        train_on: str,
        variables: Mapping[str, str],
        forbidden: Iterable[str],
        bos: str | None = None,
        name: str = "data.template: the chat template",
    ) -> None:
        self.source, self.train_on, self.bos, self.name = source, train_on, bos, name
        self.variables = dict(variables)
        self.forbidden = tuple(forbidden)
        self.marks = "endgeneration" in source
        self.environment = _environment()
        try:
            self.template = self.environment.from_string(source)
        except Exception as error:  # TemplateError, and what Python says of the program that a template is made into
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            raise DataError(
                f"{self.name}: not a valid Jinja template: {error}{line}; mend it, or choose another"
            ) from None

    def __call__(self, example: Example) -> Rendered:
        messages = as_chat(example.messages)
        refused = (*self.forbidden, _OPEN, _CLOSE) if self.marks else self.forbidden
        for written in _texts([messages, example.tools]):
            if found := next((token for token in refused if token in written), None):
                raise DataError(
                    f"{example.place}: the text contains {found!r}, which this tokenizer reads as a special token; take it "
                    "out (in rows of a prompt and an answer with data.template: alpaca it would stay text)"
                )
        for key, there in (("tool_calls", any("tool_calls" in m for m in messages)), ("tools", example.tools)):
            if there and key not in self.source:
                raise DataError(f"{example.place}: the row has '{key}', for which the chat template has no place")
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{example.place}: the last message must be from the assistant, got '{messages[-1]['role']}'"
            )
        marked = self._render(messages, example, add_generation_prompt=False)
        text = self._unmarked(marked)
        trained = self._trained(messages, text, marked, example)
        if self.train_on != "all" and not example.empty and not any(text[start:end].strip() for start, end in trained):
            raise DataError(
                f"{example.place}: the chat template leaves the answer out, so there is nothing to train on"
            )
        if self.bos:
            text, trained = _with_once(self.bos, text, trained)
        left_out = any(
            message["content"].strip() not in text
            or any(said and key not in ("role", "content") and key not in self.source for key, said in message.items())
            for message in messages
        )
        return Rendered(example.place, text, trained, writes_specials=True, empty=example.empty, left_out=left_out)

    def render(self, messages: list[dict[str, Any]], place: str, *, add_generation_prompt: bool = False) -> str:
        """The text of messages. Raises DataError where the template refuses them, RecipeError where it does what none may."""
        return self._unmarked(self._render(messages, Example(place), add_generation_prompt=add_generation_prompt))

    def _render(self, messages: list[dict[str, Any]], example: Example, *, add_generation_prompt: bool) -> str:
        self.environment.begin()
        try:
            return self.template.render(
                messages=messages,
                tools=example.tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (
            SecurityError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:  # of the template, whatever the row
            raise RecipeError(
                f"{self.name} does what no chat template may, and is not used: {str(error) or 'it fills the memory'}"
            ) from None
        except Exception as error:  # whatever a program does, division by zero included
            raise DataError(f"{example.place}: the chat template refuses these messages: {error}") from None

    def _trained(
        self, messages: list[dict[str, Any]], text: str, marked: str, example: Example
    ) -> list[tuple[int, int]]:
        if self.train_on == "all":
            return [(0, len(text))]
        # An assistant's message that begins a conversation answers nothing.
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
        found = self._marked(marked, text)
        if self.train_on == "assistant" and found:
            return found
        if self.train_on == "completion" and found and len(found) == sum(m["role"] == "assistant" for m in messages):
            return found[-1:]
        indices = indices if self.train_on == "assistant" else indices[-1:]
        ranges = []
        for index in indices:
            before = self._unmarked(self._render(messages[:index], example, add_generation_prompt=True))
            upto = self._unmarked(self._render(messages[: index + 1], example, add_generation_prompt=False))
            if not upto.startswith(before) or not text.startswith(upto):
                if found:
                    return found[-1:]
                other = "completion or all" if self.train_on == "assistant" else "all"
                raise DataError(
                    f"{example.place}: the chat template renders message {index + 1} differently once others precede or "
                    f"follow it, so its tokens cannot be told apart; use data.train_on: {other}"
                )
            ranges.append((len(before), len(upto)))
        return ranges

    def _unmarked(self, text: str) -> str:
        return text.replace(_OPEN, "").replace(_CLOSE, "") if self.marks else text

    def _marked(self, marked: str, text: str) -> list[tuple[int, int]]:
        """What stands between generation marks, each with the special token right behind it, which ends the turn."""
        ranges, at = [], 0
        for part in marked.split(_OPEN)[1:]:
            at = marked.index(_OPEN + part, at)
            start = len(self._unmarked(marked[:at]))
            end = start + len(part.partition(_CLOSE)[0])
            closing = [token for token in self.forbidden if text.startswith(token, end)]
            if text[start:end].rstrip().endswith(self.forbidden):
                closing = []  # the turn ends within the mark, and what follows is the next one's
            ranges.append((start, end + max(map(len, closing), default=0)))
            at += 1
        return ranges


def as_chat(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An Alpaca row for a chat template that has no input field: the input follows the instruction after an empty line."""
    return [
        {"role": message["role"], "content": f"{message['content']}\n\n{message['input']}"}
        if message.get("input")
        else message
        for message in messages
    ]


# Stand around what a template marks as generated; from Unicode's private use, and refused in data.
_OPEN, _CLOSE = "\U0010fffc", "\U0010fffd"


def _with_once(bos: str, text: str, trained: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """The text with `bos` before it once, also where the template writes it for some rows only; ranges moved with it."""
    moved = text
    while moved.startswith(bos):
        moved = moved[len(bos) :]
    moved = bos + moved
    by = len(moved) - len(text)
    return moved, [(max(0, start + by) if start else 0, end + by) for start, end in trained]


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, transformers' mark around the assistant's text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
        return [opens, *body, closes]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox keeps a template from Python and from changing what it is given; this one also ends what would not
    end by itself, or not fit into memory: a template comes with a model, from anyone."""

    intercepted_binops = frozenset({"*", "**"})  # computed while rendering, and by us: 9**9**9 would take for ever
    _passes = (
        1_000_000  # of loops and macros in one rendering, and numbers in ranges; a long conversation takes a thousand
    )
    _seconds = 10.0  # of computing
    _binary_digits = 1000

    def begin(self) -> None:
        """Before each rendering."""
        self._left, self._until = self._passes, time.thread_time() + self._seconds

    def spend(self, passes: int) -> None:
        self._left -= passes
        if self._left < 0 or (self._left % 64 == 0 and time.thread_time() > self._until):
            raise OverflowError("it does not come to an end")

    @property
    def one_pass(self) -> None:
        """Stands in every loop and macro; a call would take as long as all else of a short loop."""
        self.spend(1)

    def range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for one, times in ((left, right), (right, left)):
            if isinstance(one, Sized) and isinstance(times, int):
                self.spend(len(one) * max(0, times))  # a text or a list, so many times
        if isinstance(left, int) and isinstance(right, int):
            digits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if digits > self._binary_digits:
                raise OverflowError("it computes with numbers of any length")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja would write nothing in its place, and go on."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def _generate(self, source: nodes.Template, *rest: Any, **options: Any) -> str:
        blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *source.find_all(nodes.For), *source.find_all(nodes.Macro), *source.find_all(nodes.CallBlock)
        ]  # fmt: skip
        for block in blocks:
            block.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("one_pass"), lineno=block.lineno))
        return super()._generate(source, *rest, **options)


def _environment() -> _Sandbox:
    """The environment in which transformers renders chat templates (`utils/chat_template_utils.py`), without its torch."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML and sorts keys

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["range"] = environment.range
    environment.globals.pop("lipsum")  # no use in a chat, and as long as one asks for
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment

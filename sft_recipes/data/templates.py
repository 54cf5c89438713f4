"""Render examples as text, with the character ranges that are trained.

The Alpaca template and plain text write no special tokens: the data is encoded as plain text, even if it looks like a
special token, and the encoder adds BOS and EOS. A chat template (the tokenizer's or a Jinja file) writes special tokens
itself, and the encoder parses them. So an example whose own text contains one is an error: it could end a turn early.
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

from sft_recipes.data.formats.base import Example
from sft_recipes.errors import DataError, RecipeError

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
    lossy: bool = False  # the template drops or rewrites part of a message


Template = Callable[[Example], Rendered]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the Alpaca prompt, including the newline after `### Response:`."""
    if input:
        return f"{_PREAMBLE}{_WITH_INPUT}{_REQUEST}### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    return f"{_PREAMBLE}{_REQUEST}### Instruction:\n{instruction}\n\n### Response:\n"


def alpaca_chat_template() -> str:
    """Return the Alpaca prompt as a chat template, so that chat endpoints use the training format."""
    return resources.files("sft_recipes.data").joinpath("alpaca.jinja").read_text(encoding="utf-8")


class Alpaca:
    """Template for one instruction and its response; the encoder adds EOS, which is trained too.

    `chat` renders the rows with more than that: a system prompt, earlier turns, tools.
    """

    def __init__(self, train_on: str = "completion", chat: "Chat | None" = None) -> None:
        self.train_all, self.chat = train_on == "all", chat

    def __call__(self, example: Example) -> Rendered:
        if self.chat is not None and (example.chat or example.tools or len(example.messages) > 2):
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


class Chat:
    """Chat template: a Jinja program from `messages` to text, run in a sandbox.

    Args:
        train_on: `completion` (the last message) or `assistant` (every assistant message), each with the end of the turn;
            or `all` (the whole text).
        variables: Special tokens of the tokenizer by name (`bos_token`, ...).
        forbidden: Texts that the tokenizer parses as special tokens.
        bos: BOS token that every text begins with exactly once, or None.
        name: Prefix of error messages.
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
        except Exception as error:  # TemplateError, or any error of Python compiling the generated program
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            raise DataError(f"{self.name}: invalid Jinja template: {error}{line}. Fix it, or use another.") from None

    def __call__(self, example: Example) -> Rendered:
        messages = as_chat(example.messages)
        forbidden = (*self.forbidden, _OPEN, _CLOSE) if self.marks else self.forbidden
        for text in _texts([messages, example.tools]):
            if special := next((token for token in forbidden if token in text), None):
                raise DataError(
                    f"{example.place}: text contains the special token {special!r}. Remove it; for prompt/answer rows, "
                    "data.template: alpaca encodes it as plain text instead."
                )
        for key, used in (("tool_calls", any("tool_calls" in m for m in messages)), ("tools", example.tools)):
            if used and key not in self.source:
                raise DataError(
                    f"{example.place}: the chat template does not render '{key}'. Remove '{key}' from the row, or set "
                    "data.template to a template that renders it."
                )
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{example.place}: the last message must have the role assistant (got '{messages[-1]['role']}')."
            )
        marked = self._render(messages, example, add_generation_prompt=False)
        text = self._unmarked(marked)
        trained = self._trained(messages, text, marked, example)
        if self.train_on != "all" and not example.empty and not any(text[start:end].strip() for start, end in trained):
            raise DataError(
                f"{example.place}: the chat template drops the answer, so nothing would be trained. Fix the template."
            )
        if self.bos:
            text, trained = _with_bos_once(self.bos, text, trained)
        lossy = any(
            message["content"].strip() not in text
            or any(
                value and key not in ("role", "content") and key not in self.source for key, value in message.items()
            )
            for message in messages
        )
        return Rendered(example.place, text, trained, writes_specials=True, empty=example.empty, lossy=lossy)

    def render(self, messages: list[dict[str, Any]], place: str, *, add_generation_prompt: bool = False) -> str:
        """Render messages. Raises DataError if they are rejected, RecipeError on a sandbox violation."""
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
        ) as error:  # the template's fault, not the row's
            raise RecipeError(
                f"{self.name}: the template violates the sandbox: {str(error) or 'it exhausts memory'}. Use another template."
            ) from None
        except Exception as error:  # a template can raise anything, such as ZeroDivisionError
            raise DataError(
                f"{example.place}: the chat template rejects these messages: {str(error).rstrip('.')}."
            ) from None

    def _trained(
        self, messages: list[dict[str, Any]], text: str, marked: str, example: Example
    ) -> list[tuple[int, int]]:
        if self.train_on == "all":
            return [(0, len(text))]
        # An assistant message that begins a conversation is no answer.
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
        generated = self._marked(marked, text)
        if self.train_on == "assistant" and generated:
            return generated
        turns = sum(m["role"] == "assistant" for m in messages)
        if self.train_on == "completion" and generated and len(generated) == turns:
            return generated[-1:]
        indices = indices if self.train_on == "assistant" else indices[-1:]
        ranges = []
        for index in indices:
            before = self._unmarked(self._render(messages[:index], example, add_generation_prompt=True))
            upto = self._unmarked(self._render(messages[: index + 1], example, add_generation_prompt=False))
            if not upto.startswith(before) or not text.startswith(upto):
                if generated:
                    return generated[-1:]
                other = "completion or all" if self.train_on == "assistant" else "all"
                raise DataError(
                    f"{example.place}: the chat template renders message {index + 1} differently depending on the others, "
                    f"so its tokens cannot be located (data.train_on: {self.train_on}). Set data.train_on to {other}."
                )
            ranges.append((len(before), len(upto)))
        return ranges

    def _unmarked(self, text: str) -> str:
        return text.replace(_OPEN, "").replace(_CLOSE, "") if self.marks else text

    def _marked(self, marked: str, text: str) -> list[tuple[int, int]]:
        """Return the ranges inside generation marks, with the special token directly after them."""
        ranges, at = [], 0
        for part in marked.split(_OPEN)[1:]:
            at = marked.index(_OPEN + part, at)
            start = len(self._unmarked(marked[:at]))
            end = start + len(part.partition(_CLOSE)[0])
            closing = [token for token in self.forbidden if text.startswith(token, end)]
            if text[start:end].rstrip().endswith(self.forbidden):
                closing = []  # the turn ends inside the mark; what follows belongs to the next turn
            ranges.append((start, end + max(map(len, closing), default=0)))
            at += 1
        return ranges


def as_chat(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge Alpaca inputs into the content, after a blank line, for templates without an input field."""
    return [
        {"role": message["role"], "content": f"{message['content']}\n\n{message['input']}"}
        if message.get("input")
        else message
        for message in messages
    ]


# Enclose what a template marks as generated; private-use characters, forbidden in data.
_OPEN, _CLOSE = "\U0010fffc", "\U0010fffd"


def _with_bos_once(bos: str, text: str, trained: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """Return text and ranges with exactly one leading `bos`; templates may write it for some rows only."""
    moved = text
    while moved.startswith(bos):
        moved = moved[len(bos) :]
    moved = bos + moved
    by = len(moved) - len(text)
    return moved, [(max(0, start + by) if start else 0, end + by) for start, end in trained]


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


class _Generation(Extension):
    """Jinja extension for transformers' mark `{% generation %} … {% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
        return [opens, *body, closes]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja sandbox with limits on time and memory, because templates come with models from anyone.

    Jinja's own sandbox only blocks access to Python and changes of its inputs.
    """

    intercepted_binops = frozenset({"*", "**"})  # evaluated by call_binop: 9**9**9 would never finish
    _passes = 1_000_000  # loop and macro iterations and range items per rendering; a long conversation takes 1,000
    _seconds = 10.0  # of CPU time per rendering
    _binary_digits = 1000

    def begin(self) -> None:
        """Reset the limits before a rendering."""
        self._left, self._until = self._passes, time.thread_time() + self._seconds

    def spend(self, passes: int) -> None:
        self._left -= passes
        if self._left < 0 or (self._left % 64 == 0 and time.thread_time() > self._until):
            raise OverflowError("it does not terminate")

    @property
    def one_pass(self) -> None:
        """Count one iteration. A property, because a call would double the time of a short loop."""
        self.spend(1)

    def range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for one, times in ((left, right), (right, left)):
            if isinstance(one, Sized) and isinstance(times, int):
                self.spend(len(one) * max(0, times))  # repetition of a string or list
        if isinstance(left, int) and isinstance(right, int):
            digits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if digits > self._binary_digits:
                raise OverflowError("it computes numbers that are too large")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Raise an error; Jinja's own method renders nothing and continues."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def compile(self, source: Any, name: Any = None, filename: Any = None, *rest: Any, **options: Any) -> Any:
        if isinstance(source, str):
            source = self.parse(source, name, filename)
        blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *source.find_all(nodes.For), *source.find_all(nodes.Macro), *source.find_all(nodes.CallBlock)
        ]  # fmt: skip
        for block in blocks:
            block.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("one_pass"), lineno=block.lineno))
        return super().compile(source, name, filename, *rest, **options)


def _environment() -> _Sandbox:
    """Return the Jinja environment of transformers (`utils/chat_template_utils.py`), without torch."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML and sorts keys

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["range"] = environment.range
    environment.globals.pop("lipsum")  # useless in a chat template, and unlimited in length
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment

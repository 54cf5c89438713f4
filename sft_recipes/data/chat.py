"""Render conversations with a chat template, and find the text that is trained.

transformers renders. Trained are the turns that `train_on` and the flags of the row select: what the template marks as
generated ({% generation %}), with a special token directly after it; without marks, what follows the prompt of inference.
If a later message changes how a turn is rendered (most templates remove earlier thoughts), each turn becomes a document of
its own: the prompt of inference, and the answer.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft_recipes.data.formats.base import Example, Flag
from sft_recipes.data.templates import Rendered
from sft_recipes.errors import DataError, RecipeError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers renders each as the thought of a message
_NOT_TEXT = ("role", "content", "id", "type", "tool_call_id")  # keys that a template need not render
_TOOL_ROLES = ("tool", "function", "ipython")
_SENTINEL = "\U0010fffcx\U0010fffd"  # private-use characters, which no data contains
_THOUGHT = re.compile(r"(?:^|(?<=<think>))(?:(?!<think>).)*?(?=</think>)", re.DOTALL)  # written into the content
Messages = list[dict[str, Any]]
Range = tuple[int, int]


@dataclass
class _Turn:
    """Where the answer `index` is in `text`, which renders `messages`."""

    messages: Messages
    index: int
    text: str
    ranges: list[Range]
    prompt: int | None = None  # end of the prompt of inference, if the text begins with it
    marked: bool = False


class Chat:
    """Chat template. Call it in a limited process (`sandbox`), unless it is one of ours.

    Args:
        train_on: `completion` (the last message) or `assistant` (every assistant message), each with the end of the turn;
            or `all` (the whole text).
        variables: Special tokens of the tokenizer by name (`bos_token`, ...).
        forbidden: Texts that the tokenizer parses as special tokens.
        bos: BOS token that every text begins with exactly once, or "".
        name: Prefix of error messages.
        reasoning: Train on thoughts.
        parse: Messages may contain special tokens.
    """

    def __init__(
        self,
        source: str,
        train_on: str,
        variables: Mapping[str, str],
        forbidden: Iterable[str],
        bos: str = "",
        name: str = "data.template: the chat template",
        *,
        reasoning: bool = True,
        parse: bool = False,
    ) -> None:
        self.source, self.train_on, self.bos, self.name = source, train_on, bos, name
        self.reasoning, self.parse = reasoning, parse
        self.variables, self.forbidden = dict(variables), tuple(forbidden)
        self.eos = self.variables.get("eos_token", "")
        self._measured: dict[tuple[Any, ...], tuple[list[str], bool]] = {}  # by kind of row

    def __call__(self, example: Example) -> Rendered:
        rows = as_chat(example.messages)
        for text in () if self.parse else _texts([rows, example.tools]):
            if special := next((token for token in self.forbidden if token in text), None):
                raise DataError(
                    f"{example.place}: text contains the special token {special!r}. Remove it, or set "
                    "data.special_tokens: parse; for prompt/answer rows, data.template: alpaca encodes it as plain text."
                )
        if rows[-1]["role"] != "assistant":
            raise DataError(
                f"{example.place}: the last message must have the role assistant (got '{rows[-1]['role']}')."
            )
        for key, used in (("tool_calls", any("tool_calls" in row for row in rows)), ("tools", example.tools)):
            if used and key not in self.source:
                raise _not_rendered(key, example)
        messages, text, marks = self.accepted(rows, example)
        flags = self._flags(example, marked=bool(marks))
        turns = self._turns(messages, text, marks, flags, example)
        documents = [
            Rendered(example.place, one[0].text, self._trained(one, flags, example), True, example.empty,
                     cuts=[turn.prompt for turn in one if turn.prompt is not None and not turn.marked],
                     prompted=all(turn.marked or turn.prompt is not None for turn in one))
            for one in turns
        ] or [Rendered(example.place, text, [], True, example.empty)]  # fmt: skip
        wanted = any(flags) and not example.empty and self.train_on != "all"
        if wanted and not any(one.text[start:end].strip() for one in documents for start, end in one.trained):
            raise DataError(
                f"{example.place}: the chat template drops the answer, so nothing would be trained. Fix the template."
            )
        alone = [one[0].messages for one in turns if len(one[0].messages) < len(messages)]
        lossy, prompted = self._measure(messages, alone, example, marked=bool(marks))
        everything = "\n".join([text, *(document.text for document in documents)])
        if any(message["content"].strip() not in everything for message in rows):
            lossy = [*lossy, "content"]
        for document in documents:
            document.lossy, document.prompted = ",".join(lossy), document.prompted and prompted
            document.flagged = any(flag not in (None, True) for flag in example.flags)
            if self.bos:
                _begin_once_with(self.bos, document)
        return replace(documents[0], more=documents[1:])

    def accepted(
        self, messages: Messages, example: Example, *, prompt: bool = False
    ) -> tuple[Messages, str, list[Range]]:
        """Return messages in the form that the template takes, their text (with the `prompt` of inference for the next
        answer) and the ranges that the template marks as generated.

        Tool calls have their arguments as objects or else as JSON text; contents are text or else lists of parts.
        """
        failure, text = None, None
        for form in (list, _arguments_as_text, _contents_as_parts):
            changed = form(messages)
            if form is not list and changed == messages:
                continue
            try:
                text, marks = self._render(changed, example, prompt=prompt)
            except DataError as error:
                failure = failure or error
                continue
            objects = [call["arguments"] for call in _functions(changed) if isinstance(call.get("arguments"), dict)]
            parts = [message["content"] for message in changed if isinstance(message["content"], list)]
            taken = not any(inner and str(inner) in text for inner in (*objects, *parts))  # not as Python writes them
            if taken and any(message["content"].strip() in text for message in messages if message["content"].strip()):
                return changed, text, marks
        if failure and text is None:
            raise failure
        return messages, *self._render(messages, example, prompt=prompt)

    def prompt(self, messages: Messages, place: str, tools: list[Any] | None = None) -> str:
        """Render the prompt of inference. Raises DataError if the messages are rejected."""
        return self.accepted(messages, Example(place, tools=tools), prompt=True)[1]

    def text(self, messages: Messages, place: str, tools: list[Any] | None = None) -> str:
        """Render messages that end with an answer."""
        return self.accepted(messages, Example(place, tools=tools))[1]

    def _render(self, messages: Messages, example: Example, *, prompt: bool = False) -> tuple[str, list[Range]]:
        # Imported here, because it takes half a second, which plain text and our Alpaca template need not wait for.
        from jinja2 import TemplateSyntaxError
        from jinja2.exceptions import SecurityError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, ranges = render_jinja_template(
                [messages],
                tools=example.tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask="endgeneration" in self.source and not prompt,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            raise RecipeError(
                f"{self.name}: invalid Jinja template: {error} (line {error.lineno}). Fix it, or use another."
            ) from None
        except (SecurityError, OverflowError, MemoryError, RecursionError) as error:  # not the row's fault
            reason = str(error).rstrip(".") or "it exhausts memory"
            raise RecipeError(
                f"{self.name}: the template violates the sandbox: {reason}. Use another template."
            ) from None
        except Exception as error:  # a template can raise anything, such as ZeroDivisionError
            raise DataError(
                f"{example.place}: the chat template rejects these messages: {str(error).rstrip('.')}."
            ) from None
        return texts[0], ranges[0] if ranges else []

    def _flags(self, example: Example, *, marked: bool) -> list[Flag]:
        """Return for each message whether it is trained; a message that begins a conversation is no answer."""
        flags: list[Flag] = []
        for index, message in enumerate(example.messages):
            flag = example.flags[index] if example.flags else None
            if message["role"] != "assistant":
                if flag:
                    raise DataError(
                        f"{example.place}: message {index + 1}: only assistant messages can be trained (got "
                        f"'{message['role']}'). Remove the flag from it."
                    )
                flag = False
            elif flag is None:
                last = index == len(example.messages) - 1
                answers = bool(index or marked) and (last or self.train_on != "completion")
                flag = answers or self.train_on == "all"
            flags.append(flag)
        return flags

    def _turns(
        self, messages: Messages, text: str, marks: list[Range], flags: list[Flag], example: Example
    ) -> list[list[_Turn]]:
        """Locate the turns that are trained, in one text, or else each in a text of its own."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "all":  # the turns of which something is left out
            whole = _Turn(messages, -1, text, [(0, len(text))], marked=True)
            indices = [index for index in answers if flags[index] is not True or (index and not self.reasoning)]
        else:
            indices = [index for index in answers if flags[index]]
        if marks:
            found: list[_Turn | None] = [*self._marked(messages, text, marks, answers, indices, example)]
        else:
            found = [self._located(messages, index, text, example) for index in indices]
        if self.train_on != "all" and None in found:
            return [[self._alone(messages[: index + 1], example)] for index in indices]
        if None in found:
            raise self._cannot_locate(indices[found.index(None)], example)
        turns = [turn for turn in found if turn is not None]
        return [[whole, *turns]] if self.train_on == "all" else [turns] if turns else []

    def _marked(
        self,
        messages: Messages,
        text: str,
        marks: list[Range],
        answers: list[int],
        indices: list[int],
        example: Example,
    ) -> Iterator[_Turn]:
        """Assign the marked ranges to the turns."""
        numbers = range(len(marks))
        if len(marks) == len(answers):
            turn_of = dict(zip(numbers, answers, strict=True))
        elif indices == answers:
            turn_of = dict.fromkeys(numbers, answers[-1])
        else:  # the last turn that begins before the end of the mark
            prompts = [self._render(messages[:index], example, prompt=True)[0] for index in answers[1:]]
            starts = [-1, *(_shared(prompt, text) for prompt in prompts)]
            turn_of = {
                number: max(index for index, start in zip(answers, starts, strict=True) if start < end)
                for number, (_, end) in enumerate(marks)
            }
        for index in indices:
            ranges = [self._with_end(text, *marks[number]) for number in numbers if turn_of[number] == index]
            yield _Turn(messages, index, text, [(start, end) for start, end in ranges if start < end], marked=True)

    def _with_end(self, text: str, start: int, end: int) -> Range:
        """Extend a marked range by the special token directly after it, unless a turn ends inside or it is empty."""
        if start == end or text[start:end].rstrip().endswith(self.forbidden):
            return start, end
        return start, end + max((len(token) for token in self.forbidden if text.startswith(token, end)), default=0)

    def _located(self, messages: Messages, index: int, text: str, example: Example) -> _Turn | None:
        """Locate a turn by the prompt of inference; None if later messages change its text."""
        before, _ = self._render(messages[:index], example, prompt=True)
        upto = text if index == len(messages) - 1 else self._render(messages[: index + 1], example)[0]
        if not text.startswith(upto):
            upto = upto.removesuffix(self.eos)  # some templates close only the last turn with EOS
            if not text.startswith(upto):
                return None
        if upto.startswith(before):
            return _Turn(messages, index, text, [(len(before), len(upto))], len(before))
        # The prompt opens a thought that the answer does not have, or the other way round.
        shared = _shared(before, upto)
        known = len(self._render(messages[:index], example)[0].removesuffix(self.eos))
        return _Turn(messages, index, text, [(shared, len(upto))]) if shared >= known else None

    def _alone(self, messages: Messages, example: Example) -> _Turn:
        """Render the last of `messages` after the prompt of inference."""
        index = len(messages) - 1
        if turn := self._located(messages, index, self._render(messages, example)[0], example):
            return turn
        # The answer changes the text before it: append it to the prompt of inference, as rendered after no thoughts.
        plain = [{key: value for key, value in one.items() if key not in _REASONING} for one in messages[:index]]
        turn = self._located([*plain, messages[-1]], index, self._render([*plain, messages[-1]], example)[0], example)
        if turn is None or turn.prompt is None:
            raise self._cannot_locate(index, example)
        before, _ = self._render(messages[:index], example, prompt=True)
        text = before + turn.text[turn.prompt :]
        return _Turn(messages, index, text, [(len(before), len(text))], len(before))

    def _cannot_locate(self, index: int, example: Example) -> DataError:
        other = "completion or all" if self.train_on == "assistant" else "all"
        return DataError(
            f"{example.place}: the chat template renders message {index + 1} differently depending on the others, "
            f"so its tokens cannot be located (data.train_on: {self.train_on}). Set data.train_on to {other}."
        )

    def _trained(self, turns: Sequence[_Turn], flags: list[Flag], example: Example) -> list[Range]:
        """Return the ranges of turns in one text that are trained."""
        trained: list[Range] = []
        for turn in turns:
            if turn.index < 0:
                trained = turn.ranges
                continue
            flag, ranges = flags[turn.index], turn.ranges
            if self.train_on == "all":
                trained = _without(trained, ranges)
            if isinstance(flag, list):
                ranges = self._spans(turn, flag, example)
            if flag and not self.reasoning:
                ranges = _without(ranges, self._thoughts(turn, example))
            trained = sorted([*trained, *(ranges if flag else [])])
        return trained

    def _spans(self, turn: _Turn, spans: list[Range], example: Example) -> list[Range]:
        """Return the ranges of characters of a content in the text. The last character includes the end of the turn."""
        content = turn.messages[turn.index]["content"]
        start, end = self._where(turn, ("content",), example) or (0, 0)
        before = content.find(turn.text[start:end])  # blanks that the template strips
        if start == end or before < 0:
            raise DataError(
                f"{example.place}: message {turn.index + 1}: the chat template rewrites its content, so the characters to "
                "train on cannot be located. Remove the ranges, or use another template."
            )
        closed = turn.ranges[-1][1]
        ranges = [
            (max(start, start + one - before), closed if other >= len(content) else min(end, start + other - before))
            for one, other in spans
        ]
        return [(one, other) for one, other in ranges if one < other]

    def _thoughts(self, turn: _Turn, example: Example) -> list[Range]:
        """Return the ranges of the thoughts of a turn, without what encloses them."""
        named = [key for key in _REASONING if turn.messages[turn.index].get(key)]
        if named:
            found = self._where(turn, named, example)
            return [found] if found else []
        (start, _), (_, end) = turn.ranges[0], turn.ranges[-1]
        return [(start + one.start(), start + one.end()) for one in _THOUGHT.finditer(turn.text[start:end])]

    def _where(self, turn: _Turn, keys: Iterable[str], example: Example) -> Range | None:
        """Return the range of a value of a message in the text, counted from the end: the text before may differ."""
        text, _ = self._render(_replaced(turn.messages, turn.index, keys), example)
        original, _ = self._render(turn.messages, example)
        first, last = text.find(_SENTINEL), text.rfind(_SENTINEL)
        shift = len(turn.text) - len(original)
        return (first + shift, len(turn.text) - (len(text) - last - len(_SENTINEL))) if first >= 0 else None

    def _measure(
        self, messages: Messages, alone: list[Messages], example: Example, *, marked: bool
    ) -> tuple[list[str], bool]:
        """Return the keys whose values are not in the text, and whether the text begins with the prompt of inference.

        A value is in the text if another value changes the text. That is measured once per kind of row.
        """
        kind = (
            example.tools is not None,
            *map(len, alone),
            *((message["role"], *sorted(key for key, value in message.items() if value)) for message in messages),
        )
        if kind in self._measured:
            return self._measured[kind]
        contexts = [(context, self._render(context, example)[0]) for context in (messages, *alone)]
        lost = []
        for index, message in enumerate(messages):
            keys = [key for key, value in message.items() if value and key not in _NOT_TEXT]
            if message["role"] in _TOOL_ROLES:
                keys = [key for key in keys if key != "name"]  # that of the call
            thoughts = [key for key in keys if key in _REASONING]
            for group in [*([key] for key in keys if key not in thoughts), *([thoughts] if thoughts else [])]:
                if not any(
                    self._changes(_replaced(context, index, group), text, example)
                    for context, text in contexts
                    if index < len(context)
                ):
                    lost.append(group[0])
        if example.tools and not self._changes(messages, contexts[0][1], replace(example, tools=None)):
            lost.append("tools")
        if missing := next((key for key in ("tool_calls", "tools") if key in lost), None):
            raise _not_rendered(missing, example)
        prompted = not marked or contexts[0][1].startswith(self._render(messages[:-1], example, prompt=True)[0])
        self._measured[kind] = list(dict.fromkeys(lost)), prompted
        return self._measured[kind]

    def _changes(self, messages: Messages, text: str, example: Example) -> bool:
        try:
            return self._render(messages, example)[0] != text
        except (DataError, RecipeError):
            return True  # the template looked at it


def _not_rendered(key: str, example: Example) -> DataError:
    return DataError(
        f"{example.place}: the chat template does not render '{key}'. Remove '{key}' from the row, or set data.template to a "
        "template that renders it."
    )


def as_chat(messages: Messages) -> Messages:
    """Merge Alpaca inputs into the content, after a blank line, for templates without an input field."""
    return [
        {"role": message["role"], "content": f"{message['content']}\n\n{message['input']}"}
        if message.get("input")
        else message
        for message in messages
    ]


def _functions(messages: Messages) -> Iterator[dict[str, Any]]:
    for message in messages:
        for call in message.get("tool_calls") or []:
            yield call.get("function", call)


def _arguments_as_text(messages: Messages) -> Messages:
    def as_text(arguments: Any) -> Any:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    return _with_functions(
        messages, lambda call: {**call, "arguments": as_text(call["arguments"])} if "arguments" in call else call
    )


def _contents_as_parts(messages: Messages) -> Messages:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_functions(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": change(call["function"])} if "function" in call else change(call)

    return [
        {**message, "tool_calls": list(map(changed, message["tool_calls"]))} if message.get("tool_calls") else message
        for message in messages
    ]


def _replaced(messages: Messages, index: int, keys: Iterable[str]) -> Messages:
    """Replace values of a message by the sentinel; of tool calls, the names and arguments."""

    def other(call: dict[str, Any]) -> dict[str, Any]:
        arguments = {_SENTINEL: _SENTINEL} if isinstance(call.get("arguments"), dict) else _SENTINEL
        return {**call, "name": _SENTINEL, "arguments": arguments}

    def sentinel(key: str, value: Any) -> Any:
        if key == "tool_calls":
            return _with_functions([{key: value}], other)[0][key]
        return [{"type": "text", "text": _SENTINEL}] if key == "content" and isinstance(value, list) else _SENTINEL

    message = messages[index]
    return [
        *messages[:index],
        {**message, **{key: sentinel(key, message[key]) for key in keys}},
        *messages[index + 1 :],
    ]


def _shared(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    shortest = min(len(one), len(other))
    return next((at for at in range(shortest) if one[at] != other[at]), shortest)


def _without(ranges: Iterable[Range], holes: Iterable[Range]) -> list[Range]:
    """Remove the holes from the ranges."""
    left = list(ranges)
    for start, end in holes:
        left = [
            part
            for one, other in left
            for part in ((one, min(other, start)), (max(one, end), other))
            if part[0] < part[1]
        ]
    return left


def _begin_once_with(bos: str, document: Rendered) -> None:
    """Let the text begin with exactly one `bos`; templates may write it for some rows only."""
    text = document.text
    while text.startswith(bos):
        text = text[len(bos) :]
    by = len(bos) + len(text) - len(document.text)
    document.text = bos + text
    document.trained = [(max(0, start + by) if start else 0, end + by) for start, end in document.trained]
    document.cuts = [max(0, cut + by) for cut in document.cuts]


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)

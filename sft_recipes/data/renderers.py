"""Choose the template that renders a source's rows."""

import datetime
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.data import sandbox, templates
from sft_recipes.data.chat import Chat
from sft_recipes.data.chat_templates import named
from sft_recipes.data.encoder import Encoder, LightTokenizer
from sft_recipes.data.formats.base import Example
from sft_recipes.data.special_tokens import parsed
from sft_recipes.errors import DataError, ModelError
from sft_recipes.recipe.schema import Data

_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # arguments that rows and transformers give


@dataclass(frozen=True)
class Renderer:
    """Rendering of the rows of one format."""

    name: str
    render: templates.Template
    chat: Chat | None  # the same as a chat template; None for plain text
    ours: bool = True  # the template needs no limits

    @property
    def chat_source(self) -> str | None:
        return self.chat.source if self.chat else None


def refuse_two_templates(data: Data, formats: Collection[str], first: Iterable[Example]) -> None:
    """Raise DataError if sources of these formats, with these first rows, would be rendered with different templates."""
    if data.template is None and len({example.chat for example in first}) > 1:
        raise DataError(
            f"data.train: sources of different formats need one template (got {' and '.join(sorted(formats))}). "
            "Set data.template."
        )


def choose_renderer(
    data: Data, format: str, first: Example, tokenizer: LightTokenizer, encoder: Encoder, date: datetime.date
) -> Renderer:
    """Choose the template for rows of a format, given the first row. Raises DataError if there is none.

    The `date` of the run and `data.chat_template_kwargs` become part of the template, so that they hold wherever it is used.
    """
    name = data.template or ("chat" if first.chat else "alpaca")
    parses = data.special_tokens == "parse"
    written_bos = tokenizer.specials.get("bos_token", "") if encoder.bos else ""
    if format == "text":
        if data.template is not None:
            raise DataError(f"data.template: plain text takes no template (got {data.template}). Remove data.template.")
        if data.chat_template_kwargs:
            raise DataError(
                "data.chat_template_kwargs: plain text takes no template. Remove data.chat_template_kwargs."
            )
        return Renderer("text", parsed(templates.plain, written_bos) if parses else templates.plain, None)
    if name in named.NAMES:
        source = named.source(name)
    elif name == "chat":
        if tokenizer.chat_template is None:
            raise ModelError(
                "the tokenizer has no chat template. "
                f"Set data.template to {', '.join(named.NAMES)}, or the path of a .jinja file."
            )
        source = tokenizer.chat_template
    else:
        source = _template_file(name)
    label = f"data.template: {'the chat template of the tokenizer' if name == 'chat' else name}"

    def chat_of(source: str) -> Chat:
        return Chat(
            source, data.train_on, tokenizer.specials, tokenizer.special_texts, written_bos, label,
            reasoning=data.train_on_reasoning, parse=parses,
        )  # fmt: skip

    # If the tokenizer adds BOS but the template does not write it, prepend it.
    if written_bos and (
        name == "alpaca" or not sandbox.limited(label, _begins_with, chat_of(source), written_bos, first)
    ):
        source = templates.BOS + source
    chat = chat_of(_with_defaults(source, data, date))
    ours = name in named.NAMES
    if name == "alpaca" and not first.chat:
        alpaca = templates.Alpaca(data.train_on, chat)
        return Renderer(name, parsed(alpaca, written_bos) if parses else alpaca, chat, ours)
    return Renderer(name, chat, chat, ours)


def _begins_with(chat: Chat, bos: str, example: Example) -> bool:
    """Return True if a row begins with BOS, or is rejected, which is reported later with all other invalid rows."""
    try:
        return chat.text(example.messages, example.place, example.tools).startswith(bos)
    except DataError:
        return True


def _with_defaults(source: str, data: Data, date: datetime.date) -> str:
    """Prepend the date of the run and the default values of `data.chat_template_kwargs` to a chat template.

    The line break after them is removed by Jinja, so they change nothing else.
    """
    defaults = ""
    if "strftime_now" in source:
        directives = dict.fromkeys(re.findall("%-?[a-zA-Z]", source))
        replaced = "".join(f" | replace({one!r}, {date.strftime(one)!r})" for one in directives)
        defaults += f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    for name, value in data.chat_template_kwargs.items():
        if name not in _arguments(source) or name in _GIVEN:
            raise DataError(
                f"data.chat_template_kwargs: the chat template has no argument {name!r}. Remove it, or check its spelling."
            )
        defaults += f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
    return f"{defaults}\n{source}" if defaults else source


def _arguments(source: str) -> set[str]:
    """Return the names that a chat template reads but does not set; those of all words if Jinja alone cannot parse it."""
    from jinja2 import Environment, TemplateError, meta

    without_marks = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", source)
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(without_marks))
    except (TemplateError, RecursionError):
        return set(re.findall(r"\w+", source))


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(
            f"data.template: cannot read the template file: {reason} (got '{name}'). "
            f"Set it to {', '.join(named.NAMES)}, chat, or the path of a .jinja file."
        ) from None

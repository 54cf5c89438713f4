"""Choose the template that renders a source's rows."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.data import templates
from sft_recipes.data.encoder import Encoder, LightTokenizer
from sft_recipes.data.formats.base import Example
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data


@dataclass(frozen=True)
class Renderer:
    """Rendering of the rows of one format."""

    name: str
    render: templates.Template
    chat_source: str | None  # as a chat template (Jinja); None for plain text


def refuse_two_templates(data: Data, formats: Collection[str], first: Iterable[Example]) -> None:
    """Raise DataError if sources of these formats, with these first rows, would be rendered with different templates."""
    if data.template is None and len({example.chat for example in first}) > 1:
        raise DataError(
            f"data.train: sources of different formats need one template (got {' and '.join(sorted(formats))}). "
            "Set data.template."
        )


def choose_renderer(data: Data, format: str, first: Example, tokenizer: LightTokenizer, encoder: Encoder) -> Renderer:
    """Choose the template for rows of a format, given the first row. Raises DataError if there is none."""
    name = data.template or ("chat" if first.chat else "alpaca")
    if format == "text":
        if data.template is not None:
            raise DataError(f"data.template: plain text takes no template (got {data.template}). Remove data.template.")
        return Renderer("text", templates.plain, None)
    if name == "alpaca":
        source = templates.alpaca_chat_template()
    elif name == "chat":
        if tokenizer.chat_template is None:
            raise DataError(
                "data.template: the tokenizer has no chat template (got chat). "
                "Set data.template to alpaca or to the path of a .jinja file."
            )
        source = tokenizer.chat_template
    else:
        source = _template_file(name)
    bos = tokenizer.specials.get("bos_token")
    label = f"data.template: {'the chat template of the tokenizer' if name == 'chat' else name}"

    def chat_of(source: str, bos: str | None = None) -> templates.Chat:
        return templates.Chat(source, data.train_on, tokenizer.specials, tokenizer.special_texts, bos, label)

    chat = chat_of(source)
    # If the tokenizer adds BOS but the template does not write it, prepend it.
    if encoder.bos and bos and not _renders(chat, first).startswith(bos):
        source = templates.BOS + source
        chat = chat_of(source)
    if encoder.bos and bos:
        chat = chat_of(source, bos)
    if name == "alpaca" and not first.chat:
        return Renderer(name, templates.Alpaca(data.train_on, chat), source)
    return Renderer(name, chat, source)


def _renders(chat: templates.Chat, example: Example) -> str:
    """Render a row; "" if the template rejects it, which is reported later with all other invalid rows."""
    try:
        return chat.render(example.messages, example.place)
    except DataError:
        return ""


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(
            f"data.template: cannot read the template file: {reason} (got '{name}'). "
            "Set it to alpaca, chat, or the path of a .jinja file."
        ) from None

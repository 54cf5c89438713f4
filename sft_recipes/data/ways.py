"""By which template the rows of a format become text."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.data import templates
from sft_recipes.data.formats import Example
from sft_recipes.data.tokens import Encoder, LightTokenizer
from sft_recipes.errors import DataError
from sft_recipes.recipe.schema import Data


@dataclass(frozen=True)
class Way:
    """How rows of one format become text."""

    name: str
    render: templates.Template
    chat_source: str | None  # the same as a chat template; None: the text is not made of messages


def refuse_two_templates(data: Data, found: Collection[str]) -> None:
    """Raise DataError where sources of these formats would get different templates."""
    if data.template is None and "messages" in found and len(found) > 1:
        raise DataError(
            f"data.train: the sources are {' and '.join(sorted(found))}; say with data.template which one "
            "template they share"
        )


def way_of(data: Data, found: str, first: Example, tokenizer: LightTokenizer, encoder: Encoder) -> Way:
    """The way of rows in the format `found`, of which `first` is one. Raises DataError where there is none."""
    name = data.template or ("chat" if found == "messages" else "alpaca")
    if found == "text":
        if data.template is not None:
            raise DataError(f"data.template: {data.template} has no use for plain text; leave it out")
        return Way("text", templates.plain, None)
    if name == "alpaca":
        source = templates.alpaca_chat_template()
    elif name == "chat":
        if tokenizer.chat_template is None:
            raise DataError(
                "data.template: chat, and the tokenizer has no chat template; set data.template: alpaca, or the path "
                "of a .jinja file"
            )
        source = tokenizer.chat_template
    else:
        source = _template_file(name)
    bos = tokenizer.specials.get("bos_token")
    called = f"data.template: {'the chat template of the tokenizer' if name == 'chat' else name}"

    def chat_of(source: str, bos: str | None = None) -> templates.Chat:
        return templates.Chat(source, data.train_on, tokenizer.specials, tokenizer.special_texts, bos, called)

    chat = chat_of(source)
    # Each document begins with BOS where the tokenizer adds one, and the template does not.
    if encoder.bos and bos and not _renders(chat, first).startswith(bos):
        source = templates.BOS + source
        chat = chat_of(source)
    if name == "alpaca" and found != "messages":
        return Way(name, templates.Alpaca(data.train_on), source)
    if encoder.bos and bos:
        chat = chat_of(source, bos)
    return Way(name, chat, source)


def _renders(chat: templates.Chat, example: Example) -> str:
    """The text of a row, "" where the template refuses it: that is said with all other rows that are wrong."""
    try:
        return chat.render(example.messages, example.place)
    except DataError:
        return ""


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # of a file that is not UTF-8, of a name with a null character
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(
            f"data.template: '{name}' is neither alpaca nor chat, and no template file that can be read: {reason}; expected "
            "alpaca, chat, or the path of a .jinja file"
        ) from None

"""Every error that the command line shows as lines instead of a traceback.

    SFTRecipeError              exit code 1
    ├── RunError                training or export failed
    ├── Stopped                 exit code 75: ended on request; --resume continues
    └── InputError              exit code 2: something the user gave is wrong
        ├── RecipeError         the recipe or the command line
        ├── DataError           the data
        ├── ModelError          the model, its tokenizer, or an adapter
        ├── OutputError         the output directory
        └── MissingExtraError   an optional package is not installed

Each is also a standard type, so that code which uses sft-recipes as a library can catch what it knows.
"""

from collections.abc import Sequence
from typing import Any

_MOST = 2000  # characters of a line; what stands in the middle of a longer one is the user's own


def one_line(text: str) -> str:
    """A line as it can be shown, whatever a key or a file is called: without line breaks, control characters and such."""
    if not text.isprintable():
        shown = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        text = "".join(shown)
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"


def shown(value: Any) -> str:
    """A value of a recipe or a row in a few words."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class SFTRecipeError(Exception):
    """One problem a line; `lines` holds them apart."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        self.lines: Sequence[str] = tuple(map(one_line, lines))
        super().__init__("\n".join(self.lines))


class RunError(SFTRecipeError, RuntimeError):
    """Training, evaluation or export failed after it had begun."""


class Stopped(SFTRecipeError, RuntimeError):
    """The run was ended on request, and can be continued. 75 is EX_TEMPFAIL of sysexits.h: try again."""

    exit_code = 75

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines  # a command is of use only whole
        self.args = ("\n".join(lines),)


class InputError(SFTRecipeError, ValueError):
    """Something the user gave is wrong; nothing has been written."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe or the command line is wrong."""


class DataError(InputError):
    """A data file or a row in it is wrong."""


class ModelError(InputError):
    """The model, its tokenizer or an adapter cannot be used."""


class OutputError(InputError, FileExistsError):
    """The output directory is in use, cannot be written, or has no room."""


class MissingExtraError(InputError, ImportError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


def missing_extra(what: str, extra: str) -> MissingExtraError:
    """The error for `what` (a key and its value) that needs the extra `extra`."""
    return MissingExtraError(f"{what} needs a package that is not installed: pip install 'sft-recipes[{extra}]'")

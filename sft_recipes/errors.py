"""Errors that the command line prints as lines instead of a traceback.

    SFTRecipeError              exit code 1
    ├── RunError                training or export failed
    ├── Stopped                 exit code 75: stopped on request; --resume continues
    └── InputError              exit code 2: wrong input
        ├── RecipeError         the recipe or the command line
        ├── DataError           the data
        ├── ModelError          the model, its tokenizer, or an adapter
        └── OutputError         the output directory

Each also derives from a standard exception, for code that uses sft-recipes as a library.
"""

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

_MOST_QUOTED = 400  # characters of a library's error
_MOST = 2000  # characters per line; longer ones quote long user input and are shortened in the middle


def one_line(text: str) -> str:
    """Escape line breaks and non-printable characters, which names of keys and files may contain; limit the length."""
    if not text.isprintable():
        shown = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        text = "".join(shown)
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"


def shown(value: Any) -> str:
    """Format a value of a recipe or a row in at most 60 characters."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def reason_of(error: BaseException) -> str:
    """Format a library's error on one line, without a final period; its type if it says nothing."""
    if isinstance(error, UnpicklingError):  # torch's own message advises to load the file anyway
        return (
            "a file of the checkpoint is damaged or contains more than tensors and numbers. It was not loaded, because it "
            "could run code. Remove that checkpoint to continue from the one before it"
        )
    return " ".join(str(error).split())[:_MOST_QUOTED].rstrip(".") or type(error).__name__


class SFTRecipeError(Exception):
    """Base class; `lines` has one problem per line."""

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        self.lines: Sequence[str] = tuple(map(one_line, lines))
        super().__init__("\n".join(self.lines))


class RunError(SFTRecipeError, RuntimeError):
    """Training, evaluation or export failed."""


class Stopped(SFTRecipeError, RuntimeError):
    """The run was stopped on request and can be resumed. 75 is EX_TEMPFAIL of sysexits.h: try again."""

    exit_code = 75

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines  # not shortened, so that the command can be copied
        self.args = ("\n".join(lines),)


class InputError(SFTRecipeError, ValueError):
    """Wrong input from the user; nothing has been written."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe or the command line is wrong."""


class DataError(InputError):
    """A data file or a row in it is wrong."""


class ModelError(InputError):
    """The model, its tokenizer or an adapter cannot be used."""


class OutputError(InputError, FileExistsError):
    """The output directory is in use, not writable, or on a full disk."""

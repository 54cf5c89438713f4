"""Chat templates that recipes select by name, for base models: the .jinja files of this package, and their tokens."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken

_FILES = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.jinja"))}
NAMES = tuple(_FILES)


def source(name: str) -> str:
    """Return the template (Jinja)."""
    return _FILES[name].read_text(encoding="utf-8")


def tokens(name: str) -> list[str]:
    """Return the special tokens that the template writes, which its first comment lists; [] for other templates."""
    listed = re.match(r"\{#-[^#]*Tokens: ([^#]*) #\}", source(name)) if name in _FILES else None
    return listed[1].split() if listed else []


def to_add(new_tokens: Iterable[str]) -> "list[AddedToken]":
    """Convert `model.new_tokens` for a tokenizer: those of a chat template of this package are special."""
    from tokenizers import AddedToken

    special = {token for name in NAMES for token in tokens(name)}
    return [AddedToken(token, special=token in special, normalized=token not in special) for token in new_tokens]

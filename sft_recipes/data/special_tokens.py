"""Text of rows that looks like a special token: find it, and encode it as the token if data.special_tokens is parse."""

import re

from sft_recipes.data.formats.base import Example
from sft_recipes.data.templates import Rendered, Template

# Marks of common chat templates, which rows may contain although the tokenizer has no such token.
_MARKS = r"<\|[^\s|<>]{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]|</s>\s*\Z"


class Finder:
    """Finds the first special token written as text in a row.

    Args:
        known: Texts that the tokenizer parses as special tokens.
        parsed: They are parsed, so only others are found.
    """

    def __init__(self, known: list[str], *, parsed: bool) -> None:
        tokens = sorted(map(re.escape, known), key=len, reverse=True)
        self._pattern = re.compile("|".join([*tokens, _MARKS]))
        self._begins = {token[0] for token in known} | {"<", "["}
        self._skipped = set(known) if parsed else set()

    def find(self, example: Example) -> tuple[str, bool] | None:
        """Return the token, and whether the row ends with one; None if there is none."""
        *before, last = [message["content"] for message in example.messages] or [example.text]
        if not any(begin in text for text in (*before, last) for begin in self._begins):
            return None
        found = [self._in(text) for text in (*before, last)]
        first = next((text[0][1] for text in found if text), None)
        if first is None:
            return None
        end, token = found[-1][-1] if found[-1] else (-1, "")
        return (token, True) if end == len(last.rstrip()) else (first, False)

    def _in(self, text: str) -> list[tuple[int, str]]:
        matches = (
            (match.start() + len(match[0].rstrip()), match[0].rstrip()) for match in self._pattern.finditer(text)
        )
        return [(end, token) for end, token in matches if token not in self._skipped]


def parsed(render: Template, bos: str) -> Template:
    """Make a template that writes no special tokens one whose text is parsed, so that it has to begin with BOS (or "")."""

    def with_parsing(example: Example) -> Rendered:
        rendered = render(example)
        if rendered.writes_specials:
            return rendered
        by = 0 if rendered.text.startswith(bos) else len(bos)
        rendered.text = bos[:by] + rendered.text
        rendered.trained = [(start + by if start else 0, end + by) for start, end in rendered.trained]
        rendered.writes_specials = True
        return rendered

    return with_parsing

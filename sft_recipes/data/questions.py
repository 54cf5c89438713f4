"""The prompts of eval.generate, and what is expected of their answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sft_recipes.data import formats, reading, sources
from sft_recipes.errors import DataError, shown
from sft_recipes.recipe.schema import Data, Prompt, Recipe


@dataclass(frozen=True)
class Question:
    """Messages up to the answer, and the right answer where it is known."""

    messages: list[dict[str, Any]]
    expected: str | None

    @property
    def text(self) -> str:
        """What is asked last, for a table."""
        last = self.messages[-1]
        return "\n".join(filter(None, [last["content"], last.get("input")]))


def questions(recipe: Recipe) -> list[Question]:
    """`eval.generate`, written in the recipe or read from a file. Its rows are as those of the data, of which the answer is
    what is expected, or have `prompt`, and `input` and `expected` where they are known, as prompts in a recipe have.

    Raises DataError with a line for each of the first rows that are neither.
    """
    wanted = recipe.eval.generate
    if not isinstance(wanted, str):
        return [_of_prompt(Prompt(prompt=each) if isinstance(each, str) else each) for each in wanted]
    found, problems = list[Question](), list[str]()
    for row in sources.read(wanted):
        try:
            found += _of_row(row, recipe.data)
        except DataError as error:
            problems += error.lines
    reading.raise_all(problems)
    if not found:
        raise DataError(f"{wanted}: no rows")
    return found


def _of_prompt(prompt: Prompt) -> Question:
    return Question([{"role": "user", "content": prompt.prompt, "input": prompt.input}], prompt.expected)


def _of_row(row: sources.Row | DataError, data: Data) -> Iterator[Question]:
    if isinstance(row, DataError):
        raise row
    format = formats.find_format(row.values, data.columns) or data.format
    if "prompt" in row.values and format != "prompt_completion":
        yield _of_prompt(_prompt(row))
        return
    if format is None:
        raise DataError(formats.unknown(row.values, data.columns, row.place))
    messages = formats.to_example(row.values, format, data.columns, row.place).messages
    if not messages:
        raise DataError(f"{row.place}: eval.generate needs prompts, and this is plain text; expected a column 'prompt'")
    answered = messages[-1]["role"] == "assistant"
    asked, answer = (messages[:-1], messages[-1]["content"]) if answered else (messages, "")
    if not asked:
        raise DataError(f"{row.place}: eval.generate needs a prompt before the answer")
    yield Question(asked, answer if answer.strip() else None)


def _prompt(row: sources.Row) -> Prompt:
    """A row written as a prompt in a recipe; null is left out, as tables have it where other rows have a value."""
    values = {name: value for name, value in row.values.items() if value is not None}
    for name, value in values.items():
        if name not in Prompt.model_fields:
            raise DataError(f"{row.place}: a prompt has no '{name}'; expected {', '.join(Prompt.model_fields)}")
        if not isinstance(value, str):
            raise DataError(f"{row.place}: '{name}' must be text, got {shown(value)}")
    return Prompt(**values)

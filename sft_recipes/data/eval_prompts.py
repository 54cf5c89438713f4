"""Load the prompts of eval.generate and their expected answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sft_recipes.data import readers, sources
from sft_recipes.data.formats import registry as formats
from sft_recipes.data.parsers import SourceRow
from sft_recipes.errors import DataError, shown
from sft_recipes.recipe.schema import Data, Prompt, Recipe


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt as messages, and the expected answer if known."""

    messages: list[dict[str, Any]]
    expected: str | None
    tools: list[Any] | None = None  # functions that the answer may call

    @property
    def text(self) -> str:
        """Return the last message as text, for tables."""
        last = self.messages[-1]
        return "\n".join(filter(None, [last["content"], last.get("input")]))


def eval_prompts(recipe: Recipe) -> list[EvalPrompt]:
    """Load `eval.generate` from the recipe or from a file.

    Rows of a file have a format of the training data, whose answer is the expected one, or the columns of a prompt in a
    recipe: `prompt`, optionally `input` and `expected`. Raises DataError with one line for each of the first invalid rows.
    """
    generate = recipe.eval.generate
    if isinstance(generate, str):
        loaded = _of_file(generate, recipe.data)
    else:
        loaded = [_of_prompt(Prompt(prompt=prompt) if isinstance(prompt, str) else prompt) for prompt in generate]
    for prompt in loaded:
        readers.join_input(prompt.messages, recipe.data.input_separator)
    return loaded


def _of_file(generate: str, data: Data) -> list[EvalPrompt]:
    loaded, problems = list[EvalPrompt](), readers.Problems()
    for row in sources.iter_rows(generate):
        problems.rows += 1
        try:
            loaded += _of_row(row, data)
        except DataError as error:
            problems.add(error)
    readers.raise_all(problems.lines())
    if not loaded:
        raise DataError(f"{generate}: the source contains no rows.")
    return loaded


def _of_prompt(prompt: Prompt) -> EvalPrompt:
    return EvalPrompt([{"role": "user", "content": prompt.prompt, "input": prompt.input}], prompt.expected)


def _of_row(row: SourceRow | DataError, data: Data) -> Iterator[EvalPrompt]:
    if isinstance(row, DataError):
        raise row
    try:
        format = formats.find_format(row.values, data.columns, row.place) or data.format
    except DataError:  # columns of several formats
        if data.format is None:
            raise
        format = data.format
    if "prompt" in row.values and format != "prompt_completion":
        yield _of_prompt(_prompt(row))
        return
    if format is None:
        raise DataError(formats.unknown(row.values, data.columns, row.place))
    example = formats.to_example(row.values, format, data.columns, row.place)
    messages = example.messages
    if not messages:
        raise DataError(f"{row.place}: eval.generate needs prompts (got plain text). Add a column 'prompt'.")
    answered = messages[-1]["role"] == "assistant"
    prompt, answer = (messages[:-1], messages[-1]["content"]) if answered else (messages, "")
    if not prompt:
        raise DataError(f"{row.place}: eval.generate needs a prompt before the answer. Add a user message.")
    yield EvalPrompt(prompt, answer if answer.strip() else None, example.tools)


def _prompt(row: SourceRow) -> Prompt:
    """Convert a row with the columns of a prompt in a recipe; nulls, which tables contain, are ignored."""
    values = {name: value for name, value in row.values.items() if value is not None}
    for name, value in values.items():
        if name not in Prompt.model_fields:
            raise DataError(f"{row.place}: unknown column '{name}' (expected {', '.join(Prompt.model_fields)}).")
        if not isinstance(value, str):
            raise DataError(f"{row.place}: '{name}' must be text (got {shown(value)}).")
    return Prompt(**values)

from sft_recipes.data.formats import messages
from sft_recipes.data.formats.base import SYSTEM, TOOLS, Example, Format, Row, tools, with_system


def convert(row: Row) -> Example:
    if isinstance(row.require("prompt"), list) or isinstance(row.require("completion"), list):
        (before, flags), (answer, of_answer) = (messages.read(row, name) for name in ("prompt", "completion"))
        # All answers of a completion are trained, as in TRL, not only the last.
        answers = sum(message["role"] == "assistant" for message in answer)
        if answers > 1:
            of_answer = [
                True if flag is None and message["role"] == "assistant" else flag
                for message, flag in zip(answer, of_answer, strict=True)
            ]
        return messages.conversation(row, [*before, *answer], [*flags, *of_answer])
    turns = [{"role": "user", "content": row.text("prompt")}, {"role": "assistant", "content": row.text("completion")}]
    listed = tools(row)
    return Example(row.place, with_system(row, turns), tools=listed, chat=bool(listed))


FORMAT = Format(
    name="prompt_completion",
    about="A prompt and its answer: text, or lists of messages (TRL). Rows with `label: false` (KTO) are an error.",
    required=("prompt", "completion"),
    optional=(SYSTEM, TOOLS),
    also={"completion": ("response",)},
    convert=convert,
)

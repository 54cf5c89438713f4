from sft_recipes.data.formats.alpaca import instruction
from sft_recipes.data.formats.base import SYSTEM, Format

FORMAT = Format(
    name="dolly",
    about="As `alpaca`, with the columns of Dolly 15k.",
    required=("instruction", "response"),
    optional=("context", SYSTEM),
    convert=lambda row: instruction(row, "context", "response"),
)

from sft_recipes.data.formats.base import Example, Format

FORMAT = Format(
    name="text",
    about="Plain text, of which every token is trained.",
    required=("text",),
    convert=lambda row: Example(row.place, text=row.text("text")),
    last=True,  # datasets of other formats often have a rendered text, too
)

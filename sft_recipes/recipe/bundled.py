"""The recipes that ship with the project, and what their headers say of them.

A header is a comment: its first line is the purpose, and then come lines of a name, a colon and a text, which may go on in
lines that are indented.

    # Full fine-tuning of ... .
    #
    # Method:   full
    # Model:    meta-llama/Llama-3.1-8B
"""

import os
import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe import editor_schema


@dataclass(frozen=True)
class Shipped:
    """What a header says. `memory` is what `sft-recipe plan` predicts of a GPU, `result` what was measured."""

    name: str
    purpose: str
    method: str
    model: str
    hardware: str
    memory: str
    launch: str
    result: str
    needs: str = ""


FIELDS = ("method", "model", "hardware", "memory", "needs", "launch", "result")  # in the order of a header


def folder() -> Path:
    """Where they are: in the wheel inside the package, in a checkout beside it."""
    inside = Path(str(resources.files("sft_recipes"))) / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def recipes() -> list[Shipped]:
    """All of them, by name."""
    return [of_header(file.stem, file.read_text(encoding="utf-8")) for file in sorted(folder().glob("*.yaml"))]


def of_header(name: str, text: str) -> Shipped:
    """What a recipe's text says of itself. Raises ValueError where a field is missing, unknown or given twice."""
    lines = re.match(r"(#.*\n)*", text)[0].splitlines()  # type: ignore[index]  # which always matches
    purpose, fields, last = lines[0].lstrip("# ") if lines else "", dict[str, str](), ""
    for line in lines[1:]:
        if said := re.fullmatch(r"# ([A-Z][a-z]+): +(.+)", line):
            last = said[1].lower()
            if last not in FIELDS or last in fields:
                raise ValueError(f"{name}: '{said[1]}' is given twice, or is none of {', '.join(FIELDS)}")
            fields[last] = said[2]
        elif last and line.startswith("#  "):
            fields[last] += f" {line.lstrip('# ')}"
    if missing := [field for field in FIELDS if field not in fields and field != "needs"]:
        raise ValueError(f"{name}: its header lacks {', '.join(missing)}")
    return Shipped(name, purpose, **fields)


def copy(name: str, out: Path | None = None) -> Path:
    """Copy a recipe with its comments to `out` (NAME.yaml), which must not exist yet, and name the copy in its header.

    Where a schema for editors is beside it or above, the copy begins with the line that leads to it. Raises RecipeError or
    OutputError.
    """
    name = name.removesuffix(".yaml")
    file = folder() / f"{name}.yaml"
    if not file.is_file():
        raise RecipeError(f"no recipe '{name}' ships; there are {', '.join(each.name for each in recipes())}")
    out = out or Path(f"{name}.yaml")
    text = file.read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", shlex.quote(os.fspath(out)))
    return write_new(out, editor_schema.line_for(out) + text)


def write_new(out: Path, text: str) -> Path:
    """Write a file for the user to edit, which must not exist yet. Raises RecipeError or OutputError."""
    try:
        if out.exists():
            raise RecipeError(f"{out} exists; choose another name with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; choose another name with --out") from None
    return out

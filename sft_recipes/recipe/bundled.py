"""List and copy the bundled recipes.

The header of a recipe is a comment: the first line is its purpose; the fields follow as `Name: text`, continued in indented
lines.

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
class BundledRecipe:
    """Fields of a recipe's header. `memory` is predicted by `sft-recipe plan`; `result` is measured."""

    name: str
    purpose: str
    method: str
    model: str
    hardware: str
    memory: str
    launch: str
    result: str
    needs: str = ""


FIELDS = ("method", "model", "hardware", "memory", "needs", "launch", "result")  # in the order of the header


def folder() -> Path:
    """Return the directory of the recipes: inside the package in a wheel, next to it in a checkout."""
    inside = Path(str(resources.files("sft_recipes"))) / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def recipes() -> list[BundledRecipe]:
    """Return all bundled recipes, sorted by name."""
    return [parse_header(file.stem, file.read_text(encoding="utf-8")) for file in sorted(folder().glob("*.yaml"))]


def parse_header(name: str, text: str) -> BundledRecipe:
    """Parse the header of a recipe. Raises ValueError if a field is missing, unknown or duplicate."""
    lines = re.match(r"(#.*\n)*", text)[0].splitlines()  # type: ignore[index]  # always matches
    purpose, fields, last = lines[0].lstrip("# ") if lines else "", dict[str, str](), ""
    for line in lines[1:]:
        if match := re.fullmatch(r"# ([A-Z][a-z]+): +(.+)", line):
            last = match[1].lower()
            if last not in FIELDS or last in fields:
                raise ValueError(f"{name}: '{match[1]}' is duplicate or not one of {', '.join(FIELDS)}")
            fields[last] = match[2]
        elif last and line.startswith("#  "):
            fields[last] += f" {line.lstrip('# ')}"
    if missing := [field for field in FIELDS if field not in fields and field != "needs"]:
        raise ValueError(f"{name}: missing in the header: {', '.join(missing)}")
    return BundledRecipe(name, purpose, **fields)


def copy(name: str, out: Path | None = None) -> Path:
    """Copy a recipe to `out` (default: NAME.yaml), which must not exist, and replace its path in the header.

    If the directory or a parent has a schema for editors, the copy begins with the comment that refers to it. Raises
    RecipeError or OutputError.
    """
    name = name.removesuffix(".yaml")
    file = folder() / f"{name}.yaml"
    if not file.is_file():
        raise RecipeError(f"unknown recipe '{name}'. Choose one of {', '.join(each.name for each in recipes())}.")
    out = out or Path(f"{name}.yaml")
    text = file.read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", shlex.quote(os.fspath(out)))
    return write_new(out, editor_schema.line_for(out) + text)


def write_new(out: Path, text: str) -> Path:
    """Write a new file for the user to edit. Raises RecipeError if it exists, or OutputError."""
    try:
        if out.exists():
            raise RecipeError(f"{out}: already exists. Choose another name with --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}. Choose another name with --out.") from None
    return out

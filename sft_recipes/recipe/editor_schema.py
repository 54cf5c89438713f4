"""The recipe's JSON schema, and the line of a recipe by which editors find it.

The YAML language server (in VS Code the extension redhat.vscode-yaml; Neovim, Helix, Zed and others have it too) reads a path
in that line as relative to the recipe.
"""

import json
import os
from pathlib import Path

from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe.schema import Recipe

FILE = ".sft-recipe.schema.json"  # the name by which `sft-recipe new` finds it
_TITLE = "sft-recipes recipe"


def schema() -> str:
    """The JSON schema, as text."""
    return json.dumps(Recipe.model_json_schema() | {"title": _TITLE}, indent=2)


def write(out: Path) -> Path:
    """Write the schema; only one of an earlier version is replaced. Raises RecipeError or OutputError."""
    try:
        if out.exists() and not _is_ours(out):
            raise RecipeError(f"{out} exists, and is no schema of a recipe; choose another name with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(schema() + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; choose another name with --out") from None
    return out


def line_for(recipe: Path) -> str:
    """The first line of a recipe that is to be at that path, with its newline; "" where no schema is beside it or above."""
    place = Path(os.path.abspath(recipe)).parent  # noqa: PTH100  # without following links, as editors do
    found = next((above / FILE for above in (place, *place.parents) if (above / FILE).is_file()), None)
    return f"{line(Path(os.path.relpath(found, place)))}\n" if found else ""


def line(path: Path) -> str:
    """The line that leads to a schema."""
    return f"# yaml-language-server: $schema={path.as_posix()}"


def _is_ours(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["title"] == _TITLE)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False

"""Write the JSON schema that editors use for completion.

The YAML language server (in VS Code the extension redhat.vscode-yaml; also in Neovim, Helix, Zed and others) finds the
schema by a comment in the recipe, with a path relative to the recipe.
"""

import json
import os
from pathlib import Path

from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.recipe.schema import Recipe

FILE = ".sft-recipe.schema.json"  # `sft-recipe new` looks for this name
_TITLE = "sft-recipes recipe"


def schema() -> str:
    """Return the JSON schema as text."""
    return json.dumps(Recipe.model_json_schema() | {"title": _TITLE}, indent=2)


def write(out: Path) -> Path:
    """Write the schema, replacing only an earlier version of it. Raises RecipeError or OutputError."""
    try:
        if out.exists() and not _is_ours(out):
            raise RecipeError(f"{out}: already exists and is not a recipe schema. Choose another name with --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(schema() + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}. Choose another name with --out.") from None
    return out


def line_for(recipe: Path) -> str:
    """Return the schema comment for a recipe at that path, "" if neither its directory nor a parent has a schema."""
    folder = Path(os.path.abspath(recipe)).parent  # noqa: PTH100  # editors do not follow links
    file = next((parent / FILE for parent in (folder, *folder.parents) if (parent / FILE).is_file()), None)
    return f"{line(Path(os.path.relpath(file, folder)))}\n" if file else ""


def line(path: Path) -> str:
    """Return the comment by which editors find the schema at `path`."""
    return f"# yaml-language-server: $schema={path.as_posix()}"


def _is_ours(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["title"] == _TITLE)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False

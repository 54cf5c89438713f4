"""The recipes that ship with the project."""

from importlib import resources
from pathlib import Path

from sft_recipes.errors import OutputError, RecipeError


def folder() -> Path:
    """Where they are: in the wheel inside the package, in a checkout beside it."""
    inside = Path(str(resources.files("sft_recipes"))) / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def recipes() -> list[tuple[str, str]]:
    """Name and purpose (the file's first line) of each."""
    return [
        (file.stem, file.read_text(encoding="utf-8").split("\n")[0].lstrip("# "))
        for file in sorted(folder().glob("*.yaml"))
    ]


def copy(name: str, out: Path) -> Path:
    """Copy a recipe with its comments to `out`, which must not exist yet."""
    file = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not file.is_file():
        raise RecipeError(f"no recipe '{name}' ships; there are {', '.join(known for known, _ in recipes())}")
    return write_new(out, file.read_text(encoding="utf-8"))


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

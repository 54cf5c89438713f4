"""The house: imports go one way, importing a room opens no other, and nothing below the command line needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sft_recipes"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Who may import whom: a room, and those below it.
BELOW = {
    "__init__": {"data"},
    "errors": set(),
    "files": {"errors"},
    "stopping": {"errors"},
    "recipe": {"errors"},
    "convert": {"recipe", "errors"},
    "builtin": {"data", "export", "recipe", "errors"},
    "data": {"recipe", "errors"},
    "planning": {"recipe", "errors"},
    "report": {"recipe", "errors", "files", "stopping"},
    "export": {"data", "recipe", "errors", "files"},
    "scale": {"recipe", "errors"},
    "training": {"planning", "data", "recipe", "errors", "files", "stopping"},
    "run_folder": {"recipe", "errors", "files"},
    "checks": {"planning", "data", "recipe", "errors", "run_folder"},
    "run": {
        "training",
        "export",
        "report",
        "planning",
        "data",
        "recipe",
        "errors",
        "run_folder",
        "scale",
        "several",
        "stopping",
    },
    "several": {"checks", "run_folder", "scale", "data", "recipe", "errors"},
    "plan": {"training", "planning", "data", "recipe", "errors"},
    "talk": {"training", "export", "recipe", "errors"},
    "doctor": {"data", "recipe", "errors"},
    "cli": {
        "run",
        "several",
        "scale",
        "talk",
        "plan",
        "checks",
        "doctor",
        "training",
        "export",
        "report",
        "recipe",
        "convert",
        "errors",
        "stopping",
    },
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_there_are_modules() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("sft_recipes.")}

    assert ours - {room(file), "__version__"} <= BELOW.get(room(file), set())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*/__init__.py")), ids=lambda file: file.parent.name)
def test_packages_open_no_room(file: Path) -> None:
    assert file.read_text("utf-8") == ""


def test_only_the_trainer_its_loss_and_what_predicts_them_import_trl() -> None:
    users = [
        file.relative_to(PACKAGE).as_posix() for file in MODULES if any(n.split(".")[0] == "trl" for n in imports(file))
    ]

    assert users == ["training/footprint.py", "training/head.py", "training/stand_ins.py", "training/trainer.py"]


@pytest.mark.parametrize(
    "rooms",
    [
        [
            "errors.py",
            "files.py",
            "stopping.py",
            "recipe",
            "convert",
            "data",
            "planning",
            "report",
            "scale",
            "checks.py",
            "several.py",
            "doctor.py",
            "cli.py",
            "run_folder.py",
        ]
    ],
)
def test_rooms_without_torch(rooms: list[str]) -> None:
    """Every module of these rooms, imported together."""
    files = [
        file
        for file in MODULES
        if file.relative_to(PACKAGE).parts[0] in rooms and file.stem not in ("__init__", "classic")
    ]
    names = [".".join(("sft_recipes", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    code = f"import sys\nfor name in {names!r}: __import__(name)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"

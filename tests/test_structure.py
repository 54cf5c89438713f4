"""Code layout: imports go one way, packages import nothing by themselves, and the torch-free part stays torch-free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sft_recipes"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What each package or top-level module may import.
BELOW = {
    "__init__": {"data"},
    "errors": set(),
    "atomic_files": {"errors"},
    "stopping": {"errors"},
    "recipe": {"errors"},
    "console": {"report", "recipe", "errors", "stopping"},
    "convert": {"recipe", "errors"},
    "builtin": {"data", "export", "recipe", "errors"},
    "data": {"recipe", "errors"},
    "planning": {"recipe", "errors"},
    "report": {"recipe", "errors", "atomic_files", "stopping"},
    "export": {"data", "recipe", "errors", "atomic_files"},
    "distributed": {"recipe", "errors"},
    "training": {"planning", "data", "recipe", "errors", "atomic_files", "stopping"},
    "run_dir": {"recipe", "errors", "atomic_files"},
    "commands/check": {"planning", "data", "recipe", "errors", "run_dir"},
    "commands/plan": {"training", "planning", "data", "recipe", "errors"},
    "commands/generate": {"training", "export", "recipe", "errors"},
    "commands/doctor": {"data", "recipe", "errors"},
    "run_distributed": {"commands", "run_dir", "distributed", "data", "recipe", "errors"},
    "run": {
        "console",
        "training",
        "export",
        "report",
        "planning",
        "data",
        "recipe",
        "errors",
        "run_dir",
        "distributed",
        "run_distributed",
        "stopping",
    },
    "cli": {
        "run",
        "run_distributed",
        "distributed",
        "commands",
        "console",
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


def layer(file: Path) -> str:
    """Name of a package or module at the top; each command is a layer of its own."""
    first, *others = file.relative_to(PACKAGE).with_suffix("").parts
    return f"{first}/{others[0]}" if first == "commands" and others != ["__init__"] else first


def test_there_are_modules() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("sft_recipes.")}

    assert ours - {layer(file), "__version__"} <= BELOW.get(layer(file), set())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*/__init__.py")), ids=lambda file: file.parent.name)
def test_packages_import_nothing_by_themselves(file: Path) -> None:
    assert file.read_text("utf-8") == ""


def test_only_the_trainer_its_loss_and_what_predicts_them_import_trl() -> None:
    users = [
        file.relative_to(PACKAGE).as_posix() for file in MODULES if any(n.split(".")[0] == "trl" for n in imports(file))
    ]

    assert users == [
        "training/cpu_loss.py",
        "training/fake_kernels.py",
        "training/memory_trace.py",
        "training/trainer.py",
    ]


TORCH_FREE = [
    "errors.py",
    "atomic_files.py",
    "stopping.py",
    "recipe",
    "convert",
    "data",
    "planning",
    "report",
    "distributed",
    "console.py",
    "commands/check.py",
    "commands/doctor.py",
    "run_distributed.py",
    "cli.py",
    "run_dir.py",
]


def test_modules_without_torch() -> None:
    """All of them imported in one process."""
    files = [
        file
        for part in TORCH_FREE
        for file in ([PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).glob("*.py")))
        if file.stem not in ("__init__", "packed_dataset")
    ]
    names = [".".join(("sft_recipes", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    code = f"import sys\nfor name in {names!r}: __import__(name)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert len(names) > 50
    assert done.stdout.strip() == "[]"

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
    "upstream": set(),
    "model_dir": {"errors", "upstream"},
    "recipe": {"errors", "model_dir"},
    "console": {"errors", "recipe", "report", "stopping"},
    "convert": {"errors", "recipe"},
    "builtin": {"data", "errors", "export", "recipe"},
    "data": {"errors", "model_dir", "recipe"},
    "planning": {"errors", "recipe"},
    "models": {"data", "errors", "model_dir", "recipe", "upstream"},
    "memory": {"data", "errors", "model_dir", "models", "planning", "recipe", "upstream"},
    "report": {"atomic_files", "errors", "recipe", "stopping"},
    "export": {"atomic_files", "data", "errors", "model_dir", "recipe", "upstream"},
    "distributed": {"errors", "model_dir", "recipe", "upstream"},
    "training": {
        "atomic_files",
        "data",
        "errors",
        "memory",
        "model_dir",
        "models",
        "planning",
        "recipe",
        "stopping",
        "upstream",
    },
    "run_dir": {"atomic_files", "errors", "recipe"},
    "commands/check": {"data", "errors", "memory", "model_dir", "planning", "recipe", "run_dir"},
    "commands/plan": {"data", "errors", "memory", "model_dir", "models", "planning", "recipe"},
    "commands/generate": {"errors", "export", "model_dir", "models", "recipe"},
    "commands/doctor": {"data", "errors", "recipe"},
    "run_distributed": {"commands", "data", "distributed", "errors", "recipe", "run_dir"},
    "run": {
        "console",
        "data",
        "distributed",
        "errors",
        "export",
        "memory",
        "models",
        "planning",
        "recipe",
        "report",
        "run_dir",
        "run_distributed",
        "stopping",
        "training",
    },
    "cli": {
        "commands",
        "console",
        "convert",
        "distributed",
        "errors",
        "export",
        "model_dir",
        "models",
        "recipe",
        "report",
        "run",
        "run_distributed",
        "stopping",
        "training",
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


def test_only_the_trainer_and_its_loss_import_trl() -> None:
    users = [
        file.relative_to(PACKAGE).as_posix() for file in MODULES if any(n.split(".")[0] == "trl" for n in imports(file))
    ]

    assert users == ["models/cpu_loss.py", "training/trainer.py"]


TORCH_FREE = [
    "errors.py",
    "atomic_files.py",
    "stopping.py",
    "recipe",
    "convert",
    "data",
    "planning",
    "memory/prediction.py",
    "memory/per_rank_memory.py",
    "memory/optimizer_states.py",
    "memory/host_memory.py",
    "memory/remedies.py",
    "model_dir.py",
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

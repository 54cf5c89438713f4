"""Code layout: imports go one way, packages import nothing by themselves, and the torch-free part stays torch-free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sft_recipes import run_dir

PACKAGE = Path(__file__).parent.parent / "sft_recipes"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What each package or top-level module may import.
BELOW = {
    "__init__": {"data"},
    "errors": set(),
    "atomic_files": {"errors"},
    "stopping": {"errors"},
    "upstream": set(),
    "run_dir": {"atomic_files", "errors"},
    "model_dir": {"errors", "run_dir", "upstream"},
    "trackers": {"atomic_files", "run_dir", "upstream"},
    "data/chat_templates": set(),
    "data/formats": {"errors"},
    "recipe": {"data/chat_templates", "data/formats", "errors", "model_dir", "trackers"},
    "console": {"errors", "report", "run_dir"},
    "convert": {"errors", "recipe"},
    "data": {"data/chat_templates", "data/formats", "errors", "model_dir", "recipe"},
    "planning": {"errors", "recipe", "run_dir"},
    "models": {"data", "data/chat_templates", "errors", "model_dir", "recipe", "upstream"},
    "memory": {"errors", "model_dir", "models", "planning", "recipe", "run_dir", "upstream"},
    "report": {"atomic_files", "errors", "recipe", "run_dir", "stopping"},
    "export": {"atomic_files", "data", "errors", "model_dir", "recipe", "run_dir", "upstream"},
    "distributed": {"data", "errors", "model_dir", "recipe", "trackers", "upstream"},
    "training": {
        "atomic_files",
        "data",
        "errors",
        "memory",
        "model_dir",
        "models",
        "planning",
        "recipe",
        "run_dir",
        "stopping",
        "trackers",
        "upstream",
    },
    "run_metadata": {"atomic_files", "errors", "recipe", "run_dir"},
    "commands/check": {
        "data",
        "errors",
        "memory",
        "model_dir",
        "models",
        "planning",
        "recipe",
        "run_dir",
    },
    "commands/plan": {"data", "errors", "memory", "model_dir", "models", "planning", "recipe"},
    "commands/generate": {"errors", "export", "model_dir", "models", "run_dir"},
    "commands/doctor": {"data", "errors", "memory", "recipe"},
    "run_distributed": {"commands", "data", "distributed", "errors", "recipe", "run_dir", "run_metadata"},
    "run": {
        "console",
        "data",
        "distributed",
        "export",
        "memory",
        "models",
        "recipe",
        "report",
        "run_dir",
        "run_distributed",
        "run_metadata",
        "stopping",
        "training",
    },
    "cli": {
        "commands",
        "convert",
        "distributed",
        "errors",
        "export",
        "model_dir",
        "recipe",
        "report",
        "run",
        "run_distributed",
        "stopping",
    },
}
FILES = {name for key, name in vars(run_dir).items() if key.isupper() and isinstance(name, str)}
DECLARATIONS = ("data/chat_templates", "data/formats")  # layers below the recipe, whose schema derives from them
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
    """Name of a package or module at the top; each command, and what declares itself, is a layer of its own."""
    first, *others = file.relative_to(PACKAGE).with_suffix("").parts
    inner = f"{first}/{others[0]}" if others else first
    return inner if inner in DECLARATIONS or (first == "commands" and others != ["__init__"]) else first


def test_there_are_modules() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    names = [name.split(".") for name in imports(file) if name.startswith("sft_recipes.")]
    ours = {inner if (inner := "/".join(name[1:3])) in DECLARATIONS else name[1] for name in names}

    assert ours - {layer(file), "__version__"} <= BELOW.get(layer(file), set())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*/__init__.py")), ids=lambda file: file.parent.name)
def test_packages_import_nothing_by_themselves(file: Path) -> None:
    assert file.read_text("utf-8") == ""


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_run_dir_owns_the_names_of_its_files(file: Path) -> None:
    """A file's name is a constant of run_dir elsewhere; of the directories, model/ for one, in paths."""
    literals = {
        part.value
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        for part in ([node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else [node])
        if isinstance(part, ast.Constant) and (part is not node or "." in str(part.value))
    }

    assert file.stem == "run_dir" or not literals & FILES


def test_only_the_trainer_and_its_loss_import_trl() -> None:
    users = [
        file.relative_to(PACKAGE).as_posix() for file in MODULES if any(n.split(".")[0] == "trl" for n in imports(file))
    ]

    assert users == ["models/cpu_loss.py", "training/build.py", "training/trainer.py"]


TORCH_FREE = [
    "errors.py",
    "atomic_files.py",
    "stopping.py",
    "trackers",
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
    "run_metadata.py",
]


def test_modules_without_torch() -> None:
    """All of them imported in one process."""
    files = [
        file
        for part in TORCH_FREE
        for file in ([PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py")))
        if file.stem not in ("__init__", "packed_dataset")
    ]
    names = [".".join(("sft_recipes", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files]
    code = f"import sys\nfor name in {names!r}: __import__(name)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert len(names) > 50
    assert done.stdout.strip() == "[]"

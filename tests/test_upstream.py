"""Names of the libraries that are not public: they stand in `upstream.py` only, and each does what the package relies on."""

import ast
import importlib
import inspect
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sft_recipes"
MODULES = sorted(PACKAGE.rglob("*.py"))
STANDARD = {"os._exit"}  # documented


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")


def defined(tree: ast.AST) -> set[str]:
    """Names of functions, methods, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def used(tree: ast.AST) -> set[str]:
    """Private attributes that a module reads or writes, also by `getattr` and the like, and private modules and names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node) not in STANDARD:
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "patch.object"):
            names |= {each.value for each in node.args[1:2] if isinstance(each, ast.Constant) and private(each.value)}
        elif isinstance(node, ast.ImportFrom):
            names |= {part for part in (node.module or "").split(".") if private(part)}
            names |= {alias.name for alias in node.names if private(alias.name)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".") if private(part)}
    return names


def test_private_names_stand_in_upstream_only() -> None:
    trees = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text("utf-8")) for file in MODULES}
    ours = set().union(*(defined(tree) for name, tree in trees.items() if name != "upstream.py"))
    found = {name: sorted(used(tree) - ours) for name, tree in trees.items() if name != "upstream.py"}

    assert {name: names for name, names in found.items() if names} == {}


def test_no_private_method_of_a_library_is_overridden() -> None:
    overridden = set()
    for file in MODULES:
        if file.stem == "__main__" or file.name == "upstream.py":
            continue
        name = ".".join(("sft_recipes", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for kind in vars(importlib.import_module(name)).values():
            if isinstance(kind, type) and kind.__module__ == name:
                theirs = [base for base in kind.__mro__ if not base.__module__.startswith("sft_recipes")]
                overridden |= {
                    f"{name}.{kind.__name__}.{method}"
                    for method, value in vars(kind).items()
                    if private(method) and inspect.isfunction(value) and any(method in vars(base) for base in theirs)
                }

    assert overridden == set()


def test_nothing_is_patched() -> None:
    assert [file.name for file in MODULES if "unittest" in file.read_text("utf-8")] == []

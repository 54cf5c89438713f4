#!/usr/bin/env python3
"""Write the reference pages from the code: docs/recipe.md and docs/commands.md. A test holds them against it."""

import re
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from sft_recipes import cli
from sft_recipes.recipe.load import expectation, schema_of, section_class
from sft_recipes.recipe.schema import Recipe, WeightedSource

DOCS = Path(__file__).parent


def recipe_page() -> str:
    """Every field with its default, what it takes, and what it means."""
    lines = [
        "# The recipe",
        "",
        "Made from `sft_recipes/recipe/schema.py` by `docs/generate.py`.",
        "",
        "Only `model.name`, `data.train` and `output_dir` have to be given. A section's presence is its switch: no `lora:`",
        "means full fine-tuning, `lora: {}` adapters with the defaults. A key that does not exist, stands twice or",
        "contradicts another is an error. YAML is read as YAML 1.2: `1e-5` is a number, `no` and `off` are words.",
        "`sft-recipe run RECIPE --set key=value` replaces a key. Paths are relative to the working directory.",
        "`sft-recipe schema > recipe.schema.json` gives editors the same as a JSON schema.",
    ]
    top: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        section = section_class(field.annotation)
        if section is None:
            top[name] = field
            continue
        lines += ["", f"## {name}", "", *_doc(section), *_table(section.model_fields, (name,))]
        if name == "data":
            lines += [
                "",
                "### data.train as a list",
                "",
                *_doc(WeightedSource),
                *_table(WeightedSource.model_fields, ("data", "train", 0)),
            ]
    lines += ["", "## Besides the sections", "", *_table(top, ())]
    return "\n".join(lines) + "\n"


def _doc(section: type[BaseModel]) -> list[str]:
    return [(section.__doc__ or "").strip(), ""]


def _table(fields: dict[str, Any], path: tuple[str | int, ...]) -> list[str]:
    lines = ["| key | default | takes | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "*required*" if field.is_required() else f"`{_yaml(field.default)}`"
        takes = expectation(schema_of((*path, name)))
        meaning = " ".join((field.description or "").split())
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", default, takes, meaning)) + " |"
        )
    return lines


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands_page() -> str:
    """The help of every command."""
    lines = ["# The commands", "", "Made from `sft-recipe --help` by `docs/generate.py`.", ""]
    lines += [
        "Exit codes: 0 done; 1 the run failed; 2 the recipe, the data or the command line is wrong; 75 stopped on request,",
        "with a checkpoint from which `--resume` continues. Errors go to stderr, one line a problem; `--debug` shows the",
        "traceback.",
    ]
    group = typer.main.get_command(cli.app)
    context = group.make_context("sft-recipe", [], resilient_parsing=True)
    lines += ["", "```text", _help(group, context), "```"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        lines += ["", f"## sft-recipe {name}", "", "```text", _help(command, inner), "```"]
    return "\n".join(lines) + "\n"


def _help(command: Any, context: Any) -> str:
    context.terminal_width = context.max_content_width = 100
    return re.sub(r"[ \t]+$", "", command.get_help(context), flags=re.MULTILINE).strip()


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")

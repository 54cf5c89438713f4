#!/usr/bin/env python3
"""Write the reference pages from the code: PAGES. A test holds them against it."""

import inspect
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from sft_recipes import cli
from sft_recipes.convert.conversion import HEADINGS
from sft_recipes.convert.draft import FILL_IN
from sft_recipes.convert.rules import Table, names, table
from sft_recipes.data.formats.base import Format
from sft_recipes.data.formats.registry import FORMATS
from sft_recipes.recipe import editor_schema
from sft_recipes.recipe.parse import expectation, schema_of, section_class
from sft_recipes.recipe.schema import Recipe, WeightedSource
from sft_recipes.trackers.base import kinds

DOCS = Path(__file__).parent


def recipe_page() -> str:
    """Render every field with its default, type and description."""
    lines = [
        "# The recipe",
        "",
        "Generated from `sft_recipes/recipe/schema.py` by `docs/generate.py`.",
        "",
        "Only `model.name`, `data.train` and `output_dir` are required. The presence of a section enables it: without `lora:`",
        "a run is full fine-tuning, `lora: {}` trains adapters with the defaults. Unknown, duplicate and conflicting keys are",
        "errors. Recipes are YAML 1.2: `1e-5` is a number, `no` and `off` are text. `sft-recipe run RECIPE --set key=value`",
        "overrides a key. Paths are relative to the working directory.",
        "",
        "`sft-recipe schema --out .sft-recipe.schema.json` writes these keys as a JSON schema. Editors with the YAML language",
        "server (VS Code: the extension redhat.vscode-yaml) then complete and explain keys and mark errors in a recipe that",
        "begins with",
        "",
        "```yaml",
        editor_schema.line(Path(editor_schema.FILE)),
        "```",
        "",
        "`sft-recipe new` adds this line to copies in that directory and below. In VS Code, this setting covers all recipes",
        'of a workspace: `"yaml.schemas": {".sft-recipe.schema.json": "recipes/*.yaml"}`.',
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
                "",
                "### data.format",
                "",
                "The format is detected from the required columns. `data.columns` maps any of the columns to other names; the",
                "names in brackets are recognized without it. Columns that are not used are reported with the number of rows.",
                "",
                *_formats(),
            ]
    lines += ["", "## Top-level keys", "", *_table(top, ())]
    return "\n".join(lines) + "\n"


def _doc(section: type[BaseModel]) -> list[str]:
    return [(section.__doc__ or "").strip(), ""]


def _table(fields: dict[str, Any], path: tuple[str | int, ...]) -> list[str]:
    lines = ["| key | default | type | description |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "*required*" if field.is_required() else f"`{_yaml(field.default)}`"
        takes = expectation(schema_of((*path, name)))
        meaning = " ".join((field.description or "").split())
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", default, takes, meaning)) + " |"
        )
    return lines


def _formats() -> list[str]:
    """Render every row format with its columns."""

    def columns(format: Format, names: Sequence[str]) -> str:
        also = format.row({}, {}, "").also
        return ", ".join(f"`{name}`" + "".join(f" (`{other}`)" for other in also.get(name, ())) for name in names)

    return [
        "| format | required columns | optional columns | rows |",
        "|---|---|---|---|",
        *(
            f"| `{format.name}` | {columns(format, format.required)} | {columns(format, format.optional)} | {format.about} |"
            for format in FORMATS.values()
        ),
    ]


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else repr(value) if "\n" in str(value) else str(value)


def commands_page() -> str:
    """The help of every command."""
    lines = ["# The commands", "", "Made from `sft-recipe --help` by `docs/generate.py`.", ""]
    lines += [
        "Exit codes: 0 done; 1 the run failed; 2 recipe, data or command line is wrong; 75 stopped on request, with a",
        "checkpoint from which `--resume` continues. Errors go to stderr, one line per problem; `--debug` shows the",
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


def convert_page() -> str:
    """The outcome of every key of other tools."""
    lines = [
        "# Migrate from Axolotl, LLaMA-Factory, torchtune or TRL",
        "",
        "Generated from the tables in `sft_recipes/convert/` by `docs/generate.py`.",
        "",
        "```sh",
        "sft-recipe convert axolotl.yml --out recipe.yaml   # recognizes the tool by its keys, or set --from",
        "sft-recipe check recipe.yaml                       # validates the recipe and its data",
        "sft-recipe preview recipe.yaml                     # shows the tokens: compare them with your old training text",
        "```",
        "",
        "Each value of the recipe has a comment: the key that it comes from, or the tool's default if the config does not",
        "set the key and a recipe has a different default. Checkpoint and logging intervals and the seed keep the recipe's",
        "defaults if the config does not set them. Settings from the other tool's command line are not in the file: a",
        f"missing model or dataset becomes `{FILL_IN}`, and the number of processes is `--processes`.",
        "",
        "`convert` reports every key of the config on stderr under one of these headings:",
        "",
        *(f"- *{heading}*" for heading in HEADINGS.values()),
        "",
        "Notes about the recipe follow, with what `check` finds in it. The end of the recipe repeats the notes and the keys",
        "that are not supported or unknown. A config for anything but supervised fine-tuning is refused. The datasets of",
        "LLaMA-Factory are looked up in its `dataset_info.json`, relative to the working directory.",
        "",
        "TRL concatenates a prompt and a completion that are plain text; a recipe without `data.template` renders them with",
        "the Alpaca template. To keep TRL's behavior, save this to a .jinja file, and set `data.template` to its path:",
        "",
        "```jinja",
        table("trl").words["raw_template"],
        "```",
    ]
    for tool in map(table, names()):
        lines += [
            "",
            f"## {tool.name}",
            "",
            f"| key of {tool.name} | key of the recipe |",
            "|---|---|",
            *_converted(tool),
        ]
        defaults = {key: value["value"] if isinstance(value, dict) and "value" in value else value
                    for key, value in tool.defaults.items()}  # fmt: skip
        lines += [
            "",
            "Defaults of the tool, set if the config does not set the key and a recipe has another default:",
            "",
        ]
        lines.append(", ".join(f"`{key}: {_yaml(value)}`" for key, value in defaults.items()) + ".")
        for kind, heading in (("unsupported", "not supported"), ("not_needed", "not needed")):
            lines += ["", f"| {heading} | |", "|---|---|", *_notes(tool, kind)]
    return "\n".join(lines) + "\n"


def _converted(tool: Table) -> list[str]:
    rows = {key: dict.fromkeys(to for rule in rules for to in rule.targets()) for key, rules in tool.rules.items()}
    return [f"| `{key}` | {', '.join(f'`{each}`' for each in to)} |" for key, to in rows.items() if to]


def _notes(tool: Table, kind: str) -> list[str]:
    """The keys that set nothing in a recipe, by the note with which they are reported."""
    keys: dict[str, list[str]] = {}
    for key, rules in tool.rules.items():
        notes = [getattr(rule, kind) for rule in rules if getattr(rule, kind)]
        others = [rule.unsupported for rule in rules if kind == "not_needed"]
        if notes and not any(others) and not any(rule.targets() for rule in rules):
            keys.setdefault(notes[-1], []).append(f"`{key}`")
    return [f"| {', '.join(those)} | {note} |".replace("(0|1)", "(0\\|1)") for note, those in keys.items()]


def trackers_page() -> str:
    """The page as it is, with the docstring of every tracker at its end."""
    written, mark, _ = (DOCS / "trackers.md").read_text("utf-8").partition("by docs/generate.py. -->\n")
    sections = [f"\n## {name}\n\n{inspect.getdoc(kind)}\n" for name, kind in kinds().items()]
    return written + mark + "".join(sections)


def templates_page() -> str:
    """Replace the table, which is last, in the page about chat templates."""
    page = (DOCS / "chat-templates.md").read_text(encoding="utf-8").partition("| template |")[0]
    return page + "\n".join([*_matrix["table"](), ""])


_matrix = runpy.run_path(str(DOCS / "chat_templates.py"))
PAGES = {
    "recipe.md": recipe_page,
    "commands.md": commands_page,
    "convert.md": convert_page,
    "trackers.md": trackers_page,
    "chat-templates.md": templates_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")

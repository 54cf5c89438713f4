#!/usr/bin/env python3
"""Write the reference pages from the code: docs/recipe.md, commands.md and convert.md. A test holds them against it."""

import re
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from sft_recipes import cli
from sft_recipes.recipe import editors
from sft_recipes.recipe.convert import trl_sft
from sft_recipes.recipe.convert.conversion import HEADINGS, TOOLS
from sft_recipes.recipe.convert.draft import FILL_IN, Lacking, To
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
        "",
        "`sft-recipe schema --out .sft-recipe.schema.json` writes the same as a JSON schema. Editors with the YAML language",
        "server (VS Code: the extension redhat.vscode-yaml) then complete keys, show what they mean and mark what is wrong in",
        "a recipe that begins with",
        "",
        "```yaml",
        editors.line(Path(editors.FILE)),
        "```",
        "",
        "as the copies of `sft-recipe new` do from then on, in that directory and below. For all recipes of a workspace VS",
        'Code has a setting, too: `"yaml.schemas": {".sft-recipe.schema.json": "recipes/*.yaml"}`.',
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
    """What becomes of the keys of other tools."""
    lines = [
        "# Moving in from another tool",
        "",
        "Made from the tables in `sft_recipes/recipe/convert/` by `docs/generate.py`.",
        "",
        "```sh",
        "sft-recipe convert axolotl.yml --out recipe.yaml   # which tool it is of is told by its keys; --from says so",
        "sft-recipe check recipe.yaml                       # the recipe and its data",
        "sft-recipe preview recipe.yaml                     # the very tokens: is it the text that you trained on there?",
        "```",
        "",
        "The recipe has a comment beside each value: the key that it comes of, or the tool's default where the config says",
        "nothing and a recipe would do otherwise. How often checkpoints and logs are written, and the seed, are a recipe's",
        "own where the config says nothing. What the other tool was told on its command line is not in the file: a model or",
        f"data set that is missing is `{FILL_IN}`, and processes are `--processes`.",
        "",
        "On stderr, and never without a word, there is each key of the config under one of these headings:",
        "",
        *(f"- *{heading}*" for heading in HEADINGS.values()),
        "",
        "and after them what there is to say about the recipe, with what `check` would find in it. Keys that were not carried",
        "over stand at the end of the recipe, too, with what there is to say about it that `check` does not find. A config",
        "of anything else than supervised fine-tuning is refused. LLaMA-Factory's data sets are looked up in its",
        "`dataset_info.json`, from the working directory.",
        "",
        "TRL joins a prompt and a completion that are text as they are; a recipe without `data.template` puts them into the",
        "Alpaca template. Where your rows are such, save this to a .jinja file, and set `data.template` to its path:",
        "",
        "```jinja",
        trl_sft.RAW,
        "```",
    ]
    for tool in TOOLS.values():
        lines += ["", f"## {tool.NAME}", "", "| key there | in a recipe |", "|---|---|", *_where_to(tool)]
        lines += ["", "Where nothing is said:", ""]
        lines.append(", ".join(f"`{key}: {_yaml(value)}`" for key, value in tool.DEFAULTS.items()) + ".")
        lines += ["", "| without a counterpart | |", "|---|---|", *_lacking(tool)]
    return "\n".join(lines) + "\n"


def _where_to(tool: Any) -> list[str]:
    groups = [
        part.partition(": ") for group in tool.GROUPS for part in " ".join(str(group.__doc__).split()).split("; ")
    ]
    rules = [(key, rule.key) for key, rule in tool.KEYS.items() if isinstance(rule, To)]
    lines = [f"| {_code(theirs)} | {_code(ours)} |" for theirs, _, ours in groups]
    return lines + [f"| `{theirs}` | `{ours}` |" for theirs, ours in rules]


def _lacking(tool: Any) -> list[str]:
    keys: dict[str, list[str]] = {}
    for key, rule in tool.KEYS.items():
        if isinstance(rule, Lacking):
            keys.setdefault(rule.todo, []).append(f"`{key}`")
    return [f"| {', '.join(those)} | {todo} |".replace("(0|1)", "(0\\|1)") for todo, those in keys.items()]


def _code(words: str) -> str:
    """Names of keys, and what is in brackets as it is."""
    names, bracket, said = words.partition(" (")
    return ", ".join(f"`{name}`" for name in names.split(", ")) + bracket + said


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page, "convert.md": convert_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")

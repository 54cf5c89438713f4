#!/usr/bin/env python3
"""Write the reference pages from the code: docs/recipe.md, commands.md and recipes.md. A test holds them against it."""

import json
import re
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from sft_recipes import cli
from sft_recipes.planning import memory, speed
from sft_recipes.recipe import editors, load, shipped
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
        "Exit codes: 0 done; 1 the run failed; 2 the recipe, the data or the command line is wrong. Errors go to stderr,",
        "one line a problem; `--debug` shows the traceback.",
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


def recipes_page() -> str:
    """The recipes that ship, from their headers, and what `python docs/recipes.py` has predicted of each."""
    every, found = shipped.recipes(), json.loads((DOCS / "recipes.json").read_text(encoding="utf-8"))
    sizes = sorted({size for each in found.values() for size in each["fits"]})
    lines = [
        "# The recipes that ship",
        "",
        "Made from the headers of `recipes/` and the predictions of `docs/recipes.py` by `docs/generate.py`.",
        "`sft-recipe list` shows them, `sft-recipe new NAME` copies one with its comments, which say why each value is what it",
        "is. Each is there for another reason: take the one whose data and hardware are nearest to yours.",
        "",
        "| recipe | for | method | hardware | result |",
        "|---|---|---|---|---|",
        *(
            f"| [{each.name}](../recipes/{each.name}.yaml) | {each.purpose} | {each.method} | {each.hardware} | {each.result} |"
            for each in every
        ),
        "",
        "## Which fits which GPU",
        "",
        "By what `sft-recipe plan` predicts, in memory of one GPU (GB are 10^9 bytes); where a recipe takes several, of each. A",
        "dot: it fits, with half a GiB set aside for CUDA and 5 % left free. None of it has been measured on a GPU.",
        "",
        "| recipe | GPUs | predicted | " + " | ".join(f"{size} GB" for size in sizes) + " |",
        "|---|---|---|" + ":-:|" * len(sizes),
    ]
    for each in every:
        launch = load.load(shipped.folder() / f"{each.name}.yaml").recipe.launch
        dots = ["•" if size in found[each.name]["fits"] else "" for size in sizes]
        peak = memory.in_words(found[each.name]["peak"])
        lines.append(f"| {each.name} | {launch.processes * launch.machines} | {peak} | {' | '.join(dots)} |")
    cards = "; ".join(f"{size} GB: {', '.join(gpu.name for gpu in speed.gpus_of(size))}" for size in sizes)
    lines += [
        "",
        f"{cards}. A T4 has no bfloat16, which these recipes compute in.",
        "",
        "Predicted is the least that a recipe takes: with `gradient_checkpointing: auto` a run recomputes as few layers as the",
        "memory of its GPU makes it, none where there is room, and takes more then. What would make another fit, `sft-recipe plan",
        "RECIPE --gpu-memory 24GB` says. 4-bit weights that are shared out by fsdp2 are held whole by each GPU while the model is",
        "loaded; the dots reckon with it.",
        "",
        "## Where the memory goes",
        "",
        "In GiB, at the largest moment of a step ([what the parts are](plan.md#how-it-is-found)).",
        "",
        f"| recipe | parameters | trained | {' | '.join(memory.PARTS)} |",
        "|---|---|---|" + "---|" * len(memory.PARTS),
    ]
    for each in every:
        of = found[each.name]
        parts = " | ".join(f"{of['parts'][part] / memory.GIB:.2f}" for part in memory.PARTS)
        lines.append(f"| {each.name} | {of['parameters']:,} | {of['trained']:,} | {parts} |")
    return "\n".join(lines) + "\n" + _CHOOSING


_CHOOSING = """
## A model and its format

| model | `data.template` | why |
|---|---|---|
| base | `alpaca`, or a Jinja file of yours | it has no format, and learns the one of your data |
| instruct, chat | `chat`: its own | it keeps what it has learned; another format is learned against its own, which is a warning |

What ends an answer is trained on either way, and written into `generation_config`: the end token with `alpaca`, with a chat
template what closes a turn (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, ...), which often is another. Padding gets a token that
is not the end token, where a tokenizer has none or the same (Llama 3, Qwen2.5). `sft-recipe preview RECIPE` shows it all.

`train_on: assistant` needs a template that writes a turn the same wherever it stands, or marks with `{% generation %}` what the
assistant says. Those of Qwen3 8B and other models that think leave the thoughts of earlier turns out: take `completion`, the last
answer, or a model that does not think, such as Qwen3 4B Instruct 2507.

Llama and Gemma are behind a licence that has to be accepted on the model's page; then `hf auth login` on the machine.
"""

PAGES = {"recipe.md": recipe_page, "commands.md": commands_page, "recipes.md": recipes_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")

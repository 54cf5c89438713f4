"""Another tool's config as a recipe, with an account of every key."""

import io
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sft_recipes.errors import RecipeError, one_line
from sft_recipes.recipe import check, load, shipped
from sft_recipes.recipe.convert import axolotl, llama_factory, torchtune, trl_sft
from sft_recipes.recipe.convert.arguments import the_rest
from sft_recipes.recipe.convert.draft import Draft, Fate, Kind, follow, leaves, shown_of
from sft_recipes.recipe.load import field_names

Source = Literal["trl", "axolotl", "llama-factory", "torchtune"]
TOOLS: dict[Source, Any] = {"trl": trl_sft, "axolotl": axolotl, "llama-factory": llama_factory, "torchtune": torchtune}
_MOST = 10_000  # keys of a config
_KNOWN = "a config of trl sft, Axolotl, LLaMA-Factory or torchtune"
HEADINGS: dict[Kind, str] = {
    "becomes": "in the recipe",
    "default": "the default of a recipe",
    "needless": "not needed in a recipe",
    "empty": "empty",
    "lacking": "no counterpart: for you to decide",
    "unknown": "unknown: no key that is known here",
}


@dataclass(frozen=True)
class Converted:
    """A recipe, and what became of each key of the config that it is from."""

    file: str
    tool: str
    text: str  # YAML, with comments
    values: Mapping[str, Any]  # of the config's keys
    fates: Mapping[str, Fate]
    remarks: list[str]

    def account(self) -> list[str]:
        """What became of each key, the ones to look at last."""
        lines = [f"{self.file}: {self.tool}, {len(self.fates)} keys"]
        for kind, heading in HEADINGS.items():
            keys = [key for key in self.fates if self.fates[key].kind == kind]
            if keys:
                lines += ["", f"{heading} ({len(keys)})"]
            if kind == "empty":
                lines += [f"  {', '.join(keys)}"] if keys else []
                continue
            for key in keys:
                words = self.fates[key].words
                lines.append(f"  {key}: {shown_of(key, self.values[key])}{' -> ' + words if words else ''}")
        if self.remarks:
            lines += ["", f"about the recipe ({len(self.remarks)})", *(f"  {remark}" for remark in self.remarks)]
        return [one_line(line) for line in lines]


def convert(file: str | Path, source: Source | None = None) -> Converted:
    """The recipe that does what a config says. `source`: which tool's it is; found from its keys where left out.

    Raises RecipeError where the file is none of these, or is not of supervised fine-tuning.
    """
    config = _read(Path(file))
    tool = TOOLS[source] if source else _recognised(config, file)
    if tool is torchtune:
        config = torchtune.resolved(config, file)
    draft = Draft(tool.NAME, config)
    if reason := tool.refusal(draft):
        raise RecipeError(f"{file}: {reason}; only supervised fine-tuning can be converted")
    tool.convert(draft)
    follow(draft, tool.KEYS)
    the_rest(draft)
    for key in draft.left():
        draft.fates[key] = Fate("unknown", f"look it up in {tool.NAME}'s documentation")
    for to, key in tool.NEEDS.items():
        draft.need(to, f"{key} is not in the file")
    for to, value in tool.DEFAULTS.items():
        draft.assume(to, value)
    text = _written(draft, str(file))
    return Converted(
        str(file),
        tool.NAME,
        text,
        draft.keys,
        {key: draft.fates[key] for key in draft.keys},
        draft.remarks + _judged(text, str(file)),
    )


def write(converted: Converted, out: Path) -> Path:
    """Write the recipe, which must not exist yet. Raises RecipeError or OutputError."""
    return shipped.write_new(out, converted.text)


def _read(file: Path) -> dict[Any, Any]:
    """YAML 1.1 (`yes` is true), as those tools read it; JSON is YAML, too."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        with warnings.catch_warnings(action="ignore"):  # 2e-5 is no number to the letter of YAML 1.1
            config = yaml.load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}; expected {_KNOWN}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, what = (f":{mark.line + 1}" if mark else ""), " ".join(str(error.problem or error.context).split())
        raise RecipeError(f"{file}{line}: not valid YAML: {what}") from None
    except (YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{file}: has no keys; expected {_KNOWN}")
    try:
        if sum(1 for _ in islice(leaves(config), _MOST + 1)) > _MOST:
            raise RecipeError(
                f"{file}: more than {_MOST:,} keys, with those that aliases (*) stand for; write them out"
            )
    except RecursionError:
        raise RecipeError(f"{file}: an alias (*) stands within what it means (&); write it out") from None
    return config


def _recognised(config: Mapping[Any, Any], file: str | Path) -> Any:
    if any(isinstance(section, Mapping) and "_component_" in section for section in config.values()):
        return torchtune
    if isinstance(config.get("model"), Mapping) and isinstance(config.get("data"), Mapping):
        raise RecipeError(f"{file}: is a recipe already: sft-recipe check {file}")
    signs = {tool: sum(sign in config for sign in tool.SIGNS.split()) for tool in TOOLS.values()}
    best = max(signs, key=lambda tool: signs[tool])
    if signs[best] < 2:
        some = ", ".join(str(key) for key in list(config)[:5])
        raise RecipeError(
            f"{file}: is no {_KNOWN.removeprefix('a ')}, by its keys ({some}); say with --from which it is"
        )
    return best


def _judged(text: str, name: str) -> list[str]:
    """What `check` will say of the recipe that can be said without its data. Errors are of the config, `name`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            loaded = load.load(file)
        except RecipeError as error:
            place = re.compile(re.escape(str(file)) + r"(:\d+)?")  # lines of the recipe are not the config's
            raise RecipeError(*(place.sub(lambda _: name, line) for line in error.lines)) from None
    verdict = check.judge(loaded.recipe, to_run=False)
    return verdict.problems + verdict.warnings


# --- The recipe as YAML ------------------------------------------------------------------------------------------------


def _written(draft: Draft, file: str) -> str:
    recipe = CommentedMap()
    for key in sorted(draft.entries, key=_place):
        entry, (section, _, name) = draft.entries[key], key.partition(".")
        if key == "lora":
            recipe.setdefault("lora", CommentedMap())
        elif name:
            inner = recipe.setdefault(section, CommentedMap())
            inner[name] = _flow(entry.value)
            inner.yaml_add_eol_comment(one_line(entry.comment), name, column=44)
        else:
            recipe[section] = _flow(entry.value)
            recipe.yaml_add_eol_comment(one_line(entry.comment), section, column=44)
    if recipe.get("lora") == {}:
        recipe["lora"].fa.set_flow_style()
    yaml = YAML()
    yaml.width = 10_000  # a line that is broken would take its comment along
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    stream = io.StringIO()
    yaml.dump(recipe, stream)
    open_ = [(key, fate) for key, fate in draft.fates.items() if fate.kind in ("lacking", "unknown")]
    left = ["", "# Not in this recipe:"] if open_ else []
    left += [f"#   {key}: {shown_of(key, draft.keys[key])} -> {fate.words}" for key, fate in open_]
    left += ["", "# About this recipe:", *(f"#   {remark}" for remark in draft.remarks)] if draft.remarks else []
    header = (
        f"# From {one_line(file)} ({draft.tool}), by sft-recipe convert. Beside each value: the key that it is from."
    )
    return "\n".join([header, stream.getvalue().rstrip("\n"), *map(one_line, left)]) + "\n"


def _place(key: str) -> int:
    names = field_names()
    return names.index(key) if key in names else len(names)


def _flow(value: Any) -> Any:
    """Lists of plain values and mappings in one line, lists of sources one a line."""
    if isinstance(value, list):
        inner = CommentedSeq(_flow(item) for item in value)
        if not any(isinstance(item, dict) for item in value):
            inner.fa.set_flow_style()
        return inner
    if isinstance(value, dict):
        mapping = CommentedMap((key, _flow(item)) for key, item in value.items())
        mapping.fa.set_flow_style()
        return mapping
    return value

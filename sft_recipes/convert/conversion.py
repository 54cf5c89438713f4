"""Convert another tool's config to a recipe, with an outcome for every key."""

import io
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sft_recipes.convert.draft import Draft, Kind, Outcome, format_value, leaves
from sft_recipes.convert.rules import Converter, Table, names, table
from sft_recipes.errors import RecipeError, one_line
from sft_recipes.recipe import parse, validate
from sft_recipes.recipe.library_names import OWNED, sft_config_fields
from sft_recipes.recipe.parse import field_names

_MOST = 10_000  # keys of a config
_MOST_FILLED = 100_000  # characters that references stand for
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
HEADINGS: dict[Kind, str] = {
    "becomes": "in the recipe",
    "default": "default of a recipe",
    "not_needed": "not needed",
    "empty": "empty",
    "unsupported": "not supported: needs your decision",
    "unknown": "unknown key",
}


@dataclass(frozen=True)
class Converted:
    """A recipe, and the outcome of each key of the config that it is made from."""

    file: str
    tool: str
    text: str  # YAML, with comments
    values: Mapping[str, Any]  # of the config's keys
    outcomes: Mapping[str, Outcome]
    notes: list[str]  # about the recipe

    def report(self) -> list[str]:
        """Return the outcome of each key as lines, those that need attention last."""
        lines = [f"{self.file}: {self.tool}, {len(self.outcomes)} keys"]
        for kind, heading in HEADINGS.items():
            keys = [key for key in self.outcomes if self.outcomes[key].kind == kind]
            listed = [_line(key, self.values[key], self.outcomes[key]) for key in keys]
            if keys:
                lines += ["", f"{heading} ({len(keys)})", *([f"  {', '.join(keys)}"] if kind == "empty" else listed)]
        if self.notes:
            lines += ["", f"about the recipe ({len(self.notes)})", *(f"  {note}" for note in self.notes)]
        return [one_line(line) for line in lines]


def convert(file: str | Path, source: str | None = None) -> Converted:
    """Convert a config to a recipe that does the same.

    Args:
        file: A YAML or JSON file.
        source: The tool that the file is for, one of `names()`; None recognizes it by its keys.

    Raises:
        RecipeError: The file is for none of the tools, or not for supervised fine-tuning.
    """
    config = _read(Path(file))
    tool = table(source) if source else _recognize(config, file)
    if tool.references:
        config = resolve_references(config, file)
    draft = Draft(tool.name, config)
    converter = Converter(draft, tool)
    if reason := converter.refusal():
        raise RecipeError(f"{file}: {reason}. Only supervised fine-tuning can be converted.")
    converter.run()
    _pass_on(draft)
    for key in draft.left():
        draft.outcomes[key] = Outcome("unknown", f"see the documentation of {tool.name}")
    converter.complete()
    text = _write(draft, str(file))
    outcomes = {key: draft.outcomes[key] for key in draft.keys}
    return Converted(str(file), tool.name, text, draft.keys, outcomes, draft.notes + _validate(text, str(file)))


def _read(file: Path) -> dict[Any, Any]:
    """Read YAML 1.1 (`yes` is true), as those tools do; JSON is YAML, too."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        with warnings.catch_warnings(action="ignore"):  # 2e-5 is not a number to the letter of YAML 1.1
            config = yaml.load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror}). Pass {_known()}.") from None
    except MarkedYAMLError as error:
        mark, what = error.problem_mark or error.context_mark, str(error.problem or error.context)
        raise RecipeError(
            f"{file}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {' '.join(what.split())}"
        ) from None
    except (YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not config:
        raise RecipeError(f"{file}: contains no keys. Pass {_known()}.")
    try:
        if sum(1 for _ in islice(leaves(config), _MOST + 1)) > _MOST:
            raise RecipeError(f"{file}: more than {_MOST:,} keys, including those of aliases (*). Write them out.")
    except RecursionError:
        raise RecipeError(f"{file}: an alias (*) contains itself. Write it out.") from None
    return config


def _tools() -> list[Table]:
    return [table(name) for name in names()]


def _known() -> str:
    *others, last = (tool.name for tool in _tools())
    return f"a config of {', '.join(others)} or {last}"


def _recognize(config: Mapping[Any, Any], file: str | Path) -> Table:
    for tool in _tools():
        if tool.marker and any(isinstance(section, Mapping) and tool.marker in section for section in config.values()):
            return tool
    model = config.get("model")
    if isinstance(model, Mapping) and "name" in model and isinstance(config.get("data"), Mapping):
        raise RecipeError(f"{file}: is already a recipe. Run `sft-recipe check {file}`.")
    signs = {tool: sum(sign in config for sign in tool.signs.split()) for tool in _tools()}
    best = max(signs, key=lambda tool: signs[tool])
    if signs[best] < 2:
        some = ", ".join(str(key) for key in list(config)[:5])
        raise RecipeError(f"{file}: is not recognized as {_known()} (got keys {some}). Set the tool with --from.")
    return best


def resolve_references(config: Mapping[Any, Any], file: str | Path) -> dict[Any, Any]:
    """Replace ${key} and ${section.key} by their values, unless these are sections. Raises RecipeError if that is endless."""
    known = {key: value for key, value in leaves(config) if value is not None and not isinstance(value, list)}
    left = _MOST_FILLED

    def value(at: Any) -> Any:
        nonlocal left
        if isinstance(at, Mapping):
            return {key: value(inner) for key, inner in at.items()}
        if isinstance(at, list):
            return [value(inner) for inner in at]
        for _ in range(10):  # a reference to itself is left as it is
            if not isinstance(at, str) or "${" not in at:
                break
            whole = _REFERENCE.fullmatch(at)
            filled = _REFERENCE.sub(lambda hit: str(known.get(hit[1]) or hit[0]), at)
            at = known.get(whole[1], at) if whole else filled
            left -= len(str(at))
            if left < 0:
                raise RecipeError(
                    f"{file}: the values of ${{...}} are longer than {_MOST_FILLED:,} characters. Write them out."
                )
        return at

    return {key: value(inner) for key, inner in config.items()}


def _pass_on(draft: Draft) -> None:
    """Set fields of SFTConfig that no key of a recipe decides under `trl:`."""
    for key in sorted((sft_config_fields() - OWNED.keys()) & draft.config.keys(), key=list(draft.config).index):
        if set(draft.under(key)) & set(draft.left()):
            draft.carry(key, f"trl.{key}", draft.config[key])


def _validate(text: str, name: str) -> list[str]:
    """Return what `check` reports about the recipe without its data. Errors name the config, `name`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            loaded = parse.load(file)
        except RecipeError as error:
            place = re.compile(re.escape(str(file)) + r"(:\d+)?")  # lines of the recipe are not the config's
            raise RecipeError(*(place.sub(lambda _: name, line) for line in error.lines)) from None
    verdict = validate.validate(loaded.recipe, to_run=False)
    return verdict.problems + verdict.warnings


# --- The recipe as YAML ------------------------------------------------------------------------------------------------


def _write(draft: Draft, file: str) -> str:
    recipe, order = CommentedMap(), {name: number for number, name in enumerate(field_names())}
    for key in sorted(draft.entries, key=lambda key: order.get(key, len(order))):
        entry, (section, _, name) = draft.entries[key], key.partition(".")
        if key == "lora":
            recipe.setdefault("lora", CommentedMap())
            continue
        at = recipe.setdefault(section, CommentedMap()) if name else recipe
        at[name or section] = _flow(entry.value)
        at.yaml_add_eol_comment(one_line(entry.comment), name or section, column=44)
    if recipe.get("lora") == {}:
        recipe["lora"].fa.set_flow_style()
    yaml = YAML()
    yaml.width = 10_000  # a line that is broken would take its comment along
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    stream = io.StringIO()
    yaml.dump(recipe, stream)
    open_ = [(key, said) for key, said in draft.outcomes.items() if said.kind in ("unsupported", "unknown")]
    left = ["", "# Not in this recipe:"] if open_ else []
    left += [f"# {_line(key, draft.keys[key], outcome)}" for key, outcome in open_]
    left += ["", "# About this recipe:", *(f"#   {note}" for note in draft.notes)] if draft.notes else []
    header = f"# From {one_line(file)} ({draft.tool}), by sft-recipe convert. Each comment names the source of a value."
    return "\n".join([header, stream.getvalue().rstrip("\n"), *map(one_line, left)]) + "\n"


def _line(key: str, value: Any, outcome: Outcome) -> str:
    return f"  {key}: {format_value(value, key)}{' -> ' + outcome.note if outcome.note else ''}"


def _flow(value: Any) -> Any:
    """Put lists of plain values and mappings on one line, and each source of a list on its own."""
    if not isinstance(value, (list, dict)):
        return value
    plain = [_flow(item) for item in value] if isinstance(value, list) else {key: _flow(value[key]) for key in value}
    inner = CommentedSeq(plain) if isinstance(value, list) else CommentedMap(plain)
    if isinstance(value, dict) or not any(isinstance(item, dict) for item in value):
        inner.fa.set_flow_style()
    return inner

"""From a YAML file to a Recipe, or to every problem in it with file and line.

YAML is read as YAML 1.2 (`1e-5` is a number, `off` is a word); a key that does not exist or stands twice is an error.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sft_recipes.errors import InputError, RecipeError
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.upstream import OTHER_WORDS

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Loaded:
    """A recipe and where each of its keys stands."""

    recipe: Recipe
    source: str
    places: dict[KeyPath, str]

    def place(self, *path: str | int) -> str:
        """`file:line` of a key, or of the nearest section above it that is written down."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.source

    def placed(self, line: str) -> str:
        """A line that begins with the name of a key, with the key's place before it; others as they are."""
        key = re.match(r"([a-z_]+)((?:\.[a-z_0-9]+)*)[: ]", line)
        if key is None or key[1] not in Recipe.model_fields:
            return line
        return f"{self.place(*(key[1] + key[2]).split('.'))}: {line}"

    @contextmanager
    def placing_errors(self) -> Iterator[None]:
        """Errors about keys get the keys' places."""
        try:
            yield
        except InputError as error:
            raise type(error)(*map(self.placed, error.lines)) from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe; `overrides` are `key=value` as given to --set. Raises RecipeError with one line a problem."""
    loaded, problems = examine(path, overrides)
    if problems or loaded is None:
        raise RecipeError(*problems)
    return loaded


def examine(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded | None, list[str]]:
    """The recipe and its problems. With problems the recipe is what is left without the keys at fault, or None."""
    source = str(path)
    places: dict[KeyPath, str] = {}
    problems: list[str] = []
    data = _read(Path(path), places, problems)
    if data is None:
        return None, problems
    for override in overrides:
        _override(data, override, places, problems)

    try:
        return Loaded(Recipe.model_validate(data), source, places), problems
    except ValidationError as error:
        faults = _innermost(_fault(detail, data) for detail in error.errors(include_url=False))
    here = Loaded(Recipe.model_construct(), source, places)
    for fault in sorted(faults, key=lambda fault: _line(here.place(*fault.path))):
        problems.append(f"{here.place(*fault.path)}: {_describe(fault)}")
    for fault in sorted(faults, key=lambda fault: [(isinstance(part, int), part) for part in fault.path], reverse=True):
        _remove(data, fault.path)  # the later items of a list first
    try:
        return Loaded(Recipe.model_validate(data), source, places), problems
    except ValidationError:
        return None, problems


# --- YAML ------------------------------------------------------------------------------------------------------------


def _read(path: Path, places: dict[KeyPath, str], problems: list[str]) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.append(f"{path}: no such recipe; `sft-recipe list` shows those that ship")
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as text: {error}")
        return None
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.append(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}")
        return None
    except (YAMLError, ValueError) as error:
        problems.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
        return None
    if re.match(r"\s*%YAML\s+1\.[01]", text):
        problems.append(f"{path}:1: recipes are YAML 1.2; take the line with %YAML out")
        return None
    if not isinstance(node, MappingNode):
        problems.append(f"{path}:1: a recipe is a mapping of keys; see `sft-recipe list` for examples")
        return None
    try:
        recipe: dict[str, Any] = _plain(node, yaml, str(path), (), places, problems)
    except RecursionError:
        problems.append(f"{path}: an alias (*) stands within what it means (&)")
        return None
    return recipe


def _plain(node: Node, yaml: YAML, source: str, path: KeyPath, places: dict[KeyPath, str], problems: list[str]) -> Any:
    """Python values of a YAML node; notes the line of each key and finds keys that stand twice."""
    if isinstance(node, ScalarNode):
        try:
            return yaml.constructor.construct_object(node)
        except (YAMLError, ValueError) as error:
            problems.append(f"{source}:{node.start_mark.line + 1}: {_dotted(path)}: {' '.join(str(error).split())}")
            return None
    if isinstance(node, SequenceNode):
        values = []
        for index, item in enumerate(node.value):
            places[(*path, index)] = f"{source}:{item.start_mark.line + 1}"
            values.append(_plain(item, yaml, source, (*path, index), places, problems))
        return values
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        here = (*path, key)
        if key in mapping:
            problems.append(f"{source}:{line}: key '{_dotted(here)}' stands twice, first in {places[here]}")
            continue
        places[here] = f"{source}:{line}"
        if here in _SECTIONS and isinstance(value_node, ScalarNode) and value_node.value == "":
            problems.append(
                f"{source}:{line}: section '{key}:' is empty; write '{key}: {{}}' for its defaults, or leave it out"
            )
            continue
        mapping[key] = _plain(value_node, yaml, source, here, places, problems)
    return mapping


def _override(data: dict[str, Any], override: str, places: dict[KeyPath, str], problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        problems.append(f"--set {override}: expected key=value, such as --set train.learning_rate=1e-4")
        return
    yaml = YAML(typ="safe", pure=True)
    try:
        value = yaml.load(text) if text.strip() else None
    except YAMLError:
        problems.append(f"--set {override}: the value is not valid YAML, or has a key twice; quote what is text")
        return
    section = data
    for part in path[:-1]:
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            problems.append(f"--set {override}: '{part}' is not a section")
            return
        section = inner
    section[path[-1]] = value
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    places[path] = "--set"


def _line(place: str) -> int:
    number = place.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


# --- What pydantic found, in a user's words --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fault:
    path: KeyPath
    kind: str  # pydantic's error type
    value: Any


def _fault(detail: Any, data: dict[str, Any]) -> _Fault:
    """Pydantic's location without the names of union branches, which are keys neither of the data nor of the schema."""
    path: list[str | int] = []
    at: Any = data
    for index, part in enumerate(detail["loc"]):
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at)):
            at = at[part]
        elif not (detail["type"] == "missing" and index == len(detail["loc"]) - 1):
            continue
        path.append(part)
    return _Fault(tuple(path), detail["type"], detail["input"])


def _innermost(faults: Iterable[_Fault]) -> list[_Fault]:
    """One fault a key: a union complains once a branch, and about the whole where a part is wrong."""
    by_path = {fault.path: fault for fault in faults}
    return [
        fault
        for path, fault in by_path.items()
        if not any(other != path and other[: len(path)] == path for other in by_path)
    ]


def _describe(fault: _Fault) -> str:
    key = _dotted(fault.path)
    if fault.kind == "extra_forbidden":
        return f"unknown key '{key}'{_suggestion(fault.path)}"
    if fault.kind == "missing":
        return f"missing key '{key}'"
    return f"{key}: got {_yaml_word(fault.value)}; expected {expectation(schema_of(fault.path))}"


def _suggestion(path: KeyPath) -> str:
    name = str(path[-1])
    section = schema_of(path[:-1])
    siblings = [name for branch in section.get("anyOf", [section]) for name in branch.get("properties", {})]
    if name == "<<":
        return "; merging keys with << is YAML 1.1, write them out"
    if name in OTHER_WORDS:
        return f"; a recipe calls it '{OTHER_WORDS[name]}'"
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean '{close[0]}'?"
    everywhere = {field.split(".")[-1]: field for field in field_names()}
    if close := difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.8):
        return f"; did you mean '{everywhere[close[0]]}'?"
    return f"; expected one of {', '.join(siblings)}" if siblings else ""


def field_names() -> list[str]:
    """All keys of a recipe, dotted."""
    names = []
    for name, field in Recipe.model_fields.items():
        names.append(name)
        section = section_class(field.annotation)
        names += [f"{name}.{inner}" for inner in section.model_fields] if section else []
    return names


def section_class(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


_SECTIONS = {(name,) for name, field in Recipe.model_fields.items() if section_class(field.annotation)}


def schema_of(path: KeyPath) -> dict[str, Any]:
    """The JSON schema of a key, {} where there is none."""
    root = Recipe.model_json_schema()
    node: dict[str, Any] = root
    for part in path:
        branches = list(_branches(node, root))
        if isinstance(part, int):
            node = next((branch["items"] for branch in branches if "items" in branch), {})
        else:
            node = next((b["properties"][part] for b in branches if part in b.get("properties", {})), {})
    return {"anyOf": branches} if len(branches := list(_branches(node, root))) > 1 else (branches or [{}])[0]


def _branches(node: dict[str, Any], root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        yield from _branches(root["$defs"][node["$ref"].split("/")[-1]], root)
    elif "anyOf" in node:
        for branch in node["anyOf"]:
            yield from _branches(branch, root)
    else:
        yield node


def expectation(schema: dict[str, Any]) -> str:
    """What a JSON schema asks for, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(expectation(branch) for branch in schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    words = {
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "array": "a list",
        "object": "a section with keys" if "properties" in schema else "a mapping",
    }.get(str(schema.get("type")), "another value")
    bounds = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "exclusiveMaximum": "below",
        "maximum": "of at most",
    }
    # The bound of 32-bit numbers is not worth a word.
    limits = [f"{word} {schema[bound]:g}" for bound, word in bounds.items() if schema.get(bound, 2**31) != 2**31]
    if "minItems" in schema:
        limits.append(f"of at least {schema['minItems']}")
    if "pattern" in schema:
        limits.append("such as 5GB or 500MB")
    return " ".join([words, " and ".join(limits)]).strip()


def _yaml_word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _remove(data: Any, path: KeyPath) -> None:
    for part in path[:-1]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(data, dict):
        data.pop(path[-1], None)
    elif isinstance(data, list) and isinstance(path[-1], int) and path[-1] < len(data):
        del data[path[-1]]

"""From a YAML file to a Recipe, or to every problem in it with file and line.

YAML is read as YAML 1.2 (`1e-5` is a number, `off` is a word); a key that does not exist or stands twice is an error.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from sft_recipes.errors import InputError, RecipeError, shown
from sft_recipes.recipe.library_names import OTHER_WORDS
from sft_recipes.recipe.schema import Recipe

KeyPath = tuple[str | int, ...]
_SHOWN = 50  # problems of one kind that are listed; the rest are counted
_MOST = 100_000  # values in a recipe, those that an alias stands for included


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

    def with_location(self, line: str) -> str:
        """A line that begins with the name of a key, with the key's place before it; others as they are."""
        key = re.match(r"([a-z_]+)((?:\.[a-z_0-9]+)*)[: ]", line)
        if key is None or not (key[1] == "trl" or key[1] + key[2] in field_names()):  # a file can be called train.jsonl
            return line
        return f"{self.place(*(key[1] + key[2]).split('.'))}: {line}"

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Errors about keys get the keys' places."""
        try:
            yield
        except InputError as error:
            raise type(error)(*map(self.with_location, error.lines)) from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe; `overrides` are `key=value` as given to --set. Raises RecipeError with one line a problem."""
    loaded, problems = parse_recipe(path, overrides)
    if problems or loaded is None:
        raise RecipeError(*problems)
    return loaded


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded | None, list[str]]:
    """The recipe and its problems. With problems the recipe is what is left without the keys at fault, or None."""
    source = str(path)
    values = _Values(source)
    problems = values.problems
    try:
        data: dict[str, Any] = values.of(_read(Path(path)))
    except RecipeError as error:
        return None, list(error.lines)
    for override in overrides:
        _override(data, override, values)

    try:
        return Loaded(Recipe.model_validate(data), source, values.places), problems
    except ValidationError as error:
        faults = _innermost(_fault(detail, data) for detail in error.errors(include_url=False))
    here = Loaded(Recipe.model_construct(), source, values.places)
    # A key whose name has a typo is not missing as well.
    meant = {(*fault.path[:-1], _meant(fault.path)) for fault in faults if fault.kind == "extra_forbidden"}
    told = [
        fault
        for fault in faults
        if fault.path not in values.unread and not (fault.kind == "missing" and fault.path in meant)
    ]
    told.sort(key=lambda fault: _line(here.place(*fault.path)))
    problems += [f"{here.place(*fault.path)}: {_describe(fault)}" for fault in told[:_SHOWN]]
    if len(told) > _SHOWN:
        problems.append(f"{source}: ... and {len(told) - _SHOWN:,} more keys that are wrong")
    for fault in sorted(faults, key=lambda fault: [(isinstance(part, int), part) for part in fault.path], reverse=True):
        _remove(data, fault.path)  # the later items of a list first
    try:
        return Loaded(Recipe.model_validate(data), source, values.places), problems
    except ValidationError:
        return None, problems


# --- YAML ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> MappingNode:
    """The YAML of a recipe. Raises RecipeError."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `sft-recipe list` shows those that ship") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; expected the path of a recipe (YAML)") from None
    except UnicodeDecodeError as error:
        wrong = f"not valid UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8"
        raise RecipeError(f"{path}:{_lines(content[: error.start])}: {wrong}") from None
    try:
        node = _composed(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {_reason(error)}") from None
    except ReaderError as error:
        line = _lines(text[: error.position].encode())
        raise RecipeError(
            f"{path}:{line}: not valid YAML: the character {text[error.position]!r} is not allowed"
        ) from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{path}:1: not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}:1: nested too deep; a recipe is sections with keys") from None
    if re.match(r"\s*%YAML\s+1\.[01]", text):
        raise RecipeError(f"{path}:1: recipes are YAML 1.2; take the line with %YAML out")
    if not isinstance(node, MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys; see `sft-recipe list` for examples")
    return node


def _composed(text: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # an anchor may be set anew, and the warning is of eight lines
    node: Node | None = yaml.compose(text)
    return node


def _lines(before: bytes) -> int:
    return before.count(b"\n") + 1


def _reason(error: MarkedYAMLError) -> str:
    return ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)


@dataclass
class _Values:
    """The values of YAML nodes. Notes the line of each key, and what is wrong with it."""

    source: str
    places: dict[KeyPath, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    unread: set[KeyPath] = dataclasses.field(
        default_factory=set
    )  # keys without a value, because what is written is none
    yaml: YAML = dataclasses.field(default_factory=lambda: YAML(typ="safe", pure=True))

    def of(self, node: Node, path: KeyPath = (), place: str | None = None) -> Any:
        """Python values of a node; `place` is where it stands, if not in a line of the recipe. Raises RecipeError where
        aliases make them endless, or nearly so."""
        self._left = _MOST
        try:
            return self._value(node, path, place)
        except RecursionError:
            where = place or self.source
            raise RecipeError(f"{where}: an alias (*) stands within what it means (&); write it out") from None

    def _value(self, node: Node, path: KeyPath, place: str | None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RecipeError(
                f"{place or self.source}: more than {_MOST:,} values, with those that aliases (*) stand for; write them out"
            )
        here = place or f"{self.source}:{node.start_mark.line + 1}"
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind not in _KINDS[type(node)]:
            return self._refuse(path, here, f"the tag {node.tag} means nothing in a recipe; take it out")
        if isinstance(node, ScalarNode):
            return self._scalar(node, kind, path, here)
        if isinstance(node, SequenceNode):
            values = []
            for index, item in enumerate(node.value):
                self.places[(*path, index)] = place or f"{self.source}:{item.start_mark.line + 1}"
                values.append(self._value(item, (*path, index), place))
            return values
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            there = place or f"{self.source}:{key_node.start_mark.line + 1}"
            key = self._scalar(key_node, "str", path, there) if isinstance(key_node, ScalarNode) else None
            if not isinstance(key, str):
                if not isinstance(key_node, ScalarNode):
                    self._refuse(path, there, "a key must be text")
                continue
            inner = (*path, key)
            if key in mapping:
                self.problems.append(f"{there}: key '{_dotted(inner)}' stands twice, first in {self.places[inner]}")
                continue
            self.places[inner] = there
            if inner in _SECTIONS and isinstance(value_node, ScalarNode) and value_node.value == "":
                self.problems.append(
                    f"{there}: section '{key}:' is empty; write '{key}: {{}}' for its defaults, or leave it out"
                )
                continue
            mapping[key] = self._value(value_node, inner, place)
        return mapping

    def _scalar(self, node: ScalarNode, kind: str, path: KeyPath, here: str) -> Any:
        if kind in _TEXT:
            try:  # JSON writes what is beyond 16 bits as two halves
                return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                return self._refuse(path, here, f"{node.value!a} is not valid Unicode: half of a surrogate pair")
        try:
            return self.yaml.constructor.construct_object(node)
        except (YAMLError, ArithmeticError, LookupError, ValueError):
            return self._refuse(path, here, f"{shown(node.value)} is not {_KIND_WORDS[kind]}; quote what is text")

    def _refuse(self, path: KeyPath, here: str, what: str) -> None:
        self.unread.add(path)
        self.problems.append(f"{here}: {_dotted(path) + ': ' if path else ''}{what}")


_TEXT = ("str", "timestamp", "merge", "value")  # kinds of YAML 1.1 that YAML 1.2 reads as text
_KIND_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "null": "null"}
_KINDS: dict[type, tuple[str, ...]] = {
    ScalarNode: (*_TEXT, "int", "float", "bool", "null"), SequenceNode: ("seq",), MappingNode: ("map",)
}  # fmt: skip


def _override(data: dict[str, Any], override: str, values: _Values) -> None:
    try:
        _set(data, override, values)
    except RecipeError as error:
        values.problems += error.lines


def _set(data: dict[str, Any], override: str, values: _Values) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {override}: expected key=value, such as --set train.learning_rate=1e-4")
    section = data
    for depth, part in enumerate(path[:-1], start=1):
        if part not in section:
            values.places[path[:depth]] = "--set"
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: '{part}' is not a section")
        section = inner
    for known in [known for known in values.places if known[: len(path)] == path]:
        del values.places[known]
    values.places[path] = "--set"
    try:
        node = _composed(text)
    except (YAMLError, ValueError, RecursionError) as error:
        reason = _reason(error) if isinstance(error, MarkedYAMLError) else str(error)
        raise RecipeError(f"--set {override}: the value is not valid YAML: {reason}; quote what is text") from None
    section[path[-1]] = None if node is None else values.of(node, path, "--set")


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
        return f"missing key '{key}'; expected {expectation(schema_of(fault.path))}"
    huge = isinstance(fault.value, (int, float)) and abs(fault.value) >= 2**31
    got = "an empty text" if fault.value == "" else shown(fault.value)
    return f"{key}: got {got}; expected {expectation(schema_of(fault.path), every_bound=huge)}"


def _siblings(path: KeyPath) -> list[str]:
    section = schema_of(path[:-1])
    return [name for branch in section.get("anyOf", [section]) for name in branch.get("properties", {})]


def _meant(path: KeyPath) -> str | None:
    """The key of the same section whose name is close to an unknown one's."""
    return next(iter(difflib.get_close_matches(str(path[-1]), _siblings(path), n=1)), None)


def _suggestion(path: KeyPath) -> str:
    name = str(path[-1])
    siblings = _siblings(path)
    if name == "<<":
        return "; merging keys with << is YAML 1.1, write them out"
    if name in OTHER_WORDS:
        return f"; a recipe calls it '{OTHER_WORDS[name]}'"
    if meant := _meant(path):
        return f"; did you mean '{meant}'?"
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
    root = _schema()
    node: dict[str, Any] = root
    for part in path:
        branches = list(_branches(node, root))
        if isinstance(part, int):
            node = next((branch["items"] for branch in branches if "items" in branch), {})
        else:
            found = (b.get("properties", {}).get(part) or b.get("additionalProperties") for b in branches)
            node = next((inner for inner in found if isinstance(inner, dict)), {})
    return {"anyOf": branches} if len(branches := list(_branches(node, root))) > 1 else (branches or [{}])[0]


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _branches(node: dict[str, Any], root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        yield from _branches(root["$defs"][node["$ref"].split("/")[-1]], root)
    elif "anyOf" in node:
        for branch in node["anyOf"]:
            yield from _branches(branch, root)
    else:
        yield node


def expectation(schema: dict[str, Any], *, every_bound: bool = False) -> str:
    """What a JSON schema asks for, in words. The bound of 32-bit numbers is worth one only if it is `every_bound`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(expectation(branch, every_bound=every_bound) for branch in schema["anyOf"]))
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
    given = ((word, schema[bound]) for bound, word in bounds.items() if bound in schema)
    said = ((word, limit) for word, limit in given if every_bound or limit != 2**31)
    limits = [f"{word} {int(limit) if limit == int(limit) else limit}" for word, limit in said]
    if "minItems" in schema:
        limits.append(f"of at least {schema['minItems']}")
    if "pattern" in schema:
        limits.append("such as 5GB or 500MB")
    return " ".join([words, " and ".join(limits)]).strip()


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _remove(data: Any, path: KeyPath) -> None:
    if not path:
        return
    for part in path[:-1]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(data, dict):
        data.pop(path[-1], None)
    elif isinstance(data, list) and isinstance(path[-1], int) and path[-1] < len(data):
        del data[path[-1]]

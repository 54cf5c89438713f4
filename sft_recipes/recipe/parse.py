"""Parse a YAML recipe and collect all errors with file and line.

YAML 1.2: `1e-5` is a number, `off` is text. Unknown and duplicate keys are errors.
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
from sft_recipes.recipe.library_names import SYNONYMS
from sft_recipes.recipe.schema import Recipe

KeyPath = tuple[str | int, ...]
_MAX_SHOWN = 50  # wrong keys that are listed; the rest are counted
_MAX_VALUES = 100_000  # values in a recipe after expanding aliases


@dataclass(frozen=True)
class Loaded:
    """A recipe and the location of each of its keys."""

    recipe: Recipe
    source: str
    places: dict[KeyPath, str]

    def place(self, *path: str | int) -> str:
        """Return `file:line` of a key, or of the nearest enclosing section in the file."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.source

    def with_location(self, line: str) -> str:
        """Prefix a line that begins with the name of a key with the key's location; return others unchanged."""
        key = re.match(r"([a-z_]+)((?:\.[a-z_0-9]+)*)[: ]", line)
        if key is None or not (key[1] == "trl" or key[1] + key[2] in field_names()):  # a file may be named train.jsonl
            return line
        return f"{self.place(*(key[1] + key[2]).split('.'))}: {line}"

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Prefix errors about keys with the keys' locations."""
        try:
            yield
        except InputError as error:
            raise type(error)(*map(self.with_location, error.lines)) from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load a recipe; `overrides` are `key=value` as for --set. Raises RecipeError with one line per problem."""
    loaded, problems = parse_recipe(path, overrides)
    if problems or loaded is None:
        raise RecipeError(*problems)
    return loaded


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded | None, list[str]]:
    """Return the recipe and its problems. Wrong keys are removed from the recipe; it is None if they are required."""
    source = str(path)
    values = _Values(source)
    problems = values.problems
    try:
        data: dict[str, Any] = values.convert(_read(Path(path)))
    except RecipeError as error:
        return None, list(error.lines)
    for override in overrides:
        _override(data, override, values)

    try:
        return Loaded(Recipe.model_validate(data), source, values.places), problems
    except ValidationError as invalid:
        errors = _innermost(_field_error(detail, data) for detail in invalid.errors(include_url=False))
    here = Loaded(Recipe.model_construct(), source, values.places)
    # A key whose name has a typo is not reported as missing too.
    intended = {(*error.path[:-1], _intended(error.path)) for error in errors if error.kind == "extra_forbidden"}
    reported = [
        error
        for error in errors
        if error.path not in values.invalid and not (error.kind == "missing" and error.path in intended)
    ]
    reported.sort(key=lambda error: _line(here.place(*error.path)))
    problems += [f"{here.place(*error.path)}: {_describe(error)}" for error in reported[:_MAX_SHOWN]]
    if len(reported) > _MAX_SHOWN:
        problems.append(f"{source}: {len(reported) - _MAX_SHOWN:,} more wrong keys are not listed.")
    for wrong in sorted(errors, key=lambda error: [(isinstance(part, int), part) for part in error.path], reverse=True):
        _remove(data, wrong.path)  # later list items first
    try:
        return Loaded(Recipe.model_validate(data), source, values.places), problems
    except ValidationError:
        return None, problems


# --- YAML ------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> MappingNode:
    """Read the YAML of a recipe. Raises RecipeError."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: file not found. Run `sft-recipe list` to see the bundled recipes.") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot read the file: {error.strerror}. Pass the path of a recipe (YAML)."
        ) from None
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 (byte 0x{content[error.start]:02x}). Save the file as UTF-8."
        raise RecipeError(f"{path}:{_line_number(content[: error.start])}: {reason}") from None
    try:
        node = _compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: invalid YAML: {_reason(error)}.") from None
    except ReaderError as error:
        line = _line_number(text[: error.position].encode())
        raise RecipeError(
            f"{path}:{line}: invalid YAML: the character {text[error.position]!r} is not allowed. Remove it."
        ) from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{path}:1: invalid YAML: {error}.") from None
    except RecursionError:
        raise RecipeError(f"{path}:1: nesting is too deep. A recipe consists of sections with keys.") from None
    if re.match(r"\s*%YAML\s+1\.[01]", text):
        raise RecipeError(f"{path}:1: recipes must be YAML 1.2. Remove the %YAML line.")
    if not isinstance(node, MappingNode):
        raise RecipeError(
            f"{path}:1: a recipe must be a mapping of keys. Run `sft-recipe list` to see the bundled recipes."
        )
    return node


def _compose(text: str) -> Node | None:
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # redefining an anchor is allowed, and the warning has eight lines
    node: Node | None = yaml.compose(text)
    return node


def _line_number(before: bytes) -> int:
    return before.count(b"\n") + 1


def _reason(error: MarkedYAMLError) -> str:
    return ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)


@dataclass
class _Values:
    """Converter from YAML nodes to Python values that records the location and the problems of each key."""

    source: str
    places: dict[KeyPath, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    invalid: set[KeyPath] = dataclasses.field(default_factory=set)  # keys whose value could not be converted
    yaml: YAML = dataclasses.field(default_factory=lambda: YAML(typ="safe", pure=True))

    def convert(self, node: Node, path: KeyPath = (), place: str | None = None) -> Any:
        """Convert a node; `place` replaces its line as the location. Raises RecipeError if aliases expand without end."""
        self._left = _MAX_VALUES
        try:
            return self._value(node, path, place)
        except RecursionError:
            where = place or self.source
            raise RecipeError(f"{where}: an alias (*) refers to itself. Write its value out.") from None

    def _value(self, node: Node, path: KeyPath, place: str | None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RecipeError(
                f"{place or self.source}: more than {_MAX_VALUES:,} values after expanding aliases (*). Remove some."
            )
        here = place or f"{self.source}:{node.start_mark.line + 1}"
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind not in _KINDS[type(node)]:
            return self._refuse(path, here, f"YAML tags are not supported (got {node.tag}). Remove the tag.")
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
                    self._refuse(path, there, "keys must be text.")
                continue
            inner = (*path, key)
            if key in mapping:
                self.problems.append(
                    f"{there}: duplicate key '{_dotted(inner)}' (first at {self.places[inner]}). Remove one."
                )
                continue
            self.places[inner] = there
            if inner in _SECTIONS and isinstance(value_node, ScalarNode) and value_node.value == "":
                self.problems.append(
                    f"{there}: section '{key}' is empty. Write `{key}: {{}}` for its defaults, or remove it."
                )
                continue
            mapping[key] = self._value(value_node, inner, place)
        return mapping

    def _scalar(self, node: ScalarNode, kind: str, path: KeyPath, here: str) -> Any:
        if kind in _TEXT:
            try:  # JSON escapes characters beyond 16 bits as surrogate pairs
                return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                return self._refuse(
                    path, here, f"invalid Unicode: unpaired surrogate (got {node.value!a}). Write the character itself."
                )
        try:
            return self.yaml.constructor.construct_object(node)
        except (YAMLError, ArithmeticError, LookupError, ValueError):
            return self._refuse(
                path, here, f"expected {_KIND_WORDS[kind]} (got {shown(node.value)}). Quote the value if it is text."
            )

    def _refuse(self, path: KeyPath, here: str, what: str) -> None:
        self.invalid.add(path)
        self.problems.append(f"{here}: {_dotted(path) + ': ' if path else ''}{what}")


_TEXT = ("str", "timestamp", "merge", "value")  # YAML 1.1 types that are text in YAML 1.2
_KIND_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "null": "null"}
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
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set train.learning_rate=1e-4.")
    section = data
    for depth, part in enumerate(path[:-1], start=1):
        if part not in section:
            values.places[path[:depth]] = "--set"
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: '{part}' is not a section.")
        section = inner
    for known in [known for known in values.places if known[: len(path)] == path]:
        del values.places[known]
    values.places[path] = "--set"
    try:
        node = _compose(text)
    except (YAMLError, ValueError, RecursionError) as error:
        reason = _reason(error) if isinstance(error, MarkedYAMLError) else str(error)
        raise RecipeError(f"--set {override}: invalid YAML value: {reason}. Quote the value if it is text.") from None
    section[path[-1]] = None if node is None else values.convert(node, path, "--set")


def _line(place: str) -> int:
    number = place.rpartition(":")[2]
    return int(number) if number.isdigit() else 0


# --- Pydantic's errors as messages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FieldError:
    path: KeyPath
    kind: str  # pydantic's error type
    value: Any


def _field_error(detail: Any, data: dict[str, Any]) -> _FieldError:
    """Convert a pydantic error; its location loses the names of union branches, which are not keys of the recipe."""
    path: list[str | int] = []
    at: Any = data
    for index, part in enumerate(detail["loc"]):
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at)):
            at = at[part]
        elif not (detail["type"] == "missing" and index == len(detail["loc"]) - 1):
            continue
        path.append(part)
    return _FieldError(tuple(path), detail["type"], detail["input"])


def _innermost(errors: Iterable[_FieldError]) -> list[_FieldError]:
    """Keep one error per key: a union reports one per branch, and one about the whole if a part is wrong."""
    by_path = {error.path: error for error in errors}
    return [
        error
        for path, error in by_path.items()
        if not any(other != path and other[: len(path)] == path for other in by_path)
    ]


_EXAMPLES = {
    "model": "model: {name: HuggingFaceTB/SmolLM2-135M}",
    "model.name": "name: HuggingFaceTB/SmolLM2-135M",
    "data": "data: {train: data/train.jsonl}",
    "data.train": "train: data/train.jsonl",
    "output_dir": "output_dir: runs/mine",
}


def _describe(error: _FieldError) -> str:
    key = _dotted(error.path)
    if error.kind == "extra_forbidden":
        return f"unknown key '{key}'{_suggestion(error.path)}"
    if error.kind == "missing":
        kind = "section" if error.path in _SECTIONS else "key"
        example = f", for example `{_EXAMPLES[key]}`" if key in _EXAMPLES else ""
        return f"missing required {kind} '{key}'. Add it{example}."
    huge = isinstance(error.value, (int, float)) and abs(error.value) >= 2**31
    got = "an empty string" if error.value == "" else shown(error.value)
    return f"{key}: expected {expectation(schema_of(error.path), every_bound=huge)} (got {got})."


def _siblings(path: KeyPath) -> list[str]:
    section = schema_of(path[:-1])
    return [name for branch in section.get("anyOf", [section]) for name in branch.get("properties", {})]


def _intended(path: KeyPath) -> str | None:
    """Return the key of the same section whose name is closest to an unknown one."""
    return next(iter(difflib.get_close_matches(str(path[-1]), _siblings(path), n=1)), None)


def _suggestion(path: KeyPath) -> str:
    name = str(path[-1])
    siblings = _siblings(path)
    if name == "<<":
        return ". Merge keys are YAML 1.1: write the keys out."
    if name in SYNONYMS:
        return f". Use '{SYNONYMS[name]}' instead."
    if intended := _intended(path):
        return f". Did you mean '{_dotted((*path[:-1], intended))}'?"
    everywhere = {field.split(".")[-1]: field for field in field_names()}
    if close := difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.8):
        return f". Did you mean '{everywhere[close[0]]}'?"
    return f". Expected one of {', '.join(siblings)}." if siblings else "."


def field_names() -> list[str]:
    """List all keys of a recipe, dotted."""
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
    """Return the JSON schema of a key, {} if there is none."""
    root = _schema()
    node: dict[str, Any] = root
    for part in path:
        branches = list(_branches(node, root))
        if isinstance(part, int):
            node = next((branch["items"] for branch in branches if "items" in branch), {})
        else:
            inners = (b.get("properties", {}).get(part) or b.get("additionalProperties") for b in branches)
            node = next((inner for inner in inners if isinstance(inner, dict)), {})
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
    """Describe the values that a JSON schema allows. The limit of 32-bit integers is named only with `every_bound`."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(expectation(branch, every_bound=every_bound) for branch in schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    words = {
        "string": "text",
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "array": "a non-empty list" if "minItems" in schema else "a list",
        "object": "a section" if "properties" in schema else "a mapping",
    }.get(str(schema.get("type")), "another value")
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    given = ((sign, schema[bound]) for bound, sign in bounds.items() if bound in schema)
    named = ((sign, limit) for sign, limit in given if every_bound or limit != 2**31)
    limits = [f"{sign} {int(limit) if limit == int(limit) else limit}" for sign, limit in named]
    if "pattern" in schema:
        limits.append(
            f"such as {' or '.join(schema['examples'])}" if "examples" in schema else "of letters, digits and _"
        )
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

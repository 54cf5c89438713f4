"""Read the tools' tables and apply them to a config. A tool is one file: tables/NAME.yaml.

`rules` maps a key to a rule, or to a list of rules of which the first that applies is taken. A rule that is just a word
is the recipe's key; `Rule` has the fields of the others. Several keys have spaces between them, `section.*` is a section
with all that is in it, and the most specific key wins. Rules run in the order of the table; `include` inserts groups of
the shared training_arguments.yaml. `if`, `value` and `catalog` are Jinja expressions for what the other fields cannot say:
with the config's keys, the key's `value` and the functions of `Converter.evaluate`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment
from ruamel.yaml import YAML

from sft_recipes.convert.draft import Draft, Entry
from sft_recipes.recipe.library_names import optimizers, schedulers
from sft_recipes.recipe.parse import schema_of

FOLDER = Path(__file__).parent / "tables"
SHARED = Path(__file__).parent / "training_arguments.yaml"
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_OFF = (False, 0, "none", "None", "no")
_SOURCE = ("path", "name", "split", "weight", "format", "columns", "max_samples")
_EXPRESSIONS = SandboxedEnvironment()


@dataclass(frozen=True)
class Rule:
    """What happens to a key."""

    keys: str = ""  # of `refuse` (names) and `guards` (a regular expression)
    when: Any = None  # a test of the value, or {key: test}; see `Converter.holds`
    empty: bool = False  # applies to an empty value, and only to one
    off: list[Any] | None = None  # values that ask for nothing
    if_: str = ""  # an expression; the rule applies if it is true
    convert: str = ""  # name in CONVERTERS
    value: str = ""  # an expression for the value; None: the value cannot be converted
    values: Any = None  # {theirs: ours}, a list of values that are ours too, or the name of one in `_known`
    to: Any = None  # the recipe's key, or {key: value}; `.key` is of the source of data that is being read
    note: str = ""  # added to what is reported
    not_needed: str = ""
    unsupported: str = ""  # also of a value that is not among `values`
    also: "Sequence[Rule]" = ()  # applied to the same key
    assume: Mapping[str, Any] = field(default_factory=dict)  # recipe keys that get a value if they have none
    comment: str = ""  # beside what is assumed
    about: str = ""  # note about the recipe as a whole
    each: str = ""  # the section of `parts` with the rules for each source in a list, of which `to` is made
    catalog: str = ""  # an expression for the file that describes the sources that a list names
    add: Mapping[str, Any] = field(default_factory=dict)  # keys of each source
    only: str = ""  # names of the leaves that report `to`
    agree: Mapping[str, Any] = field(default_factory=dict)  # recipe keys on which the sources must agree

    def targets(self) -> list[str]:
        """Return the keys that the rule, or one applied with it, may set."""
        sections = [] if self.to or not isinstance(self.values, Mapping) else list(self.values.values())
        keys = [self.to] if isinstance(self.to, str) else [key for each in (self.to or {}, *sections) for key in each]
        keys += [*self.assume, *self.agree, *(key for also in self.also for key in also.targets())]
        return [key.removesuffix("+") for key in keys]


Rules = Mapping[str, Sequence[Rule]]


@dataclass(frozen=True, eq=False)
class Table:
    """A tool: how its configs are recognized, and what happens to their keys."""

    name: str
    rules: Rules
    signs: str = ""  # keys, of which a config has at least two
    marker: str = ""  # or a key in any section
    references: bool = False  # ${section.key} stands for the value of another key
    refuse: Sequence[Rule] = ()
    guards: Sequence[Rule] = ()  # come before all rules
    parts: Mapping[str, Rules] = field(default_factory=dict)
    notes: Sequence[Rule] = ()
    required: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)  # what $name stands for in notes


def names() -> list[str]:
    """Return the tools' names, as --from takes them."""
    return sorted(file.stem.replace("_", "-") for file in FOLDER.glob("*.yaml"))


@cache
def _load(file: Path) -> Mapping[str, Any]:
    return dict(YAML(typ="safe", pure=True).load(file))


@cache
def table(name: str) -> Table:
    """Load the table of a tool."""
    read = {**_load(FOLDER / f"{name.replace('-', '_')}.yaml")}
    for section in ("refuse", "guards", "notes"):
        read[section] = [_rule(each) for each in read.get(section, [])]
    read["parts"] = {part: rules_of(found) for part, found in read.get("parts", {}).items()}
    return Table(**read | {"rules": rules_of(read["rules"])})


def rules_of(section: Mapping[str, Any]) -> dict[str, list[Rule]]:
    """Return the rules for each key of a section of a table."""
    rules: dict[str, list[Rule]] = {}
    for names, said in section.items():
        if names.split()[0] == "include":  # groups of the shared rules, unless the tool has its own
            for group in said:
                rules = {**rules, **rules_of(_load(SHARED)[group]), **rules}
        else:
            rules |= {name: [_rule(each) for each in items(said)] for name in names.split()}
    return rules


def _rule(said: Any) -> Rule:
    if isinstance(said, str):
        return Rule(to=said)
    also = [_rule(each) for each in items(said.get("also", []))]
    return Rule(**{"if_" if name == "if" else name: value for name, value in said.items()} | {"also": also})


class Converter:
    """Applies a tool's table to a config."""

    def __init__(self, draft: Draft, table: Table) -> None:
        self.draft, self.table = draft, table
        self.source: dict[str, Entry] = {}  # the source of data that is being read, by its keys
        self.item: Mapping[Any, Any] | None = None  # what the config says of it
        self.into = ""  # the recipe's key that it is for

    def refusal(self) -> str | None:
        """Return why the config cannot be converted, or None."""
        for rule in self.table.refuse:
            for key in rule.keys.split():
                if self.holds(value := self.look(key), "given" if rule.when is None else rule.when):
                    return str(self.fill(rule.unsupported, key, value))
        return None

    def run(self) -> None:
        """Give every key that the table knows its outcome."""
        for guard in self.table.guards:
            for key in self.draft.left():
                if re.fullmatch(guard.keys, key):
                    self._try(key, self.draft.keys[key], guard)
        self.apply(self.table.rules)
        for rule in self.table.notes:
            self._try("", True, rule)

    def complete(self) -> None:
        """Give the recipe what it requires, and the tool's defaults."""
        for to, key in self.table.required.items():
            self.draft.need(to, f"{key} is missing in the file")
        for to, value in self.table.defaults.items():
            rule = value if isinstance(value, Mapping) and "value" in value else {"value": value}
            if self.holds(None, rule.get("when")):
                self.draft.assume(to, rule["value"], rule.get("comment", ""))

    def apply(self, rules: Rules, section: str = "") -> None:
        """Apply rules to the keys without an outcome, or to those that begin with `section`."""
        order = {name: number for number, name in enumerate(rules)}
        found: dict[str, str] = {}  # the name of the rule by the key or section that it is for
        for key in self.draft.keys:
            if key.startswith(section):
                for name, target in _names(key.removeprefix(section)):
                    if name in rules:
                        found.setdefault(section + target, name)
                        break
        for key, name in sorted(found.items(), key=lambda item: order[item[1]]):
            outcomes = [self.draft.outcomes.get(leaf) for leaf in self.draft.under(key)]
            if any(outcome is None or outcome.kind == "empty" for outcome in outcomes):
                value, last = self.draft.keys.get(key, self.draft.get(key)), rules[name][-1]
                any(self._try(key, value, rule, last=rule is last) for rule in rules[name])

    def _try(self, key: str, value: Any, rule: Rule, last: bool = True) -> bool:
        """Apply a rule, unless its conditions do not hold and another can."""
        if rule.empty != (value in _EMPTY) or not self.holds(value, rule.when):
            return False
        if rule.if_ and not self.evaluate(rule.if_, value):
            return False
        ours = CONVERTERS[rule.convert](value) if rule.convert else value
        if (
            rule.value
            and (ours := self.evaluate(rule.value, value)) is None
            and (rule.to is None or not rule.unsupported)
        ):
            return False
        usual = _OFF if rule.unsupported and rule.to is None and rule.when is None else ()
        if value in (usual if rule.off is None else rule.off):
            self.draft.not_needed(key, "off")
        elif rule.values is not None and not _among(ours, known := _known(rule.values)):
            if not last and not rule.unsupported:
                return False
            note = rule.unsupported or f"{rule.to} keeps its default. Set it."
            self.draft.unsupported(key, self.fill(note, key, value, known=", ".join(map(str, known))))
        elif rule.value and ours is None:
            self.draft.unsupported(key, self.fill(rule.unsupported, key, value))
        elif rule.each:
            self._each(key, ours, rule)
        else:
            if isinstance(rule.values, Mapping):
                ours = [rule.values[item] for item in ours] if isinstance(ours, list) else rule.values[ours]
            said = ours if rule.to is None and rule.values else rule.to
            for to, constant in (said if isinstance(said, Mapping) else {said: "$value"} if said else {}).items():
                self.carry(key, to, self.fill(constant, key, ours), self.fill(rule.note, key, value))
            if rule.not_needed:
                self.draft.not_needed(key, self.fill(rule.not_needed, key, value))
            if rule.unsupported and rule.values is None and not (rule.value and rule.to):
                self.draft.unsupported(key, self.fill(rule.unsupported, key, ours))
        for to, assumed in rule.assume.items():
            entry = Entry(assumed, self.fill(rule.comment, key, value) or f"{self.table.name}'s default")
            self.draft.entries.setdefault(to, entry)
        if rule.about and (about := self.fill(rule.about, key, value)) not in self.draft.notes:
            self.draft.notes.append(about)
        for also in rule.also:
            self._try(key, value, also)
        return True

    def carry(self, key: str, to: str, value: Any, note: str = "") -> None:
        """Set a key of the recipe, or, for `.key`, of the source that is being read."""
        if to.endswith("+"):
            before = self.draft.entries.pop(to := to[:-1], Entry([], ""))
            joined = list(dict.fromkeys([*before.value, *items(value)]))
            self.draft.carry(key, to, joined, note)
            if to in self.draft.entries:
                self.draft.entries[to] = Entry(joined, ", ".join(filter(None, (before.comment, key))))
        elif to.startswith("."):
            self.source[to[1:]] = Entry(value, key)
            self.draft.not_needed(key, f"in {self.into}")
        else:
            self.draft.carry(key, to, value, note)

    def _each(self, key: str, value: Any, rule: Rule) -> None:
        """Read the sources of data in a section or list, or those that a list names."""
        found: list[tuple[str, Any]] = []  # sources, each with the config's key
        read: list[dict[str, Entry]] = []
        unknown: list[str] = []
        catalog = self.evaluate(rule.catalog, value) if rule.catalog else None
        for number, item in enumerate(items(value)):
            here = f"{key}[{number}]" if isinstance(value, list) and not rule.catalog else key
            if rule.to == "data.eval" and found:
                self.draft.unsupported(here, "data.eval is a single source. Merge the rows into one file.")
            elif rule.catalog:
                source = self._described(str(item), catalog, rule)
                unknown += [str(item)] if source is None else []
                found.append((here, source or str(item)))
            elif isinstance(item, Mapping):
                self.source, self.item, self.into = {}, item, rule.to
                self.apply(self.table.parts[rule.each], f"{here}.")
                read.append(self.source)
                if source := source_of(self.source):
                    found.append((here, source))
        self.source, self.item, self.into = {}, None, ""
        if unknown and catalog:
            self.draft.notes.append(f"{rule.to}: {', '.join(unknown)}: not found in {catalog}. Set path or hub id.")
        if added := self.fill(rule.add, key, value):
            found = [(here, {**({"path": it} if isinstance(it, str) else it), **added}) for here, it in found]
        if found and rule.to == "data.eval":
            self.draft.carry(found[0][0], rule.to, found[0][1], only=rule.only)
        elif found:
            sources = [
                {**source, "path": path} if isinstance(source, dict) else path
                for _, source in found
                for path in items(source["path"] if isinstance(source, dict) else source)
            ]
            self.draft.carry(key, rule.to, sources, only=rule.only)
        for to, policy in rule.agree.items():
            said = [entries[to] for entries in read if to in entries]
            if not said or to in self.draft.entries or not self.holds(None, policy.get("when")):
                continue
            one = all(entry.value == said[0].value for entry in said)
            if one and (len(said) == len(found) or not policy.get("all")):
                if policy.get("carry"):
                    self.draft.carry(said[0].comment, to, said[0].value)
                else:
                    self.draft.assume(to, said[0].value)
            elif "otherwise" in policy:
                self.draft.assume(to, policy["otherwise"])
            else:
                self.draft.notes.append(policy["about"])

    def _described(self, name: str, catalog: Any, rule: Rule) -> Any:
        """Return the source that a catalog, a JSON file, describes, or None."""
        said = None
        with suppress(OSError, ValueError, AttributeError):
            said = json.loads(Path(str(catalog)).read_text(encoding="utf-8")).get(name)
        if not isinstance(said, Mapping):
            return None
        reader = Converter(Draft(name, said), self.table)
        reader.item, reader.into = {**said, "folder": Path(str(catalog)).parent}, rule.to
        reader.apply(self.table.parts[rule.each])
        if ignored := ", ".join(sorted(reader.draft.left())):
            self.draft.notes.append(f"{rule.to}: {name}: ignored in {catalog}: {ignored}. Check with preview.")
        return source_of(reader.source) or None

    # --- Conditions and texts ------------------------------------------------------------------------------------------

    def look(self, name: str) -> Any:
        """Return a value of the config, recipe (`=key`) or source (`.key`); of `one|other`, the first that is on."""
        if name == "into":
            return self.into
        entries = {".": self.source, "=": self.draft.entries}.get(name[0])
        if entries is not None:
            return entries[name[1:]].value if name[1:] in entries else None
        at = self.draft if self.item is None else self.item
        found = [(self.draft if "." in part else at).get(part) for part in name.split("|")]
        return next(filter(None, found), next((value for value in found if value is not None), None))

    def holds(self, value: Any, when: Any) -> bool:
        """Return whether a value passes a test, or the values of keys all pass theirs."""
        if isinstance(when, Mapping) and not when.keys() & {"not", "matches"}:
            return all(_passes(self.look(key), test) for key, test in when.items())
        return when is None or _passes(value, when)

    def evaluate(self, expression: str, value: Any) -> Any:
        """Return the value of a Jinja expression, or None if it has none."""

        def per_epoch(times: Any) -> float | None:
            """Convert a number of times per epoch, or `epoch`, to a fraction of the run."""
            runs = (1 if times == "epoch" else number(times)) * (self.look("=train.epochs") or 1)
            return None if self.look("=train.max_steps") or runs < 1 else float(f"{1 / runs:.6g}")

        def prefixed(values: Any, prefix: str) -> list[str]:
            return [f"{prefix}/{item}" for item in items(values)]

        def matching(values: Any, pattern: str) -> str | None:
            return ", ".join(str(item) for item in items(as_list(values)) if re.search(pattern, str(item))) or None

        names = {str(key): inner for key, inner in (self.item or self.draft.config).items()}
        names |= {
            "value": value,
            "number": number,
            "part_of": part_of,
            "per_epoch": per_epoch,
            "prefixed": prefixed,
            "matching": matching,
        }
        with suppress(TemplateError, TypeError, ArithmeticError, ValueError):
            return _EXPRESSIONS.compile_expression(expression)(names)
        return None

    def fill(self, text: Any, key: str, value: Any, **words: str) -> Any:
        """Fill in $value, its items $0 and $1, $key, $into, the table's words, and $name for a value of the config."""
        if isinstance(text, list):
            return [self.fill(inner, key, value) for inner in text]
        if isinstance(text, Mapping):
            filled = {name: self.fill(inner, key, value) for name, inner in text.items()}
            return {name: inner for name, inner in filled.items() if inner is not None}
        if not isinstance(text, str) or "$" not in text:
            return text
        if text in ("$value", "$0", "$1"):  # or an item of it
            return value if text == "$value" else number(value[int(text[1])])
        if re.fullmatch(r"\$\w+", text):
            return self.look(text[1:])
        words |= {"key": key, "value": value, "last": str(value).rpartition(".")[2], "into": self.into}
        return Template(text).safe_substitute({**self.table.words, **(self.item or {}), **words})


def _names(key: str) -> Iterator[tuple[str, str]]:
    """Yield the names that a rule for a key can have, the most specific first, each with the key or section it is for."""
    yield from ((key, key), (f"{key}.*", key))
    for found in reversed(list(re.finditer(r"[.\[]", key))):
        yield f"{key[: found.start()]}.*", key
        yield key[: found.start()], key[: found.start()]


def _passes(value: Any, test: Any) -> bool:
    """Return whether a value is what a test names: a word below, a value, a list of values, or a list with one of them."""
    if isinstance(test, str) and test in TESTS:
        return TESTS[test](value)
    if isinstance(test, Mapping):
        if "not" in test:
            return not _passes(value, test["not"])
        return value is not None and any(re.search(test["matches"], str(item)) for item in items(value))
    return value in items(test) or any(item in items(test) for item in items(value))


def _known(values: Any) -> Any:
    """Return the values that a rule takes."""
    if values == "trackers":
        return schema_of(("log", "to"))["items"]["enum"]
    return {"optimizers": optimizers, "schedulers": schedulers}[values]() if isinstance(values, str) else values


def _among(value: Any, known: Any) -> bool:
    return all(isinstance(item, (str, int, float)) and item in known for item in items(value))


def source_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return a source of data as it stands in a recipe; empty without a path."""
    source: dict[str, Any] = {}
    for key, entry in entries.items():
        if key.startswith("columns."):
            ours = key.removeprefix("columns.")
            if isinstance(entry.value, str) and entry.value not in (ours, "conversations"):
                source.setdefault("columns", {})[ours] = entry.value
        elif not key.startswith("data.") and entry.value not in (None, {}, "train", 1):
            source[key] = entry.value
    return {key: source[key] for key in _SOURCE if key in source} if "path" in source else {}


# --- Values ------------------------------------------------------------------------------------------------------------


def number(value: Any) -> Any:
    """Convert text such as `2e-5`, which is not a number in YAML 1.1; whole numbers become int."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def items(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as its one item."""
    return value if isinstance(value, list) else [value]


def as_list(value: Any) -> Any:
    """Split `a,b` into a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def interval(value: Any) -> Any:
    """Convert a number of steps or a fraction of the run; 0 becomes null."""
    value = number(value)
    return value or None if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def part_of(split: Any) -> tuple[str | None, float | None]:
    """Return a split's name and the share that is meant: ("train", 0.2) of `train[:20%]`, ("train", None) of `train`.

    The name is None if the value is not a split, or the part is not a percentage.
    """
    found = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split) if isinstance(split, str) else None
    if found is None:
        return None, None
    share = (int(found[3] or 100) - int(found[2] or 0)) / 100
    return found[1], share if 0 < share < 1 else None


CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "number": number,
    "list": as_list,
    "interval": interval,
    "bool": bool,
    "not": lambda value: not value,
    "double": lambda value: 2 * value if isinstance(value, int) else value,
    "names": lambda value: [name for name in items(value) if name not in (None, "none")],
    "component": lambda value: str(value).rpartition(".")[2],
    "directory": lambda value: value.rstrip("/") or value if isinstance(value, str) else value,
    "pairs": lambda value: ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else value,
    "split": lambda value: part_of(value)[0],
    "first": lambda value: value[0] if isinstance(value, list) else value,
    "shares": lambda value: [{"path": k, "weight": v} for k, v in value.items()] if isinstance(value, dict) else value,
    "share": lambda value: part_of(value)[1],
}
TESTS: Mapping[str, Callable[[Any], bool]] = {
    "given": lambda value: value is not None,
    "missing": lambda value: value is None,
    "on": bool,
    "off": lambda value: not value,
    "whole": lambda value: isinstance(number(value), int) and value is not True and number(value) > 0,
    "positive": lambda value: isinstance(number(value), (int, float)) and number(value) > 0,
    "several": lambda value: isinstance(value, list) and len(value) > 1,
    "a pair": lambda value: isinstance(value, list) and len(value) == 2,
    "a text": lambda value: isinstance(value, str),
    "a split": lambda value: part_of(value)[0] is not None and part_of(value)[1] is None,
    "a part": lambda value: part_of(value)[1] is not None,
}

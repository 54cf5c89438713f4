"""A recipe in the making: which key of another tool's config goes where, and what became of each."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from pydantic import ValidationError

from sft_recipes.errors import shown
from sft_recipes.recipe.load import expectation, schema_of, section_class
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.upstream import OWNED, sft_config_fields

FILL_IN = "FILL_IN"  # stands where a recipe needs a value that the config does not have
Kind = Literal["lacking", "becomes", "default", "needless", "unknown", "empty"]  # the worst first
_KINDS: tuple[Kind, ...] = get_args(Kind)
_SECRET = re.compile(r"(hub_token|api_key|secret|password)$")
_MINIMAL = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}


@dataclass(frozen=True)
class Fate:
    """What became of a key."""

    kind: Kind
    words: str = ""


@dataclass(frozen=True)
class Entry:
    """A value of the recipe, and where it is from."""

    value: Any
    comment: str


@dataclass
class Draft:
    """A config, and the recipe that comes of it. Keys are dotted, those of list items with their number: datasets[0].path."""

    tool: str
    config: Mapping[Any, Any]
    entries: dict[str, Entry] = field(default_factory=dict)  # by the recipe's key
    fates: dict[str, Fate] = field(default_factory=dict)  # by the config's key
    remarks: list[str] = field(default_factory=list)  # about the recipe as a whole

    def __post_init__(self) -> None:
        self.keys = dict(leaves(self.config))
        for key, value in self.keys.items():
            if value in (None, "", [], {}):
                self.fates[key] = Fate("empty")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which can be a section; `default` where it is not there or null."""
        at: Any = self.config
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return default if at is None else at

    def left(self) -> list[str]:
        """Keys of which nothing has been said yet."""
        return [key for key in self.keys if key not in self.fates]

    # --- What becomes of a key, or of all keys in a section ------------------------------------------------------------

    def carry(self, key: str, to: str, value: Any, note: str = "", only: tuple[str, ...] = ()) -> None:
        """The recipe's key `to` gets `value`, because of `key`; of a list or section, said of the keys `only`."""
        if problem := _unfit(to, value):
            self.lack(key, problem)
        elif to in self.entries and self.entries[to].value != value:
            self.lack(key, f"{to} is from {self.entries[to].comment} already; look which of the two is meant")
        else:
            self.entries[to] = Entry(value, f"{key}{'; ' + note if note else ''}")
            usual = to.partition(".")[0] != "trl" and value == default_of(to)
            words = f"in {to}" if only else f"{to}: {in_words(value)}{'; ' + note if note else ''}"
            self._say(key, "default" if usual else "becomes", words, only)

    def needless(self, key: str, why: str) -> None:
        """Nothing has to be said of it in a recipe."""
        self._say(key, "needless", why)

    def lack(self, key: str, todo: str) -> None:
        """A recipe cannot say it; `todo` is what the user can do."""
        self._say(key, "lacking", todo)

    def leave(self, *keys: str, why: str) -> None:
        """Those of which nothing has been said yet are needless."""
        for key in keys:
            for leaf in self.under(key):
                if leaf not in self.fates:
                    self.needless(leaf, why)

    def _say(self, key: str, kind: Kind, words: str, only: tuple[str, ...] = ()) -> None:
        for leaf in self.under(key):
            if only and leaf.rpartition(".")[2] not in only:
                continue
            before = self.fates.get(leaf)
            if before is None or before.kind == "empty":
                self.fates[leaf] = Fate(kind, words)
            elif "needless" in (before.kind, kind):
                self.fates[leaf] = Fate(kind, words) if before.kind == "needless" else before
            elif before.words != words:  # one key that says two things
                self.fates[leaf] = Fate(min(before.kind, kind, key=_KINDS.index), f"{before.words}; {words}")

    def under(self, key: str) -> list[str]:
        return [leaf for leaf in self.keys if leaf == key or leaf.startswith((f"{key}.", f"{key}["))]

    # --- What no key says ----------------------------------------------------------------------------------------------

    def assume(self, to: str, value: Any, comment: str = "") -> None:
        """The tool's own default, where no key says otherwise and the default here is another."""
        if to not in self.entries and value != default_of(to):
            self.entries[to] = Entry(value, comment or f"{self.tool}'s default")

    def need(self, to: str, what: str) -> None:
        """A recipe needs it, and the config does not have it."""
        if to not in self.entries:
            self.entries[to] = Entry(FILL_IN, what)
            self.remarks.append(f"{to}: fill it in: {what}")

    def value(self, to: str) -> Any:
        """What the recipe says by now."""
        return self.entries[to].value if to in self.entries else default_of(to)


def leaves(section: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with a value that is no section, dotted."""
    for key, value in section.items():
        plain = isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w-]*", key)
        yield from _leaf(f"{path}{key if plain else repr(key)}", value)


def _leaf(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        yield from leaves(value, f"{path}.")
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for number, item in enumerate(value):
            yield from _leaf(f"{path}[{number}]", item)
    else:
        yield path, value


def in_words(value: Any) -> str:
    """A value as YAML would have it, in a few words."""
    if isinstance(value, list):
        return shown([str(item) if isinstance(item, str) else item for item in value])
    return value if isinstance(value, str) and len(value) <= 60 else shown(value)


def shown_of(key: str, value: Any) -> str:
    """The value of a config's key in a few words; of a token or password, not."""
    return "(not shown)" if _SECRET.search(key) else in_words(value)


def default_of(to: str) -> Any:
    """The default of a recipe's key; None where it has none."""
    section, _, name = to.partition(".")
    fields = Recipe.model_fields
    if name:
        inner = section_class(fields[section].annotation)
        fields = inner.model_fields if inner else {}
    found = fields.get(name or section)
    return None if found is None or found.is_required() else found.default


def _unfit(to: str, value: Any) -> str | None:
    """Why a recipe would not take a value for a key."""
    section, _, name = to.partition(".")
    if section == "trl":
        return None if name in sft_config_fields() and name not in OWNED else f"no field of SFTConfig is called {name}"
    tried: dict[str, Any] = {**_MINIMAL, section: {**_MINIMAL.get(section, {}), name: value} if name else value}  # type: ignore[dict-item]
    try:
        Recipe.model_validate(tried)
    except ValidationError:
        return f"{to} takes {expectation(schema_of(tuple(to.split('.'))))}; set it"
    return None


# --- Rules: what becomes of a key by itself ----------------------------------------------------------------------------


class Rule(Protocol):
    """What becomes of a key."""

    def apply(self, draft: Draft, key: str, value: Any) -> None: ...

    @property
    def says(self) -> str:
        """For the tables of docs/convert.md."""
        ...


@dataclass(frozen=True)
class To:
    """It has a key here, maybe with other words for its values. One that is `off` asks for nothing."""

    key: str
    values: Mapping[Any, Any] | Callable[[Any], Any] | None = None
    off: tuple[Any, ...] = ()

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        if value in self.off:
            draft.needless(key, "off, as here")
            return
        if callable(self.values):
            value = self.values(value)
        elif self.values is not None:
            if not isinstance(value, (str, int, float)) or value not in self.values:
                draft.lack(key, f"{self.key} is left at its default; set it")
                return
            value = self.values[value]
        draft.carry(key, self.key, value)

    @property
    def says(self) -> str:
        return f"`{self.key}`"


@dataclass(frozen=True)
class Needless:
    """A recipe need not say it."""

    why: str

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        draft.needless(key, self.why)

    @property
    def says(self) -> str:
        return f"not needed: {self.why}"


@dataclass(frozen=True)
class Lacking:
    """A recipe cannot say it. One that is off (or has the value `off`) asks for nothing."""

    todo: str
    off: tuple[Any, ...] = (False, 0, "none", "None", "no")

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        if value in self.off:
            draft.needless(key, "off, as here")
        else:
            draft.lack(key, self.todo)

    @property
    def says(self) -> str:
        return f"no counterpart: {self.todo}"


Rules = Mapping[str, Rule]


def all_of(keys: str, rule: Rule) -> dict[str, Rule]:
    """One rule for several keys."""
    return dict.fromkeys(keys.split(), rule)


def follow(draft: Draft, rules: Rules, section: str = "") -> None:
    """Apply the rules to the keys that are left, or to those of a section. `name.*` is one for `name` and all in it."""
    for key in draft.left():
        inside = key.removeprefix(f"{section}.") if section else key
        if section and inside == key:
            continue
        if rule := rules.get(inside) or rules.get(f"{inside}.*") or _of_section(rules, inside):
            rule.apply(draft, key, draft.keys[key])


def _of_section(rules: Rules, key: str) -> Rule | None:
    """The rule of the innermost section around a key that has one."""
    ends = [found.start() for found in re.finditer(r"[.\[]", key)]
    return next((rules[f"{key[:end]}.*"] for end in reversed(ends) if f"{key[:end]}.*" in rules), None)


# --- Values ------------------------------------------------------------------------------------------------------------


def number(value: Any) -> Any:
    """`2e-5` is text in YAML 1.1; whole numbers in front of `.0` are whole."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def listed(value: Any) -> Any:
    """`a,b` is a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def part_of(split: Any) -> tuple[str | None, float | None]:
    """A split's name, and which part of it is meant: ("train", 0.2) of `train[:20%]`, ("train", None) of `train`.

    The name is None where it is no split, or a part that is not a percentage.
    """
    found = re.fullmatch(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split) if isinstance(split, str) else None
    if found is None:
        return None, None
    share = (int(found[3] or 100) - int(found[2] or 0)) / 100
    return found[1], share if 0 < share < 1 else None


def interval(value: Any) -> Any:
    """Steps, or a fraction of the run; null where it is 0."""
    value = number(value)
    return value or None if isinstance(value, (int, float)) and not isinstance(value, bool) else value

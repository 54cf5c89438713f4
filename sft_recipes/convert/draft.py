"""A recipe under construction, with an outcome for every key of the config that it is converted from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import ValidationError

from sft_recipes.errors import shown
from sft_recipes.recipe.library_names import OWNED, sft_config_fields
from sft_recipes.recipe.parse import expectation, schema_of, section_class
from sft_recipes.recipe.schema import Recipe

FILL_IN = "FILL_IN"  # placeholder for a required value that the config does not have
Kind = Literal["unsupported", "becomes", "default", "not_needed", "unknown", "empty"]  # the worst first
_KINDS: tuple[Kind, ...] = get_args(Kind)
_SECRET = re.compile(r"(hub_token|api_key|secret|password)$")
_MINIMAL = {"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"}


@dataclass(frozen=True)
class Outcome:
    """What happened to a key of the config."""

    kind: Kind
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A value of the recipe, and the comment that names its origin."""

    value: Any
    comment: str


@dataclass
class Draft:
    """A config and the recipe made from it. Keys are dotted; items of a list have their index: datasets[0].path."""

    tool: str
    config: Mapping[Any, Any]
    entries: dict[str, Entry] = field(default_factory=dict)  # by the recipe's key
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by the config's key
    notes: list[str] = field(default_factory=list)  # about the recipe as a whole

    def __post_init__(self) -> None:
        self.keys = dict(leaves(self.config))
        for key, value in self.keys.items():
            if value in (None, "", [], {}):
                self.outcomes[key] = Outcome("empty")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key or section, or `default` if it is missing or null."""
        at: Any = self.config
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return default if at is None else at

    def left(self) -> list[str]:
        """Return the keys that have no outcome yet."""
        return [key for key in self.keys if key not in self.outcomes]

    def under(self, key: str) -> list[str]:
        """Return a key, or all keys of a section."""
        return [leaf for leaf in self.keys if leaf == key or leaf.startswith((f"{key}.", f"{key}["))]

    # --- Outcomes, of a key or of all keys of a section ----------------------------------------------------------------

    def carry(self, key: str, to: str, value: Any, note: str = "", only: str = "") -> None:
        """Set `to` in the recipe because of `key`. `only`: names of the leaves of a section that get the outcome."""
        if problem := _problem(to, value):
            self.unsupported(key, problem)
        elif to in self.entries and self.entries[to].value != value:
            self.unsupported(key, f"{to} is from {self.entries[to].comment} already. Decide which of the two you need.")
        else:
            self.entries[to] = Entry(value, f"{key}{'; ' + note if note else ''}")
            usual = to.partition(".")[0] != "trl" and value == default_of(to)
            text = f"in {to}" if only else f"{to}: {format_value(value)}{'; ' + note if note else ''}"
            self._record(key, "default" if usual else "becomes", text, only.split())

    def not_needed(self, key: str, note: str) -> None:
        """Record that a recipe does without the key."""
        self._record(key, "not_needed", note)

    def unsupported(self, key: str, note: str) -> None:
        """Record that a recipe cannot express the key; `note` says what the user can do."""
        self._record(key, "unsupported", note)

    def _record(self, key: str, kind: Kind, note: str, only: list[str] | None = None) -> None:
        for leaf in self.under(key):
            if only and leaf.rpartition(".")[2] not in only:
                continue
            before = self.outcomes.get(leaf)
            if before is None or before.kind in ("empty", "not_needed"):
                self.outcomes[leaf] = Outcome(kind, note)
            elif kind != "not_needed" and before.note != note:  # one key that sets two values
                self.outcomes[leaf] = Outcome(min(before.kind, kind, key=_KINDS.index), f"{before.note}; {note}")

    # --- Values that no key gives --------------------------------------------------------------------------------------

    def assume(self, to: str, value: Any, comment: str = "") -> None:
        """Set the tool's own default if the recipe has no value yet and its default differs."""
        if to not in self.entries and value != default_of(to):
            self.entries[to] = Entry(value, comment or f"{self.tool}'s default")

    def need(self, to: str, what: str) -> None:
        """Set a placeholder if the recipe has no value for a required key."""
        if to not in self.entries:
            self.entries[to] = Entry(FILL_IN, what)
            self.notes.append(f"{to}: fill it in ({what})")


def leaves(section: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key whose value is not a section, with its value."""
    for key, value in section.items():
        plain = isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w-]*", key)
        yield from _leaf(f"{path}{key if plain else repr(key)}", value)


def _leaf(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        yield from leaves(value, f"{path}.")
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for index, item in enumerate(value):
            yield from _leaf(f"{path}[{index}]", item)
    else:
        yield path, value


def format_value(value: Any, key: str = "") -> str:
    """Format a value as YAML would, shortened; the value of a `key` that holds a token or password is hidden."""
    if _SECRET.search(key):
        return "(not shown)"
    if isinstance(value, list):
        return shown([str(item) if isinstance(item, str) else item for item in value])
    return value if isinstance(value, str) and len(value) <= 60 else shown(value)


def default_of(to: str) -> Any:
    """Return the default of a recipe's key, or None if it has none."""
    section, _, name = to.partition(".")
    fields = Recipe.model_fields
    if name:
        inner = section_class(fields[section].annotation)
        fields = inner.model_fields if inner else {}
    found = fields.get(name or section)
    return None if found is None or found.is_required() else found.default


def _problem(to: str, value: Any) -> str | None:
    """Return why a recipe rejects a value for a key, or None."""
    section, _, name = to.partition(".")
    if section == "trl":
        return None if name in sft_config_fields() and name not in OWNED else f"SFTConfig has no field {name}"
    tried: dict[str, Any] = {**_MINIMAL, section: {**_MINIMAL.get(section, {}), name: value} if name else value}  # type: ignore[dict-item]
    try:
        Recipe.model_validate(tried)
    except ValidationError:
        return f"{to} takes {expectation(schema_of(tuple(to.split('.'))))}. Set it."
    return None

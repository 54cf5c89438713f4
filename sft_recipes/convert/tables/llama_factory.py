"""Convert the keys of LLaMA-Factory for which a rule does not suffice: datasets, described in its dataset_info.json."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipes.convert.draft import Draft
from sft_recipes.convert.rules import Converter, Rule, as_list

# Columns by their name in dataset_info.json: their name in a recipe, and the default in LLaMA-Factory.
_COLUMNS = {
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
    "messages": ("messages", "conversations"),
}
_READ = {"hf_hub_url", "file_name", "subset", "split", "columns", "formatting"}


def datasets(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Look up the datasets' names, and set them as sources."""
    draft, names, to = converter.draft, as_list(value), str(rule.to)
    if not isinstance(names, list):
        return
    folder, known = str(draft.get("dataset_dir", "data")), {}
    with suppress(OSError, ValueError):
        known = json.loads((Path(folder) / "dataset_info.json").read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) else {}
    sources = [_source(draft, str(name), known.get(str(name)), folder) for name in names]
    if to == "data.train" or len(sources) == 1:
        draft.carry(key, to, sources if to == "data.train" else sources[0])
    else:
        draft.unsupported(key, "data.eval is a single source. Merge the rows into one file.")
    missing = [str(name) for name in names if str(name) not in known]
    if missing and folder != "ONLINE":
        where = f"{folder}/dataset_info.json"
        draft.notes.append(f"{to}: {', '.join(missing)}: not found in {where}. Set the path or the hub id.")


def max_samples(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Multiply the number of rows per dataset by the number of datasets."""
    names = as_list(converter.draft.get("dataset"))
    several = len(names) if isinstance(names, list) else 1
    if isinstance(value, int):
        converter.draft.carry(key, str(rule.to), value * several, "for all datasets together" if several > 1 else "")


def _source(draft: Draft, name: str, said: Any, folder: str) -> Any:
    """Return a source made of a dataset's description, or its name without one."""
    if not isinstance(said, Mapping) or not (said.get("hf_hub_url") or said.get("file_name")):
        return name
    messages, columns = said.get("formatting") == "sharegpt", said.get("columns") or {}
    renamed = {_COLUMNS[theirs][0]: column for theirs, column in columns.items()
               if theirs in _COLUMNS and column not in _COLUMNS[theirs]}  # fmt: skip
    source = {
        "path": said.get("hf_hub_url") or f"{folder}/{said['file_name']}",
        "name": said.get("subset"),
        "split": said.get("split"),
        "format": "messages" if messages else "alpaca",
        "columns": renamed,
    }
    beyond = {each for each in columns if each not in _COLUMNS and not (messages and each in ("system", "tools"))}
    if beyond := beyond | (set(said) - _READ):
        keys = ", ".join(sorted(beyond))
        draft.notes.append(f"data.train: {name}: ignored keys of dataset_info.json: {keys}. Check it with preview.")
    return {part: value for part, value in source.items() if value not in (None, {}, "train")}

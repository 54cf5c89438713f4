"""Convert the keys of LLaMA-Factory for which a rule does not suffice: datasets, described in its dataset_info.json."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipes.convert.draft import Draft
from sft_recipes.convert.rules import Converter, Rule, as_list, items, source_of


def datasets(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Look up the datasets' names, and set them as sources."""
    draft, names, to = converter.draft, items(as_list(value)), str(rule.to)
    folder, known = str(draft.get("dataset_dir", "data")), {}
    with suppress(OSError, ValueError):
        known = json.loads((Path(folder) / "dataset_info.json").read_text(encoding="utf-8"))
    known = known if isinstance(known, dict) else {}
    sources = [_source(converter, str(name), known.get(str(name)), folder) for name in names]
    if to == "data.train" or len(sources) == 1:
        draft.carry(key, to, sources if to == "data.train" else sources[0])
    else:
        draft.unsupported(key, "data.eval is a single source. Merge the rows into one file.")
    missing = [str(name) for name in names if str(name) not in known]
    if missing and folder != "ONLINE":
        draft.notes.append(f"{to}: {', '.join(missing)}: not found in {folder}/dataset_info.json. Set path or hub id.")


def max_samples(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Multiply the number of rows per dataset by the number of datasets."""
    several = len(items(as_list(converter.draft.get("dataset"))))
    if isinstance(value, int):
        converter.draft.carry(key, str(rule.to), value * several, "for all datasets together" if several > 1 else "")


def _source(converter: Converter, name: str, said: Any, folder: str) -> Any:
    """Return the source that a dataset's description stands for, or its name without one."""
    if not isinstance(said, Mapping) or not (said.get("hf_hub_url") or said.get("file_name")):
        return name
    path = said.get("hf_hub_url") or f"{folder}/{said['file_name']}"
    reader = Converter(Draft(name, {"formatting": "alpaca", **said, "path": path}), converter.table)
    reader.apply(converter.table.parts["description"])
    if keys := ", ".join(sorted(reader.draft.left())):
        converter.draft.notes.append(f"data.train: {name}: ignored in dataset_info.json: {keys}. Check with preview.")
    return source_of(reader.source)

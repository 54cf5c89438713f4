"""Convert the keys of `trl sft` for which a rule does not suffice."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.convert.draft import Entry
from sft_recipes.convert.rules import Converter, Rule


def dataset(converter: Converter, key: str, value: Any, _rule: Rule) -> None:
    """Join dataset_name, dataset_config and dataset_train_split; validate on dataset_test_split if there is a strategy."""
    draft = converter.draft
    config, train, test = (draft.get(f"dataset_{name}") for name in ("config", "train_split", "test_split"))
    source = {"path": value} | ({} if config is None else {"name": config})
    split = {} if train in (None, "train") else {"split": train}
    draft.carry(key, "data.train", [source | split] if len(source | split) > 1 else value)
    strategy = next((key for key in ("eval_strategy", "evaluation_strategy") if draft.get(key) is not None), None)
    if strategy and draft.get(strategy) not in ("no", False):
        key, held_out = "dataset_test_split" if test else strategy, source | {"split": test or "test"}
        draft.entries["data.eval"] = Entry(held_out, key)
        converter.apply({strategy: converter.table.rules[strategy]})  # before it has an outcome: validation is on
        draft.carry(key, "data.eval", held_out)


def mixer(converter: Converter, key: str, value: Any, _rule: Rule) -> None:
    """Convert the alignment-handbook's mixture: paths, and the share of each."""
    if isinstance(value, Mapping):
        sources = [{"path": str(path), "weight": part} for path, part in value.items()]
        converter.draft.carry(key, "data.train", sources, "a share below 1 is sampled randomly")

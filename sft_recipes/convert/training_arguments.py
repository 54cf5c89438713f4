"""Convert the fields of transformers' TrainingArguments for which a rule does not suffice."""

from typing import Any

from sft_recipes.convert.rules import Converter, Rule, number


def warmup(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Convert a number of warmup steps to a share of all steps; transformers takes one below 1 as a share."""
    draft = converter.draft
    steps, total = number(value), converter.look("=train.max_steps")
    if not isinstance(steps, (int, float)) or steps < 1:
        draft.carry(key, rule.to, steps)
    elif total and steps < total:
        draft.carry(key, rule.to, float(f"{steps / total:.6g}"), f"{steps} of {total} steps")
    else:
        draft.unsupported(key, f"set train.warmup_ratio to {steps} / number of steps (sft-recipe plan shows it)")


def per_epoch(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Convert a number of times per epoch, or `epoch`, to a fraction of the run."""
    draft, times = converter.draft, 1 if value == "epoch" else number(value)
    epochs = converter.look("=train.epochs") or 1
    if converter.look("=train.max_steps"):
        draft.unsupported(key, f"with train.max_steps the length of an epoch is unknown. Set {rule.to}.")
    elif not isinstance(times, (int, float)) or isinstance(times, bool) or times * epochs < 1:
        draft.unsupported(key, f"set {rule.to}")
    else:
        draft.carry(key, rule.to, float(f"{1 / (times * epochs):.6g}"), f"{times} per epoch, train.epochs: {epochs:g}")

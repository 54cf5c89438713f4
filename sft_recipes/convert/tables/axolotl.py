"""Convert the keys of Axolotl for which a rule does not suffice."""

import re
from typing import Any

from sft_recipes.convert.rules import Converter, Rule, as_list, items

_NOT_LINEAR = re.compile(r"embed|\bw[tp]e\b|lm_head|norm")  # layers that all-linear leaves out


def beyond_linear(converter: Converter, key: str, value: Any, _rule: Rule) -> None:
    """Name the target modules that lora_target_linear, which comes first, leaves out."""
    if beyond := [str(name) for name in items(as_list(value)) if _NOT_LINEAR.search(str(name))]:
        note = f"all-linear does not cover {', '.join(beyond)}. Use lora.modules_to_save to train them in full."
        converter.draft.unsupported(key, note)
    else:
        converter.draft.not_needed(key, "determined by lora.target_modules")

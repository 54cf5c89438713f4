"""Convert the keys of torchtune for which a rule does not suffice."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.convert.draft import leaves
from sft_recipes.convert.rules import Converter, Rule, number, part_of
from sft_recipes.errors import RecipeError

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MOST = 100_000  # characters that references stand for
# Layers as transformers calls them; it fuses some of Phi-3 and Phi-4.
_LAYERS = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
_MLP = ["gate_proj", "down_proj", "up_proj"]


def resolve(config: Mapping[Any, Any], file: str | Path) -> dict[Any, Any]:
    """Replace ${key} and ${section.key} by their values, unless these are sections.

    Raises RecipeError, of `file`, if the result is endless, or nearly so.
    """
    left, known = (
        _MOST,
        {key: value for key, value in leaves(config) if value is not None and not isinstance(value, list)},
    )

    def value(at: Any) -> Any:
        nonlocal left
        if isinstance(at, Mapping):
            return {key: value(inner) for key, inner in at.items()}
        if isinstance(at, list):
            return [value(inner) for inner in at]
        for _ in range(10):  # a reference to itself is left as it is
            if not isinstance(at, str) or "${" not in at:
                break
            whole = _REFERENCE.fullmatch(at)
            filled = _REFERENCE.sub(lambda hit: str(known.get(hit[1]) or hit[0]), at)
            at = known.get(whole[1], at) if whole else filled
            left -= len(str(at))
            if left < 0:
                raise RecipeError(
                    f"{file}: the values of ${{...}} are longer than {_MOST:,} characters. Write them out."
                )
        return at

    return {key: value(inner) for key, inner in config.items()}


def target_modules(converter: Converter, key: str, _value: Any, rule: Rule) -> None:
    """Name the layers of model.lora_attn_modules and model.apply_lora_to_mlp as transformers does."""
    draft, said = converter.draft, converter.draft.get("model.lora_attn_modules")
    modules = [_LAYERS.get(str(module), str(module)) for module in said] if isinstance(said, list) else []
    modules += _MLP if draft.get("model.apply_lora_to_mlp") else []
    if re.search(r"lora_phi[34][^.]*$", str(draft.get("model._component_"))):
        modules = list(dict.fromkeys(_FUSED.get(module, module) for module in modules))
    if modules and key == ("model.lora_attn_modules" if said else "model.apply_lora_to_mlp"):
        draft.carry(key, str(rule.to), modules, "names of transformers")
    else:
        draft.not_needed(key, "determined by lora")


def steps(converter: Converter, key: str, value: Any, rule: Rule) -> None:
    """Multiply the steps per epoch by the number of epochs."""
    epochs, most = number(converter.draft.get("epochs")), number(value)
    known = isinstance(most, int) and isinstance(epochs, (int, float))
    converter.draft.carry(
        key, str(rule.to), number(most * epochs) if known else most, "for all epochs" if known else ""
    )


def set_aside(converter: Converter, key: str, _value: Any, rule: Rule) -> bool:
    """Convert dataset_val to a fraction if it is the rest of the split of which dataset is a part."""
    draft = converter.draft
    train, held_out = (each if isinstance(each, Mapping) else {} for each in (draft.get("dataset"), draft.get(key)))
    (split, most), (same, rest) = part_of(train.get("split")), part_of(held_out.get("split"))
    alike = split == same and all(train.get(name) == held_out.get(name) for name in ("_component_", "source"))
    if not alike or not most or not rest or round(most + rest, 6) != 1:
        return False
    draft.not_needed(key, f"in {rule.to}")
    draft.carry(key, str(rule.to), rest, only="_component_ split")
    return True

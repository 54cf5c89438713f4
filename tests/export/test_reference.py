"""What the training process records of the trained model, and what an export is held against."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.export import reference
from tests.conftest import WriteRecipe, run

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
ROWS = [
    {"input_ids": list(range(first, first + length)), "labels": [-100] * 3 + list(range(first + 3, first + length))}
    for first, length in ((5, 9), (40, 30), (7, 17))
]
BF16 = {"model": {"name": "builtin:tiny", "dtype": "bfloat16"}, "train": {"mixed_precision": "bf16"}}
LORA = {"lora": {"rank": 2}}
FULL = {"model": {"name": "builtin:tiny", "dtype": "float32"}, "train": {"mixed_precision": "bf16"}}
VARLEN = {"model": {**BF16["model"], "attention": "varlen"}}
NF4 = {"model": {**BF16["model"], "quantization": "nf4"}, **LORA}
INT8 = {"model": {**BF16["model"], "quantization": "int8"}, **LORA}
NEW = {"model": {**BF16["model"], "new_tokens": ["<word>"]}, **LORA}
HEAD = {"lora": {"rank": 2, "modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize(
    "sections",
    [BF16 | LORA, BF16 | VARLEN | LORA, FULL, BF16, BF16 | NF4, BF16 | INT8, BF16 | NEW, BF16 | HEAD],
    ids=[
        "LoRA",
        "varlen",
        "full, float32 under autocast",
        "full, bfloat16",
        "nf4",
        "int8",
        "new tokens",
        "head in full",
    ],
)
def test_the_export_is_held_against_the_trained_model(write_recipe: WriteRecipe, sections: dict[str, Any]) -> None:
    folder, said = run(write_recipe(**sections))

    assert "verified in a fresh process" in said
    known = reference.load(folder / reference.FILE)
    assert known is not None
    assert known.compute == "float32"
    assert (known.rounded is None) == ("lora" in sections)
    assert len(known.trained.losses) == len(json.loads((folder / "probe.json").read_text("utf-8"))["rows"])
    assert (known.base is None) == ("lora" not in sections)
    report = json.loads((folder / "model" / ("merge.json" if "lora" in sections else "export.json")).read_text("utf-8"))
    figures = report["figures"].get(report.get("merged_into"), report["figures"])
    if "original" not in report["figures"] or len(report["figures"]) == 1:
        assert figures["trained_loss"] == pytest.approx(known.trained.loss)

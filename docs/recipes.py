#!/usr/bin/env python3
"""What `sft-recipe plan` predicts of the recipes that ship: docs/recipes.json, and the line `Memory:` of their headers.

`python docs/recipes.py` predicts those that have changed, `python docs/recipes.py NAME ...` those that are named, after a change
of the prediction all. docs/generate.py makes docs/recipes.md of it. Of a model its config is enough: tests/models/.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft_recipes.planning import memory
from sft_recipes.recipe import load, model_files, shipped

HERE = Path(__file__).parent
FOUND = HERE / "recipes.json"
SIZES = (16, 24, 40, 48, 80, 141)  # of GPUs, in 10^9 bytes
# What the memory of a step does not depend on.
_APART = {
    "model": {"name"},
    "data": {"train", "eval", "columns"},
    "eval": True,
    "checkpoint": True,
    "log": True,
    "export": True,
}


def directory(model: str) -> Path:
    """What stands in for a model of the hub: a directory with its config."""
    return (
        model_files.BUILTIN / "tiny"
        if model == "builtin:tiny"
        else HERE.parent / "tests/models" / model.replace("/", "--")
    )


def fingerprint(name: str) -> str:
    """Of all of a recipe that a prediction depends on: its settings, and the model's config."""
    recipe = load.load(shipped.folder() / f"{name}.yaml").recipe
    settings = recipe.model_dump(mode="json", exclude=_APART | {"output_dir": True})  # type: ignore[arg-type]
    config = (directory(recipe.model.name) / "config.json").read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([settings, config], sort_keys=True).encode()).hexdigest()


def predict(name: str) -> dict[str, Any]:
    """Bytes of a GPU, by part, with as many layers recomputed as the recipe allows; `loading`: those of 4-bit weights that each
    GPU holds before they are shared out; `fits`: which of SIZES have room for both."""
    from sft_recipes.plan import plan

    recipe = load.load(shipped.folder() / f"{name}.yaml").recipe
    with TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text('{"instruction": "Say it.", "output": "It."}\n' * 2, encoding="utf-8")
        local = [f"model.name={directory(recipe.model.name)}", f"data.train={rows}", "data.eval=0.5", "data.columns={}"]

        def found(*more: str) -> memory.Footprint:
            return plan(str(shipped.folder() / f"{name}.yaml"), [*local, *more]).found

        rank, loading = found(), 0.0
        if recipe.model.quantization and recipe.launch.strategy == "fsdp2":
            loading = found("launch.strategy=ddp", "launch.processes=1", "launch.machines=1").peak["weights"]
    return {
        "of": fingerprint(name),
        "parameters": rank.parameters,
        "trained": rank.trained,
        "peak": round(rank.peak_bytes),
        "loading": round(loading),
        "parts": {part: round(size) for part, size in rank.peak.items()},
        "fits": [
            size for size in SIZES if memory.fits(rank, size * 1e9, "cuda") and loading < size * 1e9 * memory.SHARE
        ],
    }


def in_words(found: dict[str, Any]) -> str:
    """As a header says it."""
    loading = f"; {memory.in_words(found['loading'])} while it is loaded" if found["loading"] > found["peak"] else ""
    return f"{memory.in_words(found['peak'])} a GPU, predicted{loading}"


def main(names: list[str]) -> None:
    known = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.is_file() else {}
    every = [each.name for each in shipped.recipes()]
    for name in every:
        if name in names or (not names and known.get(name, {}).get("of") != fingerprint(name)):
            known[name] = predict(name)
            print(f"{name}: {in_words(known[name])}", flush=True)
        file = shipped.folder() / f"{name}.yaml"
        text = file.read_text(encoding="utf-8")
        file.write_text(
            re.sub(r"(?m)^# Memory: .*$", f"# Memory:   {in_words(known[name])}", text, count=1), encoding="utf-8"
        )
    FOUND.write_text(json.dumps({name: known[name] for name in every}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

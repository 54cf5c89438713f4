#!/usr/bin/env python3
"""Predict the memory of the bundled recipes with `sft-recipe plan`, and write docs/recipes.json, the tables of
docs/recipes.md and the line `Memory:` of each recipe.

`python docs/recipes.py` predicts changed recipes, `python docs/recipes.py NAME ...` the named ones; use `python
docs/recipes.py all` if the prediction code has changed. A model's config is enough: tests/model_configs/.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft_recipes import model_dir
from sft_recipes.memory import prediction
from sft_recipes.planning import flops
from sft_recipes.recipe import bundled, parse
from sft_recipes.recipe.schema import Recipe

DOCS = Path(__file__).parent
FOUND, PAGE = DOCS / "recipes.json", DOCS / "recipes.md"
SIZES = (16, 24, 40, 48, 80, 141)  # of GPUs, in 10^9 bytes
# Settings that do not affect the memory of a step.
_APART: dict[str, Any] = {
    "model": {"name"}, "data": {"train", "eval", "columns"}, "train": {"kernels", "deterministic", "learning_rate", "seed"},
    "eval": True, "checkpoint": True, "log": True, "export": True, "output_dir": True,
}  # fmt: skip


# --- Predictions -----------------------------------------------------------------------------------------------------


def directory(model: str) -> Path:
    """A directory with the config of a model, and perhaps nothing else."""
    return model_dir.directory(model) or DOCS.parent / "tests" / "model_configs" / model.replace("/", "--")


def fingerprint(name: str) -> str:
    """Of all of a recipe that its prediction depends on: its settings, and the model's config."""
    recipe = _recipe(name)
    settings = recipe.model_dump(mode="json", exclude=_APART)
    config = (directory(recipe.model.name) / "config.json").read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([settings, config], sort_keys=True).encode()).hexdigest()


def predict(name: str) -> dict[str, Any]:
    """Bytes of a GPU, by part, of the least that the recipe takes: each layer recomputed if that is auto, one sequence at once
    if that is. `loading`: those of 4-bit weights, which each GPU holds before they are sharded.
    `preflight`: those of its check of isolation; the rest of it is a training step. `fits`: which of SIZES have room for all.
    `auto`: what auto comes to on the smallest of them."""
    from sft_recipes.commands.plan import plan

    recipe = _recipe(name)
    with TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text('{"instruction": "Say it.", "output": "It."}\n' * 2, encoding="utf-8")
        here = [f"model.name={directory(recipe.model.name)}", f"data.train={rows}", "data.eval=0.5", "data.columns={}"]
        here.append("train.kernels=none")  # whatever is installed here; with Liger's a run takes less

        def found(*more: str) -> prediction.Footprint:
            return plan(str(_file(name)), [*here, *more]).footprint

        sizes = recipe.train.micro_batch_size == "auto"
        rank, loading = found(*["train.micro_batch_size=1"] * sizes), 0.0
        if recipe.model.quantization and recipe.launch.strategy == "fsdp2":
            loading = found("launch.strategy=ddp", "launch.processes=1", "launch.machines=1").peak["weights"]
        fits = [
            size
            for size in SIZES
            if prediction.fits(rank, size * 1e9, "cuda") and loading < prediction.SHARE * size * 1e9
        ]
        settled = None
        if sizes:
            on_card = plan(str(_file(name)), here, gpu_memory=f"{fits[0]}GB")
            settled = {
                "micro_batch_size": on_card.recipe.train.micro_batch_size,
                "gradient_checkpointing": on_card.recipe.train.gradient_checkpointing,
                "peak": round(on_card.footprint.peak_bytes),
            }
    return {
        "of": fingerprint(name),
        "parameters": rank.size.parameters,
        "trained": rank.size.trained,
        "peak": round(rank.peak_bytes),
        "loading": round(loading),
        "preflight": round(sum(rank.phases.get("preflight", {}).values())),
        "parts": {part: round(size) for part, size in rank.peak.items()},
        "fits": fits,
        "auto": settled,
    }


def known() -> dict[str, Any]:
    """What has been predicted, by recipe."""
    return dict(json.loads(FOUND.read_text(encoding="utf-8"))) if FOUND.is_file() else {}


def format_memory(found: dict[str, Any]) -> str:
    """Format a prediction for a recipe's header."""
    loading = f"; {prediction.format_bytes(found['loading'])} while loading" if found["loading"] > found["peak"] else ""
    if settled := found["auto"]:
        layers = {False: "no layers", True: "every layer"}.get(settled["gradient_checkpointing"])
        layers = layers or f"every {settled['gradient_checkpointing']} layers"
        size, peak = found["fits"][0], prediction.format_bytes(settled["peak"])
        loading = f"; auto uses {peak} of {size} GB: micro-batch {settled['micro_batch_size']}, {layers} recomputed"
    return f"{prediction.format_bytes(found['peak'])} per GPU{' at least' if settled else ''}, predicted{loading}"


def _file(name: str) -> Path:
    return bundled.folder() / f"{name}.yaml"


def _recipe(name: str) -> Recipe:
    return parse.load(_file(name)).recipe


# --- The page --------------------------------------------------------------------------------------------------------


def purposes() -> Iterator[str]:
    yield "| recipe | purpose | method | hardware | result |"
    yield "|---|---|---|---|---|"
    for each in bundled.recipes():
        link = f"[{each.name}](../recipes/{each.name}.yaml)"
        yield f"| {link} | {each.purpose} | {each.method} | {each.hardware} | {each.result} |"


def sizes() -> Iterator[str]:
    found = known()
    yield f"| recipe | GPUs | predicted | {' | '.join(f'{size} GB' for size in SIZES)} |"
    yield "|---|---|---|" + ":-:|" * len(SIZES)
    for name, of in found.items():
        launch = _recipe(name).launch
        dots = " | ".join("•" if size in of["fits"] else " " for size in SIZES)
        yield f"| {name} | {launch.world_size} | {prediction.format_bytes(of['peak'])} | {dots} |"
    cards = [", ".join(gpu.name for gpu in flops.gpus_of(size)) for size in SIZES]
    yield f"| *examples* | | | {' | '.join(cards)} |"


def parts() -> Iterator[str]:
    yield f"| recipe | parameters | trainable | {' | '.join(prediction.Part)} |"
    yield "|---|---|---|" + "---|" * len(prediction.Part)
    for name, of in known().items():
        gib = " | ".join(f"{of['parts'][part] / prediction.GIB:.2f}" for part in prediction.Part)
        yield f"| {name} | {of['parameters']:,} | {of['trained']:,} | {gib} |"


def page(text: str) -> str:
    """Return the page with new tables, each after a comment with its name."""
    for table in (purposes, sizes, parts):
        before, after = text.split(f"<!-- {table.__name__} -->\n", 1)
        after = re.sub(r"\A\n(\|.*\n)*\n?", "", after)
        text = "\n".join([f"{before}<!-- {table.__name__} -->\n", *table(), "", after])
    return text


def main(names: list[str]) -> None:
    found, every = known(), [each.name for each in bundled.recipes()]
    for name in every:
        if name in names or names == ["all"] or found.get(name, {}).get("of") != fingerprint(name):
            found[name] = predict(name)
            print(f"{name}: {format_memory(found[name])}", flush=True)
        text = _file(name).read_text(encoding="utf-8")
        text = re.sub(r"(?m)^# Memory: .*$", f"# Memory:   {format_memory(found[name])}", text, count=1)
        _file(name).write_text(text, encoding="utf-8")
    FOUND.write_text(json.dumps({name: found[name] for name in every}, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

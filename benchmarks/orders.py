#!/usr/bin/env python3
"""What the order of the data decides on the embedded model: `python benchmarks/orders.py`.

examples/plain_trl.py as it is, and on the sequences that recipes/quickstart.yaml packs, with several seeds: the share of
held-out questions that are answered exactly. Prints a table for RESULTS.md.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from machine import measured_on
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from sft_recipes import cli
from sft_recipes.data import encoder, prepare
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import plain_trl  # noqa: E402


def recipes_own(seed: int) -> Dataset:
    recipe = parse.load(str(ROOT / "recipes" / "quickstart.yaml"), [f"train.seed={seed}"]).recipe
    tokenizer = load_tokenizer(recipe.model)
    return Dataset(prepare.prepare(recipe, encoder.from_transformers(tokenizer)).train.table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=-1, help="-1: two epochs")
    given = parser.parse_args()
    cli.quiet_libraries(debug=False)
    print(f"{measured_on()}\n")
    print("| seed | plain TRL, its own sequences | plain TRL, the recipe's |\n|---|---|---|")
    for seed in given.seeds:
        right = []
        for own in (True, False):
            trainer = plain_trl.build(given.steps, seed)
            trainer.args.eval_strategy, trainer.args.eval_on_start, trainer.args.save_strategy = "no", False, "no"
            if not own:
                trainer.train_dataset = recipes_own(seed)
            for chatter in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(chatter)
            trainer.train()
            right.append(plain_trl.exact_match(trainer, plain_trl.rows("heldout.jsonl")))
        print(f"| {seed} | " + " | ".join(f"{share:.1%}" for share in right) + " |", flush=True)


if __name__ == "__main__":
    main()

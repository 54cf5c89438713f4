#!/usr/bin/env python3
"""Preparing data, in turns with the tokenizer alone and TRL's own preparation: `python benchmarks/data_prep.py MODEL`.

MODEL is a directory with a tokenizer. Rows are made up, or those of `--data FILE` (with `--columns PROMPT COMPLETION`);
loss on the completion. Prints a table for benchmarks/RESULTS.md, best of `--times`, and whether all three agree on the
tokens and on which of them are trained on.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import measured_on

WORDS = [
    "the",
    "river",
    "of",
    "a",
    "quiet",
    "town",
    "turns",
    "north",
    "when",
    "spring",
    "rain",
    "falls",
    "on",
    "old",
    "stone",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", help="rows; without it, as many are made up as --rows says")
    parser.add_argument("--columns", nargs=2, default=["instruction", "output"])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument(
        "--memory", action="store_true", help="instead: peak memory of preparing the rows, in a process of its own"
    )
    args = parser.parse_args()
    print(measured_on(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.data) if args.data else make_up(Path(folder) / "rows.jsonl", args.rows)
        if args.memory:
            print(memory(file, args))
            return
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        measure(file, rows, args)


def make_up(file: Path, count: int) -> Path:
    """Alpaca-like rows: questions of some ten words, answers of some sixty, a third with an input."""
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            row = {"instruction": f"{number}: {text(5, 15)}?", "input": "", "output": f"{text(10, 110)}."}
            stream.write(json.dumps(row) + "\n")
    return file


def measure(file: Path, rows: list[dict[str, str]], args: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from sft_recipes.data import encoder
    from sft_recipes.data.templates import alpaca_prompt

    prompts = [alpaca_prompt(row[args.columns[0]]) for row in rows]
    completions = [row[args.columns[1]] for row in rows]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    backend = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    backend.no_truncation()
    tokenizer = encoder.from_directory(Path(args.model))
    assert tokenizer is not None
    trl, pairs = trl_preparation(args, prompts, completions)
    ways = {
        "tokenizer alone": lambda: backend.encode_batch_fast(texts),
        "sft-recipes, packed": lambda: ours(file, args, tokenizer, packing="bfd").train.table(),
        "sft-recipes": lambda: ours(file, args, tokenizer, packing="none").train.table(),
        "TRL, packed": lambda: trl(pairs, True),
        "TRL": lambda: trl(pairs, False),
    }
    best = dict.fromkeys(ways, float("inf"))
    last: dict[str, Any] = {}
    for _ in range(args.times):
        for name, way in ways.items():
            began = time.perf_counter()
            last[name] = way()
            best[name] = min(best[name], time.perf_counter() - began)
    print("| way | rows/s | of the tokenizer's rate | times TRL |\n|---|---|---|---|")
    for name, seconds in best.items():
        rival = best["TRL, packed" if "packed" in name else "TRL"]
        of_tokenizer = f"{best['tokenizer alone'] / seconds:.0%}"
        print(f"| {name} | {len(rows) / seconds:,.0f} | {of_tokenizer} | {rival / seconds:.1f} |")
    print(
        f"\nof {len(rows):,} rows, {agreement(last['sft-recipes'], last['TRL']):,} have the same ids and labels in both"
    )


def ours(file: Path, args: argparse.Namespace, tokenizer: Any, *, packing: str) -> Any:
    from sft_recipes.data import prepare
    from sft_recipes.recipe.schema import Data, Model, Recipe

    prompt, completion = args.columns
    columns = {} if args.columns == ["instruction", "output"] else {"prompt": prompt, "completion": completion}
    data = Data(
        train=str(file),
        eval=None,
        columns=columns,
        packing=packing,
        shuffle=False,
        max_length=args.max_length,
        overlong="split",
    )
    recipe = Recipe(model=Model(name=args.model), data=data, output_dir="none")
    return prepare.prepare(recipe, tokenizer, cached=False)


def trl_preparation(args: argparse.Namespace, prompts: list[str], completions: list[str]) -> tuple[Any, Any]:
    """TRL's own preparation, as its trainer runs it, and the rows in the form that it takes."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    pairs = datasets.Dataset.from_dict({"prompt": prompts, "completion": completions})
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(output_dir=folder, use_cpu=True, report_to="none", max_length=args.max_length, bf16=False)
        trainer = SFTTrainer(
            LlamaForCausalLM(config), args=settings, train_dataset=pairs.select(range(2)), processing_class=tokenizer
        )

    def prepare(rows: Any, packing: bool) -> Any:
        return trainer._prepare_dataset(rows, tokenizer, settings, packing, None, "train")

    return prepare, pairs


def agreement(ours: Any, theirs: Any) -> int:
    """Rows whose ids are equal, and which have labels for the same tokens."""
    same = 0
    mine = zip(ours["input_ids"].to_pylist(), ours["labels"].to_pylist(), strict=True)
    for (ids, labels), row in zip(mine, theirs, strict=False):
        trained = row.get("completion_mask") or [int(label != -100) for label in row["labels"]]
        same += ids == row["input_ids"] and [int(label != -100) for label in labels] == list(trained)
    return same


def memory(file: Path, args: argparse.Namespace) -> str:
    """Of a process that prepares the rows, beyond one that has imported what it takes."""
    code = f"""
import argparse, resource, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
import numpy, pyarrow
from data_prep import ours
from sft_recipes.data import encoder, prepare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
args = argparse.Namespace(**{vars(args)!r})
tokenizer, before = encoder.from_directory(Path(args.model)), peak()
data = ours({str(file)!r}, args, tokenizer, packing="bfd").train
table = data.table()
print(f"{{len(data.row):,}} rows, {{data.stats.tokens:,}} tokens: {{peak() - before:.2f}} GiB beyond {{before:.2f}}")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()

"""Time `sft-recipe check` of conversations, without a cache: python benchmarks/check_chat.py MODEL

MODEL is a directory with a tokenizer that has a chat template.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
    "but",
]


def row(turns: int, rng: random.Random) -> dict[str, Any]:
    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    messages = [
        message
        for _ in range(turns)
        for message in (
            {"role": "user", "content": text(30)},
            {"role": "assistant", "content": text(80), "reasoning_content": text(20)},
        )
    ]
    return {"messages": messages}


def seconds(model: str, rows: list[dict[str, Any]], folder: Path) -> float:
    data, recipe = folder / "rows.jsonl", folder / "recipe.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    settings = {"train": str(data), "template": "chat", "train_on": "assistant", "max_length": 2048}
    recipe.write_text(
        json.dumps({"model": {"name": model}, "lora": {}, "data": settings, "output_dir": str(folder / "run")}), "utf-8"
    )
    times = []
    for number in range(3):
        environment = os.environ | {"SFT_RECIPES_CACHE": str(folder / f"cache {number}")}
        before = time.perf_counter()
        command = [sys.executable, "-m", "sft_recipes.cli", "check", str(recipe)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        times.append(time.perf_counter() - before)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    model = str(Path(parser.parse_args().model).absolute())
    rng = random.Random(0)
    print("| rows | turns | check (s), best of 3 |\n|---|---|---|")
    for count, turns in ((10, 2), (500, 2), (2000, 1), (2000, 2)):
        rows = [row(turns, rng) for _ in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {count:,} | {turns} | {seconds(model, rows, Path(folder)):.1f} |", flush=True)


if __name__ == "__main__":
    main()

"""Synthetic run directories."""

import json
from pathlib import Path
from typing import Any

QUESTION = {"role": "user", "content": "What?", "input": ""}
ACCOUNT = {
    "sources": [
        {
            "path": "train.jsonl", "format": "alpaca", "template": "alpaca", "rows_read": 1010, "held_out": 10, "rows": 1000,
            "kept": 980, "dropped": {"overlong": 20}, "duplicates": 3, "truncated_rows": 0, "dropped_tokens": 0,
            "tokens": 50_000, "trained_tokens": 10_000, "token_lengths": {"min": 12, "p50": 40, "max": 700},
        }
    ],
    "tokens": 50_000, "trained_tokens": 10_000, "sequences": 100, "packing": "bfd", "packing_efficiency": 0.9766,
}  # fmt: skip
MANIFEST = {
    "started": "2026-01-02T03:04:05+00:00",
    "command": ["/bin/sft-recipe", "run", "a b.yaml", "--set", "train.seed=1"],
    "device": {"name": "cpu", "threads": 2},
    "parameters": {"total": 1000, "trainable": 100},
    "preflight": {"base": {"loss": 3.25}, "isolation": {"gradient_leak": 0.0}},
    "data_sha256": {"train.jsonl": "0123456789abcdef"},
    "versions": {"python": "3.11.7", "trl": "1.16.0", "flash-attn": None},
}
PROOF = {
    "merged_into": "original",
    "verification": {"original": {"max_logit_diff": 0.03125}},
    "files": {"a": {"bytes": 1}},
}


def metrics(steps: int, *, every: int = 1, evaluations: int = 2) -> list[dict[str, Any]]:
    """Lines as logged by a run: 1,000 tokens and half a second per step."""
    lines: list[dict[str, Any]] = []
    for step in range(0, steps + 1):
        if step and (step % every == 0 or step == steps):
            done = step % every or every
            lines.append({
                "step": step, "epoch": step / steps, "loss": 1 + 2 / step, "learning_rate": 1e-4 * (1 - step / steps),
                "grad_norm": 1.5, "tokens": 1000 * step, "tokens_per_second": 1000 * done / (0.5 * done),
                "peak_memory_gib": 0.7,
            })  # fmt: skip
        if evaluations and step in (0, steps):
            lines.append({"step": step, "tokens": 1000 * step, "eval_loss": 3.0 - step / steps, "peak_memory_gib": 0.5})
    return lines


def samples(*answers: str, expected: str | None = None, message: dict[str, Any] = QUESTION) -> list[dict[str, Any]]:
    """Lines of one prompt with these answers at steps 0, 1, 2, ..."""
    return [
        {"step": step, "messages": [message], "answer": answer, "expected": expected}
        for step, answer in enumerate(answers)
    ]


def write(folder: Path, lines: list[dict[str, Any]], asked: list[dict[str, Any]] | None = None, **files: Any) -> Path:
    """Write a run directory. `files`: recipe, data, manifest, proof; None: missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, objects in (("metrics", lines), ("samples", asked)):
        if objects is not None:
            text = "".join(json.dumps(line) + "\n" for line in objects)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    known = {
        "recipe": ("recipe.resolved.json", {"model": {"name": "builtin:tiny"}, "lora": None, "train": {"seed": 1}}),
        "data": ("data.json", {"train": ACCOUNT, "eval": None, "steps": lines[-1]["step"] if lines else 1}),
        "manifest": ("manifest.json", MANIFEST),
        "proof": ("model/merge.json", PROOF),
    }
    for key, (name, usual) in known.items():
        content = files.get(key, usual)
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder

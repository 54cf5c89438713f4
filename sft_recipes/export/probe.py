"""The input of verification: rows of the evaluation data, and a prompt as it was trained."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import ModelError
from sft_recipes.run_dir import PROBE

QUANTIZATION = "quantization.json"  # in the directory of an adapter that was trained on a quantized base
_ROWS, _TOKENS = 16, 512  # maximum number of rows, and of tokens per row
TEXTS = ["Name three colors.", "  The cat's 12 hats\n\ncost $3.50 – naïve? 日本 🙂", "def f(x):\n\treturn x</s>"]


@dataclass
class Probe:
    """Rows and a prompt of the data, and how training loaded the base."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)  # input_ids and labels (not shifted; -100: masked)
    prompt: dict[str, Any] | None = None  # messages, tools, and the ids of their prompt
    quantization: dict[str, Any] | None = None  # config of bitsandbytes
    loaded: str = "float32"  # dtype of the weights that were not quantized
    split: str = "evaluation"  # source of the rows: evaluation or training

    def save(self, folder: Path) -> None:
        (folder / PROBE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def save_quantization(self, adapter: Path) -> None:
        """Write the quantization into the adapter's directory, for merges without the run."""
        known = {"quantization": self.quantization, "loaded": self.loaded}
        (adapter / QUANTIZATION).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def of_adapter(adapter: Path) -> Probe | None:
    """Read the probe of an adapter's run, or the quantization of its base; None if there is neither. Raises ModelError."""
    file = next((file for file in (adapter.parent / PROBE, adapter / QUANTIZATION) if file.is_file()), None)
    if file is None:
        return None
    try:
        probe = Probe(**json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(probe.rows, list) or not isinstance(probe.quantization, dict | None):
            raise TypeError("expected a list of rows and a quantization config")
        return probe
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}. Remove it to merge without it.") from None


def rows_of(sequences: Sequences) -> list[dict[str, list[int]]]:
    """Return the first documents with trained tokens, one per row."""
    rows: list[dict[str, list[int]]] = []
    for number in range(min(len(sequences), _ROWS)):
        sequence, start = sequences[number], 0
        for length in sequence["seq_lengths"]:
            row = {name: sequence[name][start : start + min(length, _TOKENS)] for name in ("input_ids", "labels")}
            start += length
            if any(label != IGNORED for label in row["labels"][1:]):
                rows.append(row)
            if len(rows) == _ROWS:
                return rows
    return rows


def rows_of_texts(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Return rows of built-in text, for an adapter without its run."""
    encoded = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [{"input_ids": ids, "labels": ids} for ids in encoded]

"""What an export is verified with: some rows that were held out, and a prompt as it was trained."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.data.sequences import IGNORED, Sequences
from sft_recipes.errors import ModelError
from sft_recipes.run_dir import PROBE

QUANTIZATION = "quantization.json"  # in the directory of an adapter that was trained on a quantized base
_ROWS, _TOKENS = 16, 512  # at most
TEXTS = ["Name three colours.", "  The cat's 12 hats\n\ncost $3.50 – naïve? 日本 🙂", "def f(x):\n\treturn x</s>"]


@dataclass
class Probe:
    """Rows of `input_ids` and `labels` (not shifted, -100 where not trained), messages and the ids of their prompt, and how
    the base was quantized in training."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    prompt: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    loaded: str = "float32"  # type in which training held the weights that it did not quantize
    split: str = "evaluation"  # where the rows are from, or training

    def save(self, folder: Path) -> None:
        (folder / PROBE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def save_quantization(self, adapter: Path) -> None:
        """Beside the adapter, so that it also knows its base where it goes alone."""
        known = {"quantization": self.quantization, "loaded": self.loaded}
        (adapter / QUANTIZATION).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def of_adapter(adapter: Path) -> Probe | None:
    """The probe of the run that an adapter is from, or what it knows of its quantized base; None where it stands alone.

    Raises ModelError where it is broken.
    """
    file = next((there for there in (adapter.parent / PROBE, adapter / QUANTIZATION) if there.is_file()), None)
    if file is None:
        return None
    try:
        probe = Probe(**json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(probe.rows, list) or not isinstance(probe.quantization, dict | None):
            raise TypeError("expected a list of rows and a quantization's settings")
        return probe
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}; remove it, and merge without it") from None


def rows_of(sequences: Sequences) -> list[dict[str, list[int]]]:
    """The first documents of training or validation sequences, one a row."""
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
    """Rows for an adapter that comes without those of its run."""
    encoded = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [{"input_ids": ids, "labels": ids} for ids in encoded]

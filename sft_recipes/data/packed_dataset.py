"""Concatenate-and-chunk dataset for use as a library, as courses assign it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sft_recipes.data import sources, templates
from sft_recipes.data.formats import registry as formats
from sft_recipes.errors import DataError


class PackedSFTDataset(Dataset[dict[str, torch.Tensor]]):  # type: ignore[misc]  # untyped in torch
    """Alpaca-formatted documents, concatenated and chunked into sequences of `seq_length` tokens.

    Item i is {"input_ids", "labels"}: int64 tensors of shape (seq_length,). Labels are already shifted to the next token,
    also across document and chunk boundaries, and nothing is masked. For a model's own loss, which shifts labels itself,
    pass `input_ids` as labels. A document is the encoded Alpaca text (with BOS if the tokenizer adds it) and EOS.
    Remaining tokens that do not fill a chunk are dropped.

    `tokenizer` is a transformers tokenizer. `dataset_path` has rows with `prompt` and `response` (jsonl, json, csv or
    parquet, optionally gzipped). `shuffle` shuffles the documents, not the chunks, by torch's global seed. Raises DataError
    if a row is invalid.
    """

    def __init__(self, tokenizer: Any, dataset_path: str | Path, seq_length: int, shuffle: bool) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length must be at least 1 (got {seq_length}).")
        texts = []
        for row in sources.iter_rows(str(dataset_path)):
            if isinstance(row, DataError):
                raise row
            user, assistant = formats.to_example(row.values, "prompt_completion", {}, row.place).messages
            texts.append(templates.alpaca_prompt(user["content"]) + assistant["content"])
            try:
                texts[-1].encode()
            except UnicodeEncodeError:
                raise DataError(f"{row.place}: invalid Unicode: unpaired surrogate.") from None
        documents = _encode(tokenizer, texts)
        order = torch.randperm(len(documents)).tolist() if shuffle else range(len(documents))
        stream = np.concatenate([np.zeros(0, dtype=np.int64), *(documents[number] for number in order)])
        self.seq_length = seq_length
        self._stream = torch.from_numpy(stream)

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self.seq_length  # the last label needs one more token

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i} is out of range for {len(self)} items")
        start = i % len(self) * self.seq_length
        chunk = self._stream[start : start + self.seq_length + 1]
        return {"input_ids": chunk[:-1].clone(), "labels": chunk[1:].clone()}


def iterate_batches(
    dataset: Dataset[dict[str, torch.Tensor]], batch_size: int, shuffle: bool
) -> DataLoader[dict[str, torch.Tensor]]:
    """Return a DataLoader over one epoch; items are stacked and the last batch may be smaller."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def _encode(tokenizer: Any, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Encode each text, ending in exactly one EOS. Special tokens in the text are encoded as plain text."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token. Set its eos_token.")
    documents = []
    for ids in _ids(tokenizer, texts):
        documents.append(np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int64))
    return documents


def _ids(tokenizer: Any, texts: list[str]) -> Any:
    try:
        return (
            tokenizer(texts, split_special_tokens=True, truncation=False, padding=False)["input_ids"] if texts else []
        )
    except TypeError:  # not a transformers tokenizer: only encode() is required
        return [list(tokenizer.encode(text)) for text in texts]

"""The classic packed data set, as courses ask for it: one stream of documents, cut into equal chunks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sft_recipes.data import formats, sources, templates
from sft_recipes.errors import DataError


class PackedSFTDataset(Dataset[dict[str, torch.Tensor]]):  # type: ignore[misc]  # torch gives it no types
    """Prompts and responses in the Alpaca template, end to end, in chunks of `seq_length` tokens.

    `tokenizer` is one of transformers'; `dataset_path` names rows with `prompt` and `response` (jsonl, json, csv or
    parquet, each also gzipped). Each document is the Alpaca text as the tokenizer encodes it, BOS included where it adds
    one, and EOS. `shuffle` shuffles the documents (not the chunks), by torch's global seed. What is left at the end and
    does not fill a chunk is dropped.

    Item i is {"input_ids", "labels"}: int64 tensors of shape (seq_length,). Labels are the next tokens already, also
    across the borders of documents and chunks, and nothing is masked; a model's own loss, which shifts labels itself,
    takes `input_ids` as labels instead. Raises DataError for rows that cannot be read, IndexError past the end.
    """

    def __init__(self, tokenizer: Any, dataset_path: str | Path, seq_length: int, shuffle: bool) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {seq_length}")
        texts = []
        for row in sources.read(str(dataset_path)):
            if isinstance(row, DataError):
                raise row
            user, assistant = formats.to_example(row.values, "prompt_completion", {}, row.place).messages
            texts.append(templates.alpaca_prompt(user["content"]) + assistant["content"])
            try:
                texts[-1].encode()
            except UnicodeEncodeError:
                raise DataError(f"{row.place}: not valid Unicode: half of a surrogate pair") from None
        documents = _encode(tokenizer, texts)
        order = torch.randperm(len(documents)).tolist() if shuffle else range(len(documents))
        stream = np.concatenate([np.zeros(0, dtype=np.int64), *(documents[number] for number in order)])
        self.seq_length = seq_length
        self._stream = torch.from_numpy(stream)

    def __len__(self) -> int:
        return max(0, len(self._stream) - 1) // self.seq_length  # the last label needs a token more

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        start = i % len(self) * self.seq_length
        chunk = self._stream[start : start + self.seq_length + 1]
        return {"input_ids": chunk[:-1].clone(), "labels": chunk[1:].clone()}


def iterate_batches(
    dataset: Dataset[dict[str, torch.Tensor]], batch_size: int, shuffle: bool
) -> DataLoader[dict[str, torch.Tensor]]:
    """One epoch in batches of stacked items, the last one maybe smaller; `len()` of it is their number."""
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def _encode(tokenizer: Any, texts: list[str]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Token ids of each text, with EOS once at the end. Text that looks like a special token stays text."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end token (eos_token)")
    documents = []
    for ids in _ids(tokenizer, texts):
        documents.append(np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int64))
    return documents


def _ids(tokenizer: Any, texts: list[str]) -> Any:
    try:
        return (
            tokenizer(texts, split_special_tokens=True, truncation=False, padding=False)["input_ids"] if texts else []
        )
    except TypeError:  # none of transformers', but one that encodes
        return [list(tokenizer.encode(text)) for text in texts]

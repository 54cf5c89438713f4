import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes import PackedSFTDataset, iterate_batches
from sft_recipes.data import packed_dataset, prepare
from sft_recipes.data.encoder import from_transformers
from sft_recipes.data.templates import alpaca_prompt
from sft_recipes.errors import DataError
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe, write_rows
from tests.data import tokenizers

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
ROWS = [{"prompt": f"Say {n} <|endoftext|>.", "response": f"word {n}</s>"} for n in range(12)]


def stream(folder: Path) -> list[int]:
    """Concatenate the documents, by definition."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = []
    for row in ROWS:
        text = alpaca_prompt(row["prompt"]) + row["response"]
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        tokens += ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    return tokens


def test_eleven_tokens_in_chunks_of_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    monkeypatch.setattr(packed_dataset, "_encode", lambda *_: [torch.arange(11).numpy()])
    dataset = PackedSFTDataset(None, tmp_path / "rows.jsonl", 4, shuffle=False)

    assert [dataset[i]["input_ids"].tolist() for i in range(len(dataset))] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [dataset[i]["labels"].tolist() for i in range(len(dataset))] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
@pytest.mark.parametrize("length", [1, 7, 32])
def test_the_stream_in_chunks(tmp_path: Path, kind: str, length: int) -> None:
    folder = tokenizers.save(kind, tmp_path / "model")
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    dataset = PackedSFTDataset(AutoTokenizer.from_pretrained(folder), str(file), length, shuffle=False)
    tokens = stream(folder)

    assert len(dataset) == (len(tokens) - 1) // length
    items = list(dataset)
    assert [token for item in items for token in item["input_ids"].tolist()] == tokens[: len(dataset) * length]
    assert [token for item in items for token in item["labels"].tolist()] == tokens[1 : len(dataset) * length + 1]
    assert all(item[name].dtype == torch.int64 and item[name].shape == (length,) for item in items for name in item)


def test_documents_are_shuffled_and_not_chunks(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    torch.manual_seed(0)
    whole = [PackedSFTDataset(tokenizer, file, 1, shuffle=shuffle) for shuffle in (False, True)]
    texts = [tokenizer.decode([item["input_ids"].item() for item in dataset]) for dataset in whole]

    begin, ends = tokenizer.bos_token, [sorted(text.split(tokenizer.bos_token)[:-1]) for text in texts]
    assert texts[0] != texts[1]
    assert texts[1].startswith(begin)
    assert len(set(ends[0]) & set(ends[1])) >= len(ROWS) - 1  # except the document truncated at the end


def test_one_epoch_in_batches(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    dataset = PackedSFTDataset(AutoTokenizer.from_pretrained(TINY), file, 16, shuffle=False)
    batches = iterate_batches(dataset, 4, shuffle=False)

    assert len(batches) == -(-len(dataset) // 4)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [item["labels"].tolist() for item in dataset]
    mixed = torch.cat([batch["input_ids"] for batch in iterate_batches(dataset, 4, shuffle=True)]).tolist()
    assert sorted(mixed) == sorted(item["input_ids"].tolist() for item in dataset)


def test_a_tokenizer_that_only_encodes(tmp_path: Path) -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, text: str) -> dict[str, list[int]]:
            raise TypeError

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    dataset = PackedSFTDataset(Letters(), write_rows(tmp_path / "rows.jsonl", ROWS[:1]), 5, shuffle=False)
    assert "".join(chr(i) for i in dataset[0]["input_ids"].tolist()) == "Below"


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(DataError, match=r"rows.jsonl:2:2: invalid JSON"):
        PackedSFTDataset(AutoTokenizer.from_pretrained(TINY), tmp_path / "rows.jsonl", 4, shuffle=False)


def test_a_recipe_trains_on_the_same_stream_with_labels_shifted_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", ROWS)
    recipe = parse.load(
        write_recipe(
            data={
                "eval": None, "train_on": "all", "packing": "wrapped", "cross_document_attention": True, "shuffle": False,
                "max_length": 64,
            }
        )
    ).recipe  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = prepare.prepare(recipe, from_transformers(tokenizer)).train.table().to_pylist()
    dataset = PackedSFTDataset(tokenizer, file, 64, shuffle=False)

    assert [row["input_ids"] for row in rows[: len(dataset)]] == [item["input_ids"].tolist() for item in dataset]
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids, labels = (torch.tensor([rows[0][name]]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        ours = model(ids, labels=labels).loss
        logits = model(dataset[0]["input_ids"][None]).logits[0]
    theirs = cross_entropy(logits[:-1], dataset[0]["labels"][:-1])
    assert torch.allclose(ours, theirs)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, sft_recipes; assert 'torch' not in sys.modules; from sft_recipes import PackedSFTDataset;"
        "assert 'torch' in sys.modules; assert not {'trl', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

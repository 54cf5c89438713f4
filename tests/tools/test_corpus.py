import json
import random
from pathlib import Path

import pytest

from sft_recipes.model_dir import BUILTIN
from tools.builtin_model import corpus, make

TASKS = BUILTIN / "tasks"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def content(row: dict[str, str]) -> tuple[str, str]:
    """Task and content of a row, found from its wording."""
    for name, task in corpus.TASKS.items():
        for wording in task.instructions:
            before, x, after = wording.partition("X")
            if not x and row["instruction"] == wording:
                return name, row["input"]
            if x and not row["input"] and row["instruction"].startswith(before) and row["instruction"].endswith(after):
                found = row["instruction"][len(before) : len(row["instruction"]) - len(after)]
                if (name == "sum") == ("+" in found):
                    return name, found
    raise AssertionError(row)


def test_the_files_are_those_of_the_generator(tmp_path: Path) -> None:
    make.write_rows(tmp_path)

    for name in ("train", "heldout"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (TASKS / f"{name}.jsonl").read_bytes()


def test_no_held_out_content_is_trained_on() -> None:
    train, held_out = {content(row) for row in rows("train")}, {content(row) for row in rows("heldout")}

    assert len(rows("train")) == 6000
    assert len(rows("heldout")) == 200
    assert not train & held_out
    assert {task for task, _ in held_out} == set(corpus.TASKS)


def test_answers_are_right() -> None:
    right = {
        "reverse": lambda words: " ".join(words.split()[::-1]),
        "final": lambda words: words.split()[-1],
        "count": lambda words: str(len(words.split())),
        "largest": lambda numbers: str(max(map(int, numbers.split()))),
        "sum": lambda sum: str(eval(sum)),
    }
    for row in rows("train") + rows("heldout"):
        task, given = content(row)
        if task in right:
            assert row["output"] == right[task](given), row


@pytest.mark.parametrize("known", [corpus.BOTH_WAYS, corpus.PLURALS, corpus.KIND_OF, corpus.FOLLOWS])
def test_what_is_known_is_unambiguous(known: dict[str, str]) -> None:
    assert all(key and value and key.split() == [key] for key, value in known.items())
    assert len(corpus.BOTH_WAYS) == 2 * len(corpus.OPPOSITES)


def test_pretraining_text_has_neither_the_template_nor_an_answer_at_its_end() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = corpus.document(rng)
        assert "### " not in text
        assert "Below is an instruction" not in text
        assert not text.splitlines()[-1].startswith(("A:", "Answer:", "Result:"))
        assert not any(wording in text for task in corpus.TASKS.values() for wording in task.instructions)

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data import prepare, sources, tokenization
from sft_recipes.errors import DataError, RecipeError
from sft_recipes.recipe import parse
from tests.conftest import ROWS, WriteRecipe, write_rows
from tests.data import tokenizers


def prepared(recipe: Path, *overrides: str, cached: bool = False) -> prepare.Prepared:
    loaded = parse.load(recipe, ["data.max_length=200", "data.eval=null", *overrides]).recipe
    return prepare.prepare(loaded, tokenizers.make("bytes+bos"), cached=cached)


def lines_of_problem(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepared(recipe, *overrides)
    return [line.replace(f"{recipe.parent}/", "") for line in caught.value.lines]


def test_text_that_is_not_unicode_in_two_batches(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [{**row, "instruction": f"{number}: {row['instruction']}"} for number in range(40) for row in ROWS]
    rows[100] |= {"output": "\ud800"}
    rows[700] |= {"output": "\ud801"}
    write_rows(tmp_path / "train.jsonl", rows)

    assert [line.partition(": ")[0] for line in lines_of_problem(write_recipe())] == [
        "train.jsonl:101"
    ]  # then it stops
    data = prepared(write_recipe(), "data.on_bad_row=drop")
    assert data.train.stats.sources[0].bad_rows == 2
    assert data.train.stats.sources[0].rows == len(rows) - 2
    assert [line.partition(": invalid")[0] for line in data.warnings] == [
        f"data.on_bad_row: dropped {tmp_path / 'train.jsonl'}:{line}" for line in (101, 701)
    ]


BAD = [
    *ROWS[:2],
    {"instruction": "without an answer"},  # 3: no column
    *ROWS[2:20],
    {"instruction": "another"},  # 22
    {"instruction": "a number", "output": 5},  # 23: not text
]


@pytest.mark.parametrize("cached", [False, True])
def test_bad_rows_are_dropped_counted_and_named(write_recipe: WriteRecipe, tmp_path: Path, cached: bool) -> None:
    file = write_rows(tmp_path / "train.jsonl", BAD)
    file.write_text(file.read_text("utf-8") + "{broken\n" + json.dumps(ROWS[20]) + "\n", encoding="utf-8")
    good = prepared(write_recipe(data={"train": str(write_rows(tmp_path / "good.jsonl", ROWS[:21]))})).train
    for _ in range(1 + cached):  # the second time, rows are not read
        data = prepared(write_recipe(data={"train": str(file)}), "data.on_bad_row=drop", "data.eval=0.2", cached=cached)
        stats = data.train.stats.sources[0]
        assert (stats.bad_rows, stats.rows_read, stats.as_dict()["bad_rows"]) == (4, 21, 4)
        assert [line.replace(f"{tmp_path}/", "").partition(" (got")[0] for line in data.warnings] == [
            "data.on_bad_row: dropped train.jsonl:3: column 'output' is missing",
            "data.on_bad_row: dropped train.jsonl:22: column 'output' is missing",
            "data.on_bad_row: dropped train.jsonl:23: 'output' must be text",
            "data.on_bad_row: dropped train.jsonl:24:2: invalid JSON: expecting property name enclosed in double quotes.",
        ]
        assert "This affects 2 of 25 rows." in data.warnings[0]
        places = data.train.chosen[0].places(range(21))
        assert [place.rpartition(":")[2] for place in places.values()] == [
            str(line) for line in (1, 2, *range(4, 22), 25)
        ]
    whole = prepared(write_recipe(data={"train": str(file)}), "data.on_bad_row=drop").train
    assert whole.table().equals(good.table())


def test_rows_that_the_template_rejects_are_dropped(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if 'number 7' in m.content %}{{ raise_exception('not seven') }}{% endif %}"
        "{{ m.content }}</s>{% endfor %}"
    )
    template = f"data.template={tmp_path / 'chat.jinja'}"

    assert "not seven" in lines_of_problem(write_recipe(), template)[0]
    assert prepared(write_recipe(), template, "data.on_bad_row=drop").train.stats.sources[0].bad_rows == 1


def test_no_valid_row_is_an_error_even_if_they_may_be_dropped(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", BAD[2:3] * 30)

    for override in ("data.on_bad_row=drop", "data.on_bad_row=error"):
        [line] = lines_of_problem(write_recipe(), "data.format=alpaca", override)
        assert line.startswith("train.jsonl:1: column 'output' is missing")
        assert line.endswith("all 30 rows." if "drop" in override else "all of the first 20 rows.")


MANY = [
    {"messages": [{"role": "user", "content": f"the {number}?"}, {"role": "assistant", "content": f"fox {number}"}]}
    for number in range(1700)
]


def prepared_chat(recipe: Path, *overrides: str) -> prepare.Prepared:
    loaded = parse.load(recipe, ["data.max_length=200", "data.eval=null", *overrides]).recipe
    return prepare.prepare(loaded, tokenizers.make("chat"), cached=False)


@pytest.fixture
def many(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """A recipe with several batches of conversations."""
    assert len(MANY) > 3 * tokenization._BATCH
    write_rows(tmp_path / "train.jsonl", MANY)
    return write_recipe()


def test_processes_render_what_one_would(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    by_processes = prepared_chat(many)
    monkeypatch.setattr(tokenization.Work, "_rendered", rendered_here)

    assert prepared_chat(many).train.table().equals(by_processes.train.table())


def rendered_here(work: tokenization.Work) -> Iterator[Any]:
    return (tokenization._render_all(batch, work.renderer.render) for batch in work._examples())


def test_processes_say_what_is_wrong_with_each_row(many: Path) -> None:
    rows = copy.deepcopy(MANY)
    rows[600]["messages"][1]["content"] = "<|im_end|>"
    rows[1600]["messages"][1]["content"] = "<|im_start|>"
    write_rows(many.parent / "train.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepared_chat(many)

    assert [line.partition(": ")[0].rpartition(":")[2] for line in caught.value.lines] == ["601", "1601"]


def test_a_process_that_is_killed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_in_child", killed)
    with pytest.raises(
        RecipeError, match=r"it takes more than .* for a row from .*train.jsonl:1 to .*train.jsonl:\d+\."
    ):
        prepared_chat(many)


def killed(batch: object, render: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_processes_end_with_the_one_that_started_them(many: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from sft_recipes.data import tokenization
from tests.data.test_tokenization import prepared_chat

def wait(batch, render):
    print(os.getpid(), flush=True)
    time.sleep(600)

os.cpu_count, tokenization._in_child = lambda: 4, wait
prepared_chat(Path({str(many)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert len({parent.stdout.readline() for _ in range(2)}) == 2
        parent.kill()
        parent.communicate(timeout=60)  # returns because no process keeps the pipe open


def test_long_rows_are_tokenized_a_few_at_a_time(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Time and memory to sample them do not grow with their length."""
    write_rows(tmp_path / "train.jsonl", [{"instruction": str(n), "output": "word " * 100_000} for n in range(20)])
    loaded = parse.load(write_recipe(), ["data.max_length=200", "data.eval=null", "data.overlong=split"]).recipe
    sample = prepare.prepare(loaded, tokenizers.make("bytes+bos"), cached=False, seconds=0)

    assert sample.train.stats.sources[0].rows == 4  # of 500,000 characters each


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the cache would return the new content for the old one."""
    recipe = parse.load(write_recipe(), ["data.eval=null", "data.max_length=200"]).recipe
    file, fingerprint = tmp_path / "train.jsonl", sources.fingerprint
    before = file.read_text("utf-8")

    def then_change(*args: Any) -> str:
        found = fingerprint(*args)
        file.write_text(before.replace("word", "other word"), "utf-8")
        return found

    monkeypatch.setattr(sources, "fingerprint", then_change)
    changed = prepare.prepare(recipe, tokenizers.make("bytes+bos")).train
    monkeypatch.setattr(sources, "fingerprint", fingerprint)
    file.write_text(before, "utf-8")

    assert prepare.prepare(recipe, tokenizers.make("bytes+bos")).train.stats.tokens < changed.stats.tokens

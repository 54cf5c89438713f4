import copy
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
from tests.conftest import WriteRecipe, write_rows
from tests.data import tokenizers

MANY = [
    {"messages": [{"role": "user", "content": f"the {number}?"}, {"role": "assistant", "content": f"fox {number}"}]}
    for number in range(1700)
]


def prepared(recipe: Path, *overrides: str) -> prepare.Prepared:
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
    by_processes = prepared(many)
    monkeypatch.setattr(tokenization.Work, "_rendered", rendered_here)

    assert prepared(many).train.table().equals(by_processes.train.table())


def rendered_here(work: tokenization.Work) -> Iterator[Any]:
    return (tokenization._render_all(batch, work.renderer.render) for batch in work._examples())


def test_processes_say_what_is_wrong_with_each_row(many: Path) -> None:
    rows = copy.deepcopy(MANY)
    rows[600]["messages"][1]["content"] = "<|im_end|>"
    rows[1600]["messages"][1]["content"] = "<|im_start|>"
    write_rows(many.parent / "train.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepared(many)

    assert [line.partition(": ")[0].rpartition(":")[2] for line in caught.value.lines] == ["601", "1601"]


def test_a_process_that_is_killed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_in_child", killed)
    with pytest.raises(
        RecipeError, match=r"it takes more than .* for a row from .*train.jsonl:1 to .*train.jsonl:\d+\."
    ):
        prepared(many)


def killed(batch: object, render: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_processes_end_with_the_one_that_started_them(many: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from sft_recipes.data import tokenization
from tests.data.test_tokenization import prepared

def wait(batch, render):
    print(os.getpid(), flush=True)
    time.sleep(600)

os.cpu_count, tokenization._in_child = lambda: 4, wait
prepared(Path({str(many)!r}))
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

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data import prepare, sources, tokenization
from sft_recipes.errors import DataError, RunError
from sft_recipes.recipe import parse
from tests.conftest import ROWS, WriteRecipe, write_rows
from tests.data import tokenizers

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems tokenize in one process")
MANY = [{**row, "instruction": f"{number}: {row['instruction']}"} for number in range(210) for row in ROWS]


def prepared(recipe: Path, kind: str = "bytes+bos") -> prepare.Prepared:
    loaded = parse.load(recipe, ["data.max_length=200", "data.eval=null"]).recipe
    return prepare.prepare(loaded, tokenizers.make(kind), cached=False)


@pytest.fixture
def many(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """A recipe with enough rows to start processes."""
    assert len(MANY) > tokenization._BATCH * tokenization._BATCHES_FOR_PROCESSES
    write_rows(tmp_path / "train.jsonl", MANY)
    return write_recipe()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with many cores."""
    monkeypatch.setattr(tokenization, "_processes", lambda: 3)


@LINUX
@pytest.mark.parametrize("kind", ["bytes+bos", "metaspace+bos"])
def test_processes_make_what_threads_make(many: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(tokenization, "_processes", lambda: 1)
    by_threads = prepared(many, kind)
    monkeypatch.setattr(tokenization, "_processes", lambda: 3)
    monkeypatch.setattr(tokenization.Work, "_by_threads", lambda *_: pytest.fail("threads were used"))

    assert prepared(many, kind).train.table().equals(by_threads.train.table())


@LINUX
def test_processes_say_what_is_wrong_with_each_row(many: Path, processes: None) -> None:
    rows = [dict(row) for row in MANY]
    rows[600]["output"] = "\ud800"
    rows[2600]["output"] = "\ud801"
    write_rows(many.parent / "train.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepared(many)

    assert [line.partition(": ")[0].rpartition(":")[2] for line in caught.value.lines] == ["601", "2601"]


@LINUX
def test_a_process_that_is_killed(many: Path, processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_in_worker", killed)
    rows = [dict(row) for row in MANY]
    rows[700]["output"] = "long " * 900
    write_rows(many.parent / "train.jsonl", rows)
    expected = r"train.jsonl:701: a process that tokenized rows .*train.jsonl:1 to .*train.jsonl:\d+ was killed"
    with pytest.raises(RunError, match=expected):
        prepared(many)


def killed(batch: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@LINUX
def test_processes_end_with_the_one_that_started_them(many: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from sft_recipes.data import tokenization
from tests.data.test_tokenization import prepared

def wait(batch):
    print(os.getpid(), flush=True)
    time.sleep(600)

tokenization._processes, tokenization._in_worker = lambda: 2, wait
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


def test_few_cores_tokenize_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert tokenization._processes() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert tokenization._processes() == (16 if sys.platform == "linux" else 1)

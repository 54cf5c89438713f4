import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_recipes.data import cache
from sft_recipes.data.encoder import Documents


def documents(*rows: list[int]) -> Documents:
    return Documents(
        np.array([i for row in rows for i in row], dtype=np.int32),
        np.array([i % 2 == 0 for row in rows for i in row]),
        np.cumsum([0, *map(len, rows)]),
        np.cumsum([0, *map(len, rows[:-1])]),
        np.array([row[-1] for row in rows], dtype=np.int32),
        *(np.zeros(len(rows), dtype=bool) for _ in range(2)),
        np.array(["" for _ in rows]),
        np.ones(len(rows), dtype=bool),
        *(np.array([hash(tuple(row)) % 2**32 for row in rows], dtype=np.uint64) for _ in range(2)),
    )


def make() -> Iterator[Documents]:
    yield documents([1, 2], [3])
    yield documents([4, 5, 6])


def refuse() -> Iterator[Documents]:
    raise AssertionError("made again")


def kept(name: str | None, how: Callable[[], Iterator[Documents]] = make, *, complete: bool = True) -> list[list[int]]:
    found = cache.stored(name, how, lambda: complete)
    assert [found[n][1].tolist() for n in range(3)] == [[False, True], [False], [True, False, True]]
    return [found[n][0].tolist() for n in range(len(found))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenized"


ROWS = [[1, 2], [3], [4, 5, 6]]


def test_made_once(folder: Path) -> None:
    assert kept("a") == ROWS
    assert kept("a", refuse) == ROWS
    assert [entry.name for entry in folder.iterdir()] == ["a"]


def test_not_kept(folder: Path) -> None:
    assert kept(None) == ROWS
    assert kept("a", complete=False) == ROWS

    assert list(folder.iterdir()) == []


def test_what_fails_halfway_leaves_nothing(folder: Path) -> None:
    def fail() -> Iterator[Documents]:
        yield documents([1])
        raise ValueError("halfway")

    with pytest.raises(ValueError, match="halfway"):
        cache.stored("a", fail, lambda: True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["ids", "trained", "documents.npz"])
@pytest.mark.parametrize("how", ["cut", "gone", "changed"])
def test_an_entry_that_is_not_whole_is_made_again(folder: Path, name: str, how: str) -> None:
    kept("a")
    file = folder / "a" / name
    if how == "gone":
        file.unlink()
    elif how == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(file.read_bytes()[:-1])

    assert kept("a") == ROWS
    assert kept("a", refuse) == ROWS  # the corrupt entry was replaced


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = cache._write

    def full(into: Path, batches: Iterable[Documents], about: Any) -> None:
        if into.parent == folder:
            raise OSError(28, "No space left on device")
        write(into, batches, about)

    monkeypatch.setattr(cache, "_write", full)
    assert kept("a") == ROWS
    assert list(folder.iterdir()) == []


def test_two_at_once(folder: Path) -> None:
    """A second run finishes an entry while the first one writes it."""

    def slowly() -> Iterator[Documents]:
        yield documents([1, 2], [3])
        kept("a")
        yield documents([4, 5, 6])

    assert kept("a", slowly) == ROWS
    assert [entry.name for entry in folder.iterdir()] == ["a"]


def test_killed_while_it_writes(folder: Path) -> None:
    code = """
import os
from sft_recipes.data import cache
from tests.data.test_cache import documents
def make():
    yield documents([1, 2], [3])
    os.kill(os.getpid(), 9)
cache.stored("a", make, lambda: True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)

    assert done.returncode == -9
    assert kept("a") == ROWS


def test_entries_that_no_run_used_go(folder: Path) -> None:
    old, used, new = (cache.key(name=name) for name in ("old", "used", "new"))
    (folder / "partial-abc").mkdir(parents=True)
    (folder / "not ours").mkdir()
    for name in (old, used):
        kept(name)
    for entry in folder.iterdir():
        os.utime(entry, (0, time.time() - 40 * 24 * 3600))
    kept(used, refuse)
    kept(new)

    assert {entry.name for entry in folder.iterdir()} == {used, new, "not ours"}


def test_a_cache_that_cannot_be_written(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file in its place")

    assert kept("a") == ROWS


def test_documents_outlive_their_entry(folder: Path) -> None:
    found = cache.stored("a", make, lambda: True)
    shutil.rmtree(folder)

    assert found[2][0].tolist() == [4, 5, 6]


def test_the_key_moves_with_what_decides() -> None:
    assert cache.key(a=1, b="x") == cache.key(b="x", a=1)
    assert cache.key(a=1) != cache.key(a=2)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SFT_RECIPES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert cache.folder() == tmp_path / "sft-recipes" / "tokenized"

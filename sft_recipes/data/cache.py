"""Tokenised sources on disk, so that a second run need not tokenise again.

An entry is a directory whose name is a hash of all that decides its content; it gets that name when it is complete. So it
is never stale, and runs that write the same entry at once, or are killed while they write, do no harm. What the disk has
changed since is found by a checksum, and made again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sft_recipes.data.tokens import ONE_EACH, Documents
from sft_recipes.errors import RunError

_UNUSED = 30 * 24 * 3600  # seconds after which an entry that no run used is removed
_ABANDONED = 24 * 3600  # seconds after which nothing is being written any more
_PARTIAL = "partial-"  # begins the names of entries that are being written


def folder() -> Path:
    """Where entries are kept: in $SFT_RECIPES_CACHE, or sft-recipes in the user's cache directory."""
    own = os.environ.get("SFT_RECIPES_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-recipes"
    return (Path(own) if own else usual) / "tokenised"


def key(**decides: Any) -> str:
    """The name of the entry that `decides` makes, together with the code of this package's data stage."""
    return hashlib.sha256(json.dumps([_code(), decides], sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in (".py", ".jinja"):
            digest.update(file.read_bytes())
    for package in ("jinja2", "tokenizers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


def stored(name: str | None, make: Callable[[], Iterable[Documents]], complete: Callable[[], bool]) -> Documents:
    """The documents of entry `name`, made and kept if they are not there; memory-mapped.

    They are not kept where `name` is None, or where `complete` says afterwards that these are not all.
    """
    entry = folder() / name if name else None
    if entry is not None and (found := _read(entry)) is not None:
        with contextlib.suppress(OSError):
            os.utime(entry)
        return found
    if entry is not None:
        with contextlib.suppress(OSError):  # the cache is full, or cannot be written: another place will do
            return _made(entry, make, complete)
    try:
        return _made(None, make, complete)
    except OSError as error:
        raise RunError(
            f"the tokenised data cannot be written: {error}; set TMPDIR or SFT_RECIPES_CACHE to a directory with room"
        ) from error


def _made(entry: Path | None, make: Callable[[], Iterable[Documents]], complete: Callable[[], bool]) -> Documents:
    with _room(entry) as partial:
        _write(partial, make())
        if entry is not None and complete():
            with contextlib.suppress(OSError):  # another run was faster, or the cache cannot be written
                _remove_unused(entry.parent)
                if entry.exists() and _read(entry) is None:
                    shutil.rmtree(entry)  # it was cut off, or damaged
                for file in partial.iterdir():  # a name must not outlive, in a power cut, what it names
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
                partial.rename(entry)
                partial = entry
        documents = _read(partial)
    if documents is None:
        raise OSError(f"{partial}: what was written cannot be read back")
    return documents


@contextmanager
def _room(entry: Path | None) -> Iterator[Path]:
    """A new directory beside the entry, or in the system's own place; it is gone afterwards, unless renamed."""
    parent = None
    if entry is not None:
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            parent = entry.parent if os.access(entry.parent, os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)  # what is mapped from it stays readable


def _write(into: Path, batches: Iterable[Documents]) -> None:
    lengths = array("q")
    rest: dict[str, list[Any]] = {name: [] for name in ONE_EACH}
    checksums = [0, 0]
    with (into / "ids").open("wb") as ids, (into / "trained").open("wb") as trained:
        for batch in batches:
            for number, (stream, values) in enumerate(((ids, batch.ids), (trained, batch.trained))):
                stream.write(values.data)
                checksums[number] = zlib.crc32(values.data, checksums[number])
            lengths.extend(np.diff(batch.offsets).tolist())
            for name, parts in rest.items():
                parts.append(getattr(batch, name))
    offsets = np.concatenate([[0], np.cumsum(np.frombuffer(lengths, dtype=np.int64))])
    columns = {name: np.concatenate(parts) for name, parts in rest.items()}
    np.savez(into / "documents.npz", offsets=offsets, checksums=checksums, allow_pickle=False, **columns)


def _read(entry: Path) -> Documents | None:
    """The documents in a directory; None where there are none, or not all."""
    try:
        with np.load(entry / "documents.npz") as rest:
            columns = {name: rest[name] for name in ("offsets", *ONE_EACH)}
            checksums = rest["checksums"].tolist()
        # asarray: slicing a memmap takes ten times as long as slicing an array.
        ids = np.asarray(np.memmap(entry / "ids", dtype=np.int32, mode="r"))
        trained = np.asarray(np.memmap(entry / "trained", dtype=np.bool_, mode="r"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(ids) != columns["offsets"][-1] or [zlib.crc32(ids.data), zlib.crc32(trained.data)] != checksums:
        return None
    return Documents(ids, trained, **columns)


def _remove_unused(parent: Path) -> None:
    for names, age in (("[0-9a-f]" * 64, _UNUSED), (f"{_PARTIAL}*", _ABANDONED)):  # nothing else, should it be there
        for entry in parent.glob(names):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > age:
                    shutil.rmtree(entry)

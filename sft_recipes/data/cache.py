"""Cache tokenized sources on disk.

An entry is a directory named by a hash of everything that determines its content, and is renamed into place once it is
complete. So entries are never stale, and concurrent or killed writers do no harm. A checksum detects corruption; a corrupt
entry is rebuilt.
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

from sft_recipes.data.encoder import PER_DOCUMENT, Documents
from sft_recipes.errors import RunError

_UNUSED = 30 * 24 * 3600  # seconds after which an unused entry is removed
_ABANDONED = 24 * 3600  # seconds after which a partial entry is removed
_PARTIAL = "partial-"  # prefix of entries that are being written


def folder() -> Path:
    """Return the cache directory: in $SFT_RECIPES_CACHE, or in sft-recipes of the user's cache."""
    override = os.environ.get("SFT_RECIPES_CACHE")
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft-recipes"
    return (Path(override) if override else default) / "tokenized"


def key(**inputs: Any) -> str:
    """Hash the inputs of an entry, together with the code of the data pipeline, to its name."""
    return hashlib.sha256(json.dumps([_code(), inputs], sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".jinja"):
            digest.update(file.read_bytes())
    for package in ("jinja2", "tokenizers", "transformers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()


def stored(
    name: str | None,
    make: Callable[[], Iterable[Documents]],
    complete: Callable[[], bool],
    about: dict[str, Any] | None = None,
) -> Documents:
    """Return the memory-mapped documents of entry `name`; if it does not exist, make and cache it.

    Nothing is cached if `name` is None, or if `complete()` is False after `make()`. `about`, values of JSON that are known
    after `make()`, is kept with the documents, and updated from an entry that is read.
    """
    entry = folder() / name if name else None
    if entry is not None and (cached := _read(entry, about)) is not None:
        with contextlib.suppress(OSError):
            os.utime(entry)
        return cached
    if entry is not None:
        with contextlib.suppress(OSError):  # the cache is full or read-only: fall back to a temporary directory
            return _build(entry, make, complete, about)
    try:
        return _build(None, make, complete, about)
    except OSError as error:
        raise RunError(
            f"cannot write the tokenized data: {error}. Set TMPDIR or SFT_RECIPES_CACHE to a directory with free space."
        ) from error


def _build(
    entry: Path | None,
    make: Callable[[], Iterable[Documents]],
    complete: Callable[[], bool],
    about: dict[str, Any] | None,
) -> Documents:
    with _temporary_dir(entry) as partial:
        _write(partial, make(), about)
        if entry is not None and complete():
            with contextlib.suppress(OSError):  # a concurrent run finished first, or the cache is read-only
                _remove_unused(entry.parent)
                if entry.exists() and _read(entry) is None:
                    shutil.rmtree(entry)  # truncated or corrupt
                for file in partial.iterdir():  # after a power failure, no entry may have its name without its content
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
                partial.rename(entry)
                partial = entry
        documents = _read(partial)
    if documents is None:
        raise OSError(f"{partial}: the written data cannot be read back")
    return documents


@contextmanager
def _temporary_dir(entry: Path | None) -> Iterator[Path]:
    """Create a directory beside the entry, or in TMPDIR; it is removed afterwards unless it was renamed."""
    parent = None
    if entry is not None:
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            parent = entry.parent if os.access(entry.parent, os.W_OK) else None
    temporary = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # files that are memory-mapped stay readable


def _write(into: Path, batches: Iterable[Documents], about: dict[str, Any] | None) -> None:
    lengths, begins, tokens = array("q"), array("q"), 0
    per_document: dict[str, list[Any]] = {name: [] for name in PER_DOCUMENT}
    checksums = [0, 0]
    with (into / "ids").open("wb") as ids, (into / "trained").open("wb") as trained:
        for batch in batches:
            for number, (stream, values) in enumerate(((ids, batch.ids), (trained, batch.trained))):
                stream.write(values.data)
                checksums[number] = zlib.crc32(values.data, checksums[number])
            lengths.extend(np.diff(batch.offsets).tolist())
            begins.extend((batch.begins + tokens).tolist())
            tokens += len(batch.ids)
            for name, parts in per_document.items():
                parts.append(getattr(batch, name))
    offsets = np.concatenate([[0], np.cumsum(np.frombuffer(lengths, dtype=np.int64))])
    columns = {name: np.concatenate(parts) for name, parts in per_document.items()}
    columns |= {
        "offsets": offsets,
        "begins": np.frombuffer(begins, dtype=np.int64),
        "about": np.array(json.dumps(about)),
    }
    np.savez(into / "documents.npz", checksums=checksums, allow_pickle=False, **columns)


def _read(entry: Path, about: dict[str, Any] | None = None) -> Documents | None:
    """Memory-map the documents of an entry, and update `about`; None if it is missing, incomplete or corrupt."""
    try:
        with np.load(entry / "documents.npz") as stored_columns:
            columns = {name: stored_columns[name] for name in ("offsets", "begins", *PER_DOCUMENT)}
            checksums = stored_columns["checksums"].tolist()
            kept = json.loads(stored_columns["about"].item())
        # asarray: slicing a memmap is ten times slower than slicing an array.
        ids = np.asarray(np.memmap(entry / "ids", dtype=np.int32, mode="r"))
        trained = np.asarray(np.memmap(entry / "trained", dtype=np.bool_, mode="r"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(ids) != columns["offsets"][-1] or [zlib.crc32(ids.data), zlib.crc32(trained.data)] != checksums:
        return None
    if about is not None:
        about.update(kept)
    return Documents(ids, trained, **columns)


def _remove_unused(parent: Path) -> None:
    for names, age in (("[0-9a-f]" * 64, _UNUSED), (f"{_PARTIAL}*", _ABANDONED)):  # leaves other files alone
        for entry in parent.glob(names):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > age:
                    shutil.rmtree(entry)

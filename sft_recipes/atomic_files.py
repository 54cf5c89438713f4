"""Write files and directories atomically, with checksums and locks.

A killed process, a full disk or a power cut leaves the earlier file or none, but never a partial one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft_recipes.errors import OutputError, reason_of

_PATIENCE = 10.0  # seconds; workers of a killed process outlive it for a moment and keep its lock
CHECKSUMS = "checksums.json"  # size and SHA-256 of every file in the directory


def create_dirs(folder: Path) -> list[Path]:
    """Create a directory with its parents; return those created, innermost first."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return created


def remove_created(created: list[Path]) -> None:
    """Remove created directories, up to the first that is not empty because another process uses it."""
    with contextlib.suppress(OSError):
        for folder in created:
            folder.rmdir()


@contextmanager
def atomic_dir(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that is synced and renamed to `out` on success, and removed on failure.

    Files get the read permissions of the directory, because safetensors 0.8 writes files that only their owner can
    read. Raises OutputError if another process is writing `out`.
    """
    partial = out.with_name(f".{out.name}.partial")
    created = create_dirs(partial)
    lock = _lock(partial)
    if lock is None:
        raise OutputError(f"{out}: another process is writing it. Wait until it ends, or stop it.")
    try:
        for left in partial.iterdir():  # left over from a killed process
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
            _sync(file)
        _sync(partial)
        partial.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        remove_created(created[1:])
        raise
    finally:
        os.close(lock)


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `file` on success. Concurrent writers do not conflict; the last one wins."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(file)
        _sync(file.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write an indented JSON file atomically."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def append(file: Path, text: str) -> None:
    """Append `text` completely or not at all: a partial line would corrupt the next one."""
    with file.open("ab", buffering=0) as stream:
        before = stream.tell()
        content = text.encode()
        try:
            if stream.write(content) != len(content):  # partial write
                raise OSError(f"{file}: the disk is full")
        except OSError:
            stream.truncate(before)
            raise


def lines(file: Path) -> list[str]:
    """Return the complete lines of a file written by `append`; a killed process can leave a partial last one.

    Not splitlines, which also splits at separators that text in JSON may contain.
    """
    return file.read_bytes().decode().split("\n")[:-1]


def remove(folder: Path) -> None:
    """Remove a directory. It is renamed first, so that a killed process leaves no incomplete directory of that name."""
    if folder.is_dir():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file in a directory, by relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        hashes = list(pool.map(_sha256, files))
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256}
        for file, sha256 in zip(files, hashes, strict=True)
    }


def write_checksums(folder: Path) -> None:
    """Write checksums.json, by which `fault` finds missing, truncated and changed files."""
    write_json(folder / CHECKSUMS, {"files": file_hashes(folder)})


def find_corruption(folder: Path, *, thoroughly: bool = True) -> str | None:
    """Compare a directory with its checksums.json; return the first difference, or None. Hash only if `thoroughly`."""
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        expected = {name: (file["bytes"], file["sha256"]) for name, file in listed.items()}
    except FileNotFoundError:
        return f"incomplete ({CHECKSUMS} is missing)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read: {reason_of(error)}"
    try:
        return _difference(folder, expected, thoroughly)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror or error}"


def _difference(folder: Path, expected: dict[str, tuple[int, str]], thoroughly: bool) -> str | None:
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    del sizes[CHECKSUMS]
    for name, (size, _) in expected.items():
        if name not in sizes:
            return f"incomplete ({name} is missing)"
        if sizes[name] != size:
            return f"corrupt ({name} has {sizes[name]:,} bytes instead of {size:,})"
    if unexpected := sorted(sizes.keys() - expected.keys()):
        return f"unexpected file {unexpected[0]}"
    if thoroughly:
        actual = file_hashes(folder)
        changed = [name for name, (_, sha256) in expected.items() if actual[name]["sha256"] != sha256]
        if changed:
            return f"corrupt (SHA-256 of {changed[0]} differs)"
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a directory against other processes; the lock ends with the process. Raises OutputError if it is locked."""
    deadline = time.monotonic() + _PATIENCE
    while (lock := _lock(folder)) is None:
        if time.monotonic() > deadline:
            raise OutputError(f"output_dir: {folder}: in use by another process. Wait until it ends, or stop it.")
        time.sleep(0.2)
    try:
        yield
    finally:
        os.close(lock)


def is_held(folder: Path) -> bool:
    """Return True if another process has locked the directory; False also on network file systems without locks.

    Raises OutputError if the directory cannot be read.
    """
    try:
        lock = _lock(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror}. Make it readable for this user.") from None
    if lock is not None:
        os.close(lock)
    return lock is None


def _lock(folder: Path) -> int | None:
    """Return a file descriptor that locks a directory until it is closed; None if another process has the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino != folder.stat().st_ino:  # renamed or recreated since it was opened
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        return None
    except OSError:  # some network file systems have no locks
        pass
    return handle


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync directories
            raise
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

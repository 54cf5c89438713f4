"""Files and directories that are whole or not there, whatever kills the process, fills the disk or cuts the power."""

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

from sft_recipes.errors import OutputError

_PATIENCE = 10.0  # seconds; workers of a process that was killed outlive it by some, and hold what it held
MANIFEST = "manifest.json"  # in a sealed directory: size and SHA-256 of every file in it


def make(folder: Path) -> list[Path]:
    """Make a directory with its parents; those that were not there, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def unmake(made: list[Path]) -> None:
    """Remove these directories again, but for those that are not empty: another process may have begun to use them."""
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()


@contextmanager
def complete_or_not_there(out: Path) -> Iterator[Path]:
    """A directory to write to, which gets the name `out` once all is written, and is removed if that fails.

    All of it is on the disk by then. Its files may be read by whom the directory may be read by: safetensors 0.8 lets the
    owner alone read what it writes. Raises OutputError where another process is writing it.
    """
    partial = out.with_name(f".{out.name}.partial")
    made = make(partial)
    held = _hold(partial)
    if held is None:
        raise OutputError(f"{out}: is being written by another process; wait for it, or stop it")
    try:
        for left in partial.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
            _to_disk(file)
        _to_disk(partial)
        partial.rename(out)
        _to_disk(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        unmake(made[1:])
        raise
    finally:
        os.close(held)


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `file` once all is written; until then, and if that fails, the earlier
    one stays. Of processes that write it at once each has its own, and the last one stays."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(file)
        _to_disk(file.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a file anew, whole or not at all."""
    with replaced(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Write an object as readable JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def append(file: Path, text: str) -> None:
    """Add to a file, all of `text` or nothing of it: half a line would spoil the next."""
    with file.open("ab", buffering=0) as stream:
        before = stream.tell()
        content = text.encode()
        try:
            if stream.write(content) != len(content):  # the disk took a part
                raise OSError(f"{file}: the disk is full")
        except OSError:
            stream.truncate(before)
            raise


def lines(file: Path) -> list[str]:
    """The lines of a file that `append` wrote, without their ends; a process that is killed can leave half of one. (Not
    splitlines: text in JSON may hold what that takes for the end of a line.)"""
    return file.read_bytes().decode().split("\n")[:-1]


def remove(folder: Path) -> None:
    """Remove a directory; killed half way, what is left of it no longer has its name."""
    if folder.is_dir():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a directory, by its path in there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock to others
        hashes = list(pool.map(_sha256, files))
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": hashed}
        for file, hashed in zip(files, hashes, strict=True)
    }


def seal(folder: Path) -> None:
    """Write down what a directory holds, so that `fault` can tell whether it is still all there."""
    write_json(folder / MANIFEST, {"files": described(folder)})


def fault(folder: Path, *, thoroughly: bool = True) -> str | None:
    """What is wrong with a sealed directory; None where all of it is there. Contents are read where `thoroughly`."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (file["bytes"], file["sha256"]) for name, file in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it is not known to be complete"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {' '.join(str(error).split())}"
    try:
        return _fault(folder, wanted, thoroughly)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror or error}"


def _fault(folder: Path, wanted: dict[str, tuple[int, str]], thoroughly: bool) -> str | None:
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    del sizes[MANIFEST]
    for name, (size, _) in wanted.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes instead of {size:,}"
    if more := sorted(sizes.keys() - wanted.keys()):
        return f"{more[0]} does not belong to it"
    if thoroughly:
        found = described(folder)
        changed = [name for name, (_, sha256) in wanted.items() if found[name]["sha256"] != sha256]
        if changed:
            return f"{changed[0]} is not as it was written"
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a directory; the lock ends with its process. Raises OutputError."""
    patience = time.monotonic() + _PATIENCE
    while (held := _hold(folder)) is None:
        if time.monotonic() > patience:
            raise OutputError(f"output_dir: {folder}: another process is running in it; wait for it, or stop it")
        time.sleep(0.2)
    try:
        yield
    finally:
        os.close(held)


def is_held(folder: Path) -> bool:
    """Whether a process works in a directory, as `locked` has it. Not known on network file systems without locks: False.
    Raises OutputError where it cannot be read."""
    try:
        held = _hold(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be read: {error.strerror}; make it readable for this user") from None
    if held is not None:
        os.close(held)
    return held is None


def _hold(folder: Path) -> int | None:
    """A handle that holds a directory until it is closed or this process ends; None where another process holds it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(held).st_ino != folder.stat().st_ino:  # it has been renamed, or made anew
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(held)
        return None
    except OSError:  # some network file systems know no locks
        pass
    return held


def _to_disk(path: Path) -> None:
    """What the kernel holds back of a file, or of a directory's names, is written now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, for directories
            raise
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

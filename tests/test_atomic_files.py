"""Atomic writes, checksums and locks."""

import errno
import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_recipes import atomic_files
from sft_recipes.errors import OutputError


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """The kernel limits the size of files: as a full disk, except for the error number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_name_is_given_only_to_what_is_complete(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), atomic_files.atomic_dir(tmp_path / "m") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / ".m.partial").mkdir()  # left by a run that was killed
    (tmp_path / ".m.partial" / "half").write_text("x")
    with atomic_files.atomic_dir(tmp_path / "m") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_parents_that_were_made_go_with_what_failed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), atomic_files.atomic_dir(tmp_path / "a" / "b" / "m"):
        raise OSError("disk full")

    assert list(tmp_path.iterdir()) == []

    with pytest.raises(OSError, match="disk"), atomic_files.atomic_dir(tmp_path / "a" / "b" / "m"):  # noqa: PT012
        with atomic_files.atomic_dir(tmp_path / "a" / "other"):  # of another process
            pass
        raise OSError("disk full")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/other"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"{self.name} is {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    with atomic_files.atomic_dir(tmp_path / "m") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("x")
        (folder / "b").write_text("x")

    at = done.index(".m.partial is m")
    assert sorted(done[:at]) == [".m.partial", "a", "b", "inner"]
    assert done[at + 1 :] == [tmp_path.name]


def test_files_may_be_read_by_whom_the_directory_may_be(tmp_path: Path) -> None:
    with atomic_files.atomic_dir(tmp_path / "m") as folder:
        folder.chmod(0o750)
        (folder / "a").touch(0o600)

    assert stat.filemode((tmp_path / "m" / "a").stat().st_mode) == "-rw-r-----"


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGXFSZ ignored, as CPython does")
def test_what_cannot_be_written_leaves_the_earlier_file(tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    file = tmp_path / "f.json"
    atomic_files.write_json(file, {"a": 1})
    with no_file_over(1000):
        with pytest.raises(OSError, match="large") as caught:
            atomic_files.write_json(file, {"a": "x" * 10_000})
        assert caught.value.errno == errno.EFBIG

    assert json.loads(file.read_text("utf-8")) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_a_line_is_added_whole_or_not(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    atomic_files.append(file, "first\n")
    with no_file_over(15), pytest.raises(OSError, match=r"full|large"):
        atomic_files.append(file, "second line\n")
    atomic_files.append(file, "third\n")

    assert file.read_text() == "first\nthird\n"


def test_a_directory_that_is_being_removed_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").touch()
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda *_, **__: None)  # killed before it could
    atomic_files.remove(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == [".m.removed"]
    monkeypatch.undo()

    atomic_files.remove(tmp_path / "m")  # nothing to do
    (tmp_path / "m").mkdir()
    atomic_files.remove(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_write_a_file_do_not_share_it(tmp_path: Path) -> None:
    with atomic_files.atomic_file(tmp_path / "page") as mine:
        mine.write_text("mine", "utf-8")
        if os.fork() == 0:
            atomic_files.write_text(tmp_path / "page", "another's")
            os._exit(0)
        os.wait()
        assert (tmp_path / "page").read_text("utf-8") == "another's"
    assert (tmp_path / "page").read_text("utf-8") == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["page"]


def sealed(folder: Path) -> Path:
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(1000))
    (folder / "inner").mkdir()
    (folder / "inner" / "state").write_bytes(b"state")
    atomic_files.write_checksums(folder)
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "weights").unlink(), "incomplete (weights is missing)"),
        (
            lambda folder: (folder / "weights").write_bytes(bytes(999)),
            "corrupt (weights has 999 bytes instead of 1,000)",
        ),
        (lambda folder: (folder / "weights").write_bytes(b"1" + bytes(999)), "corrupt (SHA-256 of weights differs)"),
        (
            lambda folder: (folder / "inner" / "state").write_bytes(b"stat3"),
            "corrupt (SHA-256 of inner/state differs)",
        ),
        (lambda folder: (folder / "more").touch(), "unexpected file more"),
        (lambda folder: (folder / "checksums.json").unlink(), "incomplete (checksums.json is missing)"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "checksums.json cannot be read"),
        (
            lambda folder: (folder / "checksums.json").write_text('{"files": {"weights": 3}}'),
            "checksums.json cannot be read",
        ),
    ],
)
def test_faults_of_a_sealed_directory(tmp_path: Path, spoil: object, said: str | None) -> None:
    folder = sealed(tmp_path / "m")
    spoil(folder)  # type: ignore[operator]
    found = atomic_files.find_corruption(folder)

    assert (found is None) if said is None else (found is not None and found.startswith(said))


def test_a_disk_that_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sealed(tmp_path / "m")

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", "weights")

    monkeypatch.setattr(atomic_files, "_sha256", fail)
    assert atomic_files.find_corruption(folder) == "weights cannot be read: Input/output error"


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(atomic_files.fcntl, "flock", fail)
    with atomic_files.locked(tmp_path), atomic_files.atomic_dir(tmp_path / "m"):
        pass

    assert (tmp_path / "m").is_dir()


def test_lines_end_where_append_ended_them(tmp_path: Path) -> None:
    for line in ("a\u2028b\x85\x0cc\r", "d"):
        atomic_files.append(tmp_path / "lines", line + "\n")
    atomic_files.append(tmp_path / "lines", "half")

    assert atomic_files.lines(tmp_path / "lines") == ["a\u2028b\x85\x0cc\r", "d"]


def test_a_look_that_reads_no_contents(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "m")
    (folder / "weights").write_bytes(b"1" + bytes(999))

    assert atomic_files.find_corruption(folder, thoroughly=False) is None


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_PATIENCE", 0)
    with atomic_files.locked(tmp_path):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                with atomic_files.locked(tmp_path):
                    os.write(writer, b"two at once")
            except OutputError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        assert "in use by another process" in os.read(reader, 1000).decode()
        os.wait()
    with atomic_files.locked(tmp_path):
        pass


def test_whether_somebody_works_in_a_directory(tmp_path: Path) -> None:
    assert not atomic_files.is_held(tmp_path)
    with atomic_files.locked(tmp_path):
        assert atomic_files.is_held(tmp_path)
    assert not atomic_files.is_held(tmp_path)
    with atomic_files.locked(tmp_path):  # asking has left nothing behind
        pass

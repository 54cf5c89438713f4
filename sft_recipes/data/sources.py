"""Iterate over the rows of local and remote files, built-in files and Hub datasets, with their locations."""

import glob
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sft_recipes import model_dir
from sft_recipes.data import parsers
from sft_recipes.data.parsers import PARSERS, File, ReadReport, SourceRow
from sft_recipes.errors import DataError, reason_of

TRAIN = ("train",)  # default splits of a Hub dataset; the first one that exists is read
HELD_OUT = ("validation", "test")
QUICK = 1 << 28  # bytes that can be hashed, or whose lines can be counted, in less than a second
BUILTIN = Path(__file__).parent.parent / "builtin"
_SUFFIXES = ", ".join(PARSERS)
_SPLIT_NAMES = {
    "train": "train", "training": "train", "valid": "validation", "validation": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip  # in file names, as datasets takes them
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def extra(path: str) -> str | None:
    """Return the extra of sft-recipes that installs what reads a path; None if none is needed."""
    excel = "excel" if path.lower().removesuffix(".gz").endswith(".xlsx") else None
    return _EXTRAS.get(path.partition("://")[0], excel)


class RemoteFile:
    """A file of a file system of fsspec, with the methods of Path that are used here."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self.name = path.rpartition("/")[2]

    def __str__(self) -> str:
        return str(self._system.unstrip_protocol(self._path))

    def open(self, mode: str) -> Any:
        return self._system.open(self._path, mode)

    def stat(self) -> Any:
        """Return its size, and a number that changes with the content instead of the time."""
        self._system.invalidate_cache()
        key = hashlib.sha256(str(self._system.ukey(self._path)).encode()).hexdigest()
        return SimpleNamespace(st_size=self._system.size(self._path), st_mtime_ns=int(key[:15], 16))


def files(path: str, splits: Sequence[str] = TRAIN) -> Sequence[File] | None:
    """List the files of `path` (file, directory, glob, `builtin:` name, URL) in order; None for a Hub id.

    Of a directory with files of several splits, those of the first of `splits` that exists are taken. Raises DataError if
    `path` cannot be a Hub id and no file matches it.
    """
    found = _find(path, splits)
    return None if found is None else found[0]


def _find(path: str, splits: Sequence[str]) -> tuple[Sequence[File], Sequence[File]] | None:
    """Return the files to read, and those of a directory that belong to other splits."""
    if path.startswith("builtin:"):
        builtin = BUILTIN / path.removeprefix("builtin:")
        if not builtin.is_file():
            bundled = sorted(file.relative_to(BUILTIN).as_posix() for file in BUILTIN.glob("*/*.jsonl"))
            raise DataError(
                f"{path}: unknown built-in dataset. Choose one of {', '.join(f'builtin:{name}' for name in bundled)}."
            )
        return _unsplit(path, [builtin], splits)
    if "://" in path:
        return _find_remote(path, splits)
    if reason := model_dir.unusable(path):
        raise DataError(f"{path}: {reason}. Use the path of a file, or a Hub id.")
    if any(sign in path for sign in "*?[") and not Path(path).exists():
        found_paths = map(Path, glob.glob(path, recursive=True))  # noqa: PTH207  # Path.glob rejects absolute patterns
        matches = sorted(match for match in found_paths if match.is_file())
        if not matches:
            raise DataError(f"{path}: no file matches this pattern (working directory: {Path.cwd()}).")
        return _unsplit(path, matches, splits)
    file = Path(path).expanduser()
    if file.is_file():
        return _unsplit(path, [file], splits)
    if file.is_dir():
        return _saved_dataset(file, splits) or _of_split(path, sorted(file.iterdir()), splits)
    if parsers.kind_of(file) or not model_dir.could_be_hub_id(path):
        raise DataError(f"{path}: file not found (working directory: {Path.cwd()}).")
    return None


def _find_remote(url: str, splits: Sequence[str]) -> tuple[Sequence[File], Sequence[File]]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
        if system.isdir(path):
            inside = [RemoteFile(system, entry) for entry in sorted(system.ls(path, detail=False))]
            return _of_split(url, inside, splits)
        matches = sorted(system.glob(path)) if any(sign in path for sign in "*?[") else [path]
        found = [RemoteFile(system, match) for match in matches if system.isfile(match)]
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"Run pip install 'sft-recipes[{extra}]'" if extra else reason_of(error)
        raise DataError(f"{url}: {protocol}:// requires a package that is not installed. {remedy}.") from None
    except DataError:
        raise
    except Exception as error:  # each file system has its own
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {reason_of(error)}).") from None
    if not found:
        raise DataError(f"{url}: file not found.")
    return _unsplit(url, found, splits)


def _unsplit(path: str, found: Sequence[File], splits: Sequence[str]) -> tuple[Sequence[File], Sequence[File]]:
    if splits not in (TRAIN, HELD_OUT):
        raise DataError(f"{path}: 'split' applies only to Hub datasets and directories, and this is a file. Remove it.")
    return found, []


def _saved_dataset(folder: Path, splits: Sequence[str]) -> tuple[Sequence[File], Sequence[File]] | None:
    """Return the Arrow files of a directory that `save_to_disk` of datasets wrote; None for other directories."""
    if available := _json(folder / "dataset_dict.json").get("splits"):
        taken = _choose_split(str(folder), "dataset", available, splits)
        chosen, others = _saved_dataset(folder / taken, splits), [folder / name for name in available if name != taken]
        return (chosen[0], others) if chosen else None
    arrow_files = [folder / file["filename"] for file in _json(folder / "state.json").get("_data_files", [])]
    return (arrow_files, []) if arrow_files else None


def _json(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _of_split(path: str, inside: Sequence[File], splits: Sequence[str]) -> tuple[Sequence[File], Sequence[File]]:
    """Select the data files of a directory: of `splits` if some are named so, else all that do not name another one."""
    data = [file for file in inside if parsers.kind_of(file)]
    if not data:
        raise DataError(f"{path}: this directory contains no data files ({_SUFFIXES}, optionally .gz).")
    named = [_split_of(file.name) for file in data]
    taken: str | None = next((split for split in splits if split in named), None)
    if taken is None and splits not in (TRAIN, HELD_OUT):
        raise DataError(f"{path}: no file in this directory is named after the split '{splits[0]}'.")
    if taken is None and None not in named:
        return data, []
    pairs = list(zip(data, named, strict=True))
    return [file for file, split in pairs if split == taken], [file for file, split in pairs if split != taken]


def _split_of(name: str) -> str | None:
    return next((_SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_NAMES), None)


def _choose_split(path: str, what: str, available: Sequence[str], splits: Sequence[str]) -> str:
    split = next((s for s in splits if s in available), available[0] if len(available) == 1 else None)
    if split is None or (splits not in (TRAIN, HELD_OUT) and split not in splits):
        raise DataError(
            f"{path}: the {what} has no split {' or '.join(map(repr, splits))} "
            f"(available: {', '.join(map(repr, available))}). Choose one with {{path: {path}, split: {available[0]}}}."
        )
    return split


def fingerprint(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> str:
    """Return the SHA-256 of the content of `path`: of its files, or of the Arrow buffers of a Hub dataset."""
    digest = hashlib.sha256()
    found = files(path, splits)
    for file in found or []:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if found is None:
        for batch in _from_hub(path, name, splits)[0].data.table.to_batches():
            for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer):
                digest.update(buffer)
    return digest.hexdigest()


def state(path: str, splits: Sequence[str] = TRAIN) -> list[tuple[int, int]]:
    """Return (size in bytes, mtime in ns) of each file of `path`; [] for a Hub dataset."""
    stats = [file.stat() for file in files(path, splits) or []]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def count(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> int:
    """Count the rows of `path` without parsing them: approximate for files of lines, exact otherwise."""
    found = files(path, splits)
    if found is None:
        return len(_from_hub(path, name, splits)[0])
    return sum(_count_lines(file) if (rows := parsers.count(file)) is None else rows for file in found)


def _count_lines(file: File) -> int:
    lines = read = 0
    with file.open("rb") as raw:
        content = parsers.decompressed(file, raw)
        while part := content.read(1 << 20):
            lines += part.count(b"\n")
            read += len(part)
            if read > QUICK:  # extrapolate
                return int(lines * file.stat().st_size / raw.tell())
    return lines


def iter_rows(
    path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN, report: ReadReport | None = None
) -> Iterator[SourceRow | DataError]:
    """Yield the rows of all files of `path`; an invalid row is yielded as the DataError that describes it.

    Of a Hub dataset, `name` is the configuration, and the first of `splits` that exists is read. `report` receives what else
    is found. Raises DataError if a file cannot be read at all.
    """
    report = ReadReport() if report is None else report
    found = _find(path, splits)
    if found is None:
        yield from _hub(path, name, splits, report)
        return
    chosen, others = found
    if name is not None:
        raise DataError(f"{path}: 'name' applies only to Hub datasets. Remove it.")
    if others:
        names = [", ".join(file.name for file in listed[:3]) for listed in (chosen, others)]
        report.note(f"only {names[0]} read, not {names[1]}{f' and {len(others) - 3} more' if len(others) > 3 else ''}")
    for file in chosen:
        kind = parsers.kind_of(file)
        if kind is None:
            raise DataError(f"{file}: unsupported file type (expected {_SUFFIXES}, optionally .gz).")
        try:
            if file.stat().st_size == 0:
                raise DataError(f"{file}: the file is empty.")
            yield from PARSERS[kind](file, report)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: cannot read the file: {reason_of(error)}. Download it again.") from None


def _hub(path: str, name: str | None, splits: tuple[str, ...], report: ReadReport) -> Iterator[SourceRow]:
    rows, split = _from_hub(path, name, splits)
    for number, values in enumerate(rows, start=1):
        yield SourceRow(f"{path}:{split}:row {number}", parsers.table_row(values, report))


def _from_hub(path: str, name: str | None, splits: tuple[str, ...]) -> tuple[Any, str]:
    """Load a Hub dataset; returns it and the name of the split."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        split = _choose_split(path, "Hub dataset", datasets.get_dataset_split_names(path, name), splits)
        return datasets.load_dataset(path, name, split=split), split
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise DataError(
            f"{path}: no such local file, and it cannot be loaded from the Hub "
            f"({type(error).__name__}: {reason_of(error)})."
        ) from None

"""Rows from where the data is: local files of four kinds, files of the project's own, data sets on the hub."""

import csv
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.errors import DataError, shown
from sft_recipes.recipe import model_files

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TRAIN = ("train",)  # of a hub data set's splits, those that are meant where none is named: the first that is there
HELD_OUT = ("validation", "test")
QUICK = 1 << 28  # bytes that are hashed, or whose lines are counted, in less than a second
_BEYOND = (
    "cannot be read as JSON: a number of thousands of digits, or brackets within thousands of others; take them out"
)
BUILTIN = Path(__file__).parent.parent / "builtin"


@dataclass(slots=True)  # frozen ones take thrice as long to make
class Row:
    """One row as it was read, and `file:line` (of a table: `file:row N`)."""

    place: str
    values: Mapping[str, Any]


def files(path: str) -> list[Path] | None:
    """The files that `path` (a file, glob or `builtin:` name) means, in order; None where it can only be a hub id.

    Raises DataError where it looks like a file and is none.
    """
    if path.startswith("builtin:"):
        found = [BUILTIN / path.removeprefix("builtin:")]
        if not found[0].is_file():
            shipped = sorted(file.relative_to(BUILTIN).as_posix() for file in BUILTIN.glob("*/*.jsonl"))
            raise DataError(
                f"{path}: no such built-in data; there is {', '.join(f'builtin:{name}' for name in shipped)}"
            )
        return found
    if reason := model_files.unusable(path):
        raise DataError(f"{path}: {reason}; expected the path of a file, or a hub id")
    if any(sign in path for sign in "*?[") and not Path(path).exists():
        found_paths = map(Path, glob.glob(path, recursive=True))  # noqa: PTH207  # absolute ones too
        matches = sorted(match for match in found_paths if match.is_file())
        if not matches:
            raise DataError(f"{path}: no file matches this pattern (working directory {Path.cwd()})")
        return matches
    file = Path(path).expanduser()
    if file.is_file():
        return [file]
    if file.is_dir():
        inside = sorted(child for child in file.iterdir() if _kind(child))
        if not inside:
            raise DataError(f"{path}: this directory holds no data files ({', '.join(SUFFIXES)}, each also .gz)")
        return inside
    if _kind(file) or not model_files.could_be_hub_id(path):
        raise DataError(f"{path}: no such file (working directory {Path.cwd()})")
    return None


def fingerprint(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> str:
    """SHA-256 over the content that `path` means, as `read` takes it."""
    digest = hashlib.sha256()
    found = files(path)
    for file in found or []:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if found is None:
        for batch in _from_hub(path, name, splits)[0].data.table.to_batches():
            for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer):
                digest.update(buffer)
    return digest.hexdigest()


def state(path: str) -> list[tuple[int, int]]:
    """Size and time of the last change of the files that `path` means; [] of what is on the hub."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files(path) or []]


def count(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> int:
    """About how many rows there are, without reading them: lines where there are lines."""
    found = files(path)
    if found is None:
        return len(_from_hub(path, name, splits)[0])
    return sum(_count(file) for file in found)


def _count(file: Path) -> int:
    if _kind(file) == ".parquet":
        from pyarrow import parquet

        with _bytes(file) as stream:
            return int(parquet.ParquetFile(stream).metadata.num_rows)
    with file.open("rb") as raw:
        content: Any = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
        if _kind(file) == ".json":
            return len(json.loads(content.read().decode("utf-8-sig")))
        lines = read = 0
        while part := content.read(1 << 20):
            lines += part.count(b"\n")
            read += len(part)
            if read > QUICK:  # the rest is taken to be like it
                return int(lines * file.stat().st_size / raw.tell())
        return lines


def read(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> Iterator[Row | DataError]:
    """The rows of all files that `path` means; a row that cannot be read comes as the error that says why.

    Of a hub data set, those of its configuration `name` and of the first of `splits` that it has. A file that cannot be
    read at all raises DataError.
    """
    found = files(path)
    if found is None:
        yield from _hub(path, name, splits)
        return
    if name is not None or splits not in (TRAIN, HELD_OUT):
        raise DataError(f"{path}: name and split choose from a data set on the hub, and this is a file; leave them out")
    for file in found:
        kind = _kind(file)
        if kind is None:
            raise DataError(f"{file}: unknown kind of file; expected {', '.join(SUFFIXES)}, each also .gz")
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty; expected rows")
        try:
            yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind](file)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: cannot be read: {' '.join(str(error).split())}; get the file again") from None


def _kind(file: Path) -> str | None:
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    return suffix if suffix in SUFFIXES else None


def _bytes(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _jsonl(file: Path) -> Iterator[Row | DataError]:
    with _bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{file}:{number}"
            if not (line := line.removeprefix(b"\xef\xbb\xbf").strip()):
                continue
            try:
                values = json.loads(line.decode())
            except UnicodeDecodeError:
                yield DataError(f"{place}: not valid UTF-8; save the file as UTF-8")
            except json.JSONDecodeError as error:
                yield DataError(f"{place}: not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError):
                yield DataError(f"{place}: {_BEYOND}")
            else:
                yield _row(place, values)


def _json(file: Path) -> Iterator[Row | DataError]:
    with _bytes(file) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not valid UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{file}: {_BEYOND}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of objects, got {shown(rows)}")
    for number, values in enumerate(rows, start=1):
        yield _row(f"{file}:row {number}", values)


def _csv(file: Path) -> Iterator[Row | DataError]:
    csv.field_size_limit(1 << 30)  # Python's own limit, 128 KiB a field, is shorter than a long document
    with _bytes(file) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{file}:1: a column stands twice in the header: {', '.join(map(repr, names))}")
            for values in reader:
                place = f"{file}:{reader.line_num}"
                if None in values or None in values.values():
                    yield DataError(
                        f"{place}: expected {len(reader.fieldnames or [])} fields as in the header, got another number"
                    )
                else:
                    yield Row(place, values)
        except UnicodeDecodeError:
            raise DataError(f"{file}:{reader.line_num + 1} or later: not valid UTF-8; save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num + 1} or later: not valid CSV: {error}") from None


def _parquet(file: Path) -> Iterator[Row | DataError]:
    import pyarrow
    from pyarrow import parquet

    try:
        with _bytes(file) as stream:
            number = 0
            for batch in parquet.ParquetFile(stream).iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}:row {number}", _as_written(values))
    except UnicodeDecodeError:
        raise DataError(f"{file}:row {number + 1} or later: not valid UTF-8") from None
    except (pyarrow.ArrowException, ArithmeticError, ValueError) as error:  # dates of a year 12000, too
        raise DataError(
            f"{file}: not a valid parquet file: {' '.join(str(error).split())}; get the file again"
        ) from None


def _hub(path: str, name: str | None, splits: tuple[str, ...]) -> Iterator[Row]:
    rows, split = _from_hub(path, name, splits)
    for number, values in enumerate(rows, start=1):
        yield Row(f"{path}:{split}:row {number}", _as_written(values))


def _as_written(values: Any) -> Any:
    """A row of a table without the nulls that Arrow puts into objects for the keys that other rows' objects have."""
    return {name: _without_nulls(value) if isinstance(value, (list, dict)) else value for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_hub(path: str, name: str | None, splits: tuple[str, ...]) -> tuple[Any, str]:
    """A data set on the hub, as `datasets` keeps it, and which of its splits that is."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        there = datasets.get_dataset_split_names(path, name)
        split = next((wanted for wanted in splits if wanted in there), there[0] if len(there) == 1 else None)
        if split is None or (splits not in (TRAIN, HELD_OUT) and split not in splits):
            raise DataError(
                f"{path}: no split {' or '.join(map(repr, splits))} on the hub, it has {', '.join(map(repr, there))}; "
                f"choose one with {{path: {path}, split: {there[0]}}}"
            )
        return datasets.load_dataset(path, name, split=split), split
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: no such file, and not to be had from the hub either ({type(error).__name__}: {reason})"
        ) from None


def _row(place: str, values: Any) -> Row | DataError:
    if isinstance(values, dict):
        return Row(place, values)
    return DataError(f"{place}: expected an object with columns, got {shown(values)}")

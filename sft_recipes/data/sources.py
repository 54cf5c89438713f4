"""Iterate over the rows of local files, built-in files and Hub datasets, with their locations."""

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

from sft_recipes import model_dir
from sft_recipes.errors import DataError, reason_of, shown

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TRAIN = ("train",)  # default splits of a Hub dataset; the first one that exists is read
HELD_OUT = ("validation", "test")
QUICK = 1 << 28  # bytes that can be hashed, or whose lines can be counted, in less than a second
_JSON_LIMITS = (
    "JSON exceeds the parser's limits: numbers of thousands of digits or deeply nested brackets. Remove them."
)
BUILTIN = Path(__file__).parent.parent / "builtin"


@dataclass(slots=True)  # creating a frozen dataclass takes three times as long
class SourceRow:
    """One row and its location, `file:line` (tables: `file:row N`)."""

    place: str
    values: Mapping[str, Any]


def files(path: str) -> list[Path] | None:
    """List the files of `path` (file, directory, glob, `builtin:` name) in order; None for a Hub id.

    Raises DataError if `path` cannot be a Hub id and no file matches it.
    """
    if path.startswith("builtin:"):
        found = [BUILTIN / path.removeprefix("builtin:")]
        if not found[0].is_file():
            bundled = sorted(file.relative_to(BUILTIN).as_posix() for file in BUILTIN.glob("*/*.jsonl"))
            raise DataError(
                f"{path}: unknown built-in dataset. Choose one of {', '.join(f'builtin:{name}' for name in bundled)}."
            )
        return found
    if reason := model_dir.unusable(path):
        raise DataError(f"{path}: {reason}. Use the path of a file, or a Hub id.")
    if any(sign in path for sign in "*?[") and not Path(path).exists():
        found_paths = map(Path, glob.glob(path, recursive=True))  # noqa: PTH207  # Path.glob rejects absolute patterns
        matches = sorted(match for match in found_paths if match.is_file())
        if not matches:
            raise DataError(f"{path}: no file matches this pattern (working directory: {Path.cwd()}).")
        return matches
    file = Path(path).expanduser()
    if file.is_file():
        return [file]
    if file.is_dir():
        inside = sorted(child for child in file.iterdir() if _kind(child))
        if not inside:
            raise DataError(f"{path}: this directory contains no data files ({', '.join(SUFFIXES)}, optionally .gz).")
        return inside
    if _kind(file) or not model_dir.could_be_hub_id(path):
        raise DataError(f"{path}: file not found (working directory: {Path.cwd()}).")
    return None


def fingerprint(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> str:
    """Return the SHA-256 of the content of `path`: of its files, or of the Arrow buffers of a Hub dataset."""
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
    """Return (size in bytes, mtime in ns) of each file of `path`; [] for a Hub dataset."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files(path) or []]


def count(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> int:
    """Count the rows of `path` without parsing them: approximate for files of lines, exact otherwise."""
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
            if read > QUICK:  # extrapolate
                return int(lines * file.stat().st_size / raw.tell())
        return lines


def iter_rows(path: str, name: str | None = None, splits: tuple[str, ...] = TRAIN) -> Iterator[SourceRow | DataError]:
    """Yield the rows of all files of `path`; an invalid row is yielded as the DataError that describes it.

    Of a Hub dataset, `name` is the configuration, and the first of `splits` that exists is read. Raises DataError if a file
    cannot be read at all.
    """
    found = files(path)
    if found is None:
        yield from _hub(path, name, splits)
        return
    if name is not None or splits not in (TRAIN, HELD_OUT):
        raise DataError(f"{path}: 'name' and 'split' apply only to Hub datasets, and this is a file. Remove them.")
    for file in found:
        kind = _kind(file)
        if kind is None:
            raise DataError(f"{file}: unsupported file type (expected {', '.join(SUFFIXES)}, optionally .gz).")
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty.")
        try:
            yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind](file)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: cannot read the file: {reason_of(error)}. Download it again.") from None


def _kind(file: Path) -> str | None:
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    return suffix if suffix in SUFFIXES else None


def _bytes(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _jsonl(file: Path) -> Iterator[SourceRow | DataError]:
    with _bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            place = f"{file}:{number}"
            if not (line := line.removeprefix(b"\xef\xbb\xbf").strip()):
                continue
            try:
                values = json.loads(line.decode())
            except UnicodeDecodeError:
                yield DataError(f"{place}: invalid UTF-8. Save the file as UTF-8.")
            except json.JSONDecodeError as error:
                yield DataError(f"{place}:{error.colno}: invalid JSON: {_json_error(error)}.")
            except (ValueError, RecursionError):
                yield DataError(f"{place}: {_JSON_LIMITS}")
            else:
                yield _row(place, values)


def _json(file: Path) -> Iterator[SourceRow | DataError]:
    with _bytes(file) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: invalid UTF-8. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        hint = " Rename a file with one object per line to .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{file}:{error.lineno}:{error.colno}: invalid JSON: {_json_error(error)}.{hint}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{file}: {_JSON_LIMITS}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected a list of objects (got {shown(rows)}).")
    for number, values in enumerate(rows, start=1):
        yield _row(f"{file}:row {number}", values)


def _csv(file: Path) -> Iterator[SourceRow | DataError]:
    csv.field_size_limit(1 << 30)  # the default, 128 KiB per field, is shorter than a long document
    with _bytes(file) as stream:
        reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{file}:1: duplicate column in the header (got {', '.join(map(repr, names))}).")
            for values in reader:
                place = f"{file}:{reader.line_num}"
                if None in values or None in values.values():
                    yield DataError(
                        f"{place}: number of fields differs from the header (expected {len(reader.fieldnames or [])})."
                    )
                else:
                    yield SourceRow(place, values)
        except UnicodeDecodeError:
            raise DataError(f"{file}:{reader.line_num + 1} or later: invalid UTF-8. Save the file as UTF-8.") from None
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num + 1} or later: invalid CSV: {error}.") from None


def _parquet(file: Path) -> Iterator[SourceRow | DataError]:
    import pyarrow
    from pyarrow import parquet

    try:
        with _bytes(file) as stream:
            number = 0
            for batch in parquet.ParquetFile(stream).iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{file}:row {number}", _as_written(values))
    except UnicodeDecodeError:
        raise DataError(f"{file}:row {number + 1} or later: invalid UTF-8. Write the file again as UTF-8.") from None
    except (pyarrow.ArrowException, ArithmeticError, ValueError) as error:  # also for dates out of range
        raise DataError(f"{file}: invalid Parquet file: {reason_of(error)}. Download it again.") from None


def _hub(path: str, name: str | None, splits: tuple[str, ...]) -> Iterator[SourceRow]:
    rows, split = _from_hub(path, name, splits)
    for number, values in enumerate(rows, start=1):
        yield SourceRow(f"{path}:{split}:row {number}", _as_written(values))


def _as_written(values: Any) -> Any:
    """Remove the nulls that Arrow adds to nested objects for keys that occur only in other rows."""
    return {name: _without_nulls(value) if isinstance(value, (list, dict)) else value for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_hub(path: str, name: str | None, splits: tuple[str, ...]) -> tuple[Any, str]:
    """Load a Hub dataset; returns it and the name of the split."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        available = datasets.get_dataset_split_names(path, name)
        split = next((s for s in splits if s in available), available[0] if len(available) == 1 else None)
        if split is None or (splits not in (TRAIN, HELD_OUT) and split not in splits):
            raise DataError(
                f"{path}: the Hub dataset has no split {' or '.join(map(repr, splits))} "
                f"(available: {', '.join(map(repr, available))}). Choose one with {{path: {path}, split: {available[0]}}}."
            )
        return datasets.load_dataset(path, name, split=split), split
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise DataError(
            f"{path}: no such local file, and it cannot be loaded from the Hub "
            f"({type(error).__name__}: {reason_of(error)})."
        ) from None


def _row(place: str, values: Any) -> SourceRow | DataError:
    if isinstance(values, dict):
        return SourceRow(place, values)
    return DataError(f"{place}: expected an object with columns (got {shown(values)}).")


def _json_error(error: json.JSONDecodeError) -> str:
    """Return the parser's message without the position, which is part of the row's location."""
    text = error.msg.removesuffix(" at").removesuffix(" starting").rstrip(": ")
    return text[:1].lower() + text[1:]

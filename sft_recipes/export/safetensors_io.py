"""Tensors in safetensors files, read and written some rows at a time.

The files are read and written directly (https://github.com/huggingface/safetensors#format: a length of 8 bytes, a JSON
header of that length, the tensors' bytes), because the library reads whole tensors and writes whole files at once.
"""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from sft_recipes.errors import ModelError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 1 << 19  # elements that are worked on at once: what fits into a core's cache
_AT_MOST = 1 << 24  # elements that are copied to the host, hashed and written at once
_AT_ONCE = 2  # tensors: while one is read or written, another is computed
INDEX = "model.safetensors.index.json"
Shape = tuple[int, ...]


@dataclass
class Stored:
    """A tensor in a file; `start` is where its bytes begin. It is `verbatim` if these are what is meant."""

    verbatim: ClassVar[bool] = True
    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows from `first` up to `last` along the first dimension; a scalar is one row."""
        tensor = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        whole = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        width = len(whole) // max(last - first, 1)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start + first * width)
            while whole:
                if not (read := stream.readinto(whole)):
                    raise ModelError(f"{self.file}: ends before its tensors do; get the file again")
                whole = whole[read:]
        return tensor

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1).reshape(())


@dataclass(frozen=True)
class Wanted:
    """A tensor to be written: a stored one, or one that `add` computes from it.

    `add(first, last, block)` puts rows from `first` up to `last` into `block`, which is float32.
    """

    shape: Shape
    stored: Stored
    add: Callable[[int, int, torch.Tensor], None] | None = None


def in_file(file: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises ModelError where it is no whole safetensors file."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header does not fit into it")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != file.stat().st_size:
            raise ValueError("it is not as long as its header says")
        return {
            name: Stored(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}; get the file again") from None


def in_model(folder: Path) -> dict[str, Stored]:
    """The tensors of a model's directory, in one file (which transformers prefers) or several. Raises ModelError."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return in_file(folder / "model.safetensors")
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: in_file(folder / name) for name in dict.fromkeys(names.values())}
        return {name: files[file][name] for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX}: does not name the tensors of its files: {error}; get it again") from None


def write(wanted: Mapping[str, Wanted], folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write model.safetensors, or shards and their index, with floating-point tensors rounded to `dtype`.

    Takes memory for some rows only. Raises ModelError where a number is not finite.
    """

    def type_of(tensor: Wanted) -> torch.dtype:
        return dtype if tensor.stored.dtype.is_floating_point else tensor.stored.dtype

    places, index = _allocate(
        {name: (type_of(tensor), tensor.shape) for name, tensor in wanted.items()}, folder, max_shard_size
    )

    def fill(name: str) -> None:
        file, start = places[name]
        with file.open("r+b", buffering=0) as stream:
            stream.seek(start)
            _write(name, wanted[name], type_of(wanted[name]), stream)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            _AT_ONCE, initializer=torch.set_num_threads, initargs=(-(-threads // _AT_ONCE),)
        ) as pool:
            for done in [pool.submit(fill, name) for name in places]:
                try:
                    done.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    finally:
        torch.set_num_threads(threads)
    if index is not None:
        _write_index(index, folder)


class Writer:
    """Safetensors files of a model directory, to which tensors of known dtypes and shapes are written one by one.

    Needs memory for a block of one tensor only: each is written to its final place in the file.
    """

    def __init__(self, described: Mapping[str, tuple[torch.dtype, Shape]], folder: Path, max_shard_size: str) -> None:
        self._folder, self._missing = folder, dict(described)
        self._places, self._index = _allocate(described, folder, max_shard_size)
        self.sha256: dict[str, str] = {}  # of the bytes of each tensor written so far

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which may be on any device.

        Raises: ModelError if a number is NaN or Inf, or if dtype or shape are not those of `described`.
        """
        found = (tensor.dtype, tuple(tensor.shape))
        if found != self._missing.pop(name):
            raise ModelError(f"{name}: cannot be written: its dtype and shape are {found}")
        file, start = self._places[name]
        digest = hashlib.sha256()
        with file.open("r+b", buffering=0) as stream:
            stream.seek(start)
            for block in tensor.detach().reshape(-1).split(_AT_MOST):
                if not block.isfinite().all():
                    raise ModelError(f"{name} is not finite in {str(tensor.dtype).removeprefix('torch.')}")
                left = block.cpu().view(torch.uint8).numpy().data
                digest.update(left)
                while left:
                    left = left[stream.write(left) :]
        self.sha256[name] = digest.hexdigest()

    def close(self, metadata: Mapping[str, object]) -> None:
        """Write the index if there are several files, with more `metadata`.

        Raises: ModelError if a tensor has not been written.
        """
        if self._missing:
            raise ModelError(
                f"{self._folder}: {len(self._missing)} tensors were not written: {next(iter(self._missing))}"
            )
        if self._index is not None:
            self._index["metadata"] |= metadata
            _write_index(self._index, self._folder)


def sha256(stored: Stored) -> str:
    """SHA-256 of a stored tensor's bytes, read a block at a time."""
    digest, left = hashlib.sha256(), torch.Size(stored.shape).numel() * stored.dtype.itemsize
    with stored.file.open("rb") as stream:
        stream.seek(stored.start)
        while left and (block := stream.read(min(left, 1 << 24))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _allocate(
    described: Mapping[str, tuple[torch.dtype, Shape]], folder: Path, max_shard_size: str
) -> tuple[dict[str, tuple[Path, int]], dict[str, Any] | None]:
    """Create safetensors files with their headers and full size.

    Returns: file and first byte of each tensor, and the content of the index, None if there is one file.
    """

    def size_of(tensor: tuple[torch.dtype, Shape]) -> int:
        return torch.Size(tensor[1]).numel() * tensor[0].itemsize

    split = split_state_dict_into_shards_factory(
        dict(described),
        get_storage_size=size_of,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in split.filename_to_tensors.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            dtype, shape = described[name]
            start, end = end, end + size_of(described[name])
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
            places[name] = folder / file, start
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)  # tensors begin at a multiple of 8
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(content)) + content)
            stream.truncate(8 + len(content) + end)
        for name in names:
            places[name] = folder / file, places[name][1] + 8 + len(content)
    if not split.is_sharded:
        return places, None
    return places, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def _write_index(index: Mapping[str, Any], folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(name: str, tensor: Wanted, dtype: torch.dtype, into: FileIO) -> None:
    stored = tensor.stored
    if tensor.add is None and stored.verbatim and stored.dtype == dtype:
        _copy(stored, into)
        return
    rows, width = (tensor.shape[0], torch.Size(tensor.shape[1:]).numel()) if tensor.shape else (1, 1)
    height = max(1, min(rows, _BLOCK // max(width, 1)))
    shape = (height, *tensor.shape[1:])
    # Kept from block to block: new memory costs more than the sums that are done in it.
    exact, rounded = torch.empty(shape), torch.empty(shape, dtype=dtype)
    add = tensor.add or partial(_as_stored, stored)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        block, out = exact[: last - first], rounded[: last - first]
        add(first, last, block)
        out.copy_(block)
        if not out.sum(dtype=torch.float32).isfinite():
            raise ModelError(f"{name} would not be finite")
        left = out.view(-1).view(torch.uint8).numpy().data
        while left:
            left = left[into.write(left) :]


def _as_stored(stored: Stored, first: int, last: int, block: torch.Tensor) -> None:
    block.copy_(stored.rows(first, last).view(block.shape))


def _copy(stored: Stored, into: FileIO) -> None:
    """The very bytes, from file to file; on Linux without passing through this process."""
    at, left = stored.start, torch.Size(stored.shape).numel() * stored.dtype.itemsize
    with stored.file.open("rb") as source:
        while left:
            if sys.platform == "linux":
                copied = os.sendfile(into.fileno(), source.fileno(), at, left)
            else:
                copied = into.write(os.pread(source.fileno(), min(left, 1 << 24), at))
            if not copied:
                raise ModelError(f"{stored.file}: ends before its tensors do; get the file again")
            at, left = at + copied, left - copied

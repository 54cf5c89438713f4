"""Read and write safetensors files in blocks of rows, so that memory does not grow with the model.

safetensors reads: each block through a mapping of its own, because pages of one that stays open count as memory of this
process. safetensors writes whole files only, so headers and bytes are written here
(https://github.com/huggingface/safetensors#format: 8 bytes with the header length, a JSON header, the tensors).
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sft_recipes.errors import ModelError

_BLOCK = 1 << 19  # elements computed at once: they fit into a core's cache
_COPIED = 1 << 24  # elements copied, hashed or written at once
_THREADS = 2  # one tensor is read or written while another is computed
INDEX = "model.safetensors.index.json"
Shape = tuple[int, ...]


class LazyTensor(Protocol):
    """A tensor that is read or computed in blocks of rows (of its first dimension; a scalar is one row)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the file that it is from; computed blocks are float32."""

    @property
    def shape(self) -> Shape: ...

    def blocks(self, height: int) -> Iterator[torch.Tensor]:
        """Yield all rows in order, at most `height` at once. Blocks may not be changed in place."""


@dataclass
class StoredTensor:
    """A tensor in a file."""

    verbatim: ClassVar[bool] = True  # its values are those of the file; False in subclasses that change them
    file: Path
    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return the rows from `first` up to `last`, in the dtype of the file."""
        with safe_open(self.file, "pt") as file:
            stored = file.get_slice(self.name)
            return stored[first:last] if self.shape else stored[...].view(1)

    def blocks(self, height: int) -> Iterator[torch.Tensor]:
        for first, last in ranges(self.shape, height):
            yield self.rows(first, last)

    def whole(self) -> torch.Tensor:
        return self.rows(0, self.shape[0] if self.shape else 1).view(self.shape)

    def sha256(self) -> str:
        """Return the SHA-256 of its bytes."""
        digest = hashlib.sha256()
        for block in self.blocks(rows_within(_COPIED, self.shape)):
            digest.update(_bytes(block))
        return digest.hexdigest()


def ranges(shape: Shape, height: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block of up to `height` rows, and the one after its last."""
    count = shape[0] if shape else 1
    for first in range(0, count, height):
        yield first, min(first + height, count)


def rows_within(elements: int, shape: Shape) -> int:
    """Return how many rows have up to this number of elements; at least 1."""
    return max(1, elements // max(1, torch.Size(shape[1:]).numel()))


def read_file(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name. Raises ModelError if it is not a complete safetensors file."""
    try:
        with safe_open(file, "pt") as stream:  # get_tensor() maps the file and reads nothing
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return {name: StoredTensor(file, name, found.dtype, tuple(found.shape)) for name, found in tensors.items()}
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ModelError(f"{file}: not a complete safetensors file ({reason}). Copy or download it again.") from None


def read_model(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model directory: one file (which transformers prefers) or shards. Raises ModelError."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return read_file(folder / "model.safetensors")
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: read_file(folder / name) for name in dict.fromkeys(names.values())}
        return {name: files[file][name] for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / INDEX}: does not match the tensors of its files: {error}. Copy or download it again."
        ) from None


def stored_name(name: str, stored: Mapping[str, object], prefix: str) -> str:
    """Return the name of a parameter in a model's files: some are written without the `base_model_prefix`."""
    without = name.removeprefix(f"{prefix}.")
    return without if name not in stored and without in stored else name


class Writer:
    """Safetensors files of a model directory, created in full size, whose tensors are written one by one.

    Args: dtype and shape of each tensor by name; the directory; the maximum size of a file ("5GB").
    """

    def __init__(self, tensors: Mapping[str, tuple[torch.dtype, Shape]], folder: Path, max_shard_size: str) -> None:
        self._folder, self._missing = folder, dict(tensors)
        self._files: dict[str, tuple[Path, int]] = {}  # file and first byte of each tensor
        self.sha256: dict[str, str] = {}  # of the bytes of each tensor written so far

        def size_of(tensor: tuple[torch.dtype, Shape]) -> int:
            return torch.Size(tensor[1]).numel() * tensor[0].itemsize

        self._split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=size_of,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        for file, names in self._split.filename_to_tensors.items():
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}
            offsets = [0]
            for name in names:
                dtype, shape = tensors[name]
                offsets.append(offsets[-1] + size_of(tensors[name]))
                header[name] = {"dtype": _dtype_name(dtype), "shape": shape, "data_offsets": offsets[-2:]}
            content = json.dumps(header, separators=(",", ":")).encode()
            content += b" " * (-len(content) % 8)  # tensors begin at a multiple of 8
            with (folder / file).open("wb") as stream:
                stream.write(struct.pack("<Q", len(content)) + content)
                stream.truncate(8 + len(content) + offsets[-1])
            self._files |= {
                name: (folder / file, 8 + len(content) + start) for name, start in zip(names, offsets, strict=False)
            }

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which may be on any device, and record its SHA-256. Raises ModelError, see `put_blocks`."""
        digest = hashlib.sha256()

        def blocks() -> Iterator[torch.Tensor]:
            for block in tensor.detach().reshape(-1).split(_COPIED):
                if not block.isfinite().all():
                    raise ModelError(f"{name} has NaN or Inf in {dtype_name(tensor.dtype)}")
                on_host = block.cpu()
                digest.update(_bytes(on_host))
                yield on_host

        self.put_blocks(name, tensor.dtype, tuple(tensor.shape), blocks())
        self.sha256[name] = digest.hexdigest()

    def put_blocks(self, name: str, dtype: torch.dtype, shape: Shape, blocks: Iterator[torch.Tensor]) -> None:
        """Write consecutive blocks of a tensor. Raises ModelError if dtype or shape are not those given at first."""
        if (dtype, shape) != self._missing.pop(name):
            raise ModelError(f"{name}: cannot be written: unexpected dtype {dtype_name(dtype)} or shape {list(shape)}")
        file, start = self._files[name]
        with file.open("r+b") as stream:
            stream.seek(start)
            for block in blocks:
                stream.write(_bytes(block))

    def close(self, metadata: Mapping[str, object]) -> None:
        """Write the index, with more `metadata`, if there are several files. Raises ModelError if a tensor is missing."""
        if self._missing:
            raise ModelError(
                f"{self._folder}: {len(self._missing)} tensors were not written, such as {next(iter(self._missing))}"
            )
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata | metadata, "weight_map": self._split.tensor_to_filename}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write(tensors: Mapping[str, LazyTensor], folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write a model's safetensors files, with floating-point tensors rounded to `dtype`.

    Raises ModelError if a number that is computed or rounded is NaN or Inf.
    """
    dtypes = {name: dtype if lazy.dtype.is_floating_point else lazy.dtype for name, lazy in tensors.items()}
    writer = Writer({name: (dtypes[name], lazy.shape) for name, lazy in tensors.items()}, folder, max_shard_size)

    def write_one(name: str) -> None:
        lazy = tensors[name]
        if isinstance(lazy, StoredTensor) and lazy.verbatim and lazy.dtype == dtypes[name]:  # bitwise unchanged
            blocks = lazy.blocks(rows_within(_COPIED, lazy.shape))
        else:
            blocks = _rounded(name, lazy, dtypes[name])
        writer.put_blocks(name, dtypes[name], lazy.shape, blocks)

    threads = torch.get_num_threads()
    initializer = {"initializer": torch.set_num_threads, "initargs": (-(-threads // _THREADS),)}
    try:
        with ThreadPoolExecutor(_THREADS, **initializer) as pool:
            for done in [pool.submit(write_one, name) for name in tensors]:
                try:
                    done.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    finally:
        torch.set_num_threads(threads)
    writer.close({})


def _rounded(name: str, lazy: LazyTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    height = rows_within(_BLOCK, lazy.shape)
    for block in lazy.blocks(height):
        rounded = block.to(dtype)
        if not rounded.sum(dtype=torch.float32).isfinite():
            raise ModelError(f"{name} would have NaN or Inf")
        yield rounded


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in headers, from one that safetensors writes."""
    return str(json.loads(save({"x": torch.empty(0, dtype=dtype)})[8:])["x"]["dtype"])


def _bytes(block: torch.Tensor) -> memoryview:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data

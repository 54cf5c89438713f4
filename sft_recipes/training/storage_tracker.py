"""What memory a computation would take: storages counted as they come and go, of tensors that have none."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CAST = torch.ops.aten._to_copy.default
_READ = torch.ops.aten._local_scalar_dense.default


class StorageTracker(TorchDispatchMode):
    """Counts every storage from the operation that makes it until nothing refers to it any more.

    To be entered inside a FakeTensorMode, whose tensors have shapes and storages but no memory. What a kernel takes for
    itself, inside one operation, is not seen. `peaks` holds for each phase the bytes of each part at the moment of the
    phase's largest sum.
    """

    def __init__(self, *, block: int = 1, truth: bool = True) -> None:
        """`block`: bytes to whose multiple the allocator rounds (CUDA's: 512). `truth`: what a comparison that the model
        reads is taken to be, since there is nothing to read."""
        super().__init__()
        self.block, self.truth = block, truth
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.phase = self.part = ""
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ:
            kind = args[0].dtype
            return self.truth if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        out = func(*args, **(kwargs or {}))
        # A weight in the type that autocast computes in is a buffer of the moment.
        part = "buffers" if func is _CAST and self._part_of(args[0]) in ("weights", "adapters") else self.part
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), part)
        return out

    @contextmanager
    def during(self, phase: str, part: str) -> Iterator[None]:
        """What is made inside belongs to a part, and its peak to a phase; then it is as before."""
        before = self.phase, self.part
        self.enter(phase, part)
        yield
        self.enter(*before)

    def enter(self, phase: str, part: str) -> None:
        """What is made from now on belongs to a part, and its peak to a phase."""
        self.phase, self.part = phase, part
        self._note()

    def belongs(self, tensor: torch.Tensor, part: str) -> None:
        """A tensor's storage turns out to be of another part than it was made in."""
        storage = tensor.untyped_storage()
        self._count(storage, part)
        reference, size, before = self._storages[storage._cdata]
        self.live[before] -= size
        self.live[part] += size
        self._storages[storage._cdata] = reference, size, part

    def _count(self, storage: Any, part: str) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key)), size, part
        self.live[part] += size
        self._note()

    def _part_of(self, tensor: torch.Tensor) -> str | None:
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return known[2] if known else None

    def _forget(self, key: int) -> None:
        _, size, part = self._storages.pop(key)
        self.live[part] -= size

    def _note(self) -> None:
        if self.phase and self.live.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = self.live.copy()

"""Pretend that this machine has an NVIDIA GPU, and run torch on it with tensors that have shapes but no values.

`installed` patches what torch says about the machine. `fake_tensors` adds FakeTensorMode, in which torch traces its own CUDA
programs on machines without a GPU; torch's CPU build lacks two things for that, which `_driver` supplies.

Refused as on a GPU: tensors of two devices in one operation, and arguments that the attention kernel does not take (`insist`).
Recorded: each line at which the host would wait for the GPU (`GPU.syncs`), and each call of the attention kernel.
"""

import ctypes
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.attention.varlen  # defines the kernel's operator
from accelerate.state import AcceleratorState
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers.data.data_collator import DataCollatorMixin
from transformers.utils import import_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from sft_recipes.memory.storage_tracker import StorageTracker

GB = 10**9
VOLTA, TURING, AMPERE, HOPPER = (7, 0), (7, 5), (8, 0), (9, 0)  # compute capabilities
ROOT = Path(__file__).parents[2]


@dataclass
class GPU:
    """The one GPU of the machine, and what was seen of its use."""

    capability: tuple[int, int] = HOPPER
    memory: float = 80 * GB
    free: float | None = None  # None: all of it
    name: str = "NVIDIA H100 80GB HBM3"
    syncs: list[str] = field(default_factory=list)  # lines at which the host waits for the GPU
    attention_calls: int = 0  # of the varlen kernel
    calls: set[str] = field(default_factory=set)  # functions of torch.cuda that were called
    allocated: StorageTracker = field(
        default_factory=lambda: StorageTracker(block=512)
    )  # storages of fake tensors on it

    @property
    def peak(self) -> int:
        """Return the most bytes that were allocated at once."""
        return self.allocated.peaks["all"].total() if self.allocated.peaks else 0

    def reset_peak(self) -> None:
        self.allocated.peaks.clear()
        self.allocated.enter("all", "all")


# --- What torch says about the machine -------------------------------------------------------------------------------


@contextmanager
def installed(gpu: GPU) -> Iterator[GPU]:
    """Let torch report `gpu` as this machine's only GPU. Nothing can be computed on it except within `fake_tensors`."""
    torch.ones(1, requires_grad=True).sum().backward()  # starts autograd without a thread for a GPU
    free = gpu.memory if gpu.free is None else gpu.free
    properties = SimpleNamespace(
        name=gpu.name, total_memory=int(gpu.memory), major=gpu.capability[0], minor=gpu.capability[1],
        multi_processor_count=132,
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": gpu.capability >= AMPERE,
        "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None, "empty_cache": None,
        "get_device_name": gpu.name, "get_device_properties": properties, "get_device_capability": gpu.capability,
        "mem_get_info": (int(free), int(gpu.memory)), "memory_allocated": gpu.allocated.live.total,
        "max_memory_allocated": lambda: gpu.peak, "reset_peak_memory_stats": gpu.reset_peak,
        "manual_seed": None, "manual_seed_all": None, "get_rng_state": state, "set_rng_state": None,
        "get_rng_state_all": [state], "set_rng_state_all": None, "is_current_stream_capturing": False,
        "_lazy_init": None, "_lazy_call": None,
    }  # fmt: skip

    def answering(name: str, answer: Any) -> Any:
        def function(*_: Any, **__: Any) -> Any:
            gpu.calls.add(name)
            return answer() if callable(answer) else answer

        return function

    @contextmanager
    def device(_number: Any) -> Iterator[None]:
        yield

    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answering(name, answer)))
        stack.enter_context(patch.object(torch.cuda, "device", device))
        stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(patch.object(torch.accelerator, "is_available", lambda: True))
        _forget()
        stack.callback(_forget)
        gpu.reset_peak()
        yield gpu


def _forget() -> None:
    """Clear what libraries and this project have cached about the machine."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("is_torch_fp16_available_on_device", "is_torch_bf16_available_on_device", "is_cuda_platform"):
        getattr(import_utils, name).cache_clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("sft_recipes."):
            for each in vars(module).values():
                if hasattr(each, "cache_clear"):
                    each.cache_clear()


# --- Tensors without values ------------------------------------------------------------------------------------------


@contextmanager
def fake_tensors(gpu: GPU, *, watched: bool = True) -> Iterator[None]:
    """Run torch on tensors without values, which may be on `cuda`. What data loaders and collators make has values.

    `watched`: record and check operations. torch.compile does nothing then.
    """
    with (
        _driver(),
        _kernels(),
        patch.object(FakeTensorMode, "avoid_device_init", True),
        patch.object(torch, "Generator", _Generator),
        # Module.to swaps fake parameters, and refuses if there are weak references to them. FakeTensorMode keeps some.
        patch.object(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda _: [])),
        patch.object(FakeTensor, "numpy", lambda tensor: np.ones(tensor.shape), create=True),
        patch.object(FakeTensor, "__deepcopy__", _deepcopy),
        patch.dict(op_implementations_dict, {_READ: _read}),
        patch.object(DataCollatorMixin, "__call__", _collate),
        patch.object(DataLoader, "__iter__", _batches),
        patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: gpu.calls.add("pin_memory") or tensor),
        # As with Triton: TRL's loss takes the trained tokens only, and its kernels write to tensors that are there.
        patch.object(trl_utils, "_use_triton", _on_gpu),
        patch.object(chunked_logprob, "_forward_tile", _write),
        patch.object(chunked_logprob, "_backward_tile", _write),
        patch.object(chunked_logprob, "_addmm_fp32", _write),
        torch.autograd.set_multithreading_enabled(False),  # there is no thread for a GPU
        FakeTensorMode(allow_non_fake_inputs=True),
        _Watch(gpu) if watched else nullcontext(),
    ):
        yield


@contextmanager
def _driver() -> Iterator[None]:
    """Supply what autograd on `cuda` asks for, and torch's CPU build lacks: a device guard, and hooks that report a GPU.

    torch installs a guard that does nothing if the present one counts no devices. The CPU build has none, so for a moment
    it gets an object whose every method returns 0. Of the hooks, the first three methods (isBuilt, isAvailable,
    hasPrimaryContext) return true.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    folder = Path(torch.__file__).parent / "lib"
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    c10, aten = (ctypes.CDLL(str(folder / f"lib{name}{suffix}")) for name in ("c10", "torch_cpu"))
    method = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    callbacks = method(lambda _this: 0), method(lambda _this: 1)
    zero, one = (ctypes.cast(each, ctypes.c_void_p).value for each in callbacks)

    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")  # for CPU and CUDA
    zeros = (ctypes.c_void_p * 64)(*[zero] * 64)
    no_devices = ctypes.c_void_p(ctypes.addressof(zeros))
    get_hooks = aten._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())
    before, methods = hooks.value, ctypes.c_void_p * 100
    assert before is not None
    table = methods.from_buffer_copy(methods.from_address(before - 16))  # from two words before the first method
    for number in (2, 3, 4):  # after two destructors
        table[2 + number] = one
    try:
        guards[1] = ctypes.addressof(no_devices)
        torch._C._ensureCUDADeviceGuardSet()
        hooks.value = ctypes.addressof(table) + 16
        yield
    finally:
        hooks.value = before
        guards[1] = None


@contextmanager
def _kernels() -> Iterator[None]:
    """Register operators that run as one kernel on a GPU, and that torch's CPU build splits up, with more memory."""
    library = torch.library.Library("aten", "IMPL")
    if not torch.backends.cuda.is_built():
        library.impl("silu_backward", lambda gradient, _: torch.empty_like(gradient), "CUDA")
    try:
        yield
    finally:
        library._destroy()


class _Generator(torch.Generator):
    """A generator for any device, which draws nothing, because there are no values."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def _deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """Copy a tensor without a copy of its FakeTensorMode, which its attributes refer to."""
    copied: Any = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


def _collate(collator: Any, rows: Any) -> Any:
    with _disable_current_modes():
        return collator.torch_call(rows)


_iterate = DataLoader.__iter__


def _batches(loader: Any) -> Iterator[Any]:
    with _disable_current_modes():
        batches = _iterate(loader)
    while True:
        with _disable_current_modes():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


_READ = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default
_NONZERO = torch.ops.aten.nonzero.default
_INDEX = torch.ops.aten.index.Tensor
_ATTENTION = torch.ops.torch_attn._varlen_attn.default


_read_symbol = op_implementations_dict[_READ]


def _read(mode: Any, func: Any, tensor: torch.Tensor) -> Any:
    """Return what the host reads of a tensor without values: True, 1 or 0.0; of masks, nothing that they would forbid."""
    if mode.shape_env is not None:  # of torch.compile, which reads symbols
        return _read_symbol(mode, func, tensor)
    line = where()
    if "masking_utils.py" in line or ", mask_for:" in line:
        return tensor.dtype.is_floating_point and 0.0
    return True if tensor.dtype == torch.bool else 0.0 if tensor.dtype.is_floating_point else 1


class _Watch(TorchDispatchMode):
    """Record synchronizations and check the attention kernel's arguments, for each operation before FakeTensorMode runs it.

    A mask used as an index selects everything.
    """

    def __init__(self, gpu: GPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _on_gpu(tensor):
                self.gpu.allocated._count(tensor.untyped_storage(), "all")
                if self.gpu.allocated.live.total() > self.gpu.memory:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. {where()}")
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _ATTENTION:
            insist(self.gpu.capability, *args, **kwargs)
            self.gpu.attention_calls += 1
        to_host = func in (_READ, _NONZERO) or (func is _COPY and str(kwargs.get("device")) == "cpu")
        if to_host and _on_gpu(args[0]):
            self.gpu.syncs.append(where())
        if func is _INDEX and args[1][0] is not None and args[1][0].dtype == torch.bool:
            self.gpu.syncs.append(where())  # the host needs the number of selected elements
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        if func is _NONZERO:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return func(*args, **kwargs)


def _on_gpu(what: torch.Tensor | torch.device) -> bool:
    device = what.device if isinstance(what, torch.Tensor) else what
    return device.type == "cuda"


def _write(*_: Any, **__: Any) -> None:
    """Stand in for a kernel that allocates nothing."""


def where() -> str:
    """Return the innermost line outside of torch that led here: file, function, code."""
    for frame in reversed(traceback.extract_stack()):
        file = frame.filename
        if "/torch/" not in file and "/contextlib" not in file and file != __file__:
            for folder in (f"{ROOT}/", "site-packages/"):
                file = file.rpartition(folder)[2]
            return f"{file}, {frame.name}: {frame.line}"
    return "elsewhere"


def insist(
    capability: tuple[int, int], query: Any, key: Any, value: Any, starts: Any, key_starts: Any, longest: Any,
    longest_key: Any, is_causal: bool = False, scale: Any = None, window: Any = None, gqa: bool = False, *more: Any,
) -> None:  # fmt: skip
    """Raise AssertionError for arguments that flash attention 2 refuses, or computes something else from.

    Its checks are in ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_varlen_fwd, mha_varlen_bwd).
    """
    assert capability >= AMPERE, "FlashAttention only supports Ampere GPUs or newer"
    width = query.shape[-1]
    for name, rows in (("query", query), ("key", key), ("value", value)):
        assert rows.device.type == "cuda", f"{name} is on {rows.device}"
        assert rows.dtype in (torch.float16, torch.bfloat16), (
            f"{name} is {rows.dtype}: only fp16 and bf16 are supported"
        )
        assert rows.dtype == query.dtype, "query, key and value must have the same dtype"
        assert rows.dim() == 3, f"{name} must be packed as (tokens, heads, width)"
        assert rows.stride(-1) == 1, f"{name} must have a contiguous last dimension"
        assert rows.shape[-1] == width, "query, key and value must have the same width"
    assert width <= 256, f"head width must be at most 256 (got {width})"
    assert width % 8 == 0, f"head width must be a multiple of 8 (got {width})"
    assert key.shape[:2] == value.shape[:2], "key and value must have the same tokens and heads"
    assert query.shape[1] % key.shape[1] == 0, "query heads must be a multiple of key heads"
    assert gqa == (query.shape[1] != key.shape[1]), "enable_gqa must tell whether there are fewer key heads"
    for each in (starts, key_starts):
        assert each.device == query.device, "cu_seq_lens must be on the device of query"
        assert each.dtype == torch.int32, "cu_seq_lens must be int32"
        assert each.is_contiguous(), "cu_seq_lens must be contiguous"
    assert type(longest) is int, "max_q must be an int of the host"
    assert type(longest_key) is int, "max_k must be an int of the host"
    assert window is not None, "window_size must be given"
    assert window[1] == 0, "tokens must not attend to later ones"

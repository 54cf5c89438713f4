"""The fake GPU itself: what it lets through, what it refuses, what it records, and that nothing of it is left."""

from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from tests.cuda import fake_gpu
from tests.cuda.fake_gpu import AMPERE, GPU, TURING


def attend(query: torch.Tensor, key: torch.Tensor, starts: torch.Tensor, **options: Any) -> torch.Tensor:
    given = {"window_size": (-1, 0), "enable_gqa": query.shape[1] != key.shape[1]} | options
    out: torch.Tensor = varlen_attn(query, key, key, starts, starts, 5, 5, **given)
    return out


def rows(heads: int = 2, width: int = 16, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    return torch.empty(8, heads, width, dtype=dtype, device=device, requires_grad=True)


def starts(dtype: torch.dtype = torch.int32, device: str = "cuda") -> torch.Tensor:
    return torch.empty(3, dtype=dtype, device=device)


def test_it_trains_a_layer() -> None:
    """Forward, backward, optimizer, autocast and checkpointing, by torch's own programs for CUDA."""
    gpu = GPU()
    with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu):
        layer = torch.nn.Linear(16, 16).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = torch.utils.checkpoint.checkpoint(layer, torch.empty(8, 16, device="cuda"), use_reentrant=False)
        assert (out.dtype, out.device.type) == (torch.bfloat16, "cuda")
        attend(out.view(8, 1, 16), rows(heads=1), starts()).sum().backward()
        optimizer.step()
        assert optimizer.state[layer.weight]["exp_avg"].is_cuda
    assert gpu.attention_calls == 1
    assert gpu.syncs == []


def test_tensors_of_two_devices_do_not_meet() -> None:
    gpu = GPU()
    with (
        fake_gpu.installed(gpu),
        fake_gpu.fake_tensors(gpu),
        pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"),
    ):
        torch.empty(2, device="cuda") + torch.empty(2)


@pytest.mark.parametrize(
    ("wait", "waits"),
    [
        (lambda on_gpu: on_gpu.sum().item(), 1),
        (lambda on_gpu: on_gpu.tolist(), 2),
        (lambda on_gpu: bool(on_gpu.any()), 1),
        (lambda on_gpu: on_gpu.cpu(), 1),
        (lambda on_gpu: on_gpu[on_gpu > 0], 1),
        (lambda on_gpu: on_gpu.nonzero(), 1),
        (lambda on_gpu: on_gpu * 2, 0),
        (lambda on_gpu: torch.ones(2, device="cpu").to("cuda"), 0),
    ],
)
def test_waits_are_recorded(wait: Any, waits: int) -> None:
    gpu = GPU()
    with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu):
        wait(torch.empty(2, device="cuda"))
    assert len(gpu.syncs) == waits
    assert all("test_fake_gpu.py, <lambda>: (lambda on_gpu" in line for line in gpu.syncs)


REFUSED: dict[str, Any] = {
    "only fp16 and bf16": lambda: attend(rows(dtype=torch.float32), rows(dtype=torch.float32), starts()),
    "the same dtype": lambda: attend(rows(), rows(dtype=torch.float16), starts()),
    "the same width": lambda: attend(rows(), rows(width=8), starts()),
    "a multiple of 8": lambda: attend(rows(width=20), rows(width=20), starts()),
    "at most 256": lambda: attend(rows(width=264), rows(width=264), starts()),
    "query is on cpu": lambda: attend(rows(device="cpu"), rows(), starts()),
    "must be int32": lambda: attend(rows(), rows(), starts(torch.int64)),
    "on the device of query": lambda: attend(rows(), rows(), starts(device="cpu")),
    "contiguous last dimension": lambda: attend(rows().transpose(0, 2), rows().transpose(0, 2), starts()),
    "attend to later ones": lambda: attend(rows(), rows(), starts(), window_size=(-1, -1)),
    "enable_gqa must tell": lambda: attend(rows(), rows(), starts(), enable_gqa=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_attention_kernel_insists(what: str) -> None:
    gpu = GPU()
    with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu), pytest.raises(AssertionError, match=what):
        REFUSED[what]()


def test_the_attention_kernel_runs_from_ampere_on() -> None:
    for capability, refused in ((AMPERE, False), (TURING, True)):
        gpu = GPU(capability=capability)
        with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu):
            if refused:
                with pytest.raises(AssertionError, match="Ampere"):
                    attend(rows(4), rows(2), starts())
            else:
                attend(rows(4), rows(2), starts()).sum().backward()


def test_memory_runs_out() -> None:
    gpu = GPU(memory=2**20)
    with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu):
        torch.empty(2**18, device="cuda")
        held = torch.empty(2**17, device="cuda")  # half of it, as what was before is freed
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(2**18, device="cuda")
    assert held.nbytes == 2**19


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_nothing_is_left_of_it() -> None:
    gpu = GPU()
    with fake_gpu.installed(gpu), fake_gpu.fake_tensors(gpu):
        torch.empty(2, device="cuda", requires_grad=True).sum().backward()
        assert PartialState().device.type == "cuda"

    assert not torch.cuda.is_available()
    assert not torch.accelerator.is_available()
    assert torch._C._accelerator_getAccelerator() is None
    assert PartialState().device.type == "cpu"
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1]
    with FakeTensorMode():
        assert torch.empty(2, device="cuda").device.type == "cuda"

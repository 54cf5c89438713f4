"""Implement `sft-recipe doctor`: diagnose the environment and suggest fixes."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from sft_recipes.errors import one_line, reason_of
from sft_recipes.recipe import machine
from sft_recipes.recipe.library_names import imitates_bf16, installed

_OURS = "sft-recipes"
_DEVELOPMENT = "test"  # extra that no run needs
_FOR_GPUS = {  # extras for GPUs only: module, package, effect if missing
    "flash": ("flash_attn", "flash-attn", "training with long sequences is slower"),
    "liger": ("liger_kernel", "liger-kernel", "RMSNorm, RoPE and SwiGLU run unfused"),
}
_LOW_DISK = 20e9  # bytes; an 8B model in bfloat16 takes 16 GB
_LOW_MEMORY = 8e9  # bytes; libraries, data and a small model
_HUB_TIMEOUT = 5.0  # seconds
_NATIVE = {  # packages with compiled code, which may be installed but fail to load: module, package
    "torchao": "torchao",
    "flash_attn": "flash-attn",
}

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """Result of one check. `fix` is a command, or "" if nothing needs fixing; `required`: no run works without it."""

    name: str
    state: State
    detail: str
    fix: str = ""
    required: bool = True

    @property
    def blocks_runs(self) -> bool:
        return self.state == "missing" and self.required

    def line(self) -> str:
        optional = " (optional)" if self.state == "missing" and not self.required else ""
        return one_line(
            f"{self.state:<8} {self.name}: {self.detail}{optional}{f'. Fix: {self.fix}' if self.fix else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "fix": self.fix,
            "required": self.required,
        }


def diagnose(*, hub: bool = False) -> list[Finding]:
    """Return all findings. The network is used only if `hub` is set."""
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _devices, _kernels, _memory, _disks]
    findings: list[Finding] = []
    for check in [*checks, *([_hub] if hub else [])]:
        try:
            findings += check()
        except ImportError as error:  # the missing package also has its own finding
            detail = f"cannot be checked: {error}"
            findings.append(Finding(check.__name__.strip("_"), "missing", detail, f"pip install '{error.name}'"))
    return findings


# --- Versions --------------------------------------------------------------------------------------------------------


def constraints() -> Path:
    """Return the path of constraints.txt: inside the package in a wheel, beside it in a checkout."""
    inside = Path(str(resources.files("sft_recipes"))) / "constraints.txt"
    return inside if inside.is_file() else inside.parent.parent / "constraints.txt"


def tested() -> dict[str, str]:
    """Return the tested version of each package."""
    pins = (line.partition("==") for line in constraints().read_text(encoding="utf-8").splitlines() if "==" in line)
    return {canonicalize_name(name): version.strip() for name, _, version in pins}


def _packages() -> Iterator[Finding]:
    try:
        ours = importlib.metadata.distribution(_OURS)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(_OURS, "missing", "not installed, so its requirements are unknown", "pip install -e .")
        return
    yield _python(ours.metadata["Requires-Python"] or "")
    pins = tested()
    extras = [extra for extra in ours.metadata.get_all("Provides-Extra") or [] if extra != _DEVELOPMENT]
    for text in ours.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, pins)
    for extra in extras:
        for text in ours.requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            of_extra = marker and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})
            if of_extra and (extra not in _FOR_GPUS or installed(_FOR_GPUS[extra][0])):
                yield _package(requirement, pins, extra)


def _python(required: str) -> Finding:
    version = platform.python_version()
    if SpecifierSet(required).contains(version, prereleases=True):
        return Finding("python", "ok", version)
    return Finding("python", "missing", f"{version} installed, {required} required", "python3.11 -m venv .venv")


def _package(requirement: Requirement, pins: dict[str, str], extra: str = "") -> Finding:
    """Compare an installed package with the required range and the tested version."""
    name, required = requirement.name, requirement.specifier
    pin = pins.get(canonicalize_name(name))
    fix = f"pip install '{name}=={pin}'" if pin else f"pip install '{name}{required}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        install = f"pip install '{_OURS}[{extra}]'" if extra else fix
        return Finding(name, "missing", "not installed", install, required=not extra)
    if not required.contains(version, prereleases=True):
        return Finding(name, "missing", f"{version} installed, {required} required", fix, required=not extra)
    if pin and Version(version).public != pin:  # without the local part: 2.13.0+cu130 is 2.13.0
        return Finding(name, "warning", f"{version} is supported but untested (tested: {pin})", fix)
    return Finding(name, "ok", version)


# --- Devices ---------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    torch, reason = _imported("torch")
    if torch is None:
        yield Finding("devices", "missing", f"torch cannot be imported: {reason}", _reinstall("torch"))
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(torch, number)
        return
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    if machine.has_nvidia_driver():
        built = torch.version.cuda
        yield Finding(
            "devices",
            "warning",
            f"NVIDIA driver found, but torch {torch.__version__} "
            + (f"(built for CUDA {built}) cannot use it, or no GPU is visible" if built else "is a CPU build"),
            "nvidia-smi" if built else _reinstall("torch"),
        )
    else:
        yield Finding("devices", "ok", f"no GPU; {cores} CPU cores")
    if not imitates_bf16(torch):
        yield Finding("bf16", "ok", "supported by the CPU")
    else:
        yield Finding(
            "bf16",
            "warning",
            "emulated by the CPU, slow",
            "sft-recipe run RECIPE --set train.mixed_precision=no --set model.dtype=float32",
        )


def _gpu(torch: Any, number: int) -> Finding:
    """Check the free memory and the bfloat16 support of a GPU."""
    properties = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        free, total = torch.cuda.mem_get_info()
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    detail = f"{properties.name}, {_gibibytes(free)} of {_gibibytes(total)} free"
    if not bf16:
        return Finding(
            f"cuda:{number}", "warning", f"{detail}, no bf16", "sft-recipe run RECIPE --set train.mixed_precision=fp16"
        )
    if free < total / 2:
        return Finding(f"cuda:{number}", "warning", f"{detail}, bf16; in use by another process", "nvidia-smi")
    return Finding(f"cuda:{number}", "ok", f"{detail}, bf16")


def _kernels() -> Iterator[Finding]:
    """Check that packages with compiled code load, and that Triton can compile."""
    torch, _ = _imported("torch")
    cuda = torch is not None and torch.cuda.is_available()
    if cuda and (missing := machine.triton_lacks()):
        detail = f"{missing} not found; Triton needs it to compile the loss for the GPU"
        yield Finding("C compiler", "missing", detail, "apt-get install gcc python3-dev")
    elif cuda:
        yield Finding("C compiler", "ok", "found, with the headers of Python")
    for module, package in _NATIVE.items():
        if installed(module):
            imported, reason = _imported(module)
            if imported is None:
                detail = f"installed, but cannot be imported: {reason}"
                yield Finding(f"{package} loads", "missing", detail, _reinstall(package), required=False)
            else:
                yield Finding(f"{package} loads", "ok", "yes")
    for extra, (module, package, effect) in _FOR_GPUS.items():
        if installed(module):
            continue
        if cuda:
            build = "--no-build-isolation " if extra == "flash" else ""
            install = f"pip install {build}'{_OURS}[{extra}]'"
            yield Finding(package, "missing", f"not installed; {effect}", install, required=False)
        else:
            yield Finding(package, "ok", "not installed (only used on GPUs)")
    yield _bitsandbytes(cuda=cuda)


def _bitsandbytes(*, cuda: bool) -> Finding:
    """Check that bitsandbytes loads its compiled library, and that it is the CUDA build if there is a GPU."""
    name, fix = "bitsandbytes loads", _reinstall("bitsandbytes")
    extension, reason = _imported("bitsandbytes.cextension")
    if extension is None:
        return Finding(name, "missing", f"cannot be imported: {reason}", fix)
    if "Mock" in type(extension.lib).__name__:  # placeholder for a library that failed to load; raises when used
        return Finding(name, "warning", "the compiled library does not load; model.quantization needs it", fix)
    for_cuda = bool(getattr(extension.lib, "compiled_with_cuda", False))
    if cuda and not for_cuda:
        return Finding(name, "warning", "CPU library, although there is a GPU", fix)
    return Finding(name, "ok", f"{'CUDA' if for_cuda else 'CPU'} library")


def _imported(module: str) -> tuple[Any, str]:
    """Import a module; None and the reason if that fails."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # compiled code that does not match raises many types
        return None, reason_of(error)


def _reinstall(package: str) -> str:
    return f"pip install --force-reinstall -c {constraints()} {package}"


# --- Memory, disks, hub ----------------------------------------------------------------------------------------------


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    total = min(memory.total, _memory_limit() or memory.total)
    detail = f"{_gibibytes(min(memory.available, total))} of {_gibibytes(total)} free"
    if total < _LOW_MEMORY:
        yield Finding(
            "memory", "warning", f"{detail}; enough for tiny models only", "sft-recipe run recipes/quickstart.yaml"
        )
    else:
        yield Finding("memory", "ok", detail)


def _memory_limit() -> int | None:
    """Return the memory limit of the container in bytes, None if there is none."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if re.fullmatch(r"\d+", text) else None
    return None


def _disks() -> Iterator[Finding]:
    from huggingface_hub import constants

    from sft_recipes.data import cache

    for name, folder, fix in (
        ("disk of the working directory", Path.cwd(), "sft-recipe run RECIPE --set output_dir=DIR"),
        ("disk of the Hub cache", Path(constants.HF_HUB_CACHE), "export HF_HOME=DIR"),
        ("disk of the tokenization cache", cache.folder(), "export SFT_RECIPES_CACHE=DIR"),
    ):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free
        detail = f"{folder}: {_gibibytes(free)} free"
        if not os.access(existing, os.W_OK):
            yield Finding(name, "warning", f"{detail}, not writable", fix)
        elif free < _LOW_DISK:
            yield Finding(name, "warning", f"{detail}; an 8B model and its checkpoints take more", fix)
        else:
            yield Finding(name, "ok", detail)


def _hub() -> Iterator[Finding]:
    """Check the connection to the Hub, and for a token, which is not shown."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "warning", "not checked, because HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        return
    try:
        answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT, follow_redirects=True)
    except Exception as error:  # network errors of many types
        reason = reason_of(error)
        yield Finding(
            "hub",
            "warning",
            f"{constants.ENDPOINT} is unreachable: {reason}",
            "export HTTPS_PROXY=http://PROXY:PORT",
        )
    else:
        if answer.status_code < 400:
            yield Finding("hub", "ok", f"{constants.ENDPOINT} is reachable")
        else:
            detail = f"{constants.ENDPOINT} returned HTTP status {answer.status_code}"
            yield Finding("hub", "warning", detail, "export HF_ENDPOINT=https://huggingface.co")
    if huggingface_hub.get_token():
        yield Finding("hub token", "ok", "found (not shown, not validated)")
    else:
        yield Finding("hub token", "missing", "not found; gated models need one", "hf auth login", required=False)


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

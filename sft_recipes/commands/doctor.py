"""Implement `sft-recipe doctor`: diagnose the environment and suggest fixes.

It says what `pip check` and `accelerate env` do not: which versions were tested, whether compiled code loads, whether the GPU,
the memory and the disks are usable, and what to do otherwise.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sft_recipes.data import cache
from sft_recipes.errors import one_line, reason_of
from sft_recipes.memory.prediction import format_bytes
from sft_recipes.recipe import machine
from sft_recipes.recipe.library_names import imitates_bf16, installed

_OURS = "sft-recipes"
_FOR_GPUS = {  # extras for GPUs only: module, package, effect if missing
    "flash": ("flash_attn", "flash-attn", "training with long sequences is slower"),
    "liger": ("liger_kernel", "liger-kernel", "RMSNorm, RoPE and SwiGLU run unfused"),
}
_COMPILED = {"torchao": "torchao", "flash_attn": "flash-attn"}  # may be installed but fail to load: module, package
_LOW_DISK = 20e9  # bytes; an 8B model in bfloat16 takes 16 GB
_LOW_MEMORY = 8e9  # bytes; libraries, data and a small model


@dataclass(frozen=True)
class Finding:
    """Result of one check. `fix` is a command, or "" if nothing needs fixing; `required`: no run works without it."""

    name: str
    state: Literal["ok", "warning", "missing"]
    detail: str
    fix: str = ""
    required: bool = True

    @property
    def blocks_runs(self) -> bool:
        return self.state == "missing" and self.required

    def line(self) -> str:
        optional = " (optional)" if self.state == "missing" and not self.required else ""
        fix = f". Fix: {self.fix}" if self.fix else ""
        return one_line(f"{self.state:<8} {self.name}: {self.detail}{optional}{fix}")


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


def constraints() -> Path:
    """Return the path of constraints.txt: inside the package in a wheel, beside it in a checkout."""
    inside = Path(str(resources.files("sft_recipes"))) / "constraints.txt"
    return inside if inside.is_file() else inside.parent.parent / "constraints.txt"


def tested() -> dict[str, str]:
    """Return the tested version of each package."""
    pins = (line.partition("==") for line in constraints().read_text(encoding="utf-8").splitlines() if "==" in line)
    return {canonicalize_name(name): version.strip() for name, _, version in pins}


def _packages() -> Iterator[Finding]:
    """Compare what is installed with the required ranges and the tested versions."""
    yield Finding("python", "ok", platform.python_version())
    try:
        ours = importlib.metadata.distribution(_OURS)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(_OURS, "missing", "not installed, so its requirements are unknown", "pip install -e .")
        return
    pins = tested()
    unused = {"test", "docs", *(extra for extra, (module, *_) in _FOR_GPUS.items() if not installed(module))}
    extras = [extra for extra in ours.metadata.get_all("Provides-Extra") or [] if extra not in unused]
    for text in ours.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        extra = next((name for name in ["", *extras] if marker is None or marker.evaluate({"extra": name})), None)
        if extra is not None:
            yield _package(requirement, pins.get(canonicalize_name(requirement.name)), extra)


def _package(requirement: Requirement, pin: str | None, extra: str) -> Finding:
    name, required = requirement.name, requirement.specifier
    fix = f"pip install '{name}=={pin}'" if pin else f"pip install '{name}{required}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        fix = f"pip install '{_OURS}[{extra}]'" if extra else fix
        return Finding(name, "missing", "not installed", fix, required=not extra)
    if not required.contains(version, prereleases=True):
        return Finding(name, "missing", f"{version} installed, {required} required", fix, required=not extra)
    if pin and Version(version).public != pin:  # without the local part: 2.13.0+cu130 is 2.13.0
        return Finding(name, "warning", f"{version} is supported but untested (tested: {pin})", fix)
    return Finding(name, "ok", version)


def _devices() -> Iterator[Finding]:
    torch, reason = _imported("torch")
    if torch is None:
        yield Finding("devices", "missing", f"torch cannot be imported: {reason}", _reinstall("torch"))
        return
    if torch.cuda.is_available():
        yield from (_gpu(torch, number) for number in range(torch.cuda.device_count()))
        return
    if not machine.has_nvidia_driver():
        yield Finding("devices", "ok", f"no GPU; {os.cpu_count()} CPU cores")
    else:
        built = torch.version.cuda
        why = f"(built for CUDA {built}) cannot use it, or no GPU is visible" if built else "is a CPU build"
        detail = f"NVIDIA driver found, but torch {torch.__version__} {why}"
        yield Finding("devices", "warning", detail, "nvidia-smi" if built else _reinstall("torch"))
    if imitates_bf16(torch):
        fix = "sft-recipe run RECIPE --set train.mixed_precision=no --set model.dtype=float32"
        yield Finding("bf16", "warning", "emulated by the CPU, slow", fix)
    else:
        yield Finding("bf16", "ok", "supported by the CPU")


def _gpu(torch: Any, number: int) -> Finding:
    with torch.cuda.device(number):
        free, total = torch.cuda.mem_get_info()
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    detail = f"{torch.cuda.get_device_properties(number).name}, {format_bytes(free)} of {format_bytes(total)} free"
    fix = "" if bf16 else "sft-recipe run RECIPE --set train.mixed_precision=fp16"
    detail += ", bf16" if bf16 else ", no bf16"
    if bf16 and free < total / 2:
        detail, fix = f"{detail}; in use by another process", "nvidia-smi"
    return Finding(f"cuda:{number}", "warning" if fix else "ok", detail, fix)


def _kernels() -> Iterator[Finding]:
    """Check that packages with compiled code load, and that Triton can compile."""
    torch, _ = _imported("torch")
    cuda = torch is not None and torch.cuda.is_available()
    if cuda and (lacking := machine.triton_lacks()):
        detail = f"{lacking} not found; Triton needs it to compile the loss for the GPU"
        yield Finding("C compiler", "missing", detail, "apt-get install gcc python3-dev")
    elif cuda:
        yield Finding("C compiler", "ok", "found, with the headers of Python")
    for module, package in _COMPILED.items():
        if installed(module):
            loaded, reason = _imported(module)
            failed = "missing", f"installed, but cannot be imported: {reason}", _reinstall(package)
            yield Finding(f"{package} loads", *(("ok", "yes", "") if loaded else failed), required=False)
    for extra, (module, package, effect) in _FOR_GPUS.items():
        build = "--no-build-isolation " if extra == "flash" else ""
        fix = f"pip install {build}'{_OURS}[{extra}]'"
        if cuda and not installed(module):
            yield Finding(package, "missing", f"not installed; {effect}", fix, required=False)
        elif not installed(module):
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


def _memory() -> Iterator[Finding]:
    import psutil

    from sft_recipes.memory import host_memory

    total = host_memory.total_memory()
    detail = f"{format_bytes(min(psutil.virtual_memory().available, total))} of {format_bytes(total)} free"
    if total < _LOW_MEMORY:
        detail += "; enough for tiny models only"
        yield Finding("memory", "warning", detail, "sft-recipe run recipes/quickstart.yaml")
    else:
        yield Finding("memory", "ok", detail)


def _disks() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, folder, fix in (
        ("disk of the working directory", Path.cwd(), "sft-recipe run RECIPE --set output_dir=DIR"),
        ("disk of the Hub cache", Path(constants.HF_HUB_CACHE), "export HF_HOME=DIR"),
        ("disk of the tokenization cache", cache.folder(), "export SFT_RECIPES_CACHE=DIR"),
    ):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(existing).free
        detail, problem = f"{folder}: {format_bytes(free)} free", ""
        if not os.access(existing, os.W_OK):
            problem = ", not writable"
        elif free < _LOW_DISK:
            problem = "; an 8B model and its checkpoints take more"
        yield Finding(name, "warning" if problem else "ok", detail + problem, fix if problem else "")


def _hub() -> Iterator[Finding]:
    """Check the connection to the Hub, and for a token, which is not shown."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "warning", "not checked, because HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
        return
    try:
        status = huggingface_hub.get_session().head(hub, timeout=5.0, follow_redirects=True).status_code
    except Exception as error:  # network errors of many types
        detail = f"{hub} is unreachable: {reason_of(error)}"
        yield Finding("hub", "warning", detail, "export HTTPS_PROXY=http://PROXY:PORT")
    else:
        fix = "" if status < 400 else "export HF_ENDPOINT=https://huggingface.co"
        detail = f"{hub} is reachable" if status < 400 else f"{hub} returned HTTP status {status}"
        yield Finding("hub", "warning" if fix else "ok", detail, fix)
    if huggingface_hub.get_token():
        yield Finding("hub token", "ok", "found (not shown, not validated)")
    else:
        yield Finding("hub token", "missing", "not found; gated models need one", "hf auth login", required=False)

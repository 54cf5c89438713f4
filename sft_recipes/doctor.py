"""What this machine has of what a run needs, and the command that brings the rest."""

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

from sft_recipes.errors import one_line
from sft_recipes.recipe import machine
from sft_recipes.recipe.upstream import imitates_bf16, installed

_OURS = "sft-recipes"
_DEVELOPMENT = "test"  # the extra that no run needs
_FOR_GPUS = {  # extras that only GPUs have a use for: the module, the package, what a run lacks without
    "flash": ("flash_attn", "flash-attn", "training with long sequences is slower"),
    "liger": ("liger_kernel", "liger-kernel", "RMSNorm, RoPE and SwiGLU run unfused"),
}
_LITTLE_DISK = 20e9  # bytes: an 8B model as downloaded takes 16 GB
_LITTLE_MEMORY = 8e9  # bytes: libraries, data and a small model
_HUB_SECONDS = 5.0
_NATIVE = {  # packages with compiled parts, which can be there and not load; the module, the package
    "torchao": "torchao",
    "flash_attn": "flash-attn",
}

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` is the command that mends it, or "" where nothing is to be mended. Without what
    is `required` and missing no run works."""

    name: str
    state: State
    said: str
    mend: str = ""
    required: bool = True

    @property
    def hinders(self) -> bool:
        return self.state == "missing" and self.required

    def line(self) -> str:
        optional = " (optional)" if self.state == "missing" and not self.required else ""
        return one_line(f"{self.state:<8} {self.name}: {self.said}{optional}{f'; {self.mend}' if self.mend else ''}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "said": self.said,
            "mend": self.mend,
            "required": self.required,
        }


def examine(*, hub: bool = False) -> list[Finding]:
    """Everything there is to find, in the order of what builds on what. The network is only used to ask for the `hub`."""
    looks: list[Callable[[], Iterator[Finding]]] = [_packages, _devices, _kernels, _memory, _disks]
    findings: list[Finding] = []
    for look in [*looks, *([_hub] if hub else [])]:
        try:
            findings += look()
        except ImportError as error:  # of a package that is missing, which has a line of its own
            said = f"cannot be looked at: {error}"
            findings.append(Finding(look.__name__.strip("_"), "missing", said, f"pip install '{error.name}'"))
    return findings


# --- Versions --------------------------------------------------------------------------------------------------------


def constraints() -> Path:
    """The file of the tested set: in the wheel inside the package, in a checkout beside it."""
    inside = Path(str(resources.files("sft_recipes"))) / "constraints.txt"
    return inside if inside.is_file() else inside.parent.parent / "constraints.txt"


def tested() -> dict[str, str]:
    """Version of each package in the tested set."""
    pins = (line.partition("==") for line in constraints().read_text(encoding="utf-8").splitlines() if "==" in line)
    return {canonicalize_name(name): version.strip() for name, _, version in pins}


def _packages() -> Iterator[Finding]:
    try:
        ours = importlib.metadata.distribution(_OURS)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(_OURS, "missing", "is not installed, so its requirements are not known", "pip install -e .")
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


def _python(wanted: str) -> Finding:
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("python", "ok", version)
    return Finding("python", "missing", f"{version}; expected {wanted}", "python3.11 -m venv .venv")


def _package(requirement: Requirement, pins: dict[str, str], extra: str = "") -> Finding:
    """One package against the range that is required, and against the tested set."""
    name, wanted = requirement.name, requirement.specifier
    pin = pins.get(canonicalize_name(name))
    mend = f"pip install '{name}=={pin}'" if pin else f"pip install '{name}{wanted}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        bring = f"pip install '{_OURS}[{extra}]'" if extra else mend
        return Finding(name, "missing", "is not installed", bring, required=not extra)
    if not wanted.contains(version, prereleases=True):
        return Finding(name, "missing", f"{version}; expected {wanted}", mend, required=not extra)
    if pin and Version(version).public != pin:  # without what it was built for: 2.13.0+cu130 is 2.13.0
        return Finding(name, "warning", f"{version} is in the range {wanted} and not tested, {pin} is", mend)
    return Finding(name, "ok", version)


# --- Devices ---------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    torch, wrong = _imported("torch")
    if torch is None:
        yield Finding("devices", "missing", f"torch cannot be imported: {wrong}", _anew("torch"))
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(torch, number)
        return
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    cpu = f"no GPU is used; {cores} CPU cores"
    if machine.has_nvidia_driver():
        built = torch.version.cuda
        yield Finding(
            "devices",
            "warning",
            f"there is an NVIDIA driver, and torch {torch.__version__} "
            + (
                f"cannot use it: it is built for CUDA {built}, or no GPU is given to it"
                if built
                else "is built for the CPU"
            ),
            "nvidia-smi" if built else _anew("torch"),
        )
    else:
        yield Finding("devices", "ok", cpu)
    if not imitates_bf16(torch):
        yield Finding("bf16", "ok", "the CPU computes in it")
    else:
        yield Finding(
            "bf16",
            "warning",
            "the CPU only imitates it, slowly",
            "sft-recipe run RECIPE --set train.mixed_precision=no --set model.dtype=float32",
        )


def _gpu(torch: Any, number: int) -> Finding:
    """A GPU with its memory, and whether it computes in bfloat16."""
    properties = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        free, whole = torch.cuda.mem_get_info()
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    said = f"{properties.name}, {_gibibytes(free)} of {_gibibytes(whole)} free"
    if not bf16:
        return Finding(
            f"cuda:{number}", "warning", f"{said}, no bf16", "sft-recipe run RECIPE --set train.mixed_precision=fp16"
        )
    if free < whole / 2:
        return Finding(f"cuda:{number}", "warning", f"{said}, bf16; another program uses it", "nvidia-smi")
    return Finding(f"cuda:{number}", "ok", f"{said}, bf16")


def _kernels() -> Iterator[Finding]:
    """Packages with compiled parts: whether they load."""
    torch, _ = _imported("torch")
    cuda = torch is not None and torch.cuda.is_available()
    if cuda and (lacking := machine.triton_lacks()):
        said = f"{lacking} is not found; Triton compiles the loss for the GPU with it"
        yield Finding("C compiler", "missing", said, "apt-get install gcc python3-dev")
    elif cuda:
        yield Finding("C compiler", "ok", "Triton finds one, and Python's headers")
    for module, package in _NATIVE.items():
        if installed(module):
            found, wrong = _imported(module)
            if found is None:
                said = f"is installed and cannot be imported: {wrong}"
                yield Finding(f"{package} loads", "missing", said, _anew(package), required=False)
            else:
                yield Finding(f"{package} loads", "ok", "yes")
    for extra, (module, package, without) in _FOR_GPUS.items():
        if installed(module):
            continue
        if cuda:
            built = "--no-build-isolation " if extra == "flash" else ""
            bring = f"pip install {built}'{_OURS}[{extra}]'"
            yield Finding(package, "missing", f"is not installed; {without}", bring, required=False)
        else:
            yield Finding(package, "ok", "is not installed, and without a GPU there is no use for it")
    yield _bitsandbytes(cuda=cuda)


def _bitsandbytes(*, cuda: bool) -> Finding:
    """Whether bitsandbytes has its compiled library, and the one for the GPU that is there."""
    name, mend = "bitsandbytes loads", _anew("bitsandbytes")
    found, wrong = _imported("bitsandbytes.cextension")
    if found is None:
        return Finding(name, "missing", f"cannot be imported: {wrong}", mend)
    if "Mock" in type(found.lib).__name__:  # stands in for a library that did not load, and raises when it is used
        return Finding(name, "warning", "its compiled library does not load; model.quantization needs it", mend)
    for_cuda = bool(getattr(found.lib, "compiled_with_cuda", False))
    if cuda and not for_cuda:
        return Finding(name, "warning", "its library is the one for the CPU, and there is a GPU", mend)
    return Finding(name, "ok", f"its library for {'CUDA' if for_cuda else 'the CPU'}")


def _imported(module: str) -> tuple[Any, str]:
    """A module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # compiled parts that do not fit fail in their own ways
        return None, " ".join(str(error).split())[:200] or type(error).__name__


def _anew(package: str) -> str:
    return f"pip install --force-reinstall -c {constraints()} {package}"


# --- Memory, disks, hub ----------------------------------------------------------------------------------------------


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    whole = min(memory.total, _memory_limit() or memory.total)
    said = f"{_gibibytes(min(memory.available, whole))} of {_gibibytes(whole)} free"
    if whole < _LITTLE_MEMORY:
        yield Finding("memory", "warning", f"{said}, which is little", "sft-recipe run recipes/quickstart.yaml")
    else:
        yield Finding("memory", "ok", said)


def _memory_limit() -> int | None:
    """Bytes that a container may use, None where there is no limit."""
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

    for name, folder, mend in (
        ("disk of the working directory", Path.cwd(), "sft-recipe run RECIPE --set output_dir=DIR"),
        ("disk of models from the hub", Path(constants.HF_HUB_CACHE), "export HF_HOME=DIR"),
        ("disk of the tokenised data", cache.folder(), "export SFT_RECIPES_CACHE=DIR"),
    ):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(there).free
        said = f"{folder}: {_gibibytes(free)} free"
        if not os.access(there, os.W_OK):
            yield Finding(name, "warning", f"{said}, and it cannot be written", mend)
        elif free < _LITTLE_DISK:
            yield Finding(name, "warning", f"{said}; checkpoints and models of 8B weights take more", mend)
        else:
            yield Finding(name, "ok", said)


def _hub() -> Iterator[Finding]:
    """Whether the hub answers, and whether there is a token, which is not shown."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "warning", "HF_HUB_OFFLINE is set, so it is not asked", "unset HF_HUB_OFFLINE")
        return
    try:
        answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS, follow_redirects=True)
    except Exception as error:  # whatever the network says
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        yield Finding(
            "hub",
            "warning",
            f"{constants.ENDPOINT} cannot be reached: {reason}",
            "export HTTPS_PROXY=http://PROXY:PORT",
        )
    else:
        if answer.status_code < 400:
            yield Finding("hub", "ok", f"{constants.ENDPOINT} answers")
        else:
            said = f"{constants.ENDPOINT} answers with {answer.status_code}"
            yield Finding("hub", "warning", said, "export HF_ENDPOINT=https://huggingface.co")
    if huggingface_hub.get_token():
        yield Finding("hub token", "ok", "there is one (not shown, not tried)")
    else:
        yield Finding(
            "hub token", "missing", "there is none, and models behind a gate need one", "hf auth login", required=False
        )


def _gibibytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

"""Look up GPU, C compiler and Python headers without importing torch, so that `check` stays quick."""

import importlib.metadata
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def has_nvidia_driver() -> bool:
    """Return True if an NVIDIA driver is installed, whether or not torch can use it."""
    return Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi") is not None


def trains_on_nvidia_gpu() -> bool:
    """Return True if a run here computes on an NVIDIA GPU: driver, visible device, and a torch that is built for CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    try:
        built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return has_nvidia_driver() and not hidden and not built_for_cpu


def triton_lacks() -> str | None:
    """Return what is missing for Triton to compile its launchers, or None.

    Triton (3.7, runtime/build.py) takes CC if it is set, else gcc or clang, and includes Python.h.
    """
    compilers = [os.environ["CC"].split()[0]] if os.environ.get("CC", "").strip() else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"a C compiler ({' or '.join(compilers)})"
    headers = Path(sysconfig.get_paths(scheme=_scheme())["include"])
    return None if (headers / "Python.h").is_file() else f"Python's C headers ({headers}/Python.h)"


def _scheme() -> str:
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme  # Debian's posix_local has no headers


def cpp_compilers() -> Iterator[str]:
    """Yield the names of the compilers that inductor looks for on a CPU."""
    yield from (os.environ[name] for name in ("CXX", "CC") if os.environ.get(name))
    yield from ("g++", "clang++", "c++", "gcc", "clang")

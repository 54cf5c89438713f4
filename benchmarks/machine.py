"""What a figure was measured on: a line for benchmarks/RESULTS.md."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def measured_on() -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    today, python = datetime.date.today().isoformat(), platform.python_version()
    return f"{today}, {os.cpu_count()} cores of {_processor()}, Python {python}, {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

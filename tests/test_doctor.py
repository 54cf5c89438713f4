"""`sft-recipe doctor` on simulated machines."""

import importlib.metadata
import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from sft_recipes.commands import doctor
from sft_recipes.recipe import machine as machine_lookup
from tests.commands import sft_recipe

ROOT = Path(__file__).parents[1]


def found(look: Any, name: str) -> doctor.Finding:
    [finding] = [each for each in look() if each.name == name]
    return finding


def having(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Simulate other installed versions; None: not installed."""
    really = importlib.metadata.version

    def version(name: str) -> str:
        if name in versions and versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or really(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_every_requirement_has_a_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [Requirement(text).name for text in project["dependencies"]]
    wanted += ["torchao", "tensorboard", "trackio", "wandb", "mlflow-skinny"]
    names = [finding.name.replace("-", ".") for finding in doctor._packages()]

    assert {name.replace("-", ".") for name in wanted} - set(names) <= {"packaging"}  # an install from before it


def test_what_is_installed_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, torch="2.13.0+cu130")  # the local part is ignored

    assert found(doctor._packages, "torch") == doctor.Finding("torch", "ok", "2.13.0+cu130")
    assert found(doctor._packages, "python").state == "ok"


@pytest.mark.parametrize(
    ("version", "state", "detail", "fix"),
    [
        ("1.15.0", "missing", "1.15.0 installed, <1.17,>=1.16 required", "pip install 'trl==1.16.0'"),
        ("1.16.9", "warning", "1.16.9 is supported but untested (tested: 1.16.0)", "pip install 'trl==1.16.0'"),
        (None, "missing", "not installed", "pip install 'trl==1.16.0'"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str | None, state: Any, detail: str, fix: str) -> None:
    having(monkeypatch, trl=version)
    finding = found(doctor._packages, "trl")

    assert finding == doctor.Finding("trl", state, detail, fix)
    assert finding.blocks_runs == (state == "missing")


def test_missing_extra_blocks_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, wandb=None)
    finding = found(doctor._packages, "wandb")

    assert not finding.blocks_runs
    assert finding.line() == "missing  wandb: not installed (optional). Fix: pip install 'sft-recipes[wandb]'"


def test_the_tested_set_is_the_constraints_and_ships() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if not line.startswith("#")
    )
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]

    assert {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()} == doctor.tested()
    assert doctor.tested()["ruamel-yaml"] == pins["ruamel.yaml"]
    assert wheel["force-include"]["constraints.txt"] == "sft_recipes/constraints.txt"


class _CUDA:
    """One GPU of 80 GiB."""

    def __init__(self, free: float = 79, *, bf16: bool = True) -> None:
        self.free, self.bf16 = free, bf16

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda number: SimpleNamespace(name="H100"))
    device = staticmethod(lambda number: __import__("contextlib").nullcontext())

    def mem_get_info(self) -> tuple[float, float]:
        return self.free * 2**30, 80 * 2**30

    def is_bf16_supported(self, *, including_emulation: bool) -> bool:
        return self.bf16 or including_emulation


@pytest.mark.parametrize(
    ("cuda", "line"),
    [
        (_CUDA(), "ok       cuda:0: H100, 79.0 GiB of 80.0 GiB free, bf16"),
        (
            _CUDA(20),
            "warning  cuda:0: H100, 20.0 GiB of 80.0 GiB free, bf16; in use by another process. Fix: nvidia-smi",
        ),
        (
            _CUDA(bf16=False),
            "warning  cuda:0: H100, 79.0 GiB of 80.0 GiB free, no bf16. "
            "Fix: sft-recipe run RECIPE --set train.mixed_precision=fp16",
        ),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, cuda: _CUDA, line: str) -> None:
    monkeypatch.setattr(doctor, "_imported", lambda module: (SimpleNamespace(cuda=cuda), ""))

    assert [finding.line() for finding in doctor._devices()] == [line]


def machine(monkeypatch: pytest.MonkeyPatch, *, driver: bool, built: str | None = None, bf16: bool = True) -> None:
    """A machine whose torch sees no GPU."""
    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False),
        cpu=SimpleNamespace(get_capabilities=lambda: {"avx2": True, "avx512_bf16": bf16}),
        version=SimpleNamespace(cuda=built),
        __version__="2.13.0",
    )
    monkeypatch.setattr(doctor, "_imported", lambda module: (torch, ""))
    monkeypatch.setattr(machine_lookup, "has_nvidia_driver", lambda: driver)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, driver=False, bf16=False)
    devices, bf16 = doctor._devices()

    assert devices.state == "ok"
    assert bf16.state == "warning"
    assert bf16.fix == "sft-recipe run RECIPE --set train.mixed_precision=no --set model.dtype=float32"


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, driver=True)
    [devices, _] = doctor._devices()
    assert "torch 2.13.0 is a CPU build" in devices.detail
    assert devices.fix == f"pip install --force-reinstall -c {ROOT / 'constraints.txt'} torch"

    machine(monkeypatch, driver=True, built="13.0")
    [devices, _] = doctor._devices()
    assert "(built for CUDA 13.0) cannot use it, or no GPU is visible" in devices.detail


def test_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_imported", lambda module: (None, "libcudart.so.13: no such file"))
    [devices] = doctor._devices()

    assert devices.blocks_runs
    assert devices.detail == "torch cannot be imported: libcudart.so.13: no such file"


def test_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class MockLibrary:
        """Recognized by its name."""

    for library, cuda, detail in (
        (SimpleNamespace(compiled_with_cuda=True), True, "CUDA library"),
        (SimpleNamespace(compiled_with_cuda=False), False, "CPU library"),
        (SimpleNamespace(compiled_with_cuda=False), True, "CPU library, although there is a GPU"),
        (MockLibrary(), False, "the compiled library does not load; model.quantization needs it"),
    ):
        monkeypatch.setattr(doctor, "_imported", lambda module, library=library: (SimpleNamespace(lib=library), ""))
        finding = doctor._bitsandbytes(cuda=cuda)
        assert finding.detail == detail
        assert bool(finding.fix) == (finding.state == "warning")


@pytest.mark.parametrize("package", ["flash-attn", "liger-kernel"])
def test_packages_for_gpus(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    for cuda, state in ((True, "missing"), (False, "ok")):
        torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda cuda=cuda: cuda), lib=None)
        monkeypatch.setattr(doctor, "_imported", lambda module, torch=torch: (torch, ""))
        finding = found(doctor._kernels, package)
        assert finding.state == state
        assert not finding.blocks_runs


def test_a_gpu_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True), lib=None)
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    monkeypatch.setattr(doctor, "_imported", lambda module: (torch, ""))
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    finding = found(doctor._kernels, "C compiler")
    assert finding.blocks_runs
    assert f"a C compiler ({tmp_path}/cc) not found" in finding.detail

    (tmp_path / "cc").touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_paths", lambda **_: {"include": str(tmp_path)})
    assert "Python.h" in found(doctor._kernels, "C compiler").detail

    (tmp_path / "Python.h").touch()
    assert found(doctor._kernels, "C compiler").state == "ok"


def test_a_kernel_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), lib=None)
    monkeypatch.setattr(
        doctor, "_imported", lambda module: (None, "undefined symbol") if module == "torchao" else (torch, "")
    )
    finding = found(doctor._kernels, "torchao loads")

    assert (finding.state, finding.blocks_runs) == ("missing", False)
    assert "undefined symbol" in finding.detail


def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    cache = found(doctor._disks, "disk of the tokenization cache")

    assert (cache.state, cache.fix) == ("warning", "export SFT_RECIPES_CACHE=DIR")
    assert "1.0 GiB free" in cache.detail


def test_a_missing_package_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> Any:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    lacking.__name__ = "_memory"
    for name in ("_packages", "_devices", "_kernels"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr(doctor, "_memory", lacking)
    memory, *disks = doctor.diagnose()

    assert memory == doctor.Finding(
        "memory", "missing", "cannot be checked: No module named 'psutil'", "pip install 'psutil'"
    )
    assert len(disks) == 3


class _Session:
    """Hub session that answers or fails."""

    def __init__(self, answer: int | Exception) -> None:
        self.answer = answer

    def head(self, url: str, *, timeout: float, follow_redirects: bool) -> Any:
        assert timeout <= 10
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(status_code=self.answer)


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        (200, "ok", "https://huggingface.co is reachable"),
        (503, "warning", "https://huggingface.co returned HTTP status 503"),
        (OSError("no route"), "warning", "https://huggingface.co is unreachable: no route"),
    ],
)
def test_the_hub(monkeypatch: pytest.MonkeyPatch, answer: Any, state: str, detail: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: _Session(answer))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_a-token-that-nobody-is-to-see")
    hub, token = doctor._hub()

    assert (hub.state, hub.detail) == (state, detail)
    assert token.state == "ok"
    assert "hf_" not in token.line()


def test_the_hub_is_asked_only_for_the_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_packages", "_devices", "_kernels", "_memory", "_disks"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("it was asked"))

    assert doctor.diagnose() == []
    [offline] = doctor.diagnose(hub=True)
    assert offline.fix == "unset HF_HUB_OFFLINE"


def test_the_command(tmp_path: Path) -> None:
    """On this machine, which has the tested versions."""
    lines, content = sft_recipe("doctor"), sft_recipe("doctor", "--json")
    findings = json.loads(content.stdout)

    assert (lines.returncode, content.returncode) == (0, 0), lines.stdout
    assert (lines.stderr, content.stderr) == ("", "")
    assert findings["ok"] is True
    assert len(findings["findings"]) == len(lines.stdout.splitlines())
    assert all(re.match(r"(ok|warning|missing) +\S.*: ", line) for line in lines.stdout.splitlines())
    assert all(finding["fix"] for finding in findings["findings"] if finding["state"] != "ok")


def test_what_is_missing_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sft_recipes import cli

    monkeypatch.setattr(
        doctor, "diagnose", lambda hub: [doctor.Finding("trl", "missing", "not installed", "pip install trl")]
    )
    monkeypatch.setattr("sys.argv", ["sft-recipe", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 1
    assert capsys.readouterr().out == "missing  trl: not installed. Fix: pip install trl\n"

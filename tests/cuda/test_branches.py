"""Every module with code for GPUs, and which tests run it without one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sft_recipes"
BRANCH = re.compile(
    r"torch\.cuda\.|torch\.accelerator\.|\.is_cuda\b|device(?:\.type)? [!=]= \"c(?:uda|pu)\"|\"cuda\" if|if on_gpu|if cuda\b"
)
TESTS = {  # files below tests/
    "commands/check.py": ["recipe/test_validate.py", "memory/test_host_memory.py"],
    "commands/doctor.py": ["test_doctor.py"],
    "export/save_model.py": ["cuda/test_machine.py"],
    "export/verify.py": ["export/test_reference.py"],
    "commands/plan.py": ["test_plan.py"],
    "memory/host_memory.py": ["memory/test_host_memory.py"],
    "memory/prediction.py": ["memory/test_prediction.py"],
    "memory/optimizer_states.py": ["memory/test_optimizer_states.py"],
    "distributed/launch.py": ["distributed/test_launch.py"],
    "distributed/ranks.py": ["cuda/test_machine.py"],
    "commands/generate.py": ["cuda/test_machine.py"],
    "training/sft_config.py": ["cuda/test_training.py"],
    "models/attention.py": ["cuda/test_loading.py", "cuda/test_training.py", "models/test_attention.py"],
    "training/run_info.py": ["cuda/test_machine.py"],
    "memory/autosize.py": ["cuda/test_memory.py"],
    "memory/memory_trace.py": ["cuda/test_memory.py", "memory/test_memory_trace.py"],
    "models/cpu_loss.py": ["cuda/test_training.py"],
    "models/kernels.py": ["models/test_kernels.py"],
    "training/metrics.py": ["cuda/test_memory.py", "cuda/test_machine.py"],
    "models/model.py": ["cuda/test_loading.py", "models/test_model.py"],
    "training/preflight.py": ["cuda/test_preflight.py", "cuda/test_memory.py"],
    "models/strategies.py": ["cuda/test_machine.py"],
    "memory/fake_kernels.py": ["cuda/test_memory.py", "memory/test_memory_trace.py"],
    "training/build.py": ["cuda/test_training.py"],
    "training/trainer.py": ["cuda/test_training.py"],
}


def branches() -> dict[str, list[str]]:
    """Return the lines with code for GPUs, by module."""
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for line in file.read_text("utf-8").splitlines():
            code = re.sub(r"(?<!\S)#.*", "", line)
            if BRANCH.search(code):
                found.setdefault(file.relative_to(PACKAGE).as_posix(), []).append(code.strip())
    return found


def test_each_module_with_code_for_gpus_names_its_tests() -> None:
    found = branches()
    assert sum(map(len, found.values())) > 30
    assert found.keys() - TESTS.keys() == set(), {name: found[name] for name in found.keys() - TESTS.keys()}
    assert TESTS.keys() - found.keys() == set()


@pytest.mark.parametrize("module", TESTS)
def test_those_tests_are_there(module: str) -> None:
    for file in TESTS[module]:
        text = (ROOT / "tests" / file).read_text("utf-8")
        assert re.search(r"cuda|gpu", text, re.IGNORECASE), file

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.commands.check import check
from sft_recipes.memory import host_memory
from sft_recipes.memory.host_memory import PROCESS
from sft_recipes.memory.prediction import GIB
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import Recipe
from tests.conftest import WriteRecipe

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
LLAMA_8B = ModelSize(8_030_261_248, 8_030_261_248, 32, 218_112_000, 1_050_677_248, embeddings=525_336_576)
LLAMA_70B = ModelSize(70_553_706_496, 70_553_706_496, 80, 855_654_400, 2_101_354_496, embeddings=1_050_673_152)
LORA: dict[str, Any] = {"lora": {}}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"name": "x"}, "data": {"train": "x"}, "output_dir": "x"} | sections)


def test_lora_on_one_gpu_takes_a_few_gib() -> None:
    found = host_memory.predict(recipe(**LORA), LLAMA_8B, "cuda")

    assert set(found.stages) == {"load", "merge", "verify"}
    assert all(size < 6 * GIB for size in found.stages.values())
    assert found.verify == PROCESS * 2 + GIB / 2 + 4 * 525_336_576  # the head in float32


def test_on_a_cpu_the_model_is_in_memory_once() -> None:
    found = host_memory.predict(recipe(**LORA), LLAMA_8B, "cpu")

    assert found.load == PROCESS + 2 * LLAMA_8B.parameters
    assert found.verify is not None
    assert found.verify < found.load + 4 * GIB  # what is verified stays in its files


def test_a_sharded_full_model_is_never_whole_in_host_memory_but_once() -> None:
    launch = {"strategy": "fsdp2", "processes": 8}
    found = host_memory.predict(recipe(launch=launch), LLAMA_70B, "cuda")

    assert found.load == 8 * PROCESS + 2 * LLAMA_70B.parameters  # rank 0 reads it
    for stage in ("gather", "merge", "verify"):
        assert found.stages[stage] < 20 * GIB, stage
    one = host_memory.predict(recipe(launch=launch | {"strategy": "ddp"}), LLAMA_70B, "cuda")
    assert one.load < 8 * 4 * GIB
    assert one.gather is None


def test_an_adapter_that_is_not_merged_is_not_verified() -> None:
    found = host_memory.predict(recipe(export={"merge": False}, **LORA), LLAMA_8B, "cuda")

    assert set(found.stages) == {"load"}
    assert str(found) == "2.0 GiB to load"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_bases_are_loaded_again_to_be_verified(quantization: str) -> None:
    sections: dict[str, Any] = {"model": {"name": "x", "quantization": quantization}, **LORA}
    quantized, plain = (host_memory.predict(recipe(**each), LLAMA_8B, "cuda") for each in (sections, LORA))

    assert quantized.verify is not None
    assert plain.verify is not None
    assert quantized.verify > plain.verify + 0.5 * LLAMA_8B.parameters


def test_a_model_s_files_tell_its_size(tmp_path: Path) -> None:
    found = host_memory.of_files(recipe(model={"name": "builtin:tiny"}))

    assert found is not None
    assert found.embeddings == 1024 * 128
    assert 4 * found.layer + found.embeddings == pytest.approx(found.parameters)
    assert host_memory.of_files(recipe(model={"name": "on-the/hub"})) is None


def test_check_warns_if_this_machine_has_too_little(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write_recipe(**LORA))
    assert not any("host memory" in line for line in check(file).warnings)

    monkeypatch.setattr(host_memory, "total_memory", lambda: 2.2 * GIB)
    [found] = [line for line in check(file).warnings if "host memory" in line]
    assert "GiB to verify (this node has 2.2 GiB)" in found
    assert "set export.merge: false and merge the adapter elsewhere" in found


def test_without_adapters_nothing_can_be_merged_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "total_memory", lambda: 2 * GIB)
    needed = host_memory.HostMemory(load=GIB, gather=None, merge=3 * GIB, verify=3 * GIB)

    assert "export.merge" in str(host_memory.memory_shortage(needed, adapters=True))
    assert "export.merge" not in str(host_memory.memory_shortage(needed, adapters=False))


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(host_memory, "_CGROUP", str(limit))
    for content, expected in (("1073741824\n", GIB), ("max\n", None)):
        limit.write_text(content, "utf-8")
        assert (host_memory.total_memory() == GIB) == (expected == GIB)

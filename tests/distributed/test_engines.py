"""DDP, FSDP2 and DeepSpeed ZeRO on two processes over gloo: same run as one process, and a complete export."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import sft_recipes.run  # noqa: F401  # once, and not in each child
from sft_recipes.export import safetensors_io, save_model
from sft_recipes.recipe.library_names import installed
from tests.commands import forked
from tests.conftest import metrics
from tests.distributed import two

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
needs_deepspeed = pytest.mark.skipif(not installed("deepspeed"), reason="DeepSpeed is not installed")
TOLERANCES = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-4}  # relative
# No dropout, which each process samples itself; 9 sequences, so that the last step of an epoch is partial.
GENERATE = {"eval": {"generate": ["Say the word number 1."], "max_new_tokens": 3}}
SAME: dict[str, Any] = {
    "lora": {"lora": {"rank": 2, "dropout": 0.0}, **GENERATE},
    "full": GENERATE,
    "qlora": {"lora": {"rank": 2, "dropout": 0.0}},
}


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Import DeepSpeed once, not in each child; disable its shared-memory collectives, which take half a minute to compile."""
    if installed("deepspeed"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one")
    for method, sections in SAME.items():
        child = forked(two.alone, folder / method, method, sections)
        child.join()
        assert child.exitcode == 0
    return {method: folder / method / "run" for method in SAME}


def assert_same_metrics(alone: list[dict[str, Any]], together: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in alone] == [line["step"] for line in together]
    for mine, theirs in zip(alone, together, strict=True):
        for name in TOLERANCES.keys() & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=TOLERANCES[name]), (name, mine["step"])


def weights(run: Path) -> dict[str, Any]:
    return {
        f"{part}/{name}": tensor
        for part in ("adapter", "model")
        for file in sorted((run / part).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("strategy", "method", "resumes"),
    [
        ("ddp", "full", False),
        ("ddp", "lora", False),
        ("fsdp2", "full", False),
        ("fsdp2", "lora", True),
        ("fsdp2", "qlora", False),
        pytest.param("zero2", "full", True, marks=needs_deepspeed),
        pytest.param("zero2", "lora", False, marks=needs_deepspeed),
        pytest.param("zero3", "full", False, marks=needs_deepspeed),
        pytest.param("zero3", "lora", True, marks=needs_deepspeed),
    ],
)
def test_two_processes_train_the_same_model_as_one(
    strategy: str,
    method: str,
    resumes: bool,
    tmp_path: Path,
    one_process: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    child = forked(two.main, tmp_path, method, strategy, SAME[method], (3,) if resumes else ())
    child.join()
    captured = capfd.readouterr()
    assert child.exitcode == 0, captured
    found = json.loads(captured.out.splitlines()[-1])
    assert found["results"]["whole"] == ["done", "done"], found

    # Metrics of each step agree within rounding.
    run = tmp_path / "whole" / "run"
    alone, together = metrics(one_process[method]), metrics(run)
    assert_same_metrics(alone, together)
    assert [line["tokens"] for line in alone] == [line["tokens"] for line in together]

    # All ranks generate, and one writes the samples.
    if "eval" in SAME[method]:
        answers = [(where / "samples.jsonl").read_text("utf-8") for where in (one_process[method], run)]
        assert answers[0] == answers[1]
        assert answers[0].count("\n") >= 3

    # Each rank holds its shard only.
    for rank in (0, 1):
        held = json.loads((tmp_path / "whole" / f"rank_{rank}.json").read_text("utf-8"))
        broadcast = strategy == "fsdp2" and method != "qlora"
        assert len(held["read"]) == (0 if broadcast and rank else 1)
        if strategy in ("fsdp2", "zero3"):
            assert 0.4 * held["whole"] < held["weights"] < 0.6 * held["whole"], held
            assert held["kind"] == ("DTensor" if strategy == "fsdp2" else "Parameter")
        else:
            assert held["weights"] == held["whole"]

    # The export is complete, and the same model.
    wanted, exported = weights(one_process[method]), weights(run)
    assert {name: tensor.shape for name, tensor in exported.items()} == {n: t.shape for n, t in wanted.items()}
    for name, tensor in exported.items():
        assert tensor.any(), name
        assert (tensor - wanted[name]).abs().max() < 1e-4, name

    # Stopped and resumed, also with a preflight, the run is bitwise identical to the uninterrupted one.
    if resumes:
        models = json.loads((tmp_path / "stopped" / "models_1.json").read_text("utf-8"))
        assert set(models["tried"]) == set(models["trained"])
        assert all("after step 3 of 7" in result for result in found["results"]["stopped at 3"]), found
        assert found["results"]["resumed"] == ["done", "done"]
        assert found["same"]


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("fsdp2", "bfloat16"),
        ("fsdp2", "float32"),
        pytest.param("zero3", "bfloat16", marks=needs_deepspeed),
        pytest.param("zero3", "float32", marks=needs_deepspeed),
    ],
)
def test_weights_are_written_one_by_one_as_they_are_gathered(
    strategy: str, dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Same files as save_pretrained, written before the ranks leave together; rank 0 verifies alone."""
    sections = {"export": {"dtype": dtype, "max_shard_size": "300KB"}}
    sections["train"] = {"mixed_precision": "bf16", "max_steps": 2, "learning_rate": 1e-4}
    forked(two.exported, tmp_path / "run", strategy, sections).join()
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["results"] == ["done", "done"]

    # Same files as save_model writes for the whole model.
    expected, folder = torch.load(tmp_path / "run" / "expected.pt"), tmp_path / "run" / "run" / "model"
    whole = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert not whole.load_state_dict({name: weight.float() for name, weight in expected.items()}).missing_keys
    options = {"dtype": dtype, "max_shard_size": "300KB", "stops": [1]}
    save_model.save_model(whole, AutoTokenizer.from_pretrained(TINY), tmp_path / "whole", **options)
    for name in ("model.safetensors.index.json", "config.json"):
        assert json.loads((folder / name).read_text("utf-8")) == json.loads(
            (tmp_path / "whole" / name).read_text("utf-8")
        )
    assert len(list(folder.glob("*.safetensors"))) > 2
    found, wanted = (safetensors_io.read_model(each) for each in (folder, tmp_path / "whole"))
    assert found.keys() == wanted.keys()
    exact = 0
    for name, stored in found.items():
        mine, theirs = stored.whole(), wanted[name].whole()
        assert mine.dtype == getattr(torch, dtype)
        if strategy == "zero3" and dtype == "float32":  # not rounded to DeepSpeed's 16-bit compute dtype
            exact += torch.equal(mine, theirs)
            mine, theirs = mine.bfloat16(), theirs.bfloat16()
        assert torch.equal(mine, theirs), name
    assert exact < len(found)

    # One weight at a time, in the same order on both ranks.
    ranks = [json.loads((tmp_path / "run" / f"rank_{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert ranks[0]["gathered"] == ranks[1]["gathered"]
    assert not any(ranks[0]["alive"] + ranks[1]["alive"])
    assert sorted(ranks[0]["put"]) == sorted(found)
    assert not ranks[1]["put"]
    assert json.loads((tmp_path / "run" / "alone").read_text("utf-8")) is True
    assert not list(folder.parent.glob(".*"))


def test_a_full_disk_during_the_gather_fails_no_other_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forked(two.exported, tmp_path / "run", "fsdp2", {"train": {"max_steps": 1}}, True).join()
    first, second = json.loads(capfd.readouterr().out.splitlines()[-1])["results"]
    run = tmp_path / "run" / "run"

    assert second == "done"
    assert first == (
        f"RunError: {run}: export failed: [Errno 28] No space left on device. After a fix, continue with --resume."
    )
    assert not (run / "model").exists()
    assert not list(run.glob(".*"))


def test_adapters_under_autocast_and_accumulation_with_fsdp2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    half = {"lora": {"rank": 2}, "model": {"dtype": "bfloat16"}}
    half["train"] = {"mixed_precision": "bf16", "global_batch_size": 8, "max_steps": 2, "gradient_checkpointing": True}
    half["train"]["preflight"] = True
    child = forked(two.main, tmp_path, "lora", "fsdp2", half, ())
    child.join()
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["results"]["whole"] == ["done", "done"]

    run = tmp_path / "whole" / "run"
    found = json.loads((run / "manifest.json").read_text("utf-8"))["preflight"]
    assert found["predicted_peak_gib"] > 0
    assert "tflops" in metrics(run)[-2]


def test_a_pre_quantized_base_is_read_by_each_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config, device_map={"": "cpu"})
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    sections = {"model": {"name": str(tmp_path / "base")}, "lora": {"rank": 2}, "export": {"merge": False}}
    child = forked(two.main, tmp_path, "lora", "fsdp2", sections | {"train": {"max_steps": 2}}, ())
    child.join()
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["results"]["whole"] == ["done", "done"]

    held = json.loads((tmp_path / "whole" / "rank_1.json").read_text("utf-8"))
    assert len(held["read"]) == 1


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed)], ids=["ddp", "fsdp2", "zero2"]
)
def test_a_run_resumes_with_fewer_processes(
    strategy: str, tmp_path: Path, one_process: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    child = forked(two.fewer, tmp_path / "run", "full", strategy, SAME["full"])
    child.join()
    results = json.loads(capfd.readouterr().out.splitlines()[-1])

    assert all("after step 3 of 7" in result for result in results["two"])
    assert results["False"][0].startswith(
        "RecipeError: --set: launch.processes: changed from 2 to 1 since the run started."
    )
    if strategy == "zero2":
        assert results["True"][0].startswith(
            "RecipeError: --set: launch.processes: changed from 2 to 1 since the run started."
        )
    else:
        assert results["True"] == ["done"]
        assert_same_metrics(metrics(one_process["full"]), metrics(tmp_path / "run" / "run"))


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("ddp", "full"),
        ("fsdp2", "full"),
        ("fsdp2", "qlora"),
        pytest.param("zero2", "lora", marks=needs_deepspeed),
        pytest.param("zero3", "full", marks=needs_deepspeed),
    ],
)
def test_the_preflight_runs_and_changes_nothing(
    strategy: str, method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = forked(two.tried, tmp_path, method, strategy)
    child.join()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found == {"results": {"True": ["done", "done"], "False": ["done", "done"]}, "same": True}

    results = json.loads((tmp_path / "True" / "run" / "manifest.json").read_text("utf-8"))["preflight"]
    assert results["isolation"]["gradient_leak"] == 0
    assert results["base"]["loss"] < results["base"]["shuffled_loss"]
    largest = results["largest_micro_batch"]
    assert (largest["trained_tensors"], largest["tensors_without_gradient"]) == (56 if "lora" in method else 38, 0)


def test_a_preflight_failure_in_one_rank_stops_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = forked(two.failing, tmp_path)
    child.join()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])

    assert len(set(found["results"]["not a number"])) == 1
    assert "the loss of the largest micro-batch before the first step is nan" in found["results"]["not a number"][0]
    assert "out of memory after step 0" in found["results"]["fails"][1]
    assert found["results"]["fails"][0] != "done"
    assert not found["left"]

"""`sft-recipe plan` on a directory with only a config."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from sft_recipes.commands.plan import Plan, plan
from sft_recipes.errors import InputError, RecipeError
from sft_recipes.memory import autosize
from sft_recipes.recipe import parse
from tests.conftest import WriteRecipe, metrics, run, write_rows

LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
LLAMA_8B = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336, **LLAMA_3
)
PARAMETERS = 8_030_261_248  # of Llama 3.1 8B


def recipe(folder: Path, **sections: Any) -> str:
    LLAMA_8B.save_pretrained(folder / "llama")
    write_rows(folder / "train.jsonl")
    values: dict[str, Any] = {
        "model": {"name": str(folder / "llama")},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 1024},
        "train": {"micro_batch_size": 2},
        "output_dir": str(folder / "run"),
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    return str(folder / "recipe.yaml")


def test_8b_from_its_config_alone(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path))

    values = found.as_dict()
    assert values["parameters"] == values["trainable_parameters"] == PARAMETERS
    assert values["parts_gib"]["weights"] == round(2 * PARAMETERS / 2**30, 3)
    assert values["peak_gib"] == pytest.approx(sum(values["parts_gib"].values()), abs=0.01)
    assert values["peak_gib"] > 8 * PARAMETERS / 2**30  # weights, gradients and two moments
    assert values["fits"] is None
    assert values["remedies"] == []
    assert "tokens not counted" in values["notes"][0]
    assert set(values["hours"]) >= {"H100", "L4"}
    assert json.loads(json.dumps(values)) == values
    assert not (tmp_path / "run").exists()


def test_what_would_make_it_fit(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path), gpu_memory="24GB")

    assert found.fits is False
    kinds = [each.kind for each in found.remedies]
    assert kinds == ["micro-batch", "LoRA", "nf4", "8-bit optimizer", "fsdp2", "CPU offload"]
    by_kind = {each.kind: each for each in found.remedies}
    assert by_kind["LoRA"].fits
    assert by_kind["nf4"].peak < by_kind["LoRA"].peak < found.footprint.peak_bytes
    assert not by_kind["micro-batch"].fits
    assert set(found.times()) == {"RTX-4090", "A10", "L4", "RTX-3090"}
    text = "\n".join(found.lines())
    assert "does not fit in 22.4 GiB (512 MiB CUDA context, 5% margin)" in text
    assert "--set lora='{}'" in text
    assert re.search(
        r"^host memory: [\d.]+ GiB to load, [\d.]+ GiB to merge, [\d.]+ GiB to verify$", text, re.MULTILINE
    )
    assert list(found.as_dict()["host_memory_gib"]) == ["load", "merge", "verify"]
    # what is said of a change is what a plan of it says
    changed = plan(recipe(tmp_path), ["lora={}"], gpu_memory="24GB")
    assert changed.fits
    assert changed.footprint.peak_bytes == pytest.approx(by_kind["LoRA"].peak)


def test_a_gpu_before_ampere_masks_all_pairs(tmp_path: Path) -> None:
    """Its memory is that of sdpa with a mask, and varlen is no remedy."""
    written = recipe(tmp_path, lora={})
    known, named, masked = (
        plan(written, overrides, **where)
        for overrides, where in (
            ([], {"gpu_memory": "16GB"}),
            ([], {"gpu": "T4"}),
            (["model.attention=sdpa"], {"gpu": "T4"}),
        )
    )

    assert (known.attention, named.attention) == ("varlen", "sdpa")
    assert known.footprint.peak_bytes < named.footprint.peak_bytes == masked.footprint.peak_bytes
    assert "attention" not in [each.kind for each in (*named.remedies, *masked.remedies)]
    note = "attention varlen: a GPU of compute capability 8.0 or later is assumed; --gpu T4 is an earlier one"
    assert note in known.amount.notes
    assert not any("8.0" in each for each in named.amount.notes)
    with pytest.raises(InputError, match=r"model.attention: varlen does not support GPUs .*below 8.0 \(got 7.5\)"):
        plan(written, ["model.attention=varlen"], gpu="T4")


def test_auto_takes_what_fits(tmp_path: Path) -> None:
    sections = {"data": {"max_length": 2048}, "train": {"micro_batch_size": "auto", "global_batch_size": 24}}
    written = recipe(tmp_path, lora={}, **sections)

    found = plan(written, gpu="RTX 4090")

    assert found.recipe.train.micro_batch_size == 4
    assert found.recipe.sequences_per_step == 24
    assert found.fits
    with pytest.raises(RecipeError, match="Pass --gpu-memory 24GB"):
        plan(written)


def test_what_is_not_seen_is_said(write_recipe: WriteRecipe) -> None:
    found = plan(str(write_recipe(trl={"label_smoothing_factor": 0.1})), cpu=True)

    assert found.amount.notes == ["not included in the prediction: trl.label_smoothing_factor"]


def test_auto_for_this_machine(write_recipe: WriteRecipe) -> None:
    found = plan(str(write_recipe(train={"micro_batch_size": "auto", "global_batch_size": 4})), cpu=True)

    assert found.recipe.train.micro_batch_size == 4
    assert found.fits is None  # how much memory was not asked


def test_several_gpus(tmp_path: Path) -> None:
    written = recipe(tmp_path, launch={"strategy": "fsdp2"})

    one, four = plan(written), plan(written, gpus=4)

    assert four.ranks == 4
    # trained in float32 there: four bytes a weight, its gradient and two moments, in quarters
    assert 4 * PARAMETERS < four.footprint.peak_bytes < one.footprint.peak_bytes
    assert four.times()["H100"][0] == pytest.approx(one.times()["H100"][0] / 4)


def test_tokens_are_counted_where_there_is_a_tokenizer(write_recipe: WriteRecipe) -> None:
    found: Plan = plan(str(write_recipe()), cpu=True)

    assert found.amount.steps == 3
    assert found.amount.notes == []
    assert 0 < (found.amount.tokens or 0) <= 3 * 4 * 128
    assert found.device == "cpu"
    assert found.times() == {}


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"gpu_memory": "many"}, "--gpu-memory: not a size (got 'many'). Pass for example 24GB"),
        ([], {"gpu": "Z9"}, "--gpu: unknown GPU (got 'Z9'). Choose one of B200"),
        ([], {"gpus": 3}, "32 is not divisible by micro_batch_size 2 x 3 processes"),
        (["model.name=no/such-model-anywhere"], {}, "model.name: no/such-model-anywhere: its config cannot be loaded"),
        (["data.max_length=500000"], {}, ", 131072 (got 500000). Set data.max_length to 131072"),
        (
            ["train.gradient_accumulation_steps=2", "train.micro_batch_size=auto"],
            {},
            "auto requires a fixed train.global_batch_size",
        ),
        (["train.learning_ratee=1"], {}, "Did you mean"),
        (["model.attention=flex_attention"], {"cpu": True}, "training on CPUs (got flex_attention)"),
        ([], {"gpu_memory": "9" * 400}, "not a size"),
        ([], {"gpu": ""}, "--gpu: unknown GPU (got '')"),
    ],
)
def test_what_is_wrong_is_a_line(overrides: list[str], options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        plan(recipe(tmp_path), overrides, **options)

    assert len(error.value.lines) == 1
    assert message in error.value.lines[0]


def test_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sft_recipes.cli", "plan", recipe(tmp_path), "--json", "--gpu", "H100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    values = json.loads(done.stdout)
    assert values["fits"]
    assert values["peak_gib"] < values["memory_gib"]
    assert list(values["hours"]) == ["H100"]


def test_a_run_with_auto_records_the_number_and_resumes_with_it(write_recipe: WriteRecipe) -> None:
    file = write_recipe(train={"micro_batch_size": "auto", "global_batch_size": 8, "gradient_accumulation_steps": None})

    folder, _ = run(file)

    resolved = json.loads((folder / "recipe.resolved.json").read_text("utf-8"))
    assert resolved["train"]["micro_batch_size"] == 8  # all of a step at once: a tiny model, and a whole machine
    assert metrics(folder)
    resolved["train"]["micro_batch_size"] = 2
    (folder / "recipe.resolved.json").write_text(json.dumps(resolved), encoding="utf-8")
    assert autosize.resolve_for_run(parse.load(file, []).recipe, folder).train.micro_batch_size == 2  # as it was begun


def test_a_run_leaves_checkpointing_out_where_there_is_room_and_resumes_as_it_was_begun(
    write_recipe: WriteRecipe,
) -> None:
    file = write_recipe(train={"gradient_checkpointing": "auto"})

    folder, printed = run(file)

    resolved = json.loads((folder / "recipe.resolved.json").read_text("utf-8"))
    assert resolved["train"]["gradient_checkpointing"] is False
    assert "gradient checkpointing off" in printed
    resolved["train"]["gradient_checkpointing"] = 2
    (folder / "recipe.resolved.json").write_text(json.dumps(resolved), encoding="utf-8")
    assert autosize.resolve_for_run(parse.load(file, []).recipe, folder).train.gradient_checkpointing == 2


def test_checkpointing_of_a_gpu_that_is_not_known_is_all_layers(tmp_path: Path) -> None:
    written = recipe(tmp_path, lora={})

    unknown, large, small = plan(written), plan(written, gpu="H200"), plan(written, gpu_memory="24GB")

    assert unknown.recipe.train.gradient_checkpointing is True
    assert any("auto is assumed to be true" in note for note in unknown.amount.notes)
    assert large.recipe.train.gradient_checkpointing is False
    assert large.footprint.peak_bytes > unknown.footprint.peak_bytes
    assert "gradient checkpointing off" in large.lines()[1]
    assert small.fits

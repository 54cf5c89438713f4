import json
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import RecipeError
from sft_recipes.recipe import library_names, machine, parse, validate
from tests.conftest import WriteRecipe


def problems(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        validate.load_valid(recipe, overrides)
    return list(caught.value.lines)


def warnings(recipe: Path, *overrides: str) -> list[str]:
    return validate.load_valid(recipe, overrides)[1]


def test_a_good_recipe_has_neither_problems_nor_warnings(write_recipe: WriteRecipe) -> None:
    assert warnings(write_recipe()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=nf4"], "model.quantization: quantized weights cannot be trained directly (got nf4)."),
        (["train.gradient_accumulation_steps=2"], "Remove one of the two."),
        (
            ["lora={target_parameters: [x], dropout: 0.1}"],
            "lora.target_parameters: cannot be combined with lora.dropout",
        ),
        (["train.warmup_ratio=0.1", "train.warmup_steps=5"], "train.warmup_steps: cannot be combined with"),
        (
            ["train.mixed_precision=fp16", "model.dtype=bfloat16"],
            "cannot be combined with model.dtype: bfloat16 (got fp16)",
        ),
        (["train.mixed_precision=fp16", "model.dtype=float16"], "full fine-tuning in fp16 requires float32 weights"),
        (
            ["train.mixed_precision=bf16", "model.dtype=float16", "lora.rank=2"],
            "cannot be combined with model.dtype: float16 (got bf16)",
        ),
        (["data.eval=null", "checkpoint.export_best=true"], "requires an evaluation loss"),
        (["data.eval=null", "eval.every=2"], "eval.every: there are no evaluation rows"),
        (["data.packing=none", "data.cross_document_attention=true"], "has no effect without packing"),
        (["data.packing=bfd", "data.cross_document_attention=true"], "Set data.packing: wrapped"),
        (["train.optimizer=adamw_8bit_sr", "trl.optim_args=x"], "set by adamw_8bit_sr itself"),
        (["train.lr_scheduler=cosin"], "Did you mean 'cosine'?"),
        (["train.optimizer=adamw"], "unknown name 'adamw'"),
        (["trl.learning_rate=1"], "trl.learning_rate: set by the recipe. Use train.learning_rate instead."),
        (["log.group=mine"], "log.group: used only by mlflow, trackio, wandb, and none of them is in log.to"),
        (["log.to=[trackio, trackio]"], "log.to: trackio is listed 2 times"),
        (["trl.adam_beta3=1"], "Did you mean 'trl.adam_beta2'?"),
        (
            ["launch.strategy=fsdp2", "train.optimizer=paged_adamw_32bit"],
            "bitsandbytes optimizers do not support the sharded weights",
        ),
        (["launch.strategy=fsdp2", "model.quantization=int8", "lora.rank=2"], "fsdp2 cannot shard int8 weights"),
        (
            ["train.micro_batch_size=auto", "train.global_batch_size=null", "train.gradient_accumulation_steps=4"],
            "auto requires a fixed train.global_batch_size",
        ),
    ],
)
def test_conflicts(write_recipe: WriteRecipe, overrides: list[str], message: str) -> None:
    [problem] = problems(write_recipe(), *overrides)

    assert message in problem
    assert problem.startswith("--set: ") or ".yaml:" in problem


def test_offloading_needs_a_strategy_that_offloads(write_recipe: WriteRecipe) -> None:
    [problem] = problems(write_recipe(), "launch.cpu_offload=true")

    assert "launch.cpu_offload: not supported by launch.strategy: ddp. Set launch.strategy to fsdp2, zero2" in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.epochs=2"],  # with max_steps: whichever ends first
        ["data.packing=wrapped", "data.overlong=split"],
        ["train.global_batch_size=null", "train.gradient_accumulation_steps=3"],
        ["train.mixed_precision=fp16"],
        ["data.eval=null", "eval.every=2", "eval.generate=[a]"],
        ["trl.adam_beta2=0.9", "trl.neftune_noise_alpha=5"],
    ],
)
def test_settings_without_conflict(write_recipe: WriteRecipe, overrides: list[str]) -> None:
    assert warnings(write_recipe(), *overrides) == []


def test_an_indivisible_batch_lists_divisible_sizes(write_recipe: WriteRecipe) -> None:
    [problem] = problems(write_recipe(), "train.global_batch_size=32", "train.micro_batch_size=6")

    assert problem == (
        "--set: train.global_batch_size: 32 is not divisible by micro_batch_size 6. "
        "Set micro_batch_size to 1, 2, 4, 8, 16 or 32, or global_batch_size to 30 or 36."
    )


def test_global_batch_size_smaller_than_a_micro_batch(write_recipe: WriteRecipe) -> None:
    [problem] = problems(write_recipe(), "train.global_batch_size=4", "train.micro_batch_size=6")

    assert "Set micro_batch_size to 1, 2 or 4, or global_batch_size to 6." in problem


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        ([], False),
        (["model.dtype=bfloat16"], True),
        (["model.dtype=bfloat16", "train.mixed_precision=bf16"], True),
        (["model.dtype=bfloat16", "train.optimizer=adamw_8bit_sr"], False),
        (["model.dtype=bfloat16", "lora.rank=2"], False),
        (["model.dtype=bfloat16", "train.mixed_precision=bf16", "launch.strategy=fsdp2"], False),  # trains in float32
        (["model.dtype=bfloat16", "launch.strategy=fsdp2"], True),
        (["model.dtype=bfloat16", "train.optimizer=adamw_torch_8bit"], True),
        (
            ["model.dtype=bfloat16", "train.optimizer=adamw_torch_8bit", "trl.optim_args=bf16_stochastic_round=True"],
            False,
        ),
    ],
)
def test_updates_that_bfloat16_rounds_away_are_a_warning(
    write_recipe: WriteRecipe, overrides: list[str], warned: bool
) -> None:
    lines = warnings(write_recipe(), *overrides)

    assert [("lose updates to rounding" in line and "adamw_8bit_sr" in line) for line in lines] == [True] * warned


def test_updates_that_bfloat16_rounds_away() -> None:
    """The numbers of the warning: AdamW changes a weight by about the learning rate, less than bfloat16 resolves."""
    import torch

    torch.manual_seed(0)
    unmoved = {}
    for rate in (1e-5, 2e-5, 1e-4):
        weight = torch.nn.Parameter((0.02 * torch.randn(100_000)).bfloat16())
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        unmoved[rate] = (weight == before).float().mean().item()

    assert unmoved == pytest.approx({1e-5: 0.84, 2e-5: 0.70, 1e-4: 0.12}, abs=0.03)


def test_trust_remote_code_is_a_warning(write_recipe: WriteRecipe) -> None:
    [line] = warnings(write_recipe(), "model.trust_remote_code=true")

    assert "custom Python code will run" in line


@pytest.mark.parametrize(
    ("package", "overrides", "extra"),
    [
        ("torchao", ["train.optimizer=adamw_8bit_sr"], "torchao"),
        ("wandb", ["log.to=[wandb]"], "wandb"),
        ("flash_attn", ["model.attention=flash_attention_2"], "flash"),
        ("liger_kernel", ["train.kernels=liger"], "liger"),
    ],
)
def test_a_missing_package_names_its_extra(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, package: str, overrides: list[str], extra: str
) -> None:
    monkeypatch.setattr(validate, "installed", lambda name: name != package and library_names.installed(name))

    [problem] = problems(write_recipe(), *overrides)

    assert f"pip install 'sft-recipes[{extra}]'" in problem


def test_compile_without_a_compiler(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    [problem] = problems(write_recipe(), "train.compile=true")
    assert "train.compile: requires a C++ compiler, but none was found" in problem

    (tmp_path / "compiler").touch(mode=0o755)
    validate.load_valid(str(write_recipe()), ["train.compile=true"])


def test_a_gpu_needs_a_c_compiler(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "trains_on_nvidia_gpu", lambda: True)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    [problem] = problems(write_recipe())
    assert problem.endswith("or set CC to a compiler.")
    assert f"train: on a GPU, Triton compiles the loss with a C compiler, and a C compiler ({tmp_path}/cc)" in problem
    assert not validate.validate(parse.load(write_recipe()).recipe, to_run=False).problems  # a plan for another machine

    (tmp_path / "cc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda **_: {"include": str(tmp_path)})
    assert warnings(write_recipe()) == []


@pytest.mark.parametrize(
    ("driver", "visible", "version", "on_gpu"),
    [
        (True, None, "2.13.0", True),
        (True, "", "2.13.0", False),
        (True, None, "2.13.0+cpu", False),
        (False, None, "2.13.0", False),
    ],
)
def test_where_a_run_would_compute(
    monkeypatch: pytest.MonkeyPatch, driver: bool, visible: str | None, version: str, on_gpu: bool
) -> None:
    monkeypatch.setattr(machine, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert machine.trains_on_nvidia_gpu() is on_gpu


def test_recipe_and_model_problems_come_together(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    recipe = write_recipe(model={"name": str(tmp_path / "broken")}, train={"sed": 1, "lr_scheduler": "x"})

    lines = problems(recipe)

    assert len(lines) == 3
    assert "unknown key 'train.sed'" in lines[0]
    assert "unknown name 'x'" in lines[1]
    assert "config.json is missing" in lines[2]


def write_model(folder: Path, config: dict[str, Any] | str, *files: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    for file in files:
        (folder / file).touch()
    return folder


def test_a_sequence_longer_than_the_model_can_take(write_recipe: WriteRecipe) -> None:
    [problem] = problems(write_recipe(), "data.max_length=2000")

    assert (
        "data.max_length: exceeds the context length of builtin:tiny, 1024 (got 2000). Set data.max_length" in problem
    )


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ("{", [], "invalid JSON"),
        ("[]", [], "'model_type' is missing"),
        ({"model_type": "llama"}, ["model.safetensors"], "has no tokenizer"),
        ({"model_type": "llama"}, ["tokenizer.json"], "has no safetensors weights. Add model.safetensors"),
        ({"model_type": "llama"}, ["tokenizer.json", "pytorch_model.bin"], "is a pickle"),
    ],
)
def test_invalid_model_directories(
    write_recipe: WriteRecipe, tmp_path: Path, config: Any, files: list[str], message: str
) -> None:
    folder = write_model(tmp_path / "model", config, *files)

    assert message in problems(write_recipe(model={"name": str(folder)}))[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:huge", "Use builtin:tiny."),
        ("/no/such/model", "directory not found"),
        ("./model", "directory not found"),
        ("a/b/c", "directory not found"),
        (__file__, "is a file"),
    ],
)
def test_missing_models(write_recipe: WriteRecipe, name: str, message: str) -> None:
    assert message in problems(write_recipe(model={"name": name}))[0]


def test_an_adapter_is_not_a_model(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()

    assert "merge it first" in problems(write_recipe(model={"name": str(tmp_path / "adapter")}))[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learning_rate=2e-5"], None),
        (["train.learning_rate=2e-4"], None),
        (["train.learning_rate=1.3e-6"], None),
        (
            ["train.learning_rate=1e-3"],
            "0.001 is unusually high for full fine-tuning (typical: 5e-06 to 5e-05); training may diverge.",
        ),
        (["train.learning_rate=1e-6"], "1e-06 is unusually low for full fine-tuning"),
        (["train.learning_rate=2e-4", "lora.rank=4"], None),
        (["train.learning_rate=4e-3", "lora.rank=4"], None),
        (["train.learning_rate=1e-2", "lora.rank=4"], "0.01 is unusually high for LoRA (typical: 5e-05 to 0.001)"),
        (["train.learning_rate=1e-5", "lora.rank=4"], "1e-05 is unusually low for LoRA"),
        (["train.learning_rate=1e-2", "train.optimizer=sgd"], None),  # no typical range is known
        (["train.learning_rate=1e-2", "model.name=builtin:tiny"], None),  # small models take more
    ],
)
def test_unusual_learning_rates(write_recipe: WriteRecipe, overrides: list[str], message: str | None) -> None:
    lines = warnings(write_recipe(), "model.name=owner/some-8b", *overrides)

    assert len(lines) == (message is not None)
    if message is not None:
        assert f"train.learning_rate: {message}" in lines[0]


def test_the_default_rate_is_too_low_for_lora(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(model={"name": "owner/some-8b"}, lora={"rank": 4}, train=None)
    content = json.loads(recipe.read_text("utf-8"))
    del content["train"]
    recipe.write_text(json.dumps(content), encoding="utf-8")

    [warning] = warnings(recipe)
    assert "train.learning_rate: the default 2e-05 is unusually low for LoRA" in warning
    assert warnings(recipe, "train.learning_rate=2e-5") == []

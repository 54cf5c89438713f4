"""The YAML of `trl sft`. TRL itself reads the same files, and has to come to the same arguments."""

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.recipe.check import judge
from sft_recipes.recipe.convert import trl_sft
from sft_recipes.recipe.upstream import sft_config_fields
from tests.recipe.test_convert import convert

LORA = """\
model_name_or_path: HuggingFaceTB/SmolLM2-135M
model_revision: main
dtype: bfloat16
attn_implementation: sdpa
dataset_name: trl-lib/Capybara
dataset_test_split: test
max_length: 2048
packing: true
packing_strategy: bfd_split
assistant_only_loss: true
learning_rate: 2.0e-4
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
gradient_checkpointing: false
weight_decay: 0.01
max_grad_norm: 0.5
adam_beta2: 0.95
optim: adamw_bnb_8bit
seed: 7
eval_strategy: steps
eval_steps: 100
save_strategy: epoch
save_total_limit: 3
logging_steps: 5
use_peft: true
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
use_rslora: true
output_dir: out
report_to: wandb
run_name: first
push_to_hub: true
"""
BASE = "model_name_or_path: org/model\ndataset_name: org/data\n"


def test_a_whole_config(tmp_path: Path) -> None:
    converted, recipe = convert(tmp_path, LORA)

    assert recipe.model.model_dump(exclude_defaults=True) == {
        "name": "HuggingFaceTB/SmolLM2-135M", "attention": "sdpa", "quantization": "nf4",
    }  # fmt: skip
    assert recipe.data.model_dump(exclude_defaults=True, exclude={"eval"}) == {
        "train": "trl-lib/Capybara", "train_on": "assistant", "max_length": 2048, "overlong": "split",
    }  # fmt: skip
    assert recipe.data.eval.model_dump(exclude_defaults=True) == {  # type: ignore[union-attr]
        "path": "trl-lib/Capybara", "split": "test",
    }  # fmt: skip
    assert recipe.lora is not None
    assert recipe.lora.model_dump(exclude_defaults=True) == {
        "rank": 32, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
    }  # fmt: skip
    assert (recipe.eval.every, recipe.checkpoint.every, recipe.checkpoint.keep, recipe.log.every) == (100, 0.5, 3, 5)
    assert (recipe.log.to, recipe.log.name) == (["wandb"], "first")
    assert recipe.trl == {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert judge(recipe, to_run=False).problems == []
    assert {key for key, fate in converted.fates.items() if fate.kind in ("lacking", "unknown")} == {"push_to_hub"}


@pytest.mark.parametrize("text", [LORA, BASE, BASE + "max_steps: 20\nwarmup_steps: 5\nfp16: true\nbf16: false\n"])
def test_trl_comes_to_the_same_arguments(tmp_path: Path, text: str) -> None:
    from trl.scripts.sft import make_parser

    from sft_recipes.planning import steps
    from sft_recipes.training.arguments import sft_config

    _, recipe = convert(tmp_path, text)
    (tmp_path / "trl.yaml").write_text(f"{text}use_cpu: true\n".replace("fp16: true", "fp16: false"), encoding="utf-8")
    _, theirs, model, _ = make_parser(prog="trl sft").parse_args_and_config(["--config", str(tmp_path / "trl.yaml")])
    counted = steps.count(recipe, 10_000)
    ours = sft_config(recipe, counted, tmp_path, validates=recipe.data.eval is not None)

    for name in ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
                 "weight_decay", "max_grad_norm", "optim"):  # fmt: skip
        assert ours[name] == getattr(theirs, name), name
    assert ours["warmup_steps"] == theirs.get_warmup_steps(counted.total)
    assert (recipe.model.dtype, recipe.data.max_length) == (model.dtype, theirs.max_length)
    assert (recipe.train.max_steps or -1) == theirs.max_steps
    assert recipe.train.max_steps or recipe.train.epochs == theirs.num_train_epochs
    for name, value in recipe.trl.items():
        assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("to", "name", "kind"),
    [("trackio", "first", "becomes"), ("tensorboard", None, "needless"), ("none", None, "needless")],
)
def test_a_run_has_a_name_where_a_tracker_shows_it(tmp_path: Path, to: str, name: str | None, kind: str) -> None:
    converted, recipe = convert(tmp_path, BASE + f"report_to: {to}\nrun_name: first\n")

    assert (recipe.log.name, converted.fates["run_name"].kind) == (name, kind)
    assert judge(recipe, to_run=False).problems == []


def test_every_field_of_trl_has_a_place(tmp_path: Path) -> None:
    """Whatever SFTConfig has, with a value of its kind: none of it is unknown."""
    names = sorted(sft_config_fields())
    text = BASE + "".join(f"{name}: 1\n" for name in names if name not in trl_sft.KEYS and name not in ("output_dir",))

    fates = convert(tmp_path, text)[0].fates

    assert len(names) > 100
    assert [key for key, fate in fates.items() if fate.kind == "unknown"] == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", {"packing": "none", "max_length": 1024, "overlong": "truncate", "train_on": "completion"}),
        ("packing: true\npacking_strategy: wrapped",
         {"packing": "wrapped", "cross_document_attention": True, "max_length": 1024, "overlong": "truncate"}),
        ("max_length: null", {"packing": "none", "max_length": 4096, "overlong": "error"}),
        ("dataset_text_field: body", {"format": "text", "columns": {"text": "body"}}),
        ("completion_only_loss: false", {"train_on": "all"}),
        ("chat_template_path: mine.jinja", {"template": "mine.jinja"}),
    ],
)  # fmt: skip
def test_data(tmp_path: Path, keys: str, expected: dict[str, Any]) -> None:
    data = convert(tmp_path, BASE + keys)[1].data

    assert {key: getattr(data, key) for key in expected} == expected


def test_mixtures(tmp_path: Path) -> None:
    mixture = """\
model_name_or_path: org/model
datasets:
  - {path: org/one, name: en, split: train, columns: [messages]}
  - {path: json, data_files: two.jsonl}
  - {path: org/three, split: 'train[:50%]', fraction: 0.1}
test_split_size: 0.1
eval_strategy: epoch
num_train_epochs: 4
"""
    converted, recipe = convert(tmp_path, mixture)

    assert [source.model_dump(exclude_defaults=True) for source in recipe.data.train] == [  # type: ignore[union-attr]
        {"path": "org/one", "name": "en"},
        {"path": "two.jsonl"},
        {"path": "org/three", "weight": 0.5},
    ]
    assert (recipe.data.eval, recipe.eval.every) == (0.1, 0.25)
    assert {key for key, fate in converted.fates.items() if fate.kind == "lacking"} == {"datasets[2].fraction"}


def test_accelerate_config(tmp_path: Path) -> None:
    recipe = convert(tmp_path, BASE + "accelerate_config: fsdp2\nnum_processes: 8\n")[1]

    assert (recipe.launch.strategy, recipe.launch.processes) == ("fsdp2", 8)


def test_adapters_are_those_of_peft_where_none_are_named(tmp_path: Path) -> None:
    converted, recipe = convert(tmp_path, BASE + "use_peft: true\n")
    full = convert(tmp_path, BASE + "use_peft: false\nlora_r: 8\n")

    assert recipe.lora is not None
    assert (recipe.lora.target_modules, recipe.lora.dropout) == (["q_proj", "v_proj"], 0.05)
    assert any(remark.startswith("lora.target_modules: PEFT's choice") for remark in converted.remarks)
    assert full[1].lora is None
    assert full[0].fates["lora_r"].kind == "needless"

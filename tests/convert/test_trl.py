"""The YAML of `trl sft`. TRL itself reads the same files, and has to come to the same arguments."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from sft_recipes.convert.rules import table
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import PER_DOCUMENT, Documents
from sft_recipes.data.formats.registry import to_example
from sft_recipes.data.sequences import SelectedRows, build_sequences
from sft_recipes.data.stats import SourceStats
from sft_recipes.recipe.library_names import sft_config_fields
from sft_recipes.recipe.validate import validate
from tests.convert.test_conversion import convert

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
    assert validate(recipe, to_run=False).problems == []
    assert {key for key, outcome in converted.outcomes.items() if outcome.kind in ("unsupported", "unknown")} == {
        "push_to_hub"
    }


@pytest.mark.parametrize("text", [LORA, BASE, BASE + "max_steps: 20\nwarmup_steps: 5\nfp16: true\nbf16: false\n"])
def test_trl_comes_to_the_same_arguments(tmp_path: Path, text: str) -> None:
    from trl.scripts.sft import make_parser

    from sft_recipes.planning import steps
    from sft_recipes.training.sft_config import sft_config

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
    [("trackio", "first", "becomes"), ("tensorboard", None, "not_needed"), ("none", None, "not_needed")],
)
def test_a_run_has_a_name_where_a_tracker_shows_it(tmp_path: Path, to: str, name: str | None, kind: str) -> None:
    converted, recipe = convert(tmp_path, BASE + f"report_to: {to}\nrun_name: first\n")

    assert (recipe.log.name, converted.outcomes["run_name"].kind) == (name, kind)
    assert validate(recipe, to_run=False).problems == []


def test_every_field_of_trl_has_a_place(tmp_path: Path) -> None:
    """Whatever SFTConfig has, with a value of its kind: none of it is unknown."""
    names = sorted(sft_config_fields())
    text = BASE + "".join(
        f"{name}: 1\n" for name in names if name not in table("trl").rules and name not in ("output_dir",)
    )

    outcomes = convert(tmp_path, text)[0].outcomes

    assert len(names) > 100
    assert [key for key, outcome in outcomes.items() if outcome.kind == "unknown"] == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("", {"packing": "none", "max_length": 1024, "overlong": "truncate", "train_on": "completion"}),
        ("packing: true\npacking_strategy: wrapped",
         {"packing": "wrapped", "cross_document_attention": True, "max_length": 1024, "overlong": "split"}),
        ("packing: true", {"packing": "bfd", "overlong": "truncate"}),
        ("packing_strategy: wrapped", {"packing": "none", "overlong": "truncate"}),
        ("max_length: null", {"packing": "none", "max_length": 4096, "overlong": "error"}),
        ("dataset_text_field: body", {"format": "text", "columns": {"text": "body"}}),
        ("completion_only_loss: false", {"train_on": "all"}),
        ("chat_template_path: mine.jinja", {"template": "mine.jinja"}),
    ],
)  # fmt: skip
def test_data(tmp_path: Path, keys: str, expected: dict[str, Any]) -> None:
    data = convert(tmp_path, BASE + keys)[1].data

    assert {key: getattr(data, key) for key in expected} == expected


def test_wrapped_texts_lose_no_token_as_in_trl(tmp_path: Path) -> None:
    from trl import pack_dataset

    texts = [list(range(1, 6)), list(range(6, 18)), list(range(18, 21))]
    data = convert(tmp_path, BASE + "packing: true\npacking_strategy: wrapped\nmax_length: 4\n")[1].data
    theirs = pack_dataset(Dataset.from_dict({"input_ids": texts}), data.max_length, "wrapped")
    ends, one_each = np.cumsum([0, *map(len, texts)]), np.zeros(len(texts), dtype=np.int64)
    ids = np.concatenate(texts).astype(np.int32)
    columns = dict.fromkeys(PER_DOCUMENT, one_each) | {"digests": np.arange(3), "lossy": np.array([""] * 3)}
    documents = Documents(ids, ids > 0, ends, ends[:-1], **columns)
    rows = SelectedRows(documents, np.arange(len(texts)), SourceStats("rows", "text", ""), lambda _: {})
    ours = build_sequences([rows], data, None)

    assert [ours[number]["input_ids"] for number in range(len(ours))] == list(theirs["input_ids"])


def test_the_end_that_is_kept_is_not_missed_where_nothing_is_truncated(tmp_path: Path) -> None:
    ends = BASE + "truncation_mode: keep_end\n"

    assert convert(tmp_path, ends)[0].outcomes["truncation_mode"].kind == "unsupported"
    assert convert(tmp_path, ends + "packing: true\n")[0].outcomes["truncation_mode"].kind == "not_needed"


def test_a_prompt_and_a_completion_are_joined_by_the_template_that_is_named(tmp_path: Path) -> None:
    converted, _ = convert(tmp_path, BASE)
    [note] = [note for note in converted.notes if note.startswith("data.template: TRL concatenates")]
    source = re.search(r"save (.*) to a \.jinja file", note)
    assert source
    row = to_example({"prompt": " Two and\n", "completion": "two. "}, "prompt_completion", {}, "rows:1")

    rendered = Chat(source[1], "completion", {"eos_token": "</s>"}, ["</s>"])(row)

    assert rendered.text == " Two and\ntwo. </s>"
    assert [rendered.text[start:end] for start, end in rendered.trained] == ["two. </s>"]
    for keys in ("dataset_text_field: text", "chat_template_path: mine.jinja", "assistant_only_loss: true"):
        assert not any("TRL concatenates" in each for each in convert(tmp_path, BASE + keys)[0].notes)


def test_mixtures(tmp_path: Path) -> None:
    mixture = """\
model_name_or_path: org/model
datasets:
  - {path: org/one, name: en, split: train, columns: [messages]}
  - {path: json, data_files: two.jsonl}
  - {path: org/four, data_files: [a.jsonl, b.jsonl]}
  - {path: org/three, split: 'train[:50%]', fraction: 0.1}
test_split_size: 0.1
eval_strategy: epoch
num_train_epochs: 4
"""
    converted, recipe = convert(tmp_path, mixture)

    assert [source.model_dump(exclude_defaults=True) for source in recipe.data.train] == [  # type: ignore[union-attr]
        {"path": "org/one", "name": "en"},
        {"path": "two.jsonl"},
        {"path": "hf://datasets/org/four/a.jsonl"},
        {"path": "hf://datasets/org/four/b.jsonl"},
        {"path": "org/three", "weight": 0.5},
    ]
    assert (recipe.data.eval, recipe.eval.every) == (0.1, 0.25)
    assert {key for key, outcome in converted.outcomes.items() if outcome.kind == "unsupported"} == {
        "datasets[3].fraction"
    }


def test_accelerate_config(tmp_path: Path) -> None:
    recipe = convert(tmp_path, BASE + "accelerate_config: fsdp2\nnum_processes: 8\n")[1]

    assert (recipe.launch.strategy, recipe.launch.processes) == ("fsdp2", 8)


def test_adapters_are_those_of_peft_where_none_are_named(tmp_path: Path) -> None:
    converted, recipe = convert(tmp_path, BASE + "use_peft: true\n")
    full = convert(tmp_path, BASE + "use_peft: false\nlora_r: 8\n")

    assert recipe.lora is not None
    assert (recipe.lora.target_modules, recipe.lora.dropout) == (["q_proj", "v_proj"], 0.05)
    assert any(note.startswith("lora.target_modules: PEFT's default") for note in converted.notes)
    assert full[1].lora is None
    assert full[0].outcomes["lora_r"].kind == "not_needed"


def test_two_strategies_are_not_both_carried(tmp_path: Path) -> None:
    keys = "deepspeed: ds_z3_config.json\nfsdp_config: {offload_params: false, reshard_after_forward: true}\n"
    converted, recipe = convert(tmp_path, BASE + keys)

    assert recipe.launch.strategy == "zero3"
    for key in ("fsdp_config.offload_params", "fsdp_config.reshard_after_forward"):
        assert converted.outcomes[key].kind == "unsupported"


@pytest.mark.parametrize(
    ("keys", "kernels"), [("", "auto"), ("use_liger_kernel: true\n", "liger"), ("use_liger_kernel: false\n", "none")]
)
def test_liger(tmp_path: Path, keys: str, kernels: str) -> None:
    assert convert(tmp_path, BASE + keys)[1].train.kernels == kernels

"""torchtune's keys. The configs are written for these tests, in the manner of torchtune's own."""

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.convert.conversion import resolve_references
from sft_recipes.recipe.validate import validate
from tests.convert.test_conversion import convert

LORA = """\
output_dir: /tmp/torchtune/one
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /tmp/Llama-3.2-1B-Instruct/original/tokenizer.model
  max_seq_len: 2048
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Llama-3.2-1B-Instruct/
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3_2
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: True
  split: train[:95%]
dataset_val:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  split: train[95%:]
run_val_every_n_steps: 50
seed: null
shuffle: True
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
epochs: 2
max_steps_per_epoch: 500
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
device: cuda
dtype: bf16
enable_activation_checkpointing: False
enable_activation_offloading: False
metric_logger:
  _component_: torchtune.training.metric_logging.WandBLogger
  project: trials
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
"""
BASE = """\
output_dir: out
checkpointer: {checkpoint_dir: /models/one}
optimizer: {_component_: torch.optim.AdamW, lr: 2e-5}
batch_size: 2
epochs: 1
dtype: bf16
"""
FULL = BASE + "model: {_component_: torchtune.models.llama3_2.llama3_2_1b}\n"
ROWS = "dataset: {_component_: torchtune.datasets.alpaca_dataset}\n"


def test_a_whole_config(tmp_path: Path) -> None:
    converted, recipe = convert(tmp_path, LORA)

    assert recipe.model.model_dump(exclude_defaults=True) == {"name": "/tmp/Llama-3.2-1B-Instruct"}
    assert recipe.data.train[0].model_dump(exclude_defaults=True) == {  # type: ignore[union-attr]
        "path": "yahma/alpaca-cleaned", "format": "alpaca",
    }  # fmt: skip
    assert (recipe.data.eval, recipe.eval.every) == (0.05, 50)
    assert (recipe.data.train_on, recipe.data.packing) == ("all", "bfd")
    assert (recipe.data.max_length, recipe.data.overlong) == (2048, "truncate")
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha) == (64, 128)
    assert recipe.lora.target_modules == ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    assert (recipe.train.micro_batch_size, recipe.accumulation, recipe.train.max_steps) == (4, 8, 1000)
    assert (recipe.train.lr_scheduler, recipe.train.warmup_ratio, recipe.train.warmup_steps) == ("cosine", None, 100)
    assert (recipe.train.weight_decay, recipe.train.max_grad_norm) == (0.01, 0)
    assert (recipe.train.mixed_precision, recipe.train.gradient_checkpointing) == ("no", False)
    assert (recipe.log.to, recipe.output_dir) == (["wandb"], "/tmp/torchtune/one")
    assert validate(recipe, to_run=False).problems == []
    assert {key for key, outcome in converted.outcomes.items() if outcome.kind == "unsupported"} == set()
    assert recipe.log.project == "trials"
    assert "unknown" not in {outcome.kind for outcome in converted.outcomes.values()}


def test_references_are_resolved() -> None:
    config = {"a": "${b.c}/x", "b": {"c": "${d}", "n": "${e}"}, "d": "deep", "e": 3, "self": "${self}", "none": "${z}"}

    resolved = resolve_references(config, "config.yaml")

    assert (resolved["a"], resolved["b"]) == ("deep/x", {"c": "deep", "n": 3})
    assert (resolved["self"], resolved["none"]) == ("${self}", "${z}")


@pytest.mark.parametrize(
    ("entry", "source", "train_on"),
    [
        ("_component_: torchtune.datasets.alpaca_dataset, train_on_input: False",
         {"path": "tatsu-lab/alpaca", "format": "alpaca"}, "completion"),
        ("_component_: x.instruct_dataset, source: json, data_files: a.json, column_map: {input: q, output: a}",
         {"path": "a.json", "format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}, "completion"),
        ("_component_: x.chat_dataset, source: org/talk, conversation_column: talk, conversation_style: openai",
         {"path": "org/talk", "format": "messages", "columns": {"messages": "talk"}}, "assistant"),
        ("_component_: torchtune.datasets.text_completion_dataset, source: org/text, column: body, split: test",
         {"path": "org/text", "format": "text", "columns": {"text": "body"}, "split": "test"}, "all"),
        ("_component_: mine.dataset, source: org/other", {"path": "org/other"}, "completion"),
    ],
)  # fmt: skip
def test_data(tmp_path: Path, entry: str, source: dict[str, Any], train_on: str) -> None:
    converted, recipe = convert(tmp_path, f"{FULL}dataset: {{{entry}}}\n")

    assert recipe.data.train[0].model_dump(exclude_defaults=True) == source  # type: ignore[union-attr]
    assert recipe.data.train_on == train_on
    assert all(outcome.kind != "unknown" for outcome in converted.outcomes.values())


def test_several_data_sets(tmp_path: Path) -> None:
    talk = "{_component_: x.chat_dataset, source: org/talk, packed: true}"
    converted, recipe = convert(tmp_path, f"{FULL}dataset:\n  - {{_component_: x.alpaca_dataset}}\n  - {talk}\n")

    assert [source.path for source in recipe.data.train] == ["tatsu-lab/alpaca", "org/talk"]  # type: ignore[union-attr]
    assert recipe.data.packing == "bfd"
    assert any(note.startswith("data.train_on: a recipe has one setting") for note in converted.notes)


def test_qlora(tmp_path: Path) -> None:
    model = "model: {_component_: x.qlora_phi3_mini, lora_attn_modules: [q_proj, v_proj], apply_lora_to_mlp: true}\n"
    recipe = convert(tmp_path, BASE + model + ROWS)[1]

    assert recipe.model.quantization == "nf4"
    assert recipe.lora is not None
    assert recipe.lora.target_modules == ["qkv_proj", "gate_up_proj", "down_proj"]
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 16)


def test_what_no_key_says_is_as_torchtune_does_it(tmp_path: Path) -> None:
    recipe = convert(tmp_path, FULL + ROWS)[1]

    assert recipe.lora is None
    assert (recipe.train.lr_scheduler, recipe.train.warmup_ratio, recipe.train.weight_decay) == ("constant", 0, 0.01)
    assert (recipe.data.eval, recipe.data.packing, recipe.data.overlong) == (None, "none", "error")


def test_sgd_has_no_weight_decay_by_default(tmp_path: Path) -> None:
    sgd = (FULL + ROWS).replace("AdamW,", "SGD,")

    assert convert(tmp_path, sgd)[1].train.weight_decay == 0
    assert convert(tmp_path, sgd.replace("lr: 2e-5", "lr: 2e-5, weight_decay: 0.1"))[1].train.weight_decay == 0.1


def test_the_adapter_on_the_head_is_not_dropped_silently(tmp_path: Path) -> None:
    model = "model: {_component_: x.lora_llama2_7b, lora_attn_modules: [q_proj], apply_lora_to_output: true}\n"

    assert convert(tmp_path, BASE + model + ROWS)[0].outcomes["model.apply_lora_to_output"].kind == "unsupported"

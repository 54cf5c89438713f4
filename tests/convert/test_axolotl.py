"""Axolotl's keys. The configs are written for these tests, in the manner of Axolotl's own examples."""

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.recipe.validate import validate
from tests.convert.test_conversion import convert

QLORA = """\
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
wandb_project: trials
wandb_name: first
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
special_tokens:
  pad_token: "<|end_of_text|>"
"""
BASE = "base_model: org/model\nsequence_len: 1024\nmicro_batch_size: 1\nlearning_rate: 1e-4\n"
ROWS = "datasets:\n  - {path: org/data, type: alpaca}\n"


def said(folder: Path, text: str, key: str) -> tuple[str, str]:
    """What became of a key."""
    outcome = convert(folder, text)[0].outcomes[key]
    return outcome.kind, outcome.note


def test_a_whole_config(tmp_path: Path) -> None:
    converted, recipe = convert(tmp_path, QLORA)

    assert recipe.model.model_dump(exclude_defaults=True) == {
        "name": "NousResearch/Llama-3.2-1B", "attention": "flash_attention_2", "quantization": "nf4",
    }  # fmt: skip
    assert recipe.data.model_dump(exclude_defaults=True, exclude={"train"}) == {
        "eval": 0.1, "template": "alpaca", "max_length": 2048, "overlong": "drop",
    }  # fmt: skip
    assert not isinstance(recipe.data.train, str)
    assert recipe.data.train[0].model_dump(exclude_defaults=True) == {  # type: ignore[union-attr]
        "path": "teknium/GPT4-LLM-Cleaned", "format": "alpaca",
    }  # fmt: skip
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (32, 16, 0.05)
    assert recipe.lora.target_modules == ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]
    assert (recipe.train.micro_batch_size, recipe.accumulation, recipe.sequences_per_step) == (2, 4, 8)
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.warmup_ratio) == (2, 2e-4, 0.1)
    assert (recipe.train.weight_decay, recipe.train.optimizer, recipe.train.mixed_precision) == (
        0.01,
        "adamw_bnb_8bit",
        "bf16",
    )
    assert (recipe.eval.every, recipe.checkpoint.every, recipe.log.every, recipe.log.to) == (0.125, 0.5, 1, ["wandb"])
    assert (recipe.log.project, recipe.log.name, recipe.trl) == ("trials", "first", {})
    assert validate(recipe, to_run=False).problems == []
    assert {key for key, outcome in converted.outcomes.items() if outcome.kind == "unsupported"} == set()
    assert "unknown" not in {outcome.kind for outcome in converted.outcomes.values()}


@pytest.mark.parametrize(
    ("entry", "source", "template", "train_on"),
    [
        ("{path: d, type: alpaca}", {"format": "alpaca"}, "alpaca", "completion"),
        ("{path: d, type: chat_template}", {"format": "messages"}, "chat", "assistant"),
        ("{path: d, type: sharegpt, field_messages: talk}", {"format": "messages", "columns": {"messages": "talk"}}, "chat",
         "assistant"),
        ("{path: d, type: completion, field: body}", {"format": "text", "columns": {"text": "body"}}, None, "all"),
        ("{path: d, type: alpaca, split: train, name: en}", {"format": "alpaca", "name": "en"}, "alpaca", "completion"),
        ("{path: d, type: alpaca, split: 'train[:20%]'}", {"format": "alpaca", "weight": 0.2}, "alpaca", "completion"),
        ("{path: d, type: {field_instruction: q, field_output: a, format: 'Q: {instruction}'}}",
         {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}}, None, "completion"),
        ("{path: d, type: oasst}", {}, None, "completion"),
    ],
)  # fmt: skip
def test_data(tmp_path: Path, entry: str, source: dict[str, Any], template: str | None, train_on: str) -> None:
    converted, recipe = convert(tmp_path, f"{BASE}datasets:\n  - {entry}\n")

    assert recipe.data.train[0].model_dump(exclude_defaults=True) == {"path": "d", **source}  # type: ignore[union-attr]
    assert recipe.data.template == template
    assert recipe.data.train_on == train_on
    assert all(outcome.kind != "unknown" for outcome in converted.outcomes.values())


def test_local_files_and_several_sources(tmp_path: Path) -> None:
    rows = "datasets:\n  - {path: json, data_files: a.jsonl, type: alpaca}\n  - {path: org/b, type: chat_template}\n"
    converted, recipe = convert(tmp_path, BASE + rows)

    assert [source.path for source in recipe.data.train] == ["a.jsonl", "org/b"]  # type: ignore[union-attr]
    assert recipe.data.train_on == "assistant"
    assert any("a recipe has one template" in note for note in converted.notes)


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("{path: org/b, data_files: x.jsonl, type: alpaca}", ["hf://datasets/org/b/x.jsonl"]),
        ("{path: org/b, data_files: [x.jsonl, y/z.csv], type: alpaca}",
         ["hf://datasets/org/b/x.jsonl", "hf://datasets/org/b/y/z.csv"]),
        ("{path: ./rows, data_files: x.jsonl, type: alpaca}", ["./rows/x.jsonl"]),
        ("{path: csv, data_files: [x.csv, y.csv], type: alpaca}", ["x.csv", "y.csv"]),
    ],
)  # fmt: skip
def test_files_of_a_dataset(tmp_path: Path, source: str, paths: list[str]) -> None:
    recipe = convert(tmp_path, BASE + f"datasets:\n  - {source}\n")[1]

    assert [each.path for each in recipe.data.train] == paths  # type: ignore[union-attr]
    assert {each.format for each in recipe.data.train} == {"alpaca"}  # type: ignore[union-attr]
    assert recipe.data.template == "alpaca"


def test_training_on_everything(tmp_path: Path) -> None:
    assert convert(tmp_path, BASE + ROWS + "train_on_inputs: true\n")[1].data.train_on == "all"


@pytest.mark.parametrize(
    ("keys", "dtype", "precision"),
    [
        ("", "bfloat16", "bf16"),
        ("bf16: true\nfp16: false", "bfloat16", "bf16"),
        ("bf16: false\nfp16: true", "float32", "fp16"),
        ("bf16: false\nfp16: true\nadapter: lora", "float16", "fp16"),
        ("bf16: false\nfp16: false", "float32", "no"),
    ],
)
def test_numbers(tmp_path: Path, keys: str, dtype: str, precision: str) -> None:
    recipe = convert(tmp_path, BASE + ROWS + keys)[1]

    assert (recipe.model.dtype, recipe.train.mixed_precision) == (dtype, precision)
    assert validate(recipe, to_run=False).problems == []


def test_what_no_key_says_is_as_axolotl_does_it(tmp_path: Path) -> None:
    recipe = convert(tmp_path, BASE + ROWS)[1]

    assert (recipe.data.eval, recipe.data.packing, recipe.data.overlong) == (None, "none", "drop")
    assert (recipe.train.epochs, recipe.sequences_per_step, recipe.output_dir) == (1, 1, "./model-out")
    assert recipe.lora is None


def test_batch_size_of_a_whole_step(tmp_path: Path) -> None:
    assert convert(tmp_path, BASE + ROWS + "batch_size: 16\n")[1].sequences_per_step == 16


def test_warmup_in_steps_or_as_a_share(tmp_path: Path) -> None:
    for more in ("", "max_steps: 200\n"):
        train = convert(tmp_path, BASE + ROWS + f"warmup_steps: 10\n{more}")[1].train
        assert (train.warmup_steps, train.warmup_ratio) == (10, None)
    assert convert(tmp_path, BASE + ROWS + "warmup_steps: 0.1\n")[1].train.warmup_ratio == 0.1


def test_times_per_epoch_need_an_epoch(tmp_path: Path) -> None:
    assert convert(tmp_path, BASE + ROWS + "saves_per_epoch: 5\n")[1].checkpoint.every == 0.2
    assert said(tmp_path, BASE + ROWS + "saves_per_epoch: 2\nmax_steps: 200\n", "saves_per_epoch")[0] == "unsupported"


def test_validation(tmp_path: Path) -> None:
    tests = "test_datasets:\n  - {path: org/test, type: alpaca, split: test}\n  - {path: org/more, type: alpaca}\n"
    converted, recipe = convert(tmp_path, BASE + ROWS + tests + "eval_steps: 50\n")

    assert recipe.data.eval.model_dump(exclude_defaults=True) == {  # type: ignore[union-attr]
        "path": "org/test", "split": "test", "format": "alpaca",
    }  # fmt: skip
    assert recipe.eval.every == 50
    assert converted.outcomes["test_datasets[1].path"].kind == "unsupported"
    number = convert(tmp_path, BASE + ROWS + "val_set_size: 500\n")
    assert number[1].data.eval == 0.02
    assert number[0].outcomes["val_set_size"].kind == "unsupported"
    none = convert(tmp_path, BASE + ROWS + "val_set_size: 0\neval_steps: 50\nevals_per_epoch: 1\n")
    assert none[1].data.eval is None
    assert none[0].outcomes["eval_steps"].kind == none[0].outcomes["evals_per_epoch"].kind == "not_needed"


def test_where_it_runs(tmp_path: Path) -> None:
    sharded = "fsdp_version: 2\nfsdp_config: {offload_params: true, reshard_after_forward: true}\n"
    recipe = convert(tmp_path, BASE + ROWS + sharded)[1]
    assert (recipe.launch.strategy, recipe.launch.cpu_offload) == ("fsdp2", True)
    recipe = convert(tmp_path, BASE + ROWS + "deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json\n")[1]
    assert (recipe.launch.strategy, recipe.launch.cpu_offload) == ("zero3", True)
    recipe = convert(tmp_path, BASE + ROWS + "deepspeed: zero3_offload/ds_config.json\n")[1]
    assert (recipe.launch.strategy, recipe.launch.cpu_offload) == ("ddp", False)
    assert said(tmp_path, BASE + ROWS + "deepspeed: zero3_offload/ds_config.json\n", "deepspeed")[0] == "unsupported"
    recipe = convert(tmp_path, BASE + ROWS + "fsdp:\nfsdp_config:\ndeepspeed:\n")[1]
    assert recipe.launch.strategy == "ddp"


def test_of_deepspeed_s_own_settings_the_stage_and_the_offload_are_carried(tmp_path: Path) -> None:
    zero = "zero_optimization: {stage: 3, overlap_comm: false, offload_optimizer: {device: cpu, pin_memory: true}}"
    converted, recipe = convert(tmp_path, f"{BASE}{ROWS}deepspeed: {{{zero}, gradient_clipping: 0.5}}\n")
    inside = {
        key.removeprefix("deepspeed."): outcome.kind
        for key, outcome in converted.outcomes.items()
        if "deepspeed" in key
    }

    assert (recipe.launch.strategy, recipe.launch.cpu_offload) == ("zero3", True)
    assert inside == {
        "zero_optimization.stage": "becomes",
        "zero_optimization.overlap_comm": "unsupported",
        "zero_optimization.offload_optimizer.device": "becomes",
        "zero_optimization.offload_optimizer.pin_memory": "unsupported",
        "gradient_clipping": "unsupported",
    }


def test_a_schedule_that_ends_above_zero(tmp_path: Path) -> None:
    recipe = convert(tmp_path, BASE + ROWS + "lr_scheduler: cosine\ncosine_min_lr_ratio: 0.1\n")[1]

    assert recipe.train.lr_scheduler == "cosine_with_min_lr"
    assert recipe.trl == {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert said(tmp_path, BASE + ROWS + "lr_scheduler: rex\n", "lr_scheduler")[0] == "unsupported"


def test_settings_of_the_optimizer_are_text_to_transformers(tmp_path: Path) -> None:
    recipe = convert(
        tmp_path, BASE + ROWS + "optim_args: {rank: 128, scale: 0.25}\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )[1]

    assert recipe.trl == {"lr_scheduler_kwargs": {"num_cycles": 2}, "optim_args": "rank=128, scale=0.25"}


def test_adapters(tmp_path: Path) -> None:
    keys = "adapter: lora\nload_in_8bit: true\nlora_target_linear: true\npeft_use_dora: true\nlora_modules_to_save: [head]\n"
    recipe = convert(tmp_path, BASE + ROWS + keys)[1]

    assert recipe.model.quantization == "int8"
    assert recipe.lora is not None
    assert (recipe.lora.target_modules, recipe.lora.use_dora, recipe.lora.modules_to_save) == (
        "all-linear",
        True,
        ["head"],
    )
    full = convert(tmp_path, BASE + ROWS + "lora_r: 8\nadapter:\n")
    assert full[1].lora is None
    assert full[0].outcomes["lora_r"].note == "no adapter is trained"


def test_long_texts_are_cut_into_pieces_where_all_are_of_type_completion(tmp_path: Path) -> None:
    one, two = "datasets:\n  - {path: a, type: completion}\n", "  - {path: b, type: alpaca}\n"
    alone, recipe = convert(tmp_path, BASE + one + "excess_length_strategy: raise\n")
    mixed, other = convert(tmp_path, BASE + one + two)

    assert (recipe.data.overlong, other.data.overlong) == ("split", "drop")
    assert alone.outcomes["excess_length_strategy"].kind == "not_needed"
    assert not any(note.startswith("data.overlong: a recipe has one setting") for note in alone.notes)
    assert any(note.startswith("data.overlong: a recipe has one setting") for note in mixed.notes)
    assert convert(tmp_path, BASE + ROWS)[1].data.overlong == "drop"


def test_the_template_is_of_the_source_that_has_it(tmp_path: Path) -> None:
    rows = "datasets:\n  - {path: a, type: completion}\n  - {path: b, type: alpaca}\n"
    outcomes = convert(tmp_path, BASE + rows)[0].outcomes

    assert "data.template: alpaca" in outcomes["datasets[1].type"].note
    assert "data.template" not in outcomes["datasets[0].type"].note


def test_layers_beyond_linear_ones_are_not_lost(tmp_path: Path) -> None:
    keys = "adapter: lora\nlora_target_linear: true\nlora_target_modules: "

    kind, words = said(tmp_path, BASE + ROWS + keys + "[q_proj, embed_tokens, lm_head]\n", "lora_target_modules")
    assert (kind, words.partition(".")[0]) == ("unsupported", "all-linear does not cover embed_tokens, lm_head")
    assert said(tmp_path, BASE + ROWS + keys + "[q_proj]\n", "lora_target_modules")[0] == "not_needed"


LIGER = "axolotl.integrations.liger.LigerPlugin"
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
SPECTRUM = "axolotl.integrations.spectrum.SpectrumPlugin"


@pytest.mark.parametrize(
    ("keys", "key", "kind", "kernels"),
    [
        (f"plugins: [{LIGER}]", "plugins", "becomes", "liger"),
        (f"plugins: [{CUT}, {LIGER}]", "plugins", "becomes", "liger"),
        (f"plugins: [{CUT}]", "plugins", "not_needed", "auto"),
        (f"plugins: [{SPECTRUM}]", "plugins", "unsupported", "auto"),
        (f"plugins: [{LIGER}, {SPECTRUM}]", "plugins", "unsupported", "liger"),
        ("liger_rms_norm: true", "liger_rms_norm", "becomes", "liger"),
        ("liger_rms_norm: false", "liger_rms_norm", "not_needed", "auto"),
    ],
)
def test_liger_is_carried_and_other_plugins_for_speed_are_not_missed(
    tmp_path: Path, keys: str, key: str, kind: str, kernels: str
) -> None:
    converted, recipe = convert(tmp_path, BASE + ROWS + keys + "\n")

    assert converted.outcomes[key].kind == kind
    assert recipe.train.kernels == kernels


def test_adapters_on_parameters(tmp_path: Path) -> None:
    keys = "adapter: lora\nlora_target_modules: [q_proj]\nlora_target_parameters: [mlp.experts.down_proj]\n"
    lora = convert(tmp_path, BASE + ROWS + keys)[1].lora

    assert lora is not None
    assert lora.target_parameters == ["mlp.experts.down_proj"]
    dft = convert(tmp_path, BASE + ROWS + "use_dynamic_finetuning: true\n")[1]
    assert dft.trl == {"loss_type": "dft"}

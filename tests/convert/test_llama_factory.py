"""LLaMA-Factory's keys. The configs are written for these tests, in the manner of LLaMA-Factory's own examples."""

import json
from pathlib import Path

import pytest

from sft_recipes.recipe.validate import validate
from tests.convert.test_conversion import convert

LORA = """\
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
quantization_bit: 4
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,talks
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
BASE = "model_name_or_path: org/model\nstage: sft\ndo_train: true\ndataset: one\ntemplate: llama3\noutput_dir: out\n"


def test_a_whole_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    converted, recipe = convert(tmp_path, LORA)

    assert (recipe.model.name, recipe.model.dtype, recipe.model.quantization) == (
        "Qwen/Qwen3-4B-Instruct-2507",
        "bfloat16",
        "nf4",
    )
    assert recipe.data.model_dump(exclude_defaults=True) == {
        "train": [{"path": "identity", "max_samples": 1000}, {"path": "talks", "max_samples": 1000}], "eval": 0.1,
        "template": "chat", "train_on": "assistant", "max_length": 2048, "overlong": "truncate", "packing": "none",
        "input_separator": "\n",
    }  # fmt: skip
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.target_modules) == (8, 16, "all-linear")
    assert (recipe.train.micro_batch_size, recipe.accumulation, recipe.train.epochs) == (1, 8, 3)
    assert (recipe.train.learning_rate, recipe.train.lr_scheduler, recipe.train.warmup_ratio) == (1e-4, "cosine", 0.1)
    assert (recipe.eval.every, recipe.checkpoint.every, recipe.trl) == (500, 500, {"ddp_timeout": 180000000})
    assert validate(recipe, to_run=False).problems == []
    assert {outcome.kind for outcome in converted.outcomes.values()} == {"becomes", "default", "not_needed", "empty"}
    assert any("identity, talks: not found in data/dataset_info.json" in line for line in converted.notes)


def test_dataset_info_says_where_the_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    info = {
        "identity": {"file_name": "identity.json"},
        "talks": {"hf_hub_url": "org/talks", "formatting": "sharegpt", "split": "train", "subset": "en",
                  "columns": {"messages": "turns", "system": "system"}},
        "other": {"file_name": "o.json",
                  "columns": {"prompt": "q", "query": "input", "response": "a", "history": "h", "images": "i"}},
    }  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")

    converted, recipe = convert(tmp_path, BASE.replace("one", "identity,talks,other,unknown"))

    assert [
        source if isinstance(source, str) else source.model_dump(exclude_defaults=True) for source in recipe.data.train
    ] == [
        {"path": "data/identity.json", "format": "alpaca"},
        {"path": "org/talks", "name": "en", "format": "messages", "columns": {"messages": "turns"}},
        {"path": "data/o.json", "format": "alpaca", "columns": {"instruction": "q", "output": "a", "history": "h"}},
        "unknown",
    ]
    assert [note.partition(":")[2].split(":")[0].strip() for note in converted.notes[:2]] == ["other", "unknown"]
    assert "images" in converted.notes[0]


def test_the_limit_of_each_dataset(tmp_path: Path) -> None:
    keys = "dataset_dir: ONLINE\nmax_samples: 5\n"
    converted, recipe = convert(tmp_path, BASE.replace("one", "a,org/b") + keys + "eval_dataset: c\n")

    assert [source.model_dump(exclude_defaults=True) for source in recipe.data.train] == [  # type: ignore[union-attr]
        {"path": "a", "max_samples": 5}, {"path": "org/b", "max_samples": 5},
    ]  # fmt: skip
    assert (recipe.data.eval, recipe.data.max_eval_samples, recipe.data.max_train_samples) == ("c", 5, None)
    assert converted.notes == []


@pytest.mark.parametrize(("keys", "trl"), [("use_dft_loss: true", {"loss_type": "dft"}), ("use_dft_loss: false", {})])
def test_the_loss(tmp_path: Path, keys: str, trl: dict[str, str]) -> None:
    assert convert(tmp_path, BASE + keys)[1].trl == trl


@pytest.mark.parametrize(
    ("keys", "dtype", "precision"),
    [
        ("bf16: true\nfinetuning_type: lora", "bfloat16", "bf16"),
        ("fp16: true\nfinetuning_type: lora", "float16", "fp16"),
        ("bf16: true\nfinetuning_type: full", "float32", "bf16"),
        ("fp16: true\nfinetuning_type: full", "float32", "fp16"),
        ("pure_bf16: true\nbf16: true\nfinetuning_type: full", "bfloat16", "no"),
        ("finetuning_type: full", "float32", "no"),
    ],
)
def test_numbers(tmp_path: Path, keys: str, dtype: str, precision: str) -> None:
    recipe = convert(tmp_path, BASE + keys)[1]

    assert (recipe.model.dtype, recipe.train.mixed_precision) == (dtype, precision)
    assert validate(recipe, to_run=False).problems == []


@pytest.mark.parametrize(
    ("keys", "train_on"),
    [("", "assistant"), ("mask_history: true", "completion"), ("train_on_prompt: true", "all")],
)
def test_what_is_trained_on(tmp_path: Path, keys: str, train_on: str) -> None:
    assert convert(tmp_path, BASE + keys)[1].data.train_on == train_on


@pytest.mark.parametrize(
    ("keys", "packing"), [("packing: false", "none"), ("packing: true", "bfd"), ("neat_packing: true", "bfd")]
)
def test_packing(tmp_path: Path, keys: str, packing: str) -> None:
    assert convert(tmp_path, BASE + keys)[1].data.packing == packing


def test_what_no_key_says_is_as_llama_factory_does_it(tmp_path: Path) -> None:
    recipe = convert(tmp_path, BASE)[1]

    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.target_modules) == (8, 16, "all-linear")
    assert (recipe.train.micro_batch_size, recipe.accumulation, recipe.train.learning_rate) == (8, 1, 5e-5)
    assert (recipe.train.epochs, recipe.train.lr_scheduler, recipe.train.warmup_ratio) == (3, "linear", 0)
    assert (recipe.data.eval, recipe.data.max_length) == (None, 2048)


def test_layers_and_tokens_are_lists(tmp_path: Path) -> None:
    keys = "lora_target: q_proj,v_proj\nadditional_target: embed_tokens, lm_head\nadd_tokens: <a>,<b>\nlora_alpha: 64\n"
    recipe = convert(tmp_path, BASE + keys)[1]

    assert recipe.lora is not None
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.lora.modules_to_save == ["embed_tokens", "lm_head"]
    assert recipe.lora.alpha == 64
    assert recipe.model.new_tokens == ["<a>", "<b>"]


def test_where_it_runs(tmp_path: Path) -> None:
    launch = convert(tmp_path, BASE + "deepspeed: examples/deepspeed/ds_z2_offload_config.json\n")[1].launch
    assert (launch.strategy, launch.cpu_offload) == ("zero2", True)
    launch = convert(tmp_path, BASE + "deepspeed: examples/deepspeed/ds_z0_config.json\n")[1].launch
    assert launch.strategy == "ddp"


@pytest.mark.parametrize(
    ("keys", "key", "kind"),
    [
        ("val_size: 100", "val_size", "unsupported"),
        ("template: default", "template", "not_needed"),
        ("pissa_init: true", "pissa_init", "unsupported"),
        ("pissa_init: false", "pissa_init", "not_needed"),
        ("flash_attn: fa2", "flash_attn", "becomes"),
        ("disable_gradient_checkpointing: true", "disable_gradient_checkpointing", "becomes"),
        ("finetuning_type: freeze", "finetuning_type", "unsupported"),
    ],
)
def test_keys(tmp_path: Path, keys: str, key: str, kind: str) -> None:
    text = BASE.replace("template: llama3\n", "") if key == "template" else BASE
    outcome = convert(tmp_path, f"{text}{keys}\n")[0].outcomes[key]

    assert outcome.kind == ("unsupported" if key == "template" else kind), outcome


@pytest.mark.parametrize(
    ("keys", "kernels"),
    [("", "auto"), ("enable_liger_kernel: true\n", "liger"), ("enable_liger_kernel: false\n", "none")],
)
def test_liger(tmp_path: Path, keys: str, kernels: str) -> None:
    assert convert(tmp_path, BASE + keys)[1].train.kernels == kernels


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_is_an_argument_of_the_chat_template(tmp_path: Path, thinks: bool) -> None:
    _, recipe = convert(tmp_path, BASE + f"enable_thinking: {str(thinks).lower()}\n")

    assert recipe.data.chat_template_kwargs == {"enable_thinking": thinks}

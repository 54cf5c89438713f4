"""List option names of TRL and transformers without importing them.

The names are read from the installed source, because importing TRL takes seconds.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

# Fields of TRL's SFTConfig that are set by a recipe key. `trl:` rejects them and names the key.
OWNED = {
    "output_dir": "output_dir",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "chat_template_path": "data.template",
    "dataset_text_field": "data.columns",
    "dataset_kwargs": "data",
    "eos_token": "data.template",
    "pad_token": "data.template",
    "max_length": "data.max_length",
    "truncation_mode": "data.overlong",
    "packing": "data.packing",
    "packing_strategy": "data.packing",
    "eval_packing": "data.packing",
    "padding_free": "data.packing",
    "shuffle_dataset": "data.shuffle",
    "train_sampling_strategy": "data.shuffle",
    "completion_only_loss": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "auto_find_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "bf16": "train.mixed_precision",
    "fp16": "train.mixed_precision",
    "optim": "train.optimizer",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "train.gradient_checkpointing",
    "torch_compile": "train.compile",
    "use_liger_kernel": "train.kernels",
    "liger_kernel_config": "train.kernels",
    "full_determinism": "train.deterministic",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "eval_on_start": "eval.every",
    "save_strategy": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.export_best",
    "metric_for_best_model": "checkpoint.export_best",
    "greater_is_better": "checkpoint.export_best",
    "logging_strategy": "log.every",
    "logging_steps": "log.every",
    "report_to": "log.to",
    "project": "log.project",
    "run_name": "log.name",
    "fsdp": "launch.strategy",
    "fsdp_config": "launch.strategy",
    "deepspeed": "launch.strategy",
    "resume_from_checkpoint": "the flag --resume",
    "hub_token": "the environment variable HF_TOKEN",
}
# Names that other tools use for recipe keys, for the hints of unknown keys.
SYNONYMS = {name: key for name, key in OWNED.items() if "." in key} | {
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "batch_size": "train.micro_batch_size",
    "per_device_batch_size": "train.micro_batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "scheduler": "train.lr_scheduler",
    "lr_scheduler_type": "train.lr_scheduler",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "lora_r": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "base_model": "model.name",
    "model_name_or_path": "model.name",
}


@cache
def sft_config_fields() -> frozenset[str]:
    """List the fields of the installed SFTConfig."""
    return frozenset(
        statement.target.id
        for package, file, name in (
            ("trl", "trainer/sft_config.py", "SFTConfig"),
            ("trl", "trainer/base_config.py", "_BaseConfig"),
            ("transformers", "training_args.py", "TrainingArguments"),
        )
        for statement in _class(package, file, name).body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )


@cache
def schedulers() -> frozenset[str]:
    """List the learning rate schedulers of the installed transformers."""
    return _enum_values(_class("transformers", "trainer_utils.py", "SchedulerType"))


@cache
def optimizers() -> frozenset[str]:
    """List the optimizers of the installed transformers."""
    return _enum_values(_class("transformers", "training_args.py", "OptimizerNames"))


@cache
def liger_model_types() -> frozenset[str]:
    """List the model types that the installed Liger has kernels for. Importing Liger would require Triton."""
    spec = importlib.util.find_spec("liger_kernel")
    assert spec is not None, "called only if Liger is installed"
    assert spec.origin is not None, "liger_kernel is a package with files"
    file = Path(spec.origin).parent / "transformers" / "monkey_patch.py"
    tables = (
        statement.value
        for statement in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "MODEL_TYPE_TO_APPLY_LIGER_FN"
        and isinstance(statement.value, ast.Dict)
    )
    return frozenset(
        key.value for key in next(tables).keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
    )


def installed(package: str) -> bool:
    """Return True if `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _class(package: str, file: str, name: str) -> ast.ClassDef:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is a dependency"
    assert spec.origin is not None, f"{package} is a package with files"
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _enum_values(node: ast.ClassDef) -> frozenset[str]:
    assigned = (statement.value for statement in node.body if isinstance(statement, ast.Assign))
    return frozenset(
        value.value for value in assigned if isinstance(value, ast.Constant) and isinstance(value.value, str)
    )


def imitates_bf16(torch: Any) -> bool:
    """Return True if the CPU emulates bfloat16, which is several times slower than float32 (benchmarks/bf16.py)."""
    capabilities: dict[str, Any] = torch.cpu.get_capabilities()
    return bool(capabilities) and not any(
        capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
    )

"""torchtune's YAML (0.2 to 0.6): components by their dotted names, and ${...} for the values of other keys."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.errors import RecipeError
from sft_recipes.recipe.convert.arguments import in_trackers, warmup_of
from sft_recipes.recipe.convert.draft import (
    Draft,
    Entry,
    Lacking,
    Needless,
    Rules,
    To,
    all_of,
    follow,
    interval,
    number,
    part_of,
)

NAME = "torchtune"
SIGNS = ""  # told by its components
NEEDS = {"model.name": "checkpointer.checkpoint_dir", "data.train": "dataset", "output_dir": "output_dir"}
DEFAULTS = {
    "data.eval": None,
    "data.packing": "none",
    "train.gradient_accumulation_steps": 1,
    "train.lr_scheduler": "constant",
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.01,
    "train.max_grad_norm": 0.0,
}

_ONE = Needless("the checkpoint's directory is model.name")
_FSDP = Needless("set up with launch.strategy: fsdp2")
_PROFILER = Lacking("of a profiler")
_SHARDED = Lacking("layers and sequences are not split over GPUs here", off=(1, False))

KEYS: Rules = {
    "output_dir": To("output_dir"),
    # Model
    **all_of(
        "tokenizer._component_ tokenizer.path tokenizer.merges_file tokenizer.merges_path",
        Needless("the tokenizer is that of model.name"),
    ),
    **all_of("tokenizer.special_tokens_path tokenizer.special_tokens", Lacking("model.new_tokens adds tokens")),
    "tokenizer.prompt_template": Lacking("set data.template to alpaca, chat or the path of a .jinja file"),
    "tokenizer.truncation_type": Needless("data.overlong: truncate keeps the beginning"),
    "model.lora_rank": To("lora.rank"),
    "model.lora_alpha": To("lora.alpha", number),
    "model.lora_dropout": To("lora.dropout", number),
    "model.use_dora": To("lora.use_dora"),
    "model.quantize_base": To("model.quantization", {True: "nf4", False: None}),
    **all_of(
        "checkpointer._component_ checkpointer.checkpoint_files checkpointer.checkpoint_files.* "
        "checkpointer.model_type checkpointer.safetensors_index init_weights_with_hf",
        _ONE,
    ),
    "checkpointer.output_dir": Needless("everything goes to output_dir"),
    **all_of(
        "checkpointer.recipe_checkpoint resume_from_checkpoint",
        Needless("`sft-recipe run RECIPE --resume` takes the newest complete one"),
    ),
    "checkpointer.adapter_checkpoint": Lacking("merge that adapter first (sft-recipe merge), and train on the result"),
    "checkpointer.safe_serialization": Needless("weights are always safetensors"),
    **all_of("checkpointer.keep_last_n_checkpoints keep_last_n_checkpoints", To("checkpoint.keep")),
    **all_of(
        "checkpointer.enable_async_checkpointing enable_async_checkpointing",
        Lacking("checkpoints are complete or not there"),
    ),
    "should_load_recipe_state": Needless("`sft-recipe run RECIPE --resume` restores all"),
    "save_adapter_weights_only": To("export.merge", lambda only: not only),
    "save_last_epoch_only": To("checkpoint.every", {True: None, False: 0.25}),
    "save_every_n_steps": To("checkpoint.every", interval),
    "save_every_n_epochs": Lacking("set checkpoint.every to a fraction of the run"),
    # Data
    "shuffle": To("data.shuffle"),
    "collate_fn": Needless("as data.packing says"),
    "batch_size": To("train.micro_batch_size"),
    "batch_size_val": Needless("validation takes train.micro_batch_size"),
    # Steps
    "gradient_accumulation_steps": To("train.gradient_accumulation_steps"),
    "optimizer.lr": To("train.learning_rate", number),
    "optimizer.weight_decay": To("train.weight_decay", number),
    **all_of("optimizer.fused optimizer.foreach optimizer.optim_bits", Needless("as train.optimizer says")),
    "optimizer.eps": To("trl.adam_epsilon", number),
    "optimizer_in_bwd": Lacking(
        "the optimizer steps after the backward pass; 8-bit states save memory, too", off=(False,)
    ),
    **all_of("loss loss._component_", Needless("the loss is the likelihood of the tokens")),
    "loss.num_output_chunks": Needless("the loss does not make all logits at once"),
    **all_of("loss.mask_ignored_tokens loss.ignore_index", Needless("only tokens that are trained on are in the loss")),
    "lr_scheduler.num_cycles": Lacking("give it with trl: {lr_scheduler_kwargs: {num_cycles: ...}}", off=(0.5,)),
    "clip_grad_norm": To("train.max_grad_norm", number),
    # Memory and speed
    "compile": To("train.compile"),
    "compile.*": Lacking("train.compile compiles the layers"),
    "enable_activation_offloading": To("trl.activation_offloading", off=(False,)),
    "activation_offloading_use_streams": Needless("as trl.activation_offloading does it"),
    "ac_mode": Needless("as train.gradient_checkpointing says"),
    **all_of("custom_sharded_layers fsdp_reshard_after_forward memory_efficient_fsdp_wrap fsdp.*", _FSDP),
    "fsdp_cpu_offload": To("launch.cpu_offload"),
    **all_of(
        "data_parallel_replicate_dim tensor_parallel_dim tensor_parallel_plan._component_ "
        "context_parallel_dim parallelize_plan._component_",
        _SHARDED,
    ),
    "data_parallel_shard_dim": Needless("as launch.processes says"),
    "enable_fp8_training": Lacking("train.mixed_precision is bf16, fp16 or no"),
    "fp8_recipe_name": Lacking("train.mixed_precision is bf16, fp16 or no"),
    "low_cpu_ram": Needless("weights are read into their place"),
    "dataloader.*": Needless("set up by the device"),
    "cudnn_deterministic_mode": Lacking("set it in the environment"),
    "device": Needless("a GPU where there is one"),
    "seed": To("train.seed"),
    # Logs
    "log_every_n_steps": To("log.every"),
    "log_peak_memory_stats": Needless("metrics.jsonl has memory"),
    "log_level": Needless("--debug shows what the libraries print"),
    **all_of(
        "metric_logger.log_dir metric_logger.dir metric_logger.organize_logs",
        Needless("trackers write into the run directory"),
    ),
    "metric_logger.filename": Needless("metrics.jsonl is always written"),
    "metric_logger.entity": Lacking("set WANDB_ENTITY in the environment"),
    "profiler.*": Needless("of a profiler that is off"),
}

# By the last part of a component's name: where its rows are, their format, their columns, and what is trained on.
_DATASETS: dict[str, tuple[str | None, str, dict[str, str], str]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", {}, "all"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", {}, "all"),
    "instruct_dataset": (None, "prompt_completion", {"prompt": "input", "completion": "output"}, "completion"),
    "grammar_dataset": (
        "liweili/c4_200m",
        "prompt_completion",
        {"prompt": "input", "completion": "output"},
        "completion",
    ),
    "samsum_dataset": (
        "Samsung/samsum",
        "prompt_completion",
        {"prompt": "dialogue", "completion": "summary"},
        "completion",
    ),
    "chat_dataset": (None, "messages", {}, "assistant"),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "messages", {}, "assistant"),
    "text_completion_dataset": (None, "text", {}, "all"),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "text", {"text": "article"}, "all"),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "text", {"text": "page"}, "all"),
}
_OPTIMIZERS = {
    "torch.optim.AdamW": "adamw_torch_fused",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "bitsandbytes.optim.AdamW8bit": "adamw_bnb_8bit",
    "bitsandbytes.optim.AdamW": "adamw_torch_fused",
    "torchao.optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.optim.AdamW4bit": "adamw_torch_4bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw_torch_8bit",
    "torchao.prototype.low_bit_optim.AdamW4bit": "adamw_torch_4bit",
    "torch.optim.SGD": "sgd",
}
_SCHEDULES = {
    "get_cosine_schedule_with_warmup": "cosine",
    "get_linear_schedule_with_warmup": "linear",
    "get_constant_schedule_with_warmup": "constant_with_warmup",
}
_MOST = 100_000  # characters that references stand for
# Layers as transformers calls them; of Phi-3 and 4 it has some fused.
_LAYERS = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
_MLP = ["gate_proj", "down_proj", "up_proj"]
# Sections and keys of recipes for something else.
_OTHERS = {
    "teacher_model": "distillation",
    "reward_checkpointer": "PPO",
    "ref_checkpointer": "preference training",
    "ref_policy_model": "PPO",
    "prompt": "answering, not training",
    "tasks": "evaluation, not training",
    "quantizer": "quantisation",
    "grpo_samples": "GRPO",
    "orchestration": "GRPO",
}


def resolved(config: Mapping[Any, Any], file: str | Path) -> dict[Any, Any]:
    """The config with ${key} and ${section.key} replaced by what they stand for, where that is no section.

    Raises RecipeError, of `file`, where that is without end, or nearly so.
    """
    left = _MOST

    def value(at: Any, depth: int = 0) -> Any:
        if isinstance(at, Mapping):
            return {key: value(inner, depth) for key, inner in at.items()}
        if isinstance(at, list):
            return [value(inner, depth) for inner in at]
        if not isinstance(at, str) or depth > 10:  # one that stands for itself is left as it is
            return at
        if whole := re.fullmatch(r"\$\{([\w.]+)\}", at):
            found = look(whole[1])
            return at if found is None else value(found, depth + 1)
        return re.sub(r"\$\{([\w.]+)\}", lambda hit: counted(str(value(look(hit[1]) or hit[0], depth + 1))), at)

    def counted(text: str) -> str:
        nonlocal left
        left -= len(text)
        if left < 0:
            raise RecipeError(f"{file}: what ${{...}} stand for is longer than {_MOST:,} characters; write it out")
        return text

    def look(name: str) -> Any:
        at: Any = config
        for part in name.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return None if isinstance(at, (Mapping, list)) else at

    return {key: value(inner) for key, inner in config.items()}


def _component(draft: Draft, section: str) -> str:
    """The last part of the name of a section's component."""
    return str(draft.get(f"{section}._component_", "")).rpartition(".")[2]


def refusal(draft: Draft) -> str | None:
    if key := next((key for key in _OTHERS if key in draft.config), None):
        return f"{key} is of {_OTHERS[key]}"
    loss, model = _component(draft, "loss"), _component(draft, "model")
    if re.search("dpo|ppo|grpo|simpo|rso|forwardkl", loss.lower()):
        return f"loss: {loss} is no fine-tuning on answers"
    if re.search("vision|clip|reward|classifier|early_fusion", model):
        return f"model: {model} is no language model by itself"
    if "optimizer" not in draft.config or "dataset" not in draft.config:
        return "it has no optimizer or no dataset, and so does not train"
    return None


def convert(draft: Draft) -> None:
    _model(draft)
    _adapters(draft)
    _weights(draft)
    _validation(draft)
    _data(draft)
    _length(draft)
    _steps(draft)
    _rate(draft)
    _memory(draft)
    _logs(draft)
    draft.remarks.append(
        "launch: the number of GPUs is not in the file; after a *_distributed recipe set launch.processes, and strategy: fsdp2"
    )


def _model(draft: Draft) -> None:
    """checkpointer.checkpoint_dir: model.name"""
    directory = draft.get("checkpointer.checkpoint_dir")
    if isinstance(directory, str):
        draft.carry("checkpointer.checkpoint_dir", "model.name", directory.rstrip("/") or directory, "or its hub id")
    if "Meta" in _component(draft, "checkpointer"):
        draft.remarks.append(
            "model.name: these weights are in Meta's own format, and transformers has its own: put the hub id"
        )


def _adapters(draft: Draft) -> None:
    """model._component_: lora, model.quantization; model.lora_attn_modules, model.apply_lora_to_mlp: lora.target_modules"""
    name = _component(draft, "model")
    if not name.startswith(("lora_", "qlora_")) and not draft.get("model.lora_attn_modules"):
        draft.leave("model._component_", why="as the files of model.name say")
        return
    draft.carry("model._component_", "lora", {})
    if name.startswith("qlora_"):
        draft.carry("model._component_", "model.quantization", "nf4")
    said = draft.get("model.lora_attn_modules")
    modules = [_LAYERS.get(str(module), str(module)) for module in said] if isinstance(said, list) else []
    modules += _MLP if draft.get("model.apply_lora_to_mlp") else []
    if name.partition("lora_")[2].startswith(("phi3", "phi4")):
        modules = list(dict.fromkeys(_FUSED.get(module, module) for module in modules))
    if modules:
        key = "model.lora_attn_modules" if said else "model.apply_lora_to_mlp"
        draft.carry(key, "lora.target_modules", modules, "as transformers calls them")
    if draft.get("model.apply_lora_to_output"):
        draft.lack(
            "model.apply_lora_to_output", "TRL takes no adapter on the head; lora.modules_to_save: [lm_head] trains it"
        )
    draft.leave("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output", why="as lora says")
    if draft.get("model.lora_rank") is None:
        draft.assume("lora.rank", 8)
    if draft.get("model.lora_alpha") is None:
        draft.assume("lora.alpha", 16)


def _weights(draft: Draft) -> None:
    """dtype: model.dtype, train.mixed_precision (no)"""
    names = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
    if (dtype := str(draft.get("dtype"))) in names:
        draft.carry("dtype", "model.dtype", names[dtype])
        draft.carry("dtype", "train.mixed_precision", "no", "torchtune computes in the weights' type")
    elif draft.get("dtype") is not None:
        draft.lack("dtype", "model.dtype is bfloat16, float16 or float32")


def _data(draft: Draft) -> None:
    """dataset (_component_, source, split, column_map): data.train; dataset.packed: data.packing"""
    datasets = draft.get("dataset")
    entries = (
        {f"dataset[{n}]": entry for n, entry in enumerate(datasets)}
        if isinstance(datasets, list)
        else {"dataset": datasets}
    )
    sources, trained = [], set()
    for here, entry in entries.items():
        if isinstance(entry, dict):
            source, train_on = _source(draft, here, entry, "data.train")
            sources += [source] if source else []
            trained |= {train_on} - {""}
    if sources:
        draft.carry("dataset", "data.train", sources, only=("_component_",))
    packed = next((here for here, entry in entries.items() if isinstance(entry, dict) and entry.get("packed")), None)
    if packed or draft.get("packed"):
        wrapped = draft.get(f"{packed}.split_across_pack") if packed == "dataset" else False
        key = f"{packed}.packed" if packed else "packed"
        draft.carry(key, "data.packing", "wrapped" if wrapped else "bfd")
    if len(trained) == 1:
        draft.assume("data.train_on", trained.pop())
    elif trained:
        draft.remarks.append(
            "data.train_on: one for all data here, and these have several: set it, and look at preview"
        )
    formats = {source.get("format") for source in sources}
    if "alpaca" in formats:
        draft.remarks.append(
            "data.template: alpaca is plain text; torchtune has it between the turns of the model's chat template"
        )
    if "prompt_completion" in formats:
        draft.remarks.append("data.template: alpaca, chat, or the path of a .jinja file: look at preview")


_OF_DATASET = all_of(
    "packed split_across_pack train_on_input masking_strategy max_seq_len conversation_style column conversation_column "
    "source name column_map.input column_map.output _component_ split data_files",
    Needless("in data"),
) | {
    "add_eos": Needless("documents end with the end token"),
    "add_bos": Needless("documents begin with BOS where the tokenizer adds it"),
    **all_of(
        "new_system_prompt template prompt_template column_map.system",
        Lacking("write it as a .jinja chat template, and set data.template to its path"),
    ),
}


def _source(draft: Draft, here: str, entry: dict[Any, Any], there: str) -> tuple[dict[str, Any], str]:
    """A source of a recipe, and what is trained on there."""
    name = str(entry.get("_component_", "")).rpartition(".")[2]
    path, kind, columns, train_on = _DATASETS.get(name, (None, None, {}, ""))
    files, mapped, split = entry.get("data_files"), entry.get("column_map"), entry.get("split")
    path = files if isinstance(files, str) else entry.get("source", path)
    mapped = mapped if isinstance(mapped, dict) else {}
    columns = {ours: mapped.get(theirs, theirs) for ours, theirs in columns.items()} | {
        ours: entry[key] for key, ours in (("conversation_column", "messages"), ("column", "text")) if key in entry
    }
    columns = {ours: column for ours, column in columns.items() if column not in (ours, "conversations")}
    if isinstance(entry.get("masking_strategy"), str):
        train_on = "all" if entry["masking_strategy"] == "train_on_all" else train_on.replace("all", "completion")
    elif isinstance(entry.get("train_on_input"), bool) and kind != "text":
        train_on = "all" if entry["train_on_input"] else "assistant" if kind == "messages" else "completion"
    source = {"path": path, "name": entry.get("name"), "format": kind, "columns": columns}
    source["split"], share = part_of(split)
    if f"{here}.split" in draft.left() and (source["split"] is None or share):
        draft.lack(
            f"{here}.split", "no parts of splits: data.eval takes a fraction, data.max_train_samples so many rows"
        )
    if kind is None:
        draft.lack(f"{here}._component_", f"see the data: path, format and columns of {there}")
    follow(draft, _OF_DATASET, here)
    source = {part: value for part, value in source.items() if value not in (None, {}, "train")}
    return source if "path" in source else {}, train_on


def _validation(draft: Draft) -> None:
    """dataset_val: data.eval; run_val_every_n_steps: eval.every"""
    entry = draft.get("dataset_val")
    share = _set_aside(draft)
    if share:
        draft.needless("dataset.split", f"data.eval is a fraction of it: {share:g}")
        draft.carry("dataset_val", "data.eval", share, only=("_component_", "split"))
    source = _source(draft, "dataset_val", entry, "data.eval")[0] if isinstance(entry, dict) else {}
    if source and not share:
        draft.carry("dataset_val", "data.eval", source, only=("_component_",))
    if source and draft.get("run_val_every_n_steps") is not None:
        draft.carry("run_val_every_n_steps", "eval.every", interval(draft.get("run_val_every_n_steps")))
    draft.leave("run_val_every_n_steps", "batch_size_val", why="there are no validation rows")


def _set_aside(draft: Draft) -> float | None:
    """The share of the rows that is validated on, where dataset and dataset_val are parts of one split."""
    train, held_out = draft.get("dataset"), draft.get("dataset_val")
    if not isinstance(train, dict) or not isinstance(held_out, dict):
        return None
    (split, most), (same, rest) = part_of(train.get("split")), part_of(held_out.get("split"))
    alike = split == same and all(train.get(key) == held_out.get(key) for key in ("_component_", "source"))
    return rest if alike and most and rest and round(most + rest, 6) == 1 else None


def _length(draft: Draft) -> None:
    """tokenizer.max_seq_len: data.max_length, data.overlong"""
    keys = ("tokenizer.max_seq_len", "dataset.max_seq_len", "max_seq_len")
    if key := next((key for key in keys if draft.get(key) is not None), None):
        draft.carry(key, "data.max_length", draft.get(key))
        draft.assume("data.overlong", "truncate")
    else:
        draft.assume("data.max_length", 4096, "torchtune has no limit here; set one")
        draft.remarks.append(
            "data.max_length: torchtune has none here, and a recipe has one: a row that is longer is an error"
        )


def _steps(draft: Draft) -> None:
    """epochs: train.epochs; max_steps_per_epoch: train.max_steps"""
    epochs, most = number(draft.get("epochs")), number(draft.get("max_steps_per_epoch"))
    if epochs is not None:
        draft.carry("epochs", "train.epochs", epochs)
    if isinstance(most, int) and isinstance(epochs, (int, float)):
        draft.carry("max_steps_per_epoch", "train.max_steps", number(most * epochs), "in all epochs")
    elif most is not None:
        draft.carry("max_steps_per_epoch", "train.max_steps", most)


def _rate(draft: Draft) -> None:
    """optimizer._component_: train.optimizer; lr_scheduler: train.lr_scheduler, train.warmup_ratio"""
    name, schedule = str(draft.get("optimizer._component_", "")), _component(draft, "lr_scheduler")
    if name in _OPTIMIZERS:
        draft.carry("optimizer._component_", "train.optimizer", _OPTIMIZERS[name])
    elif name:
        draft.lack("optimizer._component_", "set train.optimizer to one of transformers' names")
    if name == "torch.optim.SGD" and draft.get("optimizer.weight_decay") is None:
        draft.entries["train.weight_decay"] = Entry(0.0, "torch's SGD has none by default")
    betas = draft.get("optimizer.betas")
    if isinstance(betas, list) and len(betas) == 2:
        draft.carry("optimizer.betas", "trl.adam_beta1", number(betas[0]))
        draft.carry("optimizer.betas", "trl.adam_beta2", number(betas[1]))
    if schedule in _SCHEDULES:
        draft.carry("lr_scheduler._component_", "train.lr_scheduler", _SCHEDULES[schedule])
    elif schedule:
        draft.lack("lr_scheduler._component_", "set train.lr_scheduler to one of transformers' names")
    warmup_of(draft, "lr_scheduler.num_warmup_steps")


def _memory(draft: Draft) -> None:
    """enable_activation_checkpointing, ac_option: train.gradient_checkpointing; custom_sharded_layers: launch.strategy"""
    if key := next((key for key in ("custom_sharded_layers", "fsdp_cpu_offload") if draft.get(key)), None):
        draft.carry(key, "launch.strategy", "fsdp2")
    every, on = draft.get("ac_option"), draft.get("enable_activation_checkpointing")
    if isinstance(every, int) and on:
        draft.carry("ac_option", "train.gradient_checkpointing", every, "of every so many layers")
    elif on is not None:
        draft.carry("enable_activation_checkpointing", "train.gradient_checkpointing", on)
    draft.leave("ac_option", "enable_activation_checkpointing", why="as train.gradient_checkpointing says")


def _logs(draft: Draft) -> None:
    """metric_logger._component_: log.to; metric_logger.project: log.project; metric_logger.name: log.name;
    metric_logger.group: log.group"""
    trackers = {"WandBLogger": ["wandb"], "TensorBoardLogger": ["tensorboard"], "DiskLogger": [], "StdoutLogger": []}
    if (name := _component(draft, "metric_logger")) in trackers:
        draft.carry("metric_logger._component_", "log.to", trackers[name])
    elif name:
        draft.lack("metric_logger._component_", "log.to has other trackers")
    in_trackers(draft, project=("metric_logger.project",), name=("metric_logger.name",), group=("metric_logger.group",))
    if draft.get("profiler.enabled"):
        draft.lack("profiler", "of a profiler")


GROUPS = (_model, _adapters, _weights, _data, _validation, _length, _steps, _rate, _memory, _logs)

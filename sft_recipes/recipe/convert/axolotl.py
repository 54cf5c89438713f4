"""Axolotl's YAML, as of its schema of 2026 and the names it had before."""

import re
from dataclasses import dataclass
from typing import Any

from sft_recipes.recipe.convert.arguments import (
    ARGUMENTS,
    an_epoch,
    evaluation,
    held_out,
    in_trackers,
    launch,
    length,
    optimizer,
    saving,
    scheduler,
    warmup,
)
from sft_recipes.recipe.convert.draft import (
    Draft,
    Lacking,
    Needless,
    Rule,
    Rules,
    To,
    all_of,
    follow,
    listed,
    number,
    part_of,
)

NAME = "Axolotl"
SIGNS = (
    "base_model sequence_len micro_batch_size num_epochs adapter sample_packing val_set_size rl train_on_inputs "
    "dataset_prepared_path load_in_4bit load_in_8bit datasets flash_attention strict evals_per_epoch "
    "saves_per_epoch lora_target_linear model_type tokenizer_type pretraining_dataset"
)
NEEDS = {"model.name": "base_model", "data.train": "datasets"}
DEFAULTS = {
    "train.micro_batch_size": 1,
    "data.overlong": "drop",
    "data.packing": "none",
    "data.eval": None,
    "output_dir": "./model-out",
}

_KERNELS = Needless("model.attention: auto takes the fastest that is correct")
_SHARDED = Lacking("long sequences and layers are not split over GPUs here", off=(0, 1, False))
_SPECIAL = Lacking("set it in the model's tokenizer_config.json")
_TUNING = Lacking("another way to train; full, LoRA and QLoRA are here")
_DETECTED = Needless("transformers finds it in the model's config.json")
_TRACKER = Lacking("log.to has other trackers")
_METRICS = Lacking("eval.generate answers prompts, with the share that is right")
_PLUGIN = Lacking("of a plugin of Axolotl")

KEYS: Rules = {
    # Model
    "base_model": To("model.name"),
    **all_of("revision_of_model model_revision", To("model.revision")),
    **all_of(
        "base_model_config tokenizer_config", Lacking("model.name has weights, config and tokenizer in one place")
    ),
    "base_model_ignore_patterns": Needless("safetensors are what is read"),
    **all_of(
        "model_type tokenizer_type cls_model_config is_llama_derived_model is_mistral_derived_model "
        "is_qwen_derived_model is_falcon_derived_model lora_fan_in_fan_out",
        _DETECTED,
    ),
    "tokenizer_use_fast": Needless("tokenizers are always the fast ones"),
    "tokenizer_legacy": Needless("as the tokenizer's own files say"),
    "tokenizer_use_mistral_common": Lacking("the tokenizer is that of transformers"),
    "trust_remote_code": To("model.trust_remote_code"),
    "tokens": To("model.new_tokens"),
    "added_tokens_overrides.*": Lacking("model.new_tokens adds tokens"),
    **all_of("special_tokens.* tokens.*", _SPECIAL),
    "special_tokens.pad_token": Needless("one is chosen that is not the end token"),
    "model_config.*": Lacking("set it in the model's config.json"),
    "resize_token_embeddings_to_32x": Lacking("the vocabulary grows by model.new_tokens alone"),
    "eot_tokens": Needless("what the chat template writes to close an answer is trained on"),
    **all_of("device_map device", Needless("each process has its device")),
    **all_of("max_memory.* gpu_memory_limit", Needless("sft-recipe plan says what fits")),
    "low_cpu_mem_usage": Needless("weights are read into their place"),
    **all_of("overrides_of_model_config.* rope_scaling.*", Lacking("set it in the model's config.json")),
    "overrides_of_model_kwargs.*": Lacking("what transformers' from_pretrained takes: see model in docs/recipe.md"),
    **all_of(
        "model_quantization_config model_quantization_config_kwargs.*",
        Lacking("load the model in full, and set model.quantization"),
    ),
    **all_of("gptq gptq_disable_exllama", Lacking("load the model in full, and set model.quantization")),
    "bnb_config_kwargs.*": Needless("nf4 with quantised constants, as model.quantization: nf4 is"),
    # Adapters
    "lora_r": To("lora.rank"),
    "lora_alpha": To("lora.alpha", number),
    "lora_dropout": To("lora.dropout", number),
    "lora_modules_to_save": To("lora.modules_to_save"),
    "peft_use_dora": To("lora.use_dora"),
    "peft_use_rslora": To("lora.use_rslora"),
    "lora_model_dir": Lacking("merge that adapter first (sft-recipe merge), and train on the result"),
    "lora_target_parameters": Lacking("adapters are on modules: lora.target_modules"),
    "peft_layers_to_transform": Lacking("lora.target_modules takes a regular expression: .*layers\\.(0|1)\\..*_proj"),
    "peft_layers_pattern": Lacking("lora.target_modules takes a regular expression"),
    "peft_init_lora_weights": Lacking("adapters begin at zero", off=(True,)),
    "peft_trainable_token_indices": Lacking("model.new_tokens trains the rows of new tokens"),
    "peft.*": Lacking("lora has rank, alpha, dropout, target_modules, modules_to_save, use_dora, use_rslora"),
    **all_of(
        "loraplus_lr_ratio loraplus_lr_embedding relora relora_steps relora_warmup_steps relora_cpu_offload "
        "lisa_n_layers unfrozen_parameters qat.*",
        _TUNING,
    ),
    **all_of(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel flash_attn_cross_entropy "
        "flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp unsloth_cross_entropy_loss "
        "unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope use_kernels "
        "liger_rope liger_rms_norm liger_glu_activation liger_swiglu liger_layer_norm "
        "liger_fused_linear_cross_entropy liger_cross_entropy liger_rms_norm_gated cut_cross_entropy "
        "chunked_cross_entropy chunked_cross_entropy_num_chunks flex_attn_compile_kwargs.* use_scattermoe use_sonicmoe "
        "experts_implementation fused_attn_kernel tiled_mlp",
        _KERNELS,
    ),
    "lora_on_cpu": Needless("merging takes a tenth of a GiB"),
    "merge_lora": Needless("export.merge: true is the default"),
    "qlora_sharded_model_loading": Needless("set up with launch.strategy: fsdp2"),
    # Data
    "sequence_len": To("data.max_length"),
    "min_sample_len": Lacking("rows without a token to train on are an error"),
    "eval_sample_packing": Needless("validation rows are packed as data.packing says"),
    "pad_to_sequence_len": Needless("packed sequences have no padding"),
    **all_of("sample_packing_group_size sample_packing_bin_size", Needless("the whole data set is packed at once")),
    **all_of("sample_packing_eff_est total_num_tokens", Needless("found by packing")),
    "sample_packing_sequentially": Lacking("packing is best fit over the whole data set"),
    "multipack_real_batches": Needless("documents are kept apart whatever the batch"),
    "batch_flattening": Needless("as data.packing says"),
    "curriculum_sampling": To("data.shuffle", lambda on: not on),
    "shuffle_merged_datasets": To("data.shuffle"),
    "shuffle_before_merging_datasets": Needless("all rows are shuffled together"),
    "dataset_prepared_path": Needless("tokenised rows are cached by themselves"),
    **all_of("dataset_processes dataset_num_proc", Needless("data is tokenised on all cores")),
    "dataset_keep_in_memory": Needless("tokenised rows are memory-mapped"),
    "dataset_exact_deduplication": Lacking(
        "duplicates are counted in data.json; take them out of the data", off=(False,)
    ),
    **all_of("dataset_shard_num dataset_shard_idx", Lacking("data.max_train_samples")),
    "skip_prepare_dataset": Lacking("rows are prepared here"),
    "push_dataset_to_hub": Lacking("tokenised rows stay in the cache"),
    "hf_use_auth_token": Needless("HF_TOKEN is taken from the environment"),
    "excess_length_strategy": To("data.overlong", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
    "group_by_length": Lacking("packing leaves no padding: data.packing: bfd"),
    "default_system_message": Lacking("write it into the rows, or the chat template"),
    **all_of("image_size image_resize_algorithm", Lacking("images are not trained on")),
    "streaming": Lacking("rows are read to the end before they are trained on"),
    # Steps
    "micro_batch_size": To("train.micro_batch_size"),
    "eval_batch_size": Needless("validation takes train.micro_batch_size"),
    "learning_rate": To("train.learning_rate", number),
    "warmup_ratio": To("train.warmup_ratio", number),
    "weight_decay": To("train.weight_decay", number),
    "max_grad_norm": To("train.max_grad_norm", number),
    "lr_quadratic_warmup": Lacking("the learning rate rises linearly"),
    "cosine_constant_lr_ratio": Lacking("train.lr_scheduler: warmup_stable_decay, with trl.lr_scheduler_kwargs"),
    **all_of("embedding_lr embedding_lr_scale lr_groups", Lacking("one learning rate for all weights")),
    **all_of("adam_epsilon2 adam_beta3", Lacking("of an optimizer that transformers does not have")),
    "seed": To("train.seed"),
    "noisy_embedding_alpha": To("trl.neftune_noise_alpha", number),
    "use_pose": Lacking("the context is not extended"),
    # Numbers, memory and speed
    "tf32": To("trl.tf32", off=(False,)),
    "fp8": Lacking("train.mixed_precision is bf16, fp16 or no"),
    "gradient_checkpointing_kwargs.*": Needless("set up with train.gradient_checkpointing"),
    "activation_offloading": To("trl.activation_offloading", off=(False,)),
    "xformers_attention": Lacking("model.attention: auto takes the fastest that is correct"),
    **all_of("s2_attention sage_attention flash_optimum", Lacking("model.attention has no such")),
    "torch_compile_backend": To("trl.torch_compile_backend"),
    "torch_compile_mode": To("trl.torch_compile_mode"),
    "gc_steps": To("trl.torch_empty_cache_steps"),
    "experimental_skip_move_to_device": Needless("set up with launch.strategy"),
    **all_of(
        "sequence_parallel_degree context_parallel_size tensor_parallel_size expert_parallel_size "
        "dp_shard_size dp_replicate_size heads_k_stride ring_attn_func",
        _SHARDED,
    ),
    "use_ray": Lacking("docs/scale.md"),
    "fsdp_final_state_dict_type": Needless("the export is whole"),
    "ddp": Needless("launch.strategy: ddp is the default"),
    "local_rank": Needless("told by whoever starts the processes"),
    "world_size": Needless("launch.processes and machines"),
    # Checkpoints, logs, validation
    "output_dir": To("output_dir"),
    "save_total_limit": To("checkpoint.keep"),
    "save_safetensors": Needless("weights are always safetensors"),
    "save_only_model": Lacking("checkpoints hold what --resume needs"),
    "save_first_step": Needless("the first checkpoint is proven before it has its name"),
    **all_of(
        "resume_from_checkpoint auto_resume_from_checkpoints",
        Needless("`sft-recipe run RECIPE --resume` takes the newest complete one"),
    ),
    "load_best_model_at_end": To("checkpoint.export_best"),
    **all_of("metric_for_best_model greater_is_better", Needless("checkpoint.export_best goes by the validation loss")),
    "early_stopping_patience": Lacking("checkpoint.export_best exports the best"),
    "logging_steps": To("log.every", number),
    **all_of("hub_model_id hub_strategy hub_revision", ARGUMENTS["hub_model_id"]),
    "wandb_entity": Lacking("set WANDB_ENTITY in the environment"),
    "mlflow_tracking_uri": Lacking("set MLFLOW_TRACKING_URI in the environment"),
    "wandb_watch": Lacking("set WANDB_WATCH in the environment", off=(False, "false")),
    "wandb_log_model": Lacking("set WANDB_LOG_MODEL in the environment", off=(False, "false")),
    "wandb_mode": Lacking("set WANDB_MODE in the environment"),
    "wandb_run_id": Lacking("set WANDB_RUN_ID in the environment"),
    **all_of(
        "hf_mlflow_log_artifacts use_comet comet_project_name comet_api_key comet_workspace use_swanlab use_otel_metrics",
        _TRACKER,
    ),
    **all_of(
        "do_bench_eval bench_dataset do_causal_lm_eval eval_causal_lm_metrics eval_table_size generate_samples",
        _METRICS,
    ),
    **all_of("eval_max_new_tokens eval_table_max_new_tokens", To("eval.max_new_tokens")),
    **all_of(
        "loss_watchdog_threshold loss_watchdog_patience", Lacking("train.on_nonfinite stops at what is not finite")
    ),
    **all_of("profiler_steps profiler_steps_start", Lacking("of a profiler")),
    **all_of("include_tokens_per_second include_tkps", Needless("metrics.jsonl has tokens_per_second")),
    "strict": Needless("a recipe is always read strictly"),
    "debug": Needless("--debug"),
    **all_of("is_preprocess axolotl_config_path", Needless("set by Axolotl itself")),
    **all_of("use_eaft use_dynamic_finetuning quantize_moe_experts", _PLUGIN),
    "quantization.*": Lacking("docs/serving.md: a trained model is quantised for serving"),
    **all_of("trl.* vllm.* max_prompt_len", Needless("of other trainers")),
}


def refusal(draft: Draft) -> str | None:
    if rl := draft.get("rl"):
        return f"rl: {rl} is preference training"
    for key in ("reward_model", "process_reward_model", "pretraining_dataset", "kd_trainer", "diffusion"):
        if draft.get(key):
            return f"{key} is no fine-tuning on answers"
    if draft.get("processor_type"):
        return "processor_type is of models that see or hear"
    return None


def convert(draft: Draft) -> None:
    _weights(draft)
    _adapters(draft)
    _datasets(draft)
    _packing(draft)
    _steps(draft)
    validates = _validation(draft)
    _times(draft, validates)
    _attention(draft)
    _speed(draft)
    _plugins(draft)
    _trackers(draft)
    launch(draft)


def _weights(draft: Draft) -> None:
    """bf16, fp16, bfloat16, float16: model.dtype, train.mixed_precision; load_in_4bit, load_in_8bit: model.quantization"""
    for key, kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if draft.get(key):
            draft.carry(key, "model.quantization", kind)
    half = next((key for key in ("bf16", "bfloat16") if draft.get(key)), None)
    single = next((key for key in ("fp16", "float16") if draft.get(key)), None)
    if half:
        note = "auto is fp16 on GPUs before Ampere" if draft.get(half) == "auto" else ""
        draft.carry(half, "train.mixed_precision", "bf16", note)
    elif single:
        draft.carry(single, "train.mixed_precision", "fp16" if single == "fp16" else "no")
        draft.carry(single, "model.dtype", "float16" if draft.get("adapter") else "float32")
    elif "bf16" in draft.config:
        draft.carry("bf16", "train.mixed_precision", "no")
        draft.carry("bf16", "model.dtype", "float32")
    draft.leave("load_in_4bit", "load_in_8bit", "bf16", "bfloat16", "fp16", "float16", "float32", why="off")


_NOT_LINEAR = re.compile(r"embed|\bw[tp]e\b|lm_head|norm")  # layers that all-linear leaves out


def _adapters(draft: Draft) -> None:
    """adapter, lora_target_linear, lora_target_modules: lora (without an adapter all weights are trained)"""
    kind, modules = draft.get("adapter"), draft.get("lora_target_modules")
    if kind is not None:
        draft.carry(
            "adapter", "lora", {}, "" if kind in ("lora", "qlora") else f"{kind} is not here, LoRA is near to it"
        )
        if draft.get("lora_target_linear"):
            draft.carry("lora_target_linear", "lora.target_modules", "all-linear")
            names = listed(modules) if isinstance(modules, (str, list)) else []
            if beyond := [str(name) for name in names if _NOT_LINEAR.search(str(name))]:
                draft.lack(
                    "lora_target_modules",
                    f"all-linear leaves out {', '.join(beyond)}; lora.modules_to_save trains such layers in full",
                )
        elif modules is not None:
            draft.carry("lora_target_modules", "lora.target_modules", modules)
        draft.leave("lora_target_linear", "lora_target_modules", why="as lora.target_modules says")
        return
    of_adapters = [key for key in draft.left() if key.startswith(("lora_", "peft_use")) and key != "lora_model_dir"]
    draft.leave(*of_adapters, why="there is no adapter")


def _datasets(draft: Draft) -> None:
    """datasets (path, type, split, name, data_files, field): data.train; train_on_inputs: data.train_on"""
    datasets = draft.get("datasets")
    if not isinstance(datasets, list):
        return
    found = [_source(draft, f"datasets[{n}]", entry, "data.train") for n, entry in enumerate(datasets)]
    sources = [source for source in found if source.values]
    if sources:
        draft.carry("datasets", "data.train", [source.values for source in sources], only=("path",))
    _template(draft, {source.template: f"datasets[{n}].type" for n, source in enumerate(found) if source.template})
    _pieces(draft, found)
    trained = {source.train_on for source in sources} - {""}
    if draft.get("train_on_inputs"):
        draft.carry("train_on_inputs", "data.train_on", "all")
    elif len(trained) == 1:
        draft.assume("data.train_on", trained.pop())
    elif trained:
        draft.assume("data.train_on", "assistant")
    draft.leave("train_on_inputs", why="as data.train_on says")


def _pieces(draft: Draft, found: "list[_Source]") -> None:
    """datasets (all of type completion): data.overlong (split)"""
    cut = [n for n, source in enumerate(found) if source.cut]
    if cut and all(source.cut for source in found if source.values):
        draft.carry(f"datasets[{cut[0]}].type", "data.overlong", "split")
        draft.leave("excess_length_strategy", why="Axolotl has cut texts of type completion into pieces by then")
    elif cut:
        draft.remarks.append(
            "data.overlong: one for all data here; Axolotl cuts long texts of type completion into pieces, as split does"
        )


def _template(draft: Draft, templates: dict[str, str]) -> None:
    """chat_template, chat_template_jinja: data.template"""
    name, jinja = draft.get("chat_template"), draft.get("chat_template_jinja")
    if isinstance(jinja, str) and jinja.endswith((".jinja", ".jinja2", ".j2")):
        draft.carry("chat_template_jinja", "data.template", jinja)
    elif jinja is not None:
        draft.lack("chat_template_jinja", "save it to a .jinja file, and set data.template to its path")
    elif len(templates) == 1:
        [(template, key)] = templates.items()
        draft.carry(key, "data.template", template)
    elif templates:
        draft.remarks.append("data.template: one for all data here, and these have two: set it, and look at preview")
    if name not in (None, "tokenizer_default", "jinja") and draft.value("data.template") == "chat":
        draft.lack("chat_template", f"data.template: chat is the tokenizer's own; if that is not {name}, a .jinja file")
    draft.leave("chat_template", why="as data.template says")


@dataclass(frozen=True)
class _Source:
    """A source of a recipe, with the template, what is trained on, and whether long texts are cut into pieces, all of which go
    with its type in Axolotl."""

    values: dict[str, Any]
    template: str = ""
    train_on: str = ""
    cut: bool = False


def _source(draft: Draft, here: str, entry: Any, there: str) -> _Source:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return _Source({})
    kind, path, files = entry.get("type"), entry["path"], entry.get("data_files")
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    if isinstance(files, str):
        path = files if path in ("json", "csv", "parquet") else f"{path.rstrip('/')}/{files}"
    split, share = part_of(entry.get("split"))
    values = {
        "path": path,
        "name": entry.get("name"),
        "split": split,
        "weight": share if there == "data.train" else None,
    }
    values = {part: value for part, value in values.items() if value not in (None, "train")}
    base = re.split(r"[.:]", kind)[0] if isinstance(kind, str) else ""
    template = train_on = ""
    columns: dict[str, Any] = {}
    if kind == "alpaca":
        values["format"], template, train_on = "alpaca", "alpaca", "completion"
    elif base in ("chat_template", "sharegpt"):
        values["format"], template, train_on = "messages", "chat", "assistant"
        columns = {"messages": entry.get("field_messages")}
    elif base == "completion":
        values["format"], train_on = "text", "all"
        columns = {"text": entry.get("field")}
    elif isinstance(kind, dict):
        values["format"], train_on = "alpaca", "completion"
        columns = {name: kind.get(f"field_{name}") for name in ("instruction", "input", "output")}
    columns = {ours: name for ours, name in columns.items() if _is_name(name, ours, "conversations")}
    if columns:
        values["columns"] = columns
    rules = {**_OF_DATASET, **all_of(_TAKEN, Needless(f"in {there}"))}
    if "format" not in values:
        rules["type"] = Lacking(f"see the data: format and columns of {there}, and data.template")
    if share and there == "data.train":
        rules["split"] = Needless("weight in data.train: as many rows, at random")
    elif split is None or share:
        rules["split"] = Lacking("no parts of splits: data.max_train_samples, data.max_eval_samples")
    if isinstance(files, list):
        rules["data_files"] = Lacking("give the files: data.train: a path, a glob, or a list of them")
    follow(draft, rules, here)
    return _Source(values, template, train_on, cut=base == "completion")


def _is_name(value: Any, *usual: str) -> bool:
    return isinstance(value, str) and value not in usual


_TAKEN = "path name split data_files ds_type field field_messages type " + " ".join(
    f"type.field_{name}" for name in ("instruction", "input", "output")
)
_PROMPT = Lacking("write the prompt as a .jinja chat template, and set data.template to its path")
_FOUND = Needless("human and gpt, user and assistant are found")
_AS_WRITTEN = ("role", "from", "content", "value")
_NAMES = Lacking("messages have role and content, or from and value: rename them in the data", off=_AS_WRITTEN)
_TURNS = Lacking("data.train_on: assistant trains on every assistant message, with what closes it", off=("turn",))
_OF_DATASET: dict[str, Rule] = {
    **all_of("message_property_mappings.* message_field_role message_field_content", _NAMES),
    **all_of("field_human field_model roles.*", _FOUND),
    "type.*": _PROMPT,
    "system_prompt": _PROMPT,
    "field_tools": Needless("the column tools is read"),
    "roles_to_train": Lacking(
        "data.train_on: assistant trains on assistants, all on everybody", off=(["assistant"], ["gpt"])
    ),
    **all_of("train_on_eos train_on_eot message_field_training message_field_training_detail", _TURNS),
    "chat_template": Lacking("data.template is of all data: chat is the tokenizer's own", off=("tokenizer_default",)),
    **all_of("chat_template_jinja conversation", Lacking("data.template is of all data: the path of a .jinja file")),
    "drop_system_message": Lacking("take it out of the rows"),
    **all_of("shards shards_idx", Lacking("weight in data.train: 0.1 is a random tenth", off=(1,))),
    "preprocess_shards": Needless("tokenised rows are memory-mapped"),
    "trust_remote_code": Lacking("rows are data, not code"),
    "revision": Lacking("data sets are taken as they are now; keep a copy, and give its path"),
    **all_of("split_thinking field_thinking template_thinking_key", Lacking("as the chat template does it")),
}


def _packing(draft: Draft) -> None:
    """sample_packing: data.packing"""
    if draft.get("sample_packing") is not None:
        draft.carry("sample_packing", "data.packing", "bfd" if draft.get("sample_packing") else "none")


def _steps(draft: Draft) -> None:
    """num_epochs, max_steps, gradient_accumulation_steps: train.epochs, train.max_steps, train.gradient_accumulation_steps;
    batch_size: train.global_batch_size"""
    length(draft, "num_epochs", 1)
    total, steps = draft.get("batch_size"), draft.get("gradient_accumulation_steps")
    if steps is not None:
        draft.carry("gradient_accumulation_steps", "train.gradient_accumulation_steps", steps)
        draft.leave("batch_size", why="as gradient_accumulation_steps says")
    elif total is not None:
        draft.carry("batch_size", "train.global_batch_size", total)
    else:
        draft.assume("train.gradient_accumulation_steps", 1)
    _rate(draft)
    warmup(draft)


def _rate(draft: Draft) -> None:
    """optimizer: train.optimizer; lr_scheduler, cosine_min_lr_ratio: train.lr_scheduler"""
    optimizer(draft, "optimizer")
    if isinstance(settings := draft.get("optim_args"), dict):
        draft.carry("optim_args", "trl.optim_args", ", ".join(f"{key}={value}" for key, value in settings.items()))
    floor = draft.get("cosine_min_lr_ratio")
    if floor is not None and draft.get("lr_scheduler", "cosine") == "cosine":
        draft.carry("cosine_min_lr_ratio", "train.lr_scheduler", "cosine_with_min_lr")
        draft.carry("cosine_min_lr_ratio", "trl.lr_scheduler_kwargs", {"min_lr_rate": floor})
        draft.leave("lr_scheduler", why="as cosine_min_lr_ratio says")
    else:
        scheduler(draft, "lr_scheduler")
        draft.leave("cosine_min_lr_ratio", why="of the schedule cosine")


def _validation(draft: Draft) -> bool:
    """val_set_size, test_datasets: data.eval"""
    tests = draft.get("test_datasets")
    if isinstance(tests, list) and (source := _source(draft, "test_datasets[0]", tests[0], "data.eval").values):
        draft.carry("test_datasets[0]", "data.eval", source, only=("path",))
        for leaf in draft.under("test_datasets"):
            if not leaf.startswith("test_datasets[0]"):
                draft.lack(leaf, "data.eval is one source; put the rows into one file")
        draft.leave("val_set_size", why="test_datasets is what is validated on")
        return True
    return held_out(draft, "val_set_size")


def _times(draft: Draft, validates: bool) -> None:
    """evals_per_epoch: eval.every; saves_per_epoch: checkpoint.every"""
    evaluation(draft, validates)
    saving(draft)
    if not validates:
        draft.leave("evals_per_epoch", why="there are no validation rows")
    for key, to in (("evals_per_epoch", "eval.every"), ("saves_per_epoch", "checkpoint.every")):
        if (times := number(draft.get(key))) is not None and key in draft.left():
            if times == 0:
                draft.carry(key, to, None)
            else:
                an_epoch(draft, key, to, times)


_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}


def _attention(draft: Draft) -> None:
    """flash_attention, sdp_attention, flex_attention, eager_attention, attn_implementation: model.attention"""
    for key, ours in _ATTENTION.items():
        if draft.get(key):
            draft.carry(key, "model.attention", ours)
    said = draft.get("attn_implementation")
    if isinstance(said, str) and said in ("flash_attention_3", "auto", *_ATTENTION.values()):
        draft.carry("attn_implementation", "model.attention", said)
    elif said is not None:
        draft.lack("attn_implementation", "model.attention: auto takes the fastest that is correct")
    draft.leave(*_ATTENTION, why="off")


def _speed(draft: Draft) -> None:
    """gradient_checkpointing: train.gradient_checkpointing; torch_compile: train.compile"""
    recompute, compiles = draft.get("gradient_checkpointing"), draft.get("torch_compile")
    if recompute is not None:
        note = "" if isinstance(recompute, bool) else "nothing moves to the host, which trl.activation_offloading does"
        draft.carry("gradient_checkpointing", "train.gradient_checkpointing", bool(recompute), note)
    if compiles is not None:
        draft.carry("torch_compile", "train.compile", False if compiles == "auto" else compiles)


def _plugins(draft: Draft) -> None:
    """plugins: none (of Liger and Cut Cross Entropy the loss is the same)"""
    names = listed(draft.get("plugins"))
    if isinstance(names, list) and all(re.search(r"liger|cut_cross_entropy|kernels", str(name)) for name in names):
        draft.leave("plugins", why="faster kernels: the loss here does not make all logits at once either")
    elif names:
        draft.lack("plugins", "of Axolotl; those for speed (Liger, Cut Cross Entropy) need no replacement")


def _trackers(draft: Draft) -> None:
    """use_wandb, use_tensorboard, use_trackio, use_mlflow: log.to; wandb_project, mlflow_experiment_name: log.project;
    wandb_name, mlflow_run_name: log.name"""
    wants = {name: bool(draft.get(f"use_{name}")) for name in ("wandb", "tensorboard", "trackio", "mlflow")}
    wants["wandb"] |= bool(draft.get("wandb_project")) and draft.get("use_wandb") is not False
    if to := [name for name, wanted in wants.items() if wanted]:
        keys = ("use_wandb", "wandb_project", "use_tensorboard", "use_trackio", "use_mlflow")
        key = next(key for key in keys if draft.get(key))
        draft.carry(key, "log.to", to)
    in_trackers(
        draft,
        project=("wandb_project", "mlflow_experiment_name"),
        name=("wandb_name", "wandb_run_name", "mlflow_run_name"),
    )
    draft.leave("use_wandb", "use_tensorboard", "use_trackio", "use_mlflow", why="as log.to says")


GROUPS = (_weights, _adapters, _datasets, _pieces, _template, _packing, _steps, warmup, _rate, _validation, _times,
          evaluation, saving, _attention, _speed, _plugins, _trackers, launch)  # fmt: skip

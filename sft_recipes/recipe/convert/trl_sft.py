"""The YAML of `trl sft --config`: fields of ScriptArguments, DatasetMixtureConfig, ModelConfig and SFTConfig of TRL 1.16; and
what the alignment-handbook has besides."""

from typing import Any

from sft_recipes.recipe.convert.arguments import ARGUMENTS, GROUPS_OF_ARGUMENTS, arguments, held_out
from sft_recipes.recipe.convert.draft import Draft, Entry, Lacking, Needless, Rules, To, all_of, follow, number, part_of

NAME = "trl sft"
SIGNS = (
    "dataset_name datasets dataset_mixer dataset_mixture use_peft model_name_or_path max_length "
    "dataset_text_field dataset_train_split attn_implementation torch_dtype max_seq_length packing "
    "per_device_train_batch_size num_train_epochs dataset_test_split assistant_only_loss"
)
NEEDS = {"model.name": "model_name_or_path", "data.train": "dataset_name"}
DEFAULTS = {
    "model.dtype": "float32",
    "data.eval": None,
    "data.max_length": 1024,
    "data.overlong": "truncate",
    "data.packing": "none",
    "train.micro_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "train.lr_scheduler": "linear",
    "train.warmup_ratio": 0.0,
    "output_dir": "trainer_output",
}
# A prompt and a completion with nothing between them, as a chat template.
RAW = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
# Keys of TRL's other trainers.
_OTHERS = {
    "beta": "DPO, KTO or GRPO",
    "precompute_ref_log_probs": "DPO",
    "rpo_alpha": "DPO",
    "simpo_gamma": "CPO",
    "desirable_weight": "KTO",
    "num_generations": "GRPO",
    "max_completion_length": "GRPO",
    "reward_funcs": "GRPO",
    "reward_model_path": "an online trainer",
    "center_rewards_coefficient": "a reward model",
    "teacher_model_name_or_path": "distillation",
}

KEYS: Rules = {
    # Model
    "model_name_or_path": To("model.name"),
    "model_revision": To("model.revision", lambda name: None if name == "main" else name),
    "trust_remote_code": To("model.trust_remote_code"),
    "attn_implementation": To(
        "model.attention",
        {name: name for name in ("flash_attention_2", "flash_attention_3", "flex_attention", "sdpa", "eager")},
    ),
    "bnb_4bit_quant_storage": Needless("set up with launch.strategy"),
    "use_bnb_nested_quant": Needless("nf4 and fp4 always quantise their constants, too"),
    "model_init_kwargs.*": Lacking("what transformers' from_pretrained takes: see model in docs/recipe.md"),
    # Adapters
    "lora_r": To("lora.rank"),
    "lora_alpha": To("lora.alpha", number),
    "lora_dropout": To("lora.dropout", number),
    "lora_modules_to_save": To("lora.modules_to_save", lambda names: [names] if isinstance(names, str) else names),
    "lora_target_parameters": Lacking("adapters are on modules: lora.target_modules"),
    "lora_task_type": Lacking("a recipe trains a causal language model", off=("CAUSAL_LM",)),
    "use_rslora": To("lora.use_rslora"),
    "use_dora": To("lora.use_dora"),
    # Data
    **all_of("dataset_streaming streaming", Lacking("rows are read to the end before they are trained on")),
    "ignore_bias_buffers": Needless("of old models with DDP"),
    "dataset_kwargs.*": Needless("rows are prepared here"),
    "preprocessing_num_workers": Needless("data is tokenised on all cores"),
    "padding_free": Needless("as data.packing says"),
    "eval_packing": Needless("validation rows are packed as data.packing says"),
    "shuffle_dataset": Needless("as data.shuffle says"),
    "pad_to_multiple_of": Needless("packed sequences have no padding"),
    "eos_token": Lacking("the token that ends a document is the tokenizer's, or what the chat template writes"),
    "pad_token": Needless("one is chosen that is not the end token"),
    "max_prompt_length": Lacking("data.max_length is of prompt and answer"),
    "neftune_noise_alpha": To("trl.neftune_noise_alpha"),
    "loss_type": Lacking("the loss is the likelihood of the tokens", off=("nll", "chunked_nll")),
    # Where it runs
    "num_processes": To("launch.processes"),
    "num_machines": To("launch.machines"),
    "env.*": Lacking("set it in the environment"),
    # trackers
    "wandb_entity": Lacking("set WANDB_ENTITY in the environment"),
    **ARGUMENTS,
}


def refusal(draft: Draft) -> str | None:
    key = next((key for key in _OTHERS if draft.get(key) is not None), None)
    return None if key is None else f"{key} is of {_OTHERS[key]}"


def convert(draft: Draft) -> None:
    _weights(draft)
    _quantization(draft)
    _adapters(draft)
    validates = _data(draft)
    _lengths(draft)
    _text(draft)
    _trained_on(draft)
    arguments(draft, validates=validates, epochs=3)
    _accelerate(draft)


def _weights(draft: Draft) -> None:
    """dtype, torch_dtype: model.dtype; bf16, fp16: train.mixed_precision"""
    for key in ("dtype", "torch_dtype"):
        if draft.get(key) == "auto":
            draft.carry(key, "model.dtype", "bfloat16", "the type of most weights on the hub")
        elif draft.get(key) is not None:
            draft.carry(key, "model.dtype", draft.get(key))
    if draft.get("fp16"):
        draft.carry("fp16", "train.mixed_precision", "fp16")
    elif draft.get("bf16") is not None:
        draft.carry("bf16", "train.mixed_precision", "bf16" if draft.get("bf16") else "no")
    draft.leave("bf16", "fp16", why="as train.mixed_precision says")


def _quantization(draft: Draft) -> None:
    """load_in_4bit, load_in_8bit, bnb_4bit_quant_type: model.quantization"""
    for key, kind in (("load_in_4bit", draft.get("bnb_4bit_quant_type", "nf4")), ("load_in_8bit", "int8")):
        if draft.get(key):
            draft.carry(key, "model.quantization", kind)
    draft.leave("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", why="as model.quantization says")


def _adapters(draft: Draft) -> None:
    """use_peft: lora (without it all weights are trained); lora_target_modules: lora.target_modules"""
    modules = draft.get("lora_target_modules")
    if not draft.get("use_peft"):
        of_adapters = [key for key in draft.left() if key.startswith("lora_") or key in ("use_rslora", "use_dora")]
        draft.leave("use_peft", *of_adapters, why="all weights are trained")
        return
    draft.carry("use_peft", "lora", {})
    if modules is not None:
        draft.carry("lora_target_modules", "lora.target_modules", modules[0] if modules == ["all-linear"] else modules)
    else:
        draft.assume("lora.target_modules", ["q_proj", "v_proj"])
        draft.remarks.append("lora.target_modules: PEFT's choice for Llama and Mistral; for other models look there")
    if draft.get("lora_dropout") is None:
        draft.assume("lora.dropout", 0.05)


def _data(draft: Draft) -> bool:
    """dataset_name, dataset_config, dataset_train_split, datasets, dataset_mixer: data.train; dataset_test_split: data.eval"""
    mixture = next((key for key in ("datasets", "dataset_mixture.datasets") if draft.get(key)), None)
    if mixture:
        return _mixture(draft, mixture)
    if isinstance(mixer := draft.get("dataset_mixer"), dict):
        return _mixer(draft, mixer)
    name, config = draft.get("dataset_name"), draft.get("dataset_config")
    train, test = draft.get("dataset_train_split"), draft.get("dataset_test_split")
    source = {"path": name} | ({} if config is None else {"name": config})
    split = {"split": train} if train not in (None, "train") else {}
    if name is not None:
        draft.carry("dataset_name", "data.train", [source | split] if config is not None or split else name)
    draft.leave("dataset_config", "dataset_train_split", why="in data.train")
    strategy = next((key for key in ("eval_strategy", "evaluation_strategy") if draft.get(key) is not None), None)
    if name is None or strategy is None or draft.get(strategy) in ("no", False):
        draft.leave("dataset_test_split", why="there is no validation: eval_strategy")
        return False
    draft.carry("dataset_test_split" if test else strategy, "data.eval", source | {"split": test or "test"})
    return True


def _mixture(draft: Draft, key: str) -> bool:
    datasets = draft.get(key)
    sources = [
        _source(draft, f"{key}[{n}]", entry) for n, entry in enumerate(datasets if isinstance(datasets, list) else [])
    ]
    draft.carry(key, "data.train", [source for source in sources if source], only=("path", "id"))
    draft.leave(
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", why=f"{key} goes before it"
    )
    draft.leave("dataset_mixture.seed", why="train.seed is that of the data, too")
    return held_out(draft, key.replace("datasets", "test_split_size"))


_TAKEN = Needless("in data.train")
_OF_DATASET: Rules = {
    **all_of("path id name config split weight data_files", _TAKEN),
    "columns": Needless("other columns are left alone"),
    "fraction": Lacking("set weight in data.train: 2 is each row twice, 0.5 a random half"),
    **all_of("data_dir data_files.*", Lacking("give the files: data.train: a path, a glob, or a list of them")),
}


def _source(draft: Draft, here: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        return {}
    files, (split, share) = entry.get("data_files"), part_of(entry.get("split"))
    source = {
        "path": files if isinstance(files, str) else entry.get("path", entry.get("id")),
        "name": entry.get("name", entry.get("config")),
        "split": split,
        # weight is of the alignment-handbook: the share of the rows that is taken, at random
        "weight": share or (number(entry["weight"]) if isinstance(entry.get("weight"), float) else None),
    }
    if isinstance(files, list):
        draft.lack(f"{here}.data_files", "give them: data.train: a path, a glob, or a list of them")
    if split is None:
        draft.lack(f"{here}.split", "no parts of splits: data.max_train_samples takes so many rows")
    follow(draft, _OF_DATASET, here)
    return {part: value for part, value in source.items() if value not in (None, "train", 1)}


def _mixer(draft: Draft, mixer: dict[Any, Any]) -> bool:
    sources = [{"path": str(path), "weight": part} for path, part in mixer.items()]
    draft.carry("dataset_mixer", "data.train", sources, "a part below 1 is a random one")
    draft.lack("dataset_splits", "give them: data.train: [{path, split}], data.eval: {path, split}")
    draft.leave("dataset_configs", why="give it with name in data.train")
    return False


def _lengths(draft: Draft) -> None:
    """max_length, max_seq_length: data.max_length; packing, packing_strategy: data.packing,
    data.cross_document_attention, data.overlong; truncation_mode: data.overlong"""
    for key in ("max_length", "max_seq_length"):
        if key in draft.config and draft.config[key] is None:
            draft.lack(
                key, "a recipe has a length: data.max_length; longer rows are an error, which says what would fit"
            )
            draft.assume("data.max_length", 4096, f"{key} is null; set one")
            draft.entries["data.overlong"] = Entry("error", f"{key} is null: nothing is cut")
        elif draft.get(key) is not None:
            draft.carry(key, "data.max_length", draft.get(key))
    strategy = draft.get("packing_strategy", "bfd")
    if draft.get("packing"):
        draft.carry("packing", "data.packing", "wrapped" if strategy == "wrapped" else "bfd")
        if strategy == "wrapped":
            draft.carry("packing_strategy", "data.cross_document_attention", True)
            draft.carry("packing_strategy", "data.overlong", "split")  # TRL truncates no text that it wraps
        elif strategy in ("bfd_split", "bfd-requeue"):
            draft.carry("packing_strategy", "data.overlong", "split")
    elif draft.get("packing") is not None:
        draft.carry("packing", "data.packing", "none")
    draft.leave("packing_strategy", why="as data.packing says")
    if draft.get("truncation_mode") == "keep_end" and not draft.get("packing"):
        draft.lack("truncation_mode", "data.overlong: truncate keeps the beginning")
    draft.leave("truncation_mode", why="data.overlong: truncate keeps the beginning")


def _text(draft: Draft) -> None:
    """dataset_text_field: data.format, data.columns; chat_template_path: data.template"""
    if (field := draft.get("dataset_text_field")) is not None:
        draft.carry("dataset_text_field", "data.format", "text")
        if field != "text":
            draft.carry("dataset_text_field", "data.columns", {"text": field})
    for key in ("chat_template_path", "chat_template"):
        template = draft.get(key)
        if isinstance(template, str) and template.endswith((".jinja", ".jinja2")):
            draft.carry(key, "data.template", template)
        elif template is not None:
            draft.lack(key, "save the template to a .jinja file, and set data.template to its path")
    if field is None and not draft.get("assistant_only_loss") and "data.template" not in draft.entries:
        draft.remarks.append(
            "data.template: TRL joins a prompt and a completion that are text as they are, and here they get the Alpaca "
            f"template: for such rows save {RAW} to a .jinja file, and set data.template to its path"
        )


def _trained_on(draft: Draft) -> None:
    """assistant_only_loss, completion_only_loss: data.train_on"""
    if draft.get("assistant_only_loss"):
        draft.carry("assistant_only_loss", "data.train_on", "assistant")
    elif draft.get("completion_only_loss") is not None:
        draft.carry(
            "completion_only_loss", "data.train_on", "completion" if draft.get("completion_only_loss") else "all"
        )
    elif "data.format" not in draft.entries:
        draft.remarks.append(
            "data.train_on: TRL trains on the completion of rows that have one, and on every token of messages and text: for "
            "these set all"
        )
    draft.leave("assistant_only_loss", "completion_only_loss", why="as data.train_on says")


def _accelerate(draft: Draft) -> None:
    """accelerate_config: launch.strategy"""
    names = {"single_gpu": "ddp", "multi_gpu": "ddp", "zero1": "zero2", "zero2": "zero2", "zero3": "zero3"}
    names |= {"fsdp1": "fsdp2", "fsdp2": "fsdp2"}
    if (name := str(draft.get("accelerate_config"))) in names:
        draft.carry("accelerate_config", "launch.strategy", names[name])
    elif draft.get("accelerate_config") is not None:
        draft.lack("accelerate_config", "set launch.strategy, processes and machines as it says")


GROUPS = (_weights, _quantization, _adapters, _data, _lengths, _text, _trained_on, *GROUPS_OF_ARGUMENTS, _accelerate)

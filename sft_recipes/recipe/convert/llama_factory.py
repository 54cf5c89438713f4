"""LLaMA-Factory's YAML and JSON (0.9), with the data sets that its dataset_info.json describes."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipes.recipe.convert.arguments import ARGUMENTS, GROUPS_OF_ARGUMENTS, arguments, held_out
from sft_recipes.recipe.convert.draft import Draft, Lacking, Needless, Rules, To, all_of, listed, number

NAME = "LLaMA-Factory"
SIGNS = (
    "stage finetuning_type cutoff_len template lora_target dataset_dir quantization_bit do_train overwrite_cache "
    "plot_loss lora_rank dataset val_size flash_attn adapter_name_or_path export_dir"
)
NEEDS = {"model.name": "model_name_or_path", "data.train": "dataset", "output_dir": "output_dir"}
DEFAULTS = {
    "data.eval": None,
    "data.train_on": "assistant",
    "data.max_length": 2048,
    "data.overlong": "truncate",
    "data.packing": "none",
    "train.micro_batch_size": 8,
    "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 5e-5,
    "train.lr_scheduler": "linear",
    "train.warmup_ratio": 0.0,
}

_TUNING = Lacking("another way to train; full, LoRA and QLoRA are here")
_EXPORT = Needless("every run exports a verified model")
_PREFERENCES = Lacking("of preference training, which comes after: docs/dpo.md")
_MEDIA = Lacking("images, videos and sound are not trained on")
_KERNELS = Needless("model.attention: auto takes the fastest that is correct")

KEYS: Rules = {
    # Model
    "model_name_or_path": To("model.name"),
    "model_revision": To("model.revision", lambda name: None if name == "main" else name),
    "trust_remote_code": To("model.trust_remote_code"),
    "flash_attn": To(
        "model.attention",
        {"auto": "auto", "fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"},
    ),
    "adapter_name_or_path": Lacking("merge that adapter first (sft-recipe merge), and train on the result"),
    **all_of("add_tokens add_special_tokens new_special_tokens", To("model.new_tokens", listed)),
    "resize_vocab": Needless("model.new_tokens resizes"),
    "use_fast_tokenizer": Needless("tokenizers are always the fast ones"),
    "double_quantization": Needless("nf4 and fp4 always quantise their constants, too"),
    "quantization_method": Lacking("bitsandbytes quantises: model.quantization", off=("bitsandbytes", "bnb")),
    "quantization_device_map": Needless("set up with launch.strategy"),
    "rope_scaling": Lacking("set it in the model's config.json"),
    **all_of("low_cpu_mem_usage offload_folder", Needless("weights are read into their place")),
    "upcast_layernorm": Lacking("the norms have the weights' type: model.dtype"),
    "upcast_lmhead_output": Lacking("the loss is computed in float32"),
    "disable_gradient_checkpointing": To("train.gradient_checkpointing", lambda off: not off),
    "use_reentrant_gc": Needless("set up with train.gradient_checkpointing"),
    "use_unsloth": Lacking("transformers and TRL train here"),
    "use_unsloth_gc": Lacking("train.gradient_checkpointing: true"),
    "enable_liger_kernel": Needless("the loss here does not make all logits at once either"),
    "moe_aux_loss_coef": To("trl.router_aux_loss_coef", number),
    "use_dft_loss": Lacking("the loss is the likelihood of the tokens"),
    **all_of(
        "shift_attn pissa_init pissa_iter pissa_convert loraplus_lr_ratio use_llama_pro use_galore use_apollo "
        "use_badam use_adam_mini use_muon mixture_of_depths train_from_scratch",
        _TUNING,
    ),
    "cache_dir": Lacking("set HF_HOME in the environment"),
    **all_of("use_kv_cache infer_backend infer_dtype", Needless("of answering")),
    "print_param_status": Needless("the preflight names what learns"),
    # Adapters
    "lora_rank": To("lora.rank"),
    "lora_dropout": To("lora.dropout", number),
    "additional_target": To("lora.modules_to_save", listed),
    "use_rslora": To("lora.use_rslora"),
    "use_dora": To("lora.use_dora"),
    "create_new_adapter": Lacking("merge the adapter first (sft-recipe merge), and train on the result"),
    # Data
    "cutoff_len": To("data.max_length"),
    "stage": Needless("a recipe is of supervised fine-tuning"),
    "streaming": Lacking("rows are read to the end before they are trained on"),
    "buffer_size": Needless("of streaming"),
    "mix_strategy": Lacking("set weight in data.train: 2 is each row twice, 0.5 a random half", off=("concat",)),
    "interleave_probs": Lacking("set weight in data.train: 2 is each row twice, 0.5 a random half"),
    "disable_shuffling": To("data.shuffle", lambda off: not off),
    **all_of(
        "media_dir image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen "
        "use_audio_in_video freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
        _MEDIA,
    ),
    "tokenized_path": Needless("tokenised rows are cached by themselves"),
    "overwrite_cache": Needless("the cache is never stale; --no-cache goes without"),
    "preprocessing_batch_size": Needless("rows are tokenised in batches"),
    "ignore_pad_token_for_loss": Needless("padding is never trained on"),
    "tool_format": Lacking("tool calls are written by the chat template"),
    "default_system": Lacking("write it into the rows, or the chat template"),
    **all_of("enable_thinking reasoning_effort", Lacking("as the chat template does it")),
    "eval_on_each_dataset": Lacking("validation is over all rows"),
    # What comes out
    "plot_loss": Needless("learning_curve.png is always drawn"),
    "compute_accuracy": Lacking("eval.generate with expected answers logs the share that is right"),
    "include_effective_tokens_per_second": Needless("metrics.jsonl has trained_tokens_per_second"),
    "early_stopping_steps": Lacking("checkpoint.export_best exports the best"),
    **all_of("export_dir export_size export_device export_legacy_format", _EXPORT),
    "export_hub_model_id": Lacking("upload the verified model yourself: hf upload NAME RUN/model"),
    "export_quantization_bit": Lacking("docs/serving.md"),
    **all_of("ref_model pref_beta pref_loss pref_ftx", _PREFERENCES),
    "use_swanlab": Lacking("log.to has other trackers"),
    "hf_hub_token": Needless("taken from HF_TOKEN in the environment"),
    **all_of("ms_hub_token om_hub_token", Lacking("models are taken from the hub, or a directory")),
    "use_v1_kernels": _KERNELS,
    **ARGUMENTS,
}


def refusal(draft: Draft) -> str | None:
    stage = draft.get("stage", "sft")
    if stage != "sft":
        return f"stage: {stage} is not sft"
    if draft.get("do_train") is False or not (draft.get("do_train") or draft.get("dataset")):
        return "it does not train (do_train)"
    if key := next((key for key in _SEEING if draft.get(key)), None):
        return f"{key} is of models that see or hear"
    return None


def convert(draft: Draft) -> None:
    _adapters(draft)
    _weights(draft)
    _quantization(draft)
    _data(draft)
    validates = _validation(draft)
    _template(draft)
    _trained_on(draft)
    _packing(draft)
    arguments(draft, validates=validates, epochs=3)


_SEEING = ("image_max_pixels", "video_max_pixels", "image_min_pixels", "audio_sampling_rate")
_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora")


def _adapters(draft: Draft) -> None:
    """finetuning_type: lora (full trains all weights); lora_target: lora.target_modules; lora_alpha: lora.alpha"""
    kind = draft.get("finetuning_type", "lora")
    if kind in ("full", "freeze"):
        if kind == "freeze":
            draft.lack("finetuning_type", "the recipe trains all weights; lora: {} would train adapters")
        draft.leave("finetuning_type", *_OF_LORA, why="all weights are trained")
        return
    draft.carry("finetuning_type", "lora", {}, "" if kind == "lora" else f"{kind} is not here, LoRA is near to it")
    target, rank, alpha = listed(draft.get("lora_target")), draft.get("lora_rank"), draft.get("lora_alpha")
    if target is not None:
        draft.carry(
            "lora_target", "lora.target_modules", "all-linear" if target in (["all"], ["all-linear"]) else target
        )
    if alpha is not None:
        draft.carry("lora_alpha", "lora.alpha", number(alpha))
    elif rank is not None:
        draft.carry("lora_rank", "lora.alpha", 2 * rank if isinstance(rank, int) else rank, "twice the rank")
    if rank is not None:
        draft.carry("lora_rank", "lora.rank", rank)
    draft.assume("lora.rank", 8)
    draft.assume("lora.alpha", 16)


def _weights(draft: Draft) -> None:
    """bf16, fp16, pure_bf16: model.dtype, train.mixed_precision"""
    key = next((key for key in ("pure_bf16", "bf16", "fp16") if draft.get(key)), None)
    adapters = "lora" in draft.entries
    half = {"pure_bf16": "bfloat16", "bf16": "bfloat16", "fp16": "float16", None: "bfloat16"}[key]
    dtype = half if adapters or key == "pure_bf16" else "float32"  # what is trained is float32, but in pure_bf16
    precision = {"pure_bf16": "no", "bf16": "bf16", "fp16": "fp16", None: "no"}[key]
    if key is None:
        draft.assume("model.dtype", dtype)
        draft.assume("train.mixed_precision", precision)
    else:
        draft.carry(key, "model.dtype", dtype)
        draft.carry(key, "train.mixed_precision", precision)
    draft.leave("pure_bf16", "bf16", "fp16", why="as model.dtype and train.mixed_precision say")


def _quantization(draft: Draft) -> None:
    """quantization_bit, quantization_type: model.quantization"""
    bits = draft.get("quantization_bit")
    if bits in (4, 8):
        draft.carry(
            "quantization_bit", "model.quantization", "int8" if bits == 8 else draft.get("quantization_type", "nf4")
        )
    elif bits is not None:
        draft.lack("quantization_bit", "model.quantization is nf4, fp4 or int8")
    draft.leave("quantization_type", why="as model.quantization says")


def _data(draft: Draft) -> None:
    """dataset, dataset_dir: data.train; eval_dataset: data.eval; max_samples: data.max_train_samples"""
    folder = str(draft.get("dataset_dir", "data"))
    known = _described(folder)
    for key, to in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = listed(draft.get(key))
        if not isinstance(names, list) or not names:
            continue
        sources = [_source(draft, str(name), known, folder) for name in names]
        if to == "data.train":
            draft.carry(key, to, sources)
        elif len(sources) == 1:
            draft.carry(key, to, sources[0])
        else:
            draft.lack(key, "data.eval is one source; put the rows into one file")
        missing = [str(name) for name in names if str(name) not in known]
        if missing and folder != "ONLINE":
            where = f"{folder}/dataset_info.json"
            draft.remarks.append(
                f"{to}: {', '.join(missing)}: {where} does not describe it here; put its file or hub id"
            )
    most = draft.get("max_samples")
    if isinstance(most, int):
        names = listed(draft.get("dataset"))
        several = len(names) if isinstance(names, list) else 1
        draft.carry(
            "max_samples", "data.max_train_samples", most * several, "over all data sets" if several > 1 else ""
        )
    draft.leave("dataset_dir", why="in data.train")


def _described(folder: str) -> Mapping[str, Any]:
    """dataset_info.json, {} where it is not to be had."""
    with suppress(OSError, ValueError):
        found = json.loads((Path(folder) / "dataset_info.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


# Columns by their names there: what they are called here, and by default there.
_COLUMNS = {
    "prompt": ("instruction", "instruction"),
    "query": ("input", "input"),
    "response": ("output", "output"),
    "messages": ("messages", "conversations"),
}
_READ = {"hf_hub_url", "file_name", "subset", "split", "columns", "formatting"}


def _source(draft: Draft, name: str, known: Mapping[str, Any], folder: str) -> Any:
    """What dataset_info.json says of a name, as a source; the name itself where it says nothing."""
    said = known.get(name)
    if not isinstance(said, dict) or not (said.get("hf_hub_url") or said.get("file_name")):
        return name
    messages, columns = said.get("formatting") == "sharegpt", said.get("columns") or {}
    renamed = {_COLUMNS[theirs][0]: column for theirs, column in columns.items()
               if theirs in _COLUMNS and column not in _COLUMNS[theirs]}  # fmt: skip
    source = {
        "path": said.get("hf_hub_url") or f"{folder}/{said['file_name']}",
        "name": said.get("subset"),
        "split": said.get("split"),
        "format": "messages" if messages else "alpaca",
        "columns": renamed,
    }
    beyond = [
        theirs for theirs in columns if theirs not in _COLUMNS and not (messages and theirs in ("system", "tools"))
    ]
    if beyond := sorted({*beyond, *(set(said) - _READ)}):
        draft.remarks.append(f"data.train: {name}: dataset_info.json says {', '.join(beyond)}, too: look at preview")
    return {part: value for part, value in source.items() if value not in (None, {}, "train")}


def _validation(draft: Draft) -> bool:
    """val_size: data.eval"""
    if "data.eval" in draft.entries:
        draft.leave("val_size", why="eval_dataset is what is validated on")
        return True
    return held_out(draft, "val_size")


def _template(draft: Draft) -> None:
    """template: data.template (chat, the tokenizer's own, or alpaca)"""
    name = draft.get("template")
    if name == "alpaca":
        draft.carry("template", "data.template", "alpaca")
    elif name in ("default", "empty", "vanilla", "fewshot"):
        draft.lack("template", "set data.template to alpaca, chat or the path of a .jinja file, and look at preview")
    elif name is not None:
        draft.carry("template", "data.template", "chat", f"the tokenizer's own; if that is not {name}, a .jinja file")


def _trained_on(draft: Draft) -> None:
    """train_on_prompt, mask_history: data.train_on"""
    if draft.get("train_on_prompt"):
        draft.carry("train_on_prompt", "data.train_on", "all")
    elif draft.get("mask_history"):
        draft.carry("mask_history", "data.train_on", "completion")
    draft.leave("train_on_prompt", "mask_history", why="as data.train_on says")


def _packing(draft: Draft) -> None:
    """packing, neat_packing: data.packing"""
    key = "neat_packing" if draft.get("neat_packing") else "packing"
    if draft.get(key) is not None:
        note = "documents do not see each other here" if draft.get(key) and key == "packing" else ""
        draft.carry(key, "data.packing", "bfd" if draft.get(key) else "none", note)
    draft.leave("packing", "neat_packing", why="as data.packing says")


GROUPS = (
    _adapters,
    _weights,
    _quantization,
    _data,
    _validation,
    _template,
    _trained_on,
    _packing,
    *GROUPS_OF_ARGUMENTS,
)

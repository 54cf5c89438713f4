"""Keys that are fields of transformers' TrainingArguments, which `trl sft` and LLaMA-Factory take by their own names."""

import re
from pathlib import PurePath
from typing import Any

from sft_recipes.recipe.convert.draft import Draft, Entry, Lacking, Needless, Rules, To, all_of, interval, number
from sft_recipes.recipe.load import schema_of
from sft_recipes.recipe.upstream import OWNED, optimizers, schedulers, sft_config_fields

HUB = Lacking("upload the verified model yourself: hf upload NAME RUN/model", off=(False, "every_save"))
# Optimizers by other names for the same computation; transformers no longer has the first.
OPTIMIZERS = {
    "adamw_hf": "adamw_torch_fused",
    "adamw_torch": "adamw_torch_fused",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "ao_adamw_4bit": "adamw_torch_4bit",
}

ARGUMENTS: Rules = {
    "output_dir": To("output_dir"),
    # Steps
    "per_device_train_batch_size": To("train.micro_batch_size"),
    "gradient_accumulation_steps": To("train.gradient_accumulation_steps"),
    "per_device_eval_batch_size": Needless("validation takes train.micro_batch_size"),
    "auto_find_batch_size": Lacking("set train.micro_batch_size: auto and train.global_batch_size"),
    "learning_rate": To("train.learning_rate", number),
    "warmup_ratio": To("train.warmup_ratio", number),
    "weight_decay": To("train.weight_decay", number),
    "max_grad_norm": To("train.max_grad_norm", number),
    "seed": To("train.seed"),
    "data_seed": Needless("train.seed is that of the data, too"),
    # Memory and speed
    **all_of("gradient_checkpointing activation_checkpointing", To("train.gradient_checkpointing")),
    **all_of(
        "gradient_checkpointing_kwargs.* activation_checkpointing_kwargs.*",
        Needless("set up with train.gradient_checkpointing"),
    ),
    "torch_compile": To("train.compile"),
    "use_liger_kernel": To("train.kernels", {True: "auto", False: "none"}),
    "liger_kernel_config": Needless("train.kernels takes all kernels but the loss"),
    "full_determinism": To("train.deterministic"),
    "train_sampling_strategy": To("data.shuffle", {"random": True, "sequential": False}),
    "group_by_length": Lacking("packing leaves no padding: data.packing: bfd"),
    "dataloader_pin_memory": Needless("set up by the device"),
    "remove_unused_columns": Needless("columns that are not asked for are left alone"),
    **all_of("dataset_num_proc preprocessing_num_workers", Needless("data is tokenised on all cores")),
    # Checkpoints and logs
    "save_total_limit": To("checkpoint.keep"),
    "load_best_model_at_end": To("checkpoint.export_best"),
    "greater_is_better": Needless("checkpoint.export_best goes by the validation loss"),
    "save_safetensors": Needless("weights are always safetensors"),
    "save_only_model": Lacking("checkpoints hold what --resume needs"),
    "overwrite_output_dir": Needless("a run directory that is not empty is refused, or resumed with --resume"),
    "resume_from_checkpoint": Needless("`sft-recipe run RECIPE --resume` takes the newest complete one"),
    "restore_callback_states_from_checkpoint": Needless("--resume restores what there is"),
    "ignore_data_skip": Lacking("--resume goes on with the row after the last"),
    "logging_steps": To("log.every", number),
    "logging_strategy": Needless("as log.every says"),
    "logging_first_step": Needless("the first step is always logged"),
    "logging_nan_inf_filter": Needless("what is not finite is seen: train.on_nonfinite"),
    "logging_dir": Needless("trackers write into the run directory"),
    **all_of("log_level log_level_replica", Needless("--debug shows what the libraries print")),
    "disable_tqdm": Needless("as the terminal is"),
    "include_num_input_tokens_seen": Needless("metrics.jsonl has tokens"),
    "include_tokens_per_second": Needless("metrics.jsonl has tokens_per_second"),
    "prediction_loss_only": Needless("validation is the loss"),
    "do_train": Needless("`sft-recipe run` trains"),
    "do_eval": Needless("as data.eval says"),
    **all_of("do_predict predict_with_generate", Lacking("eval.generate answers prompts")),
    # Hub
    **all_of(
        "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision "
        "push_to_hub_model_id push_to_hub_organization",
        HUB,
    ),
    "hub_token": Needless("taken from HF_TOKEN in the environment"),
}


def arguments(draft: Draft, *, validates: bool, epochs: float) -> None:
    """What takes more than a rule. `validates`: there are validation rows; `epochs`: the tool's default."""
    length(draft, "num_train_epochs", epochs)
    scheduler(draft, "lr_scheduler_type")
    optimizer(draft, "optim")
    warmup(draft)
    evaluation(draft, validates)
    saving(draft)
    metric(draft)
    trackers(draft)
    launch(draft)


def length(draft: Draft, epochs_key: str, usual: float) -> None:
    """num_train_epochs: train.epochs; max_steps: train.max_steps"""
    epochs, steps = number(draft.get(epochs_key)), number(draft.get("max_steps"))
    if isinstance(steps, int) and steps < 0:
        draft.needless("max_steps", "as many as train.epochs takes")
    elif steps is not None:
        draft.carry("max_steps", "train.max_steps", steps)
    if epochs is not None and draft.value("train.max_steps"):
        draft.needless(epochs_key, "max_steps goes before it")
    elif epochs is not None:
        draft.carry(epochs_key, "train.epochs", epochs)
    elif not draft.value("train.max_steps"):
        draft.assume("train.epochs", usual)


def the_rest(draft: Draft) -> None:
    """Fields of SFTConfig that no key of a recipe decides go to `trl:`."""
    fields = sft_config_fields() - OWNED.keys()
    for key in list(draft.config):
        if key in fields and any(leaf in draft.left() for leaf in draft.under(key)):
            draft.carry(key, f"trl.{key}", draft.config[key])


def scheduler(draft: Draft, key: str) -> None:
    """lr_scheduler_type: train.lr_scheduler"""
    name = draft.get(key)
    if str(name) in schedulers():
        draft.carry(key, "train.lr_scheduler", name)
    elif name is not None:
        draft.lack(key, "transformers has no such schedule; set train.lr_scheduler")


def optimizer(draft: Draft, key: str) -> None:
    """optim: train.optimizer"""
    name = draft.get(key)
    if str(name) in OPTIMIZERS:
        draft.carry(key, "train.optimizer", OPTIMIZERS[name], "the same computation")
    elif str(name) in optimizers():
        draft.carry(key, "train.optimizer", name)
    elif name is not None:
        draft.lack(key, "transformers has no such optimizer; set train.optimizer")


def warmup(draft: Draft) -> None:
    """warmup_steps: train.warmup_ratio (where train.max_steps says of how many steps it is a share)"""
    steps, ratio = number(draft.get("warmup_steps")), draft.get("warmup_ratio")
    if ratio is not None and isinstance(steps, (int, float)) and steps > 0:
        draft.needless("warmup_ratio", "warmup_steps goes before it")
    elif ratio is not None:
        draft.leave("warmup_steps", why="as warmup_ratio says")
    if "warmup_steps" in draft.left():
        warmup_of(draft, "warmup_steps")


def warmup_of(draft: Draft, key: str) -> None:
    """Steps as a share of all; below 1 they are one, in transformers' words."""
    steps, total = number(draft.get(key)), draft.value("train.max_steps")
    if not isinstance(steps, (int, float)) or steps < 1:
        if steps is not None:
            draft.carry(key, "train.warmup_ratio", steps)
    elif total and steps < total:
        draft.carry(key, "train.warmup_ratio", float(f"{steps / total:.6g}"), f"{steps} of {total} steps")
    else:
        draft.lack(
            key, f"set train.warmup_ratio, the share that {steps} are of the steps: sft-recipe plan says how many"
        )


def metric(draft: Draft) -> None:
    """metric_for_best_model: checkpoint.export_best (by the validation loss)"""
    if draft.get("metric_for_best_model", "loss") not in ("loss", "eval_loss"):
        draft.lack("metric_for_best_model", "checkpoint.export_best goes by the validation loss")
    draft.leave("metric_for_best_model", why="checkpoint.export_best goes by the validation loss")


def held_out(draft: Draft, key: str) -> bool:
    """Whether there are validation rows because of `key`, the share of the rows that is set aside, or their number."""
    size = number(draft.get(key))
    if isinstance(size, int) and size > 0:
        draft.lack(key, "a number of rows; data.eval takes a fraction of them, and has 0.02 until you set another")
        draft.entries["data.eval"] = Entry(0.02, f"{key} is a number of rows; set a fraction")
    elif size:
        draft.carry(key, "data.eval", size)
    elif size is not None:
        draft.carry(key, "data.eval", None)
    return bool(size)


def evaluation(draft: Draft, validates: bool) -> None:
    """eval_strategy, eval_steps: eval.every"""
    key = next((key for key in ("eval_strategy", "evaluation_strategy") if draft.get(key) is not None), "eval_strategy")
    keys = ("eval_strategy", "evaluation_strategy", "eval_steps", "eval_delay", "eval_on_start")
    if not validates or draft.get(key) in ("no", False):
        draft.leave(*keys, why="there is no validation")
    elif draft.get(key) == "epoch":
        an_epoch(draft, key, "eval.every", 1)
    elif draft.get("eval_steps") is not None:
        draft.carry("eval_steps", "eval.every", interval(draft.get("eval_steps")))
    draft.leave(*keys, why="as eval.every says, and before the first step")


def saving(draft: Draft) -> None:
    """save_strategy, save_steps: checkpoint.every"""
    strategy = draft.get("save_strategy")
    if strategy in ("no", False):
        draft.carry("save_strategy", "checkpoint.every", None)
    elif strategy == "epoch":
        an_epoch(draft, "save_strategy", "checkpoint.every", 1)
    elif strategy == "best":
        draft.carry("save_strategy", "checkpoint.export_best", True)
    elif draft.get("save_steps") is not None:
        draft.carry("save_steps", "checkpoint.every", interval(draft.get("save_steps")))
    draft.leave("save_strategy", "save_steps", why="as checkpoint.every says")


def an_epoch(draft: Draft, key: str, to: str, times: Any) -> None:
    """`times` an epoch, as a fraction of the run."""
    epochs = draft.value("train.epochs") or 1
    if draft.value("train.max_steps"):
        draft.lack(key, f"with train.max_steps an epoch is no known fraction of the run; set {to}")
    elif not isinstance(times, (int, float)) or isinstance(times, bool) or times * epochs < 1:
        draft.lack(key, f"set {to}")
    else:
        draft.carry(key, to, float(f"{1 / (times * epochs):.6g}"), f"{times} an epoch, of {epochs:g}")


def trackers(draft: Draft) -> None:
    """report_to: log.to; run_name: log.name; project, wandb_project: log.project"""
    wanted = draft.get("report_to")
    names = [name for name in (wanted if isinstance(wanted, list) else [wanted]) if name not in (None, "none")]
    known = schema_of(("log", "to"))["items"]["enum"]
    if wanted is not None and all(name in known for name in names):
        draft.carry("report_to", "log.to", names)
    elif wanted is not None:
        draft.lack("report_to", f"log.to knows {', '.join(known)}")
    in_trackers(draft, name=("run_name",), project=("project", "wandb_project"))


def in_trackers(draft: Draft, **theirs: tuple[str, ...]) -> None:
    """Their keys for log.project, log.name, log.group, which are for trackers that have such: those of log.to."""
    named = set(draft.value("log.to")) - {"tensorboard"}
    for to, keys in theirs.items():
        for key in keys:
            if draft.get(key) and named:
                draft.carry(key, f"log.{to}", draft.get(key))
            draft.leave(key, why=f"for trackers that have a {to}, of which log.to names none")


def launch(draft: Draft) -> None:
    """deepspeed, fsdp, fsdp_config: launch.strategy, launch.cpu_offload"""
    engine = draft.get("deepspeed")
    if isinstance(engine, dict):
        _deepspeed(draft)
    elif engine not in (None, False):
        name = PurePath(str(engine)).name.lower()  # of a file, as these are usually called
        found = re.search(r"(?:zero|zero_stage|z)[-_]?([0-3])", name)
        _zero(draft, "deepspeed", int(found[1]) if found else None, ["deepspeed"] if "offload" in name else [])
    _fsdp(draft)


def _deepspeed(draft: Draft) -> None:
    """DeepSpeed's own settings, of which a recipe has the stage and whether it offloads."""
    zero = "deepspeed.zero_optimization"
    on_host = [leaf for leaf in draft.under(zero) if leaf.endswith(".device") and draft.keys[leaf] == "cpu"]
    _zero(draft, f"{zero}.stage", draft.get(f"{zero}.stage"), on_host)
    for leaf in draft.left():
        if leaf in draft.under("deepspeed"):
            draft.lack(
                leaf, "of DeepSpeed's settings a recipe has launch.strategy (zero2, zero3) and launch.cpu_offload"
            )


def _zero(draft: Draft, key: str, stage: Any, on_host: list[str]) -> None:
    """The stage that `key` says; `on_host` are keys that say that it offloads."""
    if stage == 0:
        draft.needless(key, "ZeRO 0 shares nothing out, as launch.strategy: ddp")
    elif stage in (1, 2, 3):
        note = "zero2 shares out gradients, too" if stage == 1 else ""
        draft.carry(key, "launch.strategy", "zero3" if stage == 3 else "zero2", note)
        for each in on_host:
            draft.carry(each, "launch.cpu_offload", True)
    else:
        draft.lack(key, "set launch.strategy: zero2 or zero3, as DeepSpeed's settings say")


def _fsdp(draft: Draft) -> None:
    said, settings = draft.get("fsdp"), draft.under("fsdp_config")
    on = said if "fsdp" in draft.config else any(draft.keys[leaf] not in (None, {}) for leaf in settings)
    if not on:
        for key in ("fsdp", "fsdp_version", *settings):
            if draft.keys.get(key) is not None:
                draft.needless(key, "off, as here")
        return
    key = next(
        (key for key in ("fsdp", "fsdp_version") if draft.get(key) is not None), settings[0] if settings else "fsdp"
    )
    words = str(said)
    note = "shares out weights, too" if "shard_grad_op" in words else ""
    draft.carry(key, "launch.strategy", "fsdp2", note)
    if "offload" in words:
        draft.carry("fsdp", "launch.cpu_offload", True)
    for leaf in (each for each in ("fsdp_version", *settings) if each in draft.left()):
        name, value = leaf.rpartition(".")[2].removeprefix("fsdp_"), draft.keys[leaf]
        if name in ("offload_params", "cpu_offload") and value:
            draft.carry(leaf, "launch.cpu_offload", True)
        elif name == "activation_checkpointing" and value:
            draft.carry(leaf, "train.gradient_checkpointing", True)
        else:
            draft.needless(leaf, "set up with launch.strategy: fsdp2")


GROUPS_OF_ARGUMENTS = (length, scheduler, optimizer, warmup, evaluation, saving, metric, trackers, launch)

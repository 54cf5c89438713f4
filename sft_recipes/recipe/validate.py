"""Validate a parsed recipe: conflicting keys, unknown names, likely mistakes. The recipe is never changed."""

import difflib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipes import model_dir
from sft_recipes.data.formats.registry import COLUMNS
from sft_recipes.errors import ModelError, RecipeError
from sft_recipes.recipe import machine, secrets
from sft_recipes.recipe.library_names import OWNED, installed, optimizers, schedulers, sft_config_fields
from sft_recipes.recipe.parse import Loaded, field_names, parse_recipe
from sft_recipes.recipe.schema import DEFAULT_GLOBAL_BATCH_SIZE, Recipe
from sft_recipes.trackers.base import kinds

STOCHASTIC_ROUNDING = "adamw_8bit_sr"
# Typical peak learning rates with Adam: 1e-5 to 2e-5 for all weights (alignment-handbook; TRL's default is 2e-5),
# 2e-4 for adapters of 7B and 13B, 1e-4 of 33B and 65B (QLoRA, arXiv 2305.14314, table 9), ten times those for all weights
# (TRL's PEFT guide). Wide on both sides; only a rate _FAR times outside of them is a warning.
_TYPICAL_RATES = {False: (5e-6, 5e-5), True: (5e-5, 1e-3)}  # with lora:
_FAR = 4
_SMALL = 100_000_000  # parameters; smaller models train with larger rates and are not checked
_BITSANDBYTES = re.compile(r"bnb|paged|ademamix|lion|^(?!.*torch).*_8bit$")  # optimizers of bitsandbytes
TORCHAO = (STOCHASTIC_ROUNDING, "adamw_torch_4bit", "adamw_torch_8bit")  # optimizers of torchao


@dataclass
class Validation:
    """Problems, which prevent a run, and warnings; one line each."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def validate(recipe: Recipe, *, to_run: bool = True) -> Validation:
    """Find conflicts and likely mistakes in a recipe. Lines begin with a key.

    `to_run=False`, for a plan, skips the requirements of this machine.
    """
    rules = (_conflicts, _batch, _names, _secrets, *((_output, _extras) if to_run else ()))
    return Validation([line for rule in rules for line in rule(recipe)], list(_likely_mistakes(recipe)))


def validate_file(recipe_file: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded | None, Validation]:
    """Validate a recipe and its local model directory. Wrong keys are removed from the recipe, which may be None."""
    loaded, problems = parse_recipe(recipe_file, overrides)
    if loaded is None:
        return None, Validation(problems)
    validation = validate(loaded.recipe)
    model_problems = model_dir.find_problems(loaded.recipe.model.name, loaded.recipe.data.max_length)
    return loaded, Validation(
        problems + [loaded.with_location(line) for line in (*validation.problems, *model_problems)],
        [loaded.with_location(line) for line in validation.warnings],
    )


def load_valid(recipe_file: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded, list[str]]:
    """Load a recipe that can be run, and its warnings. Raises RecipeError with every problem."""
    loaded, validation = validate_file(recipe_file, overrides)
    if validation.problems or loaded is None:
        raise RecipeError(*validation.problems)
    return loaded, validation.warnings


def _output(recipe: Recipe) -> Iterator[str]:
    """Check that the run directory can be created."""
    if reason := model_dir.path_problem(recipe.output_dir):
        yield f"output_dir: {reason}. Choose another directory with --set output_dir=DIR."


def _given(recipe: Recipe, section: str, key: str) -> bool:
    """Return True if the recipe sets a key to a value other than null."""
    inner = getattr(recipe, section)
    return section in recipe.model_fields_set and key in inner.model_fields_set and getattr(inner, key) is not None


def _conflicts(recipe: Recipe) -> Iterator[str]:
    model, data, train = recipe.model, recipe.data, recipe.train
    if model.quantization and not recipe.trains_adapters:
        yield (
            f"model.quantization: quantized weights cannot be trained directly (got {model.quantization}). "
            "Add `lora: {}` for QLoRA, or remove model.quantization."
        )
    if _given(recipe, "train", "global_batch_size") and _given(recipe, "train", "gradient_accumulation_steps"):
        yield (
            "train.gradient_accumulation_steps: cannot be combined with train.global_batch_size, from which it follows. "
            "Remove one of the two."
        )
    if recipe.lora and recipe.lora.target_parameters and (recipe.lora.dropout or recipe.lora.use_dora):
        yield "lora.target_parameters: cannot be combined with lora.dropout or lora.use_dora. Remove these keys."
    if train.warmup_ratio is not None and train.warmup_steps is not None:
        yield "train.warmup_steps: cannot be combined with train.warmup_ratio. Remove one of the two."
    if train.mixed_precision == "fp16" and model.dtype == "bfloat16":
        yield (
            "train.mixed_precision: cannot be combined with model.dtype: bfloat16 (got fp16). "
            "Set train.mixed_precision: bf16, or model.dtype: float32."
        )
    if train.mixed_precision == "fp16" and model.dtype == "float16" and not recipe.trains_adapters:
        yield "train.mixed_precision: full fine-tuning in fp16 requires float32 weights. Set model.dtype: float32."
    if train.mixed_precision == "bf16" and model.dtype == "float16":
        yield (
            "train.mixed_precision: cannot be combined with model.dtype: float16 (got bf16). "
            "Set model.dtype to bfloat16 or float32."
        )
    if data.eval is None and recipe.checkpoint.export_best:
        yield "checkpoint.export_best: requires an evaluation loss, but data.eval is null. Set data.eval, or remove this key."
    if data.eval is None and _given(recipe, "eval", "every") and not recipe.eval.generate:
        yield "eval.every: there are no evaluation rows (data.eval is null). Set data.eval, or remove this key."
    if isinstance(data.eval, str) and re.fullmatch(r"[\d.]+(e-?\d+)?%?", data.eval.strip()):
        yield f"data.eval: text is the name of a file or dataset (got '{data.eval}'). Write a fraction as a number, e.g. 0.02."
    for name in data.columns:
        if name not in COLUMNS:
            yield (
                f"data.columns: '{name}' is not a column of any format (expected {', '.join(COLUMNS)}). "
                "Write {FORMAT_COLUMN: YOUR_COLUMN}."
            )
    if data.cross_document_attention and data.packing == "none":
        yield (
            "data.cross_document_attention: has no effect without packing (data.packing is none). "
            "Set data.packing: wrapped, or remove this key."
        )
    if data.cross_document_attention and data.packing == "bfd":
        yield "data.cross_document_attention: bfd packs unrelated documents. Set data.packing: wrapped, or remove this key."
    if recipe.launch.cpu_offload and recipe.launch.strategy == "ddp":
        yield "launch.cpu_offload: not supported by launch.strategy: ddp. Set launch.strategy to fsdp2, zero2 or zero3."
    yield from _strategy(recipe)
    yield from _trackers(recipe)
    if train.optimizer == STOCHASTIC_ROUNDING and "optim_args" in recipe.trl:
        yield f"trl.optim_args: set by {STOCHASTIC_ROUNDING} itself. Remove it, or set train.optimizer: adamw_torch_8bit."


def _strategy(recipe: Recipe) -> Iterator[str]:
    """Find what FSDP2 and DeepSpeed do not support."""
    strategy, quantization = recipe.launch.strategy, recipe.model.quantization
    if strategy == "fsdp2" and _BITSANDBYTES.search(recipe.train.optimizer):
        yield (
            "train.optimizer: bitsandbytes optimizers do not support the sharded weights of launch.strategy: fsdp2 "
            f"(got {recipe.train.optimizer}). Set {STOCHASTIC_ROUNDING} or adamw_torch_fused."
        )
    if (strategy == "fsdp2" and quantization == "int8") or (strategy == "zero3" and quantization):
        yield f"model.quantization: {strategy} cannot shard {quantization} weights. Set nf4 and launch.strategy: fsdp2."
    if strategy in ("zero2", "zero3") and recipe.train.on_nonfinite == "skip":
        yield (
            "train.on_nonfinite: DeepSpeed has applied the step before it can be skipped (got skip). "
            "Set stop, or launch.strategy: fsdp2."
        )
    if strategy in ("zero2", "zero3") and recipe.train.mixed_precision == "no" and recipe.model.dtype != "float32":
        yield (
            f"train.mixed_precision: launch.strategy: {strategy} requires mixed precision for {recipe.model.dtype} weights "
            "(got no). Set bf16, or model.dtype: float32."
        )


def _trackers(recipe: Recipe) -> Iterator[str]:
    to = recipe.log.to
    for name in dict.fromkeys(name for name in to if to.count(name) > 1):
        yield f"log.to: {name} is listed {to.count(name)} times. List it once."
    for key in ("project", "name", "group"):
        if _given(recipe, "log", key) and not any(kinds()[name].has_names for name in to):
            users = ", ".join(name for name, kind in kinds().items() if kind.has_names)
            yield f"log.{key}: used only by {users}, and none of them is in log.to. Add one to log.to, or remove this key."


def _batch(recipe: Recipe) -> Iterator[str]:
    """Check that global_batch_size is divisible by micro_batch_size x processes x machines."""
    train, micro = recipe.train, recipe.train.micro_batch_size
    if train.gradient_accumulation_steps is not None:
        if micro == "auto":
            yield (
                "train.micro_batch_size: auto requires a fixed train.global_batch_size, which gradient_accumulation_steps "
                "leaves open. Set global_batch_size instead of it, or micro_batch_size to a number."
            )
        return
    whole = train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
    world = recipe.launch.world_size
    sequences = recipe.train.micro_batch_size_or_1 * world  # at least one sequence in each process
    if whole % sequences == 0:
        return
    fitting = [n for n in range(1, whole // world + 1) if whole % (n * world) == 0]
    multiples = [n for n in (whole // sequences * sequences, whole // sequences * sequences + sequences) if n]
    place = "train.global_batch_size:" if train.global_batch_size else "train.micro_batch_size: global_batch_size"
    processes = f"{world} processes" if world > 1 else ""
    divisor = " x ".join(filter(None, ("" if micro == "auto" else f"micro_batch_size {micro}", processes)))
    remedy = f"micro_batch_size to {_either(fitting)}, or " if fitting else ""
    yield f"{place} {whole} is not divisible by {divisor}. Set {remedy}global_batch_size to {_either(multiples)}."


def _names(recipe: Recipe) -> Iterator[str]:
    if recipe.train.lr_scheduler not in schedulers():
        yield _unknown("train.lr_scheduler", recipe.train.lr_scheduler, schedulers())
    known = optimizers() | {STOCHASTIC_ROUNDING}
    if recipe.train.optimizer not in known:
        yield _unknown("train.optimizer", recipe.train.optimizer, known)
    if recipe.lora is not None and isinstance(recipe.lora.target_modules, str):
        try:
            re.compile(recipe.lora.target_modules)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"lora.target_modules: invalid regular expression: {error} (got '{recipe.lora.target_modules}'). Fix it."
    for name in recipe.trl:
        if name in OWNED:
            yield f"trl.{name}: set by the recipe. Use {OWNED[name]} instead."
        elif name not in sft_config_fields():
            ours = next((key for key in field_names() if key.rpartition(".")[2] == name), None)
            close = difflib.get_close_matches(name, sorted(sft_config_fields()), n=1)
            hint = f"Did you mean 'trl.{close[0]}'?" if close else "Use a field of TRL's SFTConfig."
            hint = f"Use {ours} instead." if ours else hint
            yield f"trl.{name}: SFTConfig has no field '{name}'. {hint}"


def _secrets(recipe: Recipe) -> Iterator[str]:
    """Find secrets of the environment: a run saves its recipe and sends it to trackers."""
    for key, value in _leaves(recipe.model_dump()):
        if key != "trl.hub_token" and (name := secrets.find_in(value)):
            yield (
                f"{key}: contains the value of the environment variable {name}, which the run directory, report and trackers "
                "would show. Remove it: libraries read the variable themselves."
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value of a recipe with its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, str(value)


def _extras(recipe: Recipe) -> Iterator[str]:
    """Find required packages and compilers that are not installed."""
    attention, optimizer = recipe.model.attention, recipe.train.optimizer
    if optimizer in TORCHAO and not installed("torchao"):
        yield f"train.optimizer: {optimizer} requires torchao, which {_install('torchao')}."
    if machine.trains_on_nvidia_gpu():
        if missing := machine.triton_lacks():
            yield (
                f"train: on a GPU, Triton compiles the loss with a C compiler, and {missing} is missing. Install gcc and the "
                "headers of this Python (Debian: apt-get install gcc python3-dev), or set CC to a compiler."
            )
    elif recipe.train.compile and not any(map(shutil.which, machine.cpp_compilers())):
        yield "train.compile: requires a C++ compiler, but none was found (g++, clang++ or CXX). Install one, or set false."
    if recipe.train.kernels == "liger" and not installed("liger_kernel"):
        yield f"train.kernels: liger {_install('liger')}, or set auto."
    if recipe.launch.strategy in ("zero2", "zero3") and not installed("deepspeed"):
        yield f"launch.strategy: {recipe.launch.strategy} requires DeepSpeed, which {_install('deepspeed')}, or set fsdp2."
    for tracker in recipe.log.to:
        if not installed(kinds()[tracker].package):
            yield f"log.to: {tracker} is not installed. Run pip install '{kinds()[tracker].install()}'."
    if attention == "flash_attention_2" and not installed("flash_attn"):
        yield f"model.attention: {attention} requires flash-attn, which {_install('flash')}."
    if attention == "flash_attention_3" and not installed("flash_attn_3"):
        yield (
            f"model.attention: {attention} requires flash-attn 3, which is not installed. Build it from source "
            "(github.com/Dao-AILab/flash-attention, hopper/)."
        )


def _likely_mistakes(recipe: Recipe) -> Iterator[str]:
    """Find settings that run without errors but are likely mistakes."""
    # FSDP2 and DeepSpeed train a float32 copy.
    in_float32 = recipe.launch.strategy != "ddp" and recipe.train.mixed_precision != "no"
    if (
        not recipe.trains_adapters
        and recipe.model.dtype != "float32"
        and not _rounds_stochastically(recipe)
        and not in_float32
    ):
        yield (
            f"model.dtype: {recipe.model.dtype} weights with {recipe.train.optimizer} lose updates to rounding: at a "
            "learning rate of 1e-5, 2e-5 or 1e-4, about 84%, 70% or 12% of typical weights do not change in 20 steps. "
            f"Set train.optimizer: {STOCHASTIC_ROUNDING} (8-bit states, no extra memory), or model.dtype: float32."
        )
    if recipe.trains_layers_in_full and recipe.model.dtype != "float32" and recipe.train.mixed_precision == "no":
        yield (
            f"train.mixed_precision: without autocast, lora.modules_to_save and model.new_tokens are trained in "
            f"{recipe.model.dtype} and lose updates to rounding. Set train.mixed_precision: bf16."
        )
    yield from _learning_rate(recipe)
    if recipe.model.trust_remote_code:
        yield "model.trust_remote_code: the model's custom Python code will run. Review it first."


def _learning_rate(recipe: Recipe) -> Iterator[str]:
    """Warn about a learning rate that is far too low or too high."""
    rate, adapters = recipe.train.learning_rate, recipe.trains_adapters
    if not recipe.train.optimizer.startswith(("adamw", "paged_adamw")) or _is_small(recipe.model.name):
        return
    low, high = _TYPICAL_RATES[adapters]
    method, example = ("LoRA", "2e-4") if adapters else ("full fine-tuning", "2e-5")
    if adapters and not _given(recipe, "train", "learning_rate"):
        yield (
            f"train.learning_rate: the default {rate:g} is unusually low for {method} (typical: {low:g} to {high:g}); the "
            f"model may learn little. Try {example}."
        )
    elif rate < low / _FAR or rate > high * _FAR:
        size, risk = ("low", "the model may learn little") if rate < low else ("high", "training may diverge")
        yield (
            f"train.learning_rate: {rate:g} is unusually {size} for {method} (typical: {low:g} to {high:g}); {risk}. "
            f"Try {example}."
        )


def _is_small(model: str) -> bool:
    """Return True if a local model is known to be small. Models on the Hub are not inspected."""
    try:
        size = model_dir.parameters(model)
    except ModelError:
        return False
    return size is not None and size < _SMALL


def _rounds_stochastically(recipe: Recipe) -> bool:
    if recipe.train.optimizer == STOCHASTIC_ROUNDING:
        return True
    return "bf16_stochastic_round=true" in str(recipe.trl.get("optim_args", "")).lower().replace(" ", "")


def _install(extra: str) -> str:
    return f"is not installed. Run pip install 'sft-recipes[{extra}]'"


def _unknown(key: str, value: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(value, sorted(known), n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Choose one of {', '.join(sorted(known))}."
    return f"{key}: unknown name '{value}'. {hint}"


def _either(values: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))

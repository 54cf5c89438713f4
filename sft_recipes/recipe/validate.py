"""What is wrong with a recipe that reads well: keys that contradict each other, names that no library knows, faults.

Judges and never edits: a recipe means what it says.
"""

import difflib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_recipes.errors import ModelError, RecipeError
from sft_recipes.recipe import machine, model_dir, secrets
from sft_recipes.recipe.library_names import OWNED, installed, optimizers, schedulers, sft_config_fields
from sft_recipes.recipe.parse import Loaded, field_names, parse_recipe
from sft_recipes.recipe.schema import DEFAULT_GLOBAL_BATCH_SIZE, Recipe

STOCHASTIC_ROUNDING = "adamw_8bit_sr"
COLUMNS = ("instruction", "input", "output", "prompt", "completion", "messages", "text")
# Peak learning rates that are usual with Adam: 1e-5 to 2e-5 for all weights (alignment-handbook; TRL's default is 2e-5),
# 2e-4 for adapters of 7B and 13B, 1e-4 of 33B and 65B (QLoRA, arXiv 2305.14314, table 9), ten times those for all weights
# (TRL's PEFT guide). Wide on both sides; a warning comes where a rate is _FAR times beyond them.
_USUAL_RATES = {False: (5e-6, 5e-5), True: (5e-5, 1e-3)}  # with lora:
_FAR = 4
_SMALL = 100_000_000  # parameters; smaller models take larger rates, and so are left alone
_BITSANDBYTES = re.compile(r"bnb|paged|ademamix|lion|^(?!.*torch).*_8bit$")  # optimizers of that package
TORCHAO = (STOCHASTIC_ROUNDING, "adamw_torch_4bit", "adamw_torch_8bit")  # optimizers of that package


@dataclass
class Validation:
    """Problems stop a run, warnings are shown; a line each."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def validate(recipe: Recipe, *, to_run: bool = True) -> Validation:
    """Every contradiction in a recipe, and the faults that a run would not show by itself. Lines begin with a key.

    Without `to_run`, for a plan: not what this machine lacks to run it.
    """
    judgements = (_contradictions, _batch, _names, _secrets, *((_output, _extras) if to_run else ()))
    return Validation([line for judgement in judgements for line in judgement(recipe)], list(_faults(recipe)))


def validate_file(recipe_file: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded | None, Validation]:
    """Every problem of the recipe and of a local model directory. The recipe lacks the keys at fault, or is None."""
    loaded, problems = parse_recipe(recipe_file, overrides)
    if loaded is None:
        return None, Validation(problems)
    verdict = validate(loaded.recipe)
    found = model_dir.find_problems(loaded.recipe.model.name, loaded.recipe.data.max_length)
    return loaded, Validation(
        problems + [loaded.with_location(line) for line in (*verdict.problems, *found)],
        [loaded.with_location(line) for line in verdict.warnings],
    )


def load_valid(recipe_file: str | Path, overrides: Sequence[str] = ()) -> tuple[Loaded, list[str]]:
    """A recipe that can be run, and warnings. Raises RecipeError with every problem."""
    loaded, verdict = validate_file(recipe_file, overrides)
    if verdict.problems or loaded is None:
        raise RecipeError(*verdict.problems)
    return loaded, verdict.warnings


def _output(recipe: Recipe) -> Iterator[str]:
    """A directory that no run could make."""
    if reason := model_dir.path_problem(recipe.output_dir):
        yield f"output_dir: {reason}; choose another with --set output_dir=DIR"


def _given(recipe: Recipe, section: str, key: str) -> bool:
    """Whether the recipe itself sets a key to something else than null."""
    inner = getattr(recipe, section)
    return section in recipe.model_fields_set and key in inner.model_fields_set and getattr(inner, key) is not None


def _contradictions(recipe: Recipe) -> Iterator[str]:
    model, data, train = recipe.model, recipe.data, recipe.train
    if model.quantization and recipe.lora is None:
        yield (
            f"model.quantization: {model.quantization} freezes the weights, so there is nothing to train; "
            "add a section 'lora: {}' (QLoRA), or leave quantization out"
        )
    if _given(recipe, "train", "global_batch_size") and _given(recipe, "train", "gradient_accumulation_steps"):
        yield "train.gradient_accumulation_steps and train.global_batch_size are two ways to say the same; give one"
    if train.mixed_precision == "fp16" and model.dtype == "bfloat16":
        yield "train.mixed_precision: fp16 does not go with model.dtype: bfloat16; set bf16, or model.dtype: float32"
    if train.mixed_precision == "fp16" and model.dtype == "float16" and recipe.lora is None:
        yield "train.mixed_precision: fp16 needs float32 weights in full fine-tuning; set model.dtype: float32"
    if train.mixed_precision == "bf16" and model.dtype == "float16":
        yield "train.mixed_precision: bf16 does not go with model.dtype: float16; set model.dtype: bfloat16 or float32"
    if data.eval is None and recipe.checkpoint.export_best:
        yield "checkpoint.export_best chooses by validation loss, and data.eval is null; set data.eval, or leave it out"
    if data.eval is None and _given(recipe, "eval", "every") and not recipe.eval.generate:
        yield "eval.every without validation rows; set data.eval, or leave eval.every out"
    if isinstance(data.eval, str) and re.fullmatch(r"[\d.]+(e-?\d+)?%?", data.eval.strip()):
        yield f"data.eval: '{data.eval}' is text, and so the name of a file or data set; a fraction is a number, such as 0.02"
    for name in data.columns:
        if name not in COLUMNS:
            yield f"data.columns: no format has a column '{name}'; there are {', '.join(COLUMNS)}"
    if data.cross_document_attention and data.packing == "none":
        yield "data.cross_document_attention is about packed documents, and data.packing is none; leave one of them out"
    if data.cross_document_attention and data.packing == "bfd":
        yield (
            "data.cross_document_attention goes with packing: wrapped; bfd packs documents that do not belong together"
        )
    if recipe.launch.cpu_offload and recipe.launch.strategy == "ddp":
        yield "launch.cpu_offload goes with launch.strategy: fsdp2, zero2 or zero3; ddp has nothing to offload"
    yield from _strategy(recipe)
    yield from _trackers(recipe)
    if train.optimizer == STOCHASTIC_ROUNDING and "optim_args" in recipe.trl:
        yield f"trl.optim_args: {STOCHASTIC_ROUNDING} sets them itself; use adamw_torch_8bit"


def _strategy(recipe: Recipe) -> Iterator[str]:
    """What the engines that share weights out cannot do."""
    strategy, quantization = recipe.launch.strategy, recipe.model.quantization
    if strategy == "fsdp2" and _BITSANDBYTES.search(recipe.train.optimizer):
        yield (
            f"train.optimizer: {recipe.train.optimizer} is of bitsandbytes, which does not know the shares of "
            f"launch.strategy: fsdp2; set {STOCHASTIC_ROUNDING} or adamw_torch_fused"
        )
    if (strategy == "fsdp2" and quantization == "int8") or (strategy == "zero3" and quantization):
        yield f"model.quantization: {strategy} cannot share {quantization} weights out; set nf4 and launch.strategy: fsdp2"
    if strategy in ("zero2", "zero3") and recipe.train.on_nonfinite == "skip":
        yield "train.on_nonfinite: skip does not go with DeepSpeed, which has taken the step by then; set stop, or fsdp2"
    if strategy in ("zero2", "zero3") and recipe.train.mixed_precision == "no" and recipe.model.dtype != "float32":
        yield f"train.mixed_precision: no goes with model.dtype: float32 under launch.strategy: {strategy}; set bf16"


def _trackers(recipe: Recipe) -> Iterator[str]:
    to = recipe.log.to
    for name in dict.fromkeys(name for name in to if to.count(name) > 1):
        yield f"log.to: {name} is there {to.count(name)} times; name it once"
    for key in ("project", "name", "group"):
        if _given(recipe, "log", key) and not set(to) - {"tensorboard"}:
            yield f"log.{key} is for wandb, trackio and mlflow, and log.to names none of them; add one, or leave it out"


def _batch(recipe: Recipe) -> Iterator[str]:
    """global_batch_size = micro_batch_size x accumulation x processes x machines has to come out."""
    train, micro = recipe.train, recipe.train.micro_batch_size
    if train.gradient_accumulation_steps is not None:
        if micro == "auto":
            yield (
                "train.micro_batch_size: auto keeps train.global_batch_size, and train.gradient_accumulation_steps leaves it "
                "open; give global_batch_size instead, or a number"
            )
        return
    whole = train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
    world = recipe.launch.world_size
    at_once = recipe.train.micro_batch_size_or_1 * world  # at least one sequence in each process
    if whole % at_once == 0:
        return
    fitting = [n for n in range(1, whole // world + 1) if whole % (n * world) == 0]
    multiples = [n for n in (whole // at_once * at_once, whole // at_once * at_once + at_once) if n]
    key = "train.global_batch_size" if train.global_batch_size else "train.micro_batch_size"
    yield (
        f"{key}: {whole} sequences a step do not come out of micro-batches of {micro}"
        f"{f' on {world} processes' if world > 1 else ''}; micro_batch_size could be {_listed(fitting) or 'none'}, "
        f"global_batch_size {_listed(multiples)}"
    )


def _names(recipe: Recipe) -> Iterator[str]:
    if recipe.train.lr_scheduler not in schedulers():
        yield _no_such("train.lr_scheduler", recipe.train.lr_scheduler, schedulers())
    known = optimizers() | {STOCHASTIC_ROUNDING}
    if recipe.train.optimizer not in known:
        yield _no_such("train.optimizer", recipe.train.optimizer, known)
    if recipe.lora is not None and isinstance(recipe.lora.target_modules, str):
        try:
            re.compile(recipe.lora.target_modules)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"lora.target_modules: '{recipe.lora.target_modules}' is not a regular expression: {error}"
    for name in recipe.trl:
        if name in OWNED:
            yield f"trl.{name}: a recipe says this with {OWNED[name]}"
        elif name not in sft_config_fields():
            ours = next((key for key in field_names() if key.rpartition(".")[2] == name), None)
            close = difflib.get_close_matches(name, sorted(sft_config_fields()), n=1)
            hint = f"did you mean '{close[0]}'?" if close else "expected a field of TRL's SFTConfig"
            hint = f"a recipe says this with {ours}" if ours else hint
            yield f"trl.{name}: '{name}' is no field of SFTConfig that is known here; {hint}"


def _secrets(recipe: Recipe) -> Iterator[str]:
    """Tokens and keys of the environment: a run writes its recipe down, and hands it to trackers."""
    for key, value in _leaves(recipe.model_dump()):
        if key != "trl.hub_token" and (name := secrets.in_text(value)):
            yield (
                f"{key}: holds the value of the environment variable {name}, and the run directory, its report and trackers "
                "would show it; take it out: what needs it reads the variable itself"
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Everything a recipe says, with its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, str(value)


def _extras(recipe: Recipe) -> Iterator[str]:
    """Optional packages that the recipe needs and that are not installed."""
    attention, optimizer = recipe.model.attention, recipe.train.optimizer
    if optimizer in TORCHAO and not installed("torchao"):
        yield f"train.optimizer: {optimizer} needs torchao, which {_install('torchao')}"
    if machine.trains_on_nvidia_gpu():
        if lacking := machine.triton_lacks():
            yield (
                f"train: on a GPU, Triton compiles the loss with a C compiler, and {lacking} is missing. Install gcc and the "
                "headers of this Python (Debian: apt-get install gcc python3-dev), or set CC to a compiler."
            )
    elif recipe.train.compile and not any(map(shutil.which, machine.cpp_compilers())):
        yield "train.compile: it needs a C++ compiler, and none is found (g++, clang++, or CXX); install one, or set false"
    if recipe.train.kernels == "liger" and not installed("liger_kernel"):
        yield f"train.kernels: liger {_install('liger')}, or set auto"
    if recipe.launch.strategy in ("zero2", "zero3") and not installed("deepspeed"):
        yield f"launch.strategy: {recipe.launch.strategy} needs DeepSpeed, which {_install('deepspeed')}; or set fsdp2"
    for tracker in recipe.log.to:
        if not installed(tracker):
            yield f"log.to: {tracker} {_install(tracker)}"
    if attention == "flash_attention_2" and not installed("flash_attn"):
        yield f"model.attention: {attention} needs flash-attn, which {_install('flash')}"
    if attention == "flash_attention_3" and not installed("flash_attn_3"):
        yield (
            f"model.attention: {attention} needs flash-attn 3, which is not installed; it is built from source "
            "(github.com/Dao-AILab/flash-attention, hopper/)"
        )


def _faults(recipe: Recipe) -> Iterator[str]:
    """Recipes that run, and do not do what their author wants."""
    in_float32 = recipe.launch.strategy != "ddp" and recipe.train.mixed_precision != "no"  # the copy that is trained
    if (
        recipe.lora is None
        and recipe.model.dtype != "float32"
        and not _rounds_stochastically(recipe)
        and not in_float32
    ):
        yield (
            f"model.dtype: {recipe.model.dtype} weights with {recipe.train.optimizer} lose updates to rounding: at a "
            "learning rate of 1e-5, 2e-5 or 1e-4 some 84 %, 70 % or 12 % of typical weights do not move in 20 steps; "
            f"set train.optimizer: {STOCHASTIC_ROUNDING} (8-bit states, no more memory), or model.dtype: float32"
        )
    in_full = recipe.lora is not None and (recipe.lora.modules_to_save or recipe.model.new_tokens)
    if in_full and recipe.model.dtype != "float32" and recipe.train.mixed_precision == "no":
        yield (
            f"train.mixed_precision: without autocast, lora.modules_to_save and model.new_tokens are trained in "
            f"{recipe.model.dtype} and lose updates to rounding; set bf16"
        )
    yield from _unusual_rate(recipe)
    if recipe.model.trust_remote_code:
        yield "model.trust_remote_code: Python code that comes with the model will run"


def _unusual_rate(recipe: Recipe) -> Iterator[str]:
    """A learning rate at which most likely nothing is learned, or all is lost."""
    rate, adapters = recipe.train.learning_rate, recipe.lora is not None
    if not recipe.train.optimizer.startswith(("adamw", "paged_adamw")) or _is_small(recipe.model.name):
        return
    low, high = _USUAL_RATES[adapters]
    method, example = ("LoRA", "2e-4") if adapters else ("full fine-tuning", "2e-5")
    if adapters and not _given(recipe, "train", "learning_rate"):
        yield (
            f"train.learning_rate: its default of {rate:g} is one for full fine-tuning, and {method} learns little with it; "
            f"set one, such as {example}"
        )
    elif rate < low / _FAR or rate > high * _FAR:
        way, fear = ("below", "little is learned") if rate < low else ("above", "the model may come apart")
        yield (
            f"train.learning_rate: {rate:g} is far {way} what {method} usually takes, {low:g} to {high:g}, and {fear}; set "
            f"one of these, such as {example}"
        )


def _is_small(model: str) -> bool:
    """Whether a model is known to be small; one on the hub is not looked at."""
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
    return f"is not installed: pip install 'sft-recipes[{extra}]'"


def _no_such(key: str, value: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(value, sorted(known), n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(sorted(known))}"
    return f"{key}: '{value}' is no name that is known here; {hint}"


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))

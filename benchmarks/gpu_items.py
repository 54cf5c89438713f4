"""The items of gpu.py: what is checked and measured. Imported by its worker processes only.

What these items use of sft_recipes is in the section "Recipe, model, data" and in `train`.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

import sft_recipes.run  # noqa: F401  # imported here for the commands that are forked
from sft_recipes import cli
from sft_recipes.data.encoder import Documents
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import SelectedRows, build_sequences
from sft_recipes.data.stats import SourceStats
from sft_recipes.errors import reason_of
from sft_recipes.memory import autosize, prediction, remedies
from sft_recipes.models import model
from sft_recipes.models.adapters import with_adapters
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import parse
from sft_recipes.recipe.library_names import installed
from sft_recipes.recipe.schema import Model, Recipe
from sft_recipes.training import trainer
from sft_recipes.training.build import build_trainer

__all__ = ["SkipItem", "attention_tests", "machine", "prepare", "quickstart", "reason_of", "resume", "train"]

ROOT = Path(__file__).parent.parent
CONFIGS = {"8b": "meta-llama--Llama-3.1-8B", "4b": "Qwen--Qwen3-4B-Instruct-2507", "1b": "meta-llama--Llama-3.1-8B"}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
}  # of Llama 3.2 1B, where it differs from Llama 3.1 8B
TINY = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
LOSS_TOLERANCE = 0.01  # relative, of the first loss in bfloat16 to the CPU's in float32


class SkipItem(Exception):
    """Reason for which an item cannot run on this machine."""


def prepare(given: argparse.Namespace) -> None:
    """Make the process ready for an item, with an empty folder."""
    given.folder = Path(tempfile.mkdtemp(dir=given.folder))
    torch.set_num_threads(torch.get_num_threads())  # a forked process has lost torch's thread pool
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SkipItem("torch sees no GPU; --cpu --tiny tries the script without one")


# --- Item 1: machine ---


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """Check that torch.compile (Triton and a C compiler) works, and time bfloat16 matrix products."""
    packages = ("triton", "torchao", "bitsandbytes", "liger_kernel", "flash_attn")
    found = [f"imports {given.import_seconds:.0f} s", f"CUDA {torch.version.cuda}", *map(version, packages)]
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    found.append(f"C compiler {compiler}")
    if given.device == "cpu":
        return {"result": "; ".join([*found, "Triton and matrix products skipped (no GPU)"])}
    major, minor = torch.cuda.get_device_capability()
    found.append(f"compute capability {major}.{minor}")
    began = time.perf_counter()
    x = torch.arange(1000.0, device="cuda")
    torch.testing.assert_close(torch.compile(lambda x: x.sin() + x)(x), x.sin() + x)
    found.append(f"Triton compiled a kernel in {time.perf_counter() - began:.1f} s")
    return {"result": "; ".join([*found, "8192 x 8192 bfloat16 products"]), "tflops": matrix_product_tflops()}


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def matrix_product_tflops() -> float:
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for times in (10, 100):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        torch.cuda.synchronize()
    return 100 * 2 * size**3 / (time.perf_counter() - began) / 1e12


# --- Item 2: tests ---


def attention_tests(given: argparse.Namespace) -> dict[str, Any]:
    if not installed("pytest"):
        raise SkipItem("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/models/test_attention.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode:
        errors = [line[1:].strip() for line in lines if line.startswith("E ")]
        raise RuntimeError(": ".join([lines[-1], *errors[:3]]))
    if given.device == "cpu":
        raise SkipItem(f"no GPU ({lines[-1]})")
    return {"result": lines[-1]}


# --- Items 3 and 4: the command line on the quickstart recipe ---

QUICK = ["log.every=1", "eval.every=null", "eval.generate=[]", "data.max_eval_samples=20", "checkpoint.every=null"]
HALF = ["model.dtype=bfloat16", "train.mixed_precision=bf16", "train.gradient_checkpointing=true"]


def quickstart(given: argparse.Namespace) -> dict[str, Any]:
    """Train, generate and export in bfloat16, and compare the first loss with the CPU's in float32."""
    keys = [*QUICK, "train.max_steps=4"]
    reference = Command(given, "reference", *keys, "export.merge=false", cpu=True)
    command = Command(given, "quickstart", *keys, *HALF, 'eval.generate=["What is the opposite of empty?"]')
    command.finish()
    reference.finish()
    loss, expected = command.losses()[0], reference.losses()[0]
    answers = len((command.output / "samples.jsonl").read_text("utf-8").splitlines())
    off = abs(loss / expected - 1)
    result = (
        f"first loss {loss:.4f}, on the CPU in float32 {expected:.4f} (difference {off:.2%}, limit {LOSS_TOLERANCE:.0%}); "
        f"{answers} answers generated; merged model exported and verified"
    )
    if off > LOSS_TOLERANCE or not answers:
        raise RuntimeError(result)
    return {"result": result}


def resume(given: argparse.Namespace, deterministic: bool = False) -> dict[str, Any]:
    """Stop a run with SIGTERM, resume it, and compare it with a run that was not stopped."""
    if deterministic and not has_key("train.deterministic"):
        raise SkipItem("there is no key train.deterministic")
    keys = [*QUICK, *HALF, f"train.max_steps={8 if given.tiny else 30}", "export.merge=false"]
    keys += ["train.deterministic=true"] if deterministic else []
    whole = Command(given, "whole", *keys)
    stopped = Command(given, "stopped", *keys)
    while len(stopped.losses()) < 3 and stopped.process.is_alive():
        time.sleep(0.02)
    stopped.process.terminate()
    stopped.finish(expected=75)
    steps = len(stopped.losses())
    resumed = Command(given, "stopped", *keys, options=["--resume"])
    resumed.finish()
    whole.finish()
    one, other = whole.losses(), resumed.losses()
    first, second = (command.output / "adapter/adapter_model.safetensors" for command in (whole, resumed))
    same = one == other and first.read_bytes() == second.read_bytes()
    off = max(abs(a - b) for a, b in zip(one, other, strict=True))
    result = (
        f"stopped after step {steps} (exit code 75), resumed to step {len(other)} (exit code 0); losses and adapter "
        f"{'bitwise identical to' if same else f'not bitwise identical to (largest loss difference {off:.1e})'} "
        "those of a run that was not stopped"
    )
    if deterministic and not same:
        raise RuntimeError(result)
    return {"result": result}


class Command:
    """`sft-recipe run recipes/quickstart.yaml` in a process of its own.

    Forked from this process, which has imported the libraries, if that cannot have initialized CUDA.
    """

    def __init__(
        self, given: argparse.Namespace, name: str, *keys: str, options: list[str] | None = None, cpu: bool = False
    ) -> None:
        self.output, self.log = given.folder / name, given.folder / f"{name}.log"
        overrides = [f"--set={key}" for key in (*keys, f"output_dir={self.output}")]
        arguments = ["run", str(ROOT / "recipes/quickstart.yaml"), *overrides, *(options or [])]
        environment = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
        forked = multiprocessing.get_context("fork").Process
        self.process = forked(target=_command, args=(arguments, self.log, environment, given.device == "cuda"))
        self.process.start()

    def finish(self, expected: int = 0) -> None:
        self.process.join()
        text = self.log.read_text("utf-8")
        print(text)
        if self.process.exitcode != expected:
            last = (text.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"sft-recipe run: exit code {self.process.exitcode}, expected {expected}: {last}")

    def losses(self) -> list[float]:
        """Training losses by step."""
        file = self.output / "metrics.jsonl"
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def _command(arguments: list[str], log: Path, environment: dict[str, str], fresh: bool) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    os.environ.update(environment)
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "sft_recipes.cli", *arguments])
    torch.set_num_threads(torch.get_num_threads())
    sys.argv = ["sft-recipe", *arguments]
    cli.main()


# --- Items 5 to 11: training steps ---


def train(
    given: argparse.Namespace,
    size: str,
    keys: dict[str, Any],
    *,
    micro: int = 1,
    recipe: str | None = None,
    cap: float | None = None,
    profile: bool = False,
    plain: bool = False,
) -> dict[str, Any]:
    """Train a random model on random rows: speed and peak memory, compared with the prediction.

    Args:
        given: Command line.
        size: Key of CONFIGS.
        keys: Changes of the recipe.
        micro: Sequences per micro-batch and step, of 512 tokens.
        recipe: Name of a bundled recipe to take instead, with the preflight and 2 steps.
        cap: Limit of the memory in bytes, context included.
        profile: Profile one step after the timed ones, into profile-N.txt.
        plain: Use TRL's SFTTrainer with its defaults instead of ours.
    """
    warm, timed = (1, 1) if recipe else (3, 6)
    directory = model_directory(given, size)
    used = bundled(recipe, directory, given) if recipe else base(directory, micro, given)
    used = with_keys(used, {**keys, "train.max_steps": warm + timed + profile})
    check_requirements(used, given)
    predicted = autosize.predict_here(used)
    total = torch.cuda.mem_get_info()[1] if given.device == "cuda" else None
    if total is not None:
        card = min(cap or total, total)
        if not prediction.fits(predicted, card, "cuda"):
            needed, there = prediction.format_bytes(predicted.peak_bytes), prediction.format_bytes(card)
            raise SkipItem(f"does not fit: predicted {needed}, GPU {there}")
        if cap is not None:
            torch.cuda.set_per_process_memory_fraction((card - prediction.CONTEXT) / total)

    data = random_rows(used, long=recipe is not None, tiny=given.tiny)
    table = data.train.table()
    network, tokenizer = build_model(used, given.device, adapters=not plain), load_tokenizer(used.model)
    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if plain:
        sft = trl_alone(used, network, tokenizer, Dataset(table), given.folder)
    else:
        sft = build_trainer(used, network, tokenizer, data, given.folder, Console())
    clock = Clock(warm, timed, given.out / f"profile-{given.number}.txt" if profile else None)
    sft.add_callback(clock)
    if plain:
        sft.train()
    else:
        trainer.train(sft, None)

    notes = [f"loss {sft.state.log_history[-1]['train_loss']:.2f}", f"first step {clock.first:.1f} s"]
    if has_key("train.kernels") and used.train.kernels == "liger":
        notes.append(f"{count_liger(sft.model)} modules use Liger")
    sequences = slice(warm * used.sequences_per_step, (warm + timed) * used.sequences_per_step)
    lengths = np.concatenate(table["seq_lengths"].to_pylist()[sequences])
    rate = float(lengths.sum()) / clock.seconds
    flops = autosize.model_flops_per_token(used, predicted.size, float((lengths**2).sum() / lengths.sum()))
    row = {
        "tokens_per_second": rate,
        "tflops": rate * flops / 1e12,
        "seconds_per_step": clock.seconds / timed,
        "predicted_gib": predicted.peak_bytes / prediction.GIB,
    }
    if given.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / prediction.GIB
        notes.append(f"peak {row['peak_gib'] / row['predicted_gib']:.0%} of the prediction")
        notes += [f"preflight peak {clock.before / prediction.GIB:.2f} GiB"] if used.train.preflight else []
        notes += [f"fits in {card / 1e9:.0f} GB"] if cap is not None else []
    else:
        notes.append("peak memory skipped (no GPU)")
    return {"result": "; ".join(notes), **row}


class Clock(TrainerCallback):
    """Times the steps after `warm` ones, GPU work included; then profiles the last step if `profile` names a file."""

    def __init__(self, warm: int, timed: int, profile: Path | None) -> None:
        self.warm, self.last, self.profile = warm, warm + timed, profile
        self.first = self.seconds = self.before = 0.0
        self.profiler: Any = None

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.began = time.perf_counter()
            if torch.cuda.is_available():
                self.before = torch.cuda.max_memory_allocated()  # in the preflight
                torch.cuda.reset_peak_memory_stats()
        elif state.global_step == self.last and self.profile is not None:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        step = state.global_step
        if step in (1, self.warm, self.last) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 1:
            self.first = time.perf_counter() - self.began
        if step == self.warm:
            self.began = time.perf_counter()
        elif step == self.last:
            self.seconds = time.perf_counter() - self.began
        elif self.profiler is not None:
            self.profiler.stop()
            device = "device" if torch.cuda.is_available() else "cpu"
            table = self.profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15)
            assert self.profile is not None
            self.profile.write_text(table, "utf-8")


def count_liger(network: torch.nn.Module) -> int:
    """Count the modules whose forward pass is Liger's. Raises RuntimeError if there is none."""
    forwards = (getattr(module.forward, "__func__", module.forward) for module in network.modules())
    found = sum((getattr(forward, "__module__", "") or "").startswith("liger_kernel") for forward in forwards)
    if not found:
        raise RuntimeError("train.kernels: no module uses Liger (got liger)")
    return found


def trl_alone(recipe: Recipe, network: Any, tokenizer: Any, rows: Dataset, folder: Path) -> SFTTrainer:
    """TRL's trainer with its defaults, on the same model and rows as ours."""
    assert recipe.lora is not None
    adapters = LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"), dataset_kwargs={"skip_prepare_dataset": True}, padding_free=True, max_length=None,
        per_device_train_batch_size=recipe.train.micro_batch_size, max_steps=recipe.train.max_steps,
        train_sampling_strategy="sequential", learning_rate=recipe.train.learning_rate, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_steps=1000, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    sft = SFTTrainer(network, config, train_dataset=rows, processing_class=tokenizer, peft_config=adapters)
    sft.remove_callback(PrinterCallback)
    return sft


# --- Recipe, model, data ---


def has_key(key: str) -> bool:
    section, _, name = key.partition(".")
    kind = Recipe.model_fields.get(section)
    return kind is not None and (not name or section == "trl" or name in kind.annotation.model_fields)


def base(directory: Path, micro: int, given: argparse.Namespace) -> Recipe:
    """The recipe of a case on sequences of 512 tokens, one micro-batch per step."""
    micro = min(micro, 2) if given.tiny else micro
    keys: dict[str, Any] = {"micro_batch_size": micro, "global_batch_size": micro, "learning_rate": 1e-5}
    if has_key("train.kernels"):
        keys["kernels"] = "none"
    return Recipe.model_validate(
        {
            "model": {"name": str(directory), "dtype": "bfloat16"},
            "data": {"train": "random", "eval": None, "max_length": 64 if given.tiny else 512},
            "train": keys | {"preflight": False, "gradient_checkpointing": False},
            "checkpoint": {"every": None},
            "log": {"every": 1000},
            "export": {"merge": False},
            "trl": {"train_sampling_strategy": "sequential"},
            "output_dir": str(given.folder / "run"),
        }
    )


def bundled(name: str, directory: Path, given: argparse.Namespace) -> Recipe:
    """A bundled recipe with a random model and random rows in place of its own."""
    keys = {
        "model.name": str(directory),
        "data.train": "random",
        "data.eval": None,
        "eval.generate": [],
        "checkpoint.every": None,
        "export.merge": False,
        "trl.train_sampling_strategy": "sequential",
        "output_dir": str(given.folder / "run"),
    }
    if given.tiny:
        keys["data.max_length"] = 256
    return with_keys(parse.load(ROOT / f"recipes/{name}.yaml").recipe, keys)


def with_keys(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """The recipe with other values of some keys. Raises SkipItem for a key that this version does not have."""
    for key in keys:
        if not has_key(key):
            raise SkipItem(f"there is no key {key}")
    return remedies.applied(recipe, keys)


def check_requirements(recipe: Recipe, given: argparse.Namespace) -> None:
    """Raise SkipItem if a package or a GPU is missing."""
    kernels = has_key("train.kernels") and recipe.train.kernels == "liger"
    packages = {
        "torchao": recipe.train.optimizer == "adamw_8bit_sr",
        "bitsandbytes": recipe.model.quantization is not None,
        "liger_kernel": kernels,
    }
    for package, needed in packages.items():
        if needed and not installed(package):
            raise SkipItem(f"{package} is not installed")
    if given.device == "cpu" and (kernels or recipe.train.compile):
        raise SkipItem("needs a GPU")


def model_directory(given: argparse.Namespace, size: str) -> Path:
    """A directory with the config of that size and the tokenizer of the built-in model, without weights."""
    directory: Path = given.folder / size
    source = ROOT / "tests/model_configs" / CONFIGS[size] / "config.json"
    config = json.loads(source.read_text("utf-8")) | SHAPES.get(size, {}) | (TINY if given.tiny else {})
    load_tokenizer(Model(name="builtin:tiny")).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    return directory


def build_model(recipe: Recipe, device: str, *, adapters: bool) -> Any:
    """A model with random weights, created on the device in the recipe's dtype, quantized and with adapters."""
    config = model.load_config(recipe)
    options = {"dtype": getattr(torch, recipe.model.dtype), "attn_implementation": model.attention(recipe, config)}
    torch.manual_seed(recipe.train.seed)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, **options)
    if recipe.model.quantization is not None:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
        network = type(network).from_pretrained(
            None, config=config, state_dict=network.state_dict(), quantization_config=settings,
            device_map={"": 0 if device == "cuda" else device}, **options,
        )  # fmt: skip
    if recipe.lora is not None and adapters:
        network = with_adapters(network, recipe.lora, recipe.model, [])
    return network


def random_rows(recipe: Recipe, *, long: bool, tiny: bool) -> Prepared:
    """Random tokens for all steps, every token trained, in packed documents of about 150 tokens (`long`: about 3,500)."""
    least, most = {
        (False, False): (40, 512),
        (True, False): (2048, 8192),
        (False, True): (8, 64),
        (True, True): (32, 128),
    }[long, tiny]
    rng, length = np.random.default_rng(0), recipe.data.max_length
    vocabulary = model.load_config(recipe).vocab_size
    tokens = ((recipe.train.max_steps or 0) * recipe.sequences_per_step + 8) * length  # more than enough
    lengths = np.minimum(most, least + rng.exponential((most - least) / 4, size=tokens // least)).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
    number, total = len(lengths), int(lengths.sum())
    none = np.zeros(number, dtype=np.bool_)
    offsets = np.concatenate([[0], lengths.cumsum()])
    made = Documents(
        ids=rng.integers(0, vocabulary, total, dtype=np.int32), trained=np.ones(total, dtype=np.bool_),
        offsets=offsets, begins=offsets[:-1], stops=np.zeros(number, dtype=np.int32),
        ended=~none, empty=none, lossy=np.full(number, ""), prompted=~none,
        digests=np.arange(number, dtype=np.uint64), prompts=np.zeros(number, dtype=np.uint64),
    )  # fmt: skip
    chosen = SelectedRows(made, np.arange(number), SourceStats("random", "", "", number), dict.fromkeys)
    return Prepared(build_sequences([chosen], recipe.data, rng), None, None, [], None, 1.0, [])

#!/usr/bin/env python3
"""Training on one NVIDIA GPU, from TRL's defaults to ours, a step at a time: `python benchmarks/gpu.py --seconds 540`.

Llama 3.1 8B and Llama 3.2 1B in shape, with random weights, on random rows: documents of about 150 tokens packed to 512, and
of 2,048 to 8,192. LoRA, QLoRA in nf4, and full with 8-bit stochastically rounded AdamW. Tokens a second; TFLOP/s that count 4
operations a token for each frozen weight that is multiplied, 6 for each that is trained, 6 x layers x width x s for attention
(s: tokens of the document that a token is in, on average), and nothing that is done twice; the allocator's peak, and what
`sft-recipe plan` predicts. No network. `--only '8b/lora/*'` takes some of it, in the order given; what no time is left for,
what does not fit and what is not installed is said. With `--cpu --tiny` it tries itself out.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from machine import measured_on
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from sft_recipes import cli
from sft_recipes.data.accounting import SourceAccount
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import Chosen, lay_out
from sft_recipes.data.tokens import Documents
from sft_recipes.planning import changes, memory
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.upstream import installed
from sft_recipes.training import footprint, model, trainer

LLAMA = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
MODELS = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# max_length, and the least and the most tokens of a document, of which short ones are more.
DOCUMENTS = {"short": (512, 40, 512), "long": (8192, 2048, 8192)}
TINY_DOCUMENTS = {"short": (64, 8, 64), "long": (128, 32, 128)}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16}},
    "full": {"train.optimizer": "adamw_8bit_sr"},
    "qlora": {"lora": {"rank": 16}, "model.quantization": "nf4"},
}
NEEDS = {"full": "torchao", "qlora": "bitsandbytes"}
CASES = [f"{size}/{method}/{kind}" for kind in DOCUMENTS for size in MODELS for method in METHODS]
TRL = "TRL, its defaults"
WARM = 3  # steps that are not timed
# Each with what was done before it. Of the recipe's keys, but for the first: of PEFT's layers.
STEPS: dict[str, dict[str, Any]] = {
    "bfloat16 weights": {"model.dtype": "bfloat16"},
    "varlen": {"model.attention": "varlen"},
    "no checkpointing": {"train.gradient_checkpointing": False},
    "cast off": {},
    "compile": {"train.compile": True},
}
INSTEAD = {"flash-attn": ("varlen", {"model.attention": "flash_attention_2"})}  # of a step, tried behind it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help=f"of {', '.join(CASES)}")
    steps = (TRL, *STEPS, *INSTEAD)
    parser.add_argument(
        "--steps", nargs="+", default=steps, choices=steps, metavar="NAME", help=f"of {', '.join(steps)}"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch, of which an optimizer step has one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--timed", type=int, default=6, help="optimizer steps that are timed, after 3 that are not")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="models and documents of no use but to try this out")
    given = parser.parse_args()
    given.ends, given.device = time.monotonic() + given.seconds, "cpu" if given.cpu else "cuda"
    if not (chosen := [case for pattern in given.only for case in CASES if fnmatch(case, pattern)]):
        parser.error(f"--only: there are {', '.join(CASES)}")
    if given.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; --cpu --tiny tries this out without")
    if given.tiny:
        given.tokens = 128
    cli._quiet(debug=False)
    SFTTrainer._send_telemetry = trainer.Trainer._send_telemetry  # which is silent
    said = f", {torch.cuda.get_device_name()}, bfloat16 products at {products():.0f} TFLOP/s" if not given.cpu else ""
    print(f"{measured_on()}{said}")
    for package in ("torchao", "bitsandbytes", "flash_attn"):
        if not installed(package):
            print(f"{package} is not installed")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for case in dict.fromkeys(chosen):
            measure(given, case, Path(folder))


def measure(given: argparse.Namespace, case: str, folder: Path) -> None:
    """The table of a model, a method, and documents; each line as it is found."""
    size, method, kind = case.split("/")
    length, *_ = documents = (TINY_DOCUMENTS if given.tiny else DOCUMENTS)[kind]
    micro = given.tokens // length
    print(
        f"\n{case}: {micro} x {length:,} tokens a step\n\n| | tokens/s | TFLOP/s | seconds a step | peak GiB | predicted GiB "
        "| times TRL |\n|---|---|---|---|---|---|---|"
    )
    if (needed := NEEDS.get(method)) and not installed(needed):
        print(f"needs {needed}")
        return
    theirs = None
    for name, recipe, cast in ladder(weights(folder, size, given), method, length, micro, given.timed):
        if name not in given.steps or (name == "cast off" and recipe.lora is None):
            continue
        line = [name, *[""] * 6]
        if time.monotonic() > given.ends:
            line[1] = "no time was left"
        elif name == "compile" and given.cpu:
            line[1] = "not on a CPU"
        elif name == "flash-attn" and (given.cpu or not installed("flash_attn")):
            line[1] = "not installed"
        else:
            found = memory.on_device(footprint.predict(recipe, footprint.config_of(recipe), given.device), given.device)
            line[5] = f"{found.peak_bytes / memory.GIB:.1f}"
            if not given.cpu and not memory.fits(found, torch.cuda.mem_get_info()[1], "cuda"):
                line[1] = "does not fit"
            else:
                try:
                    rate, line[1:5] = trained(given, recipe, folder, documents, cast=cast, plain=name == TRL)
                    theirs = rate if name == TRL else theirs
                    line[6] = f"{rate / theirs:.2f}" if theirs else ""
                except Exception as error:  # the others are worth having
                    traceback.print_exc()
                    line[1] = "out of memory" if model.is_out_of_memory(error) else f"failed: {model.reason_of(error)}"
        print(f"| {' | '.join(line)} |", flush=True)
        release_memory()


def release_memory() -> None:
    """Nothing of one model is to be in another's peak."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ladder(name: Path, method: str, length: int, micro: int, timed: int) -> Iterator[tuple[str, Recipe, bool]]:
    """The steps from TRL's defaults to ours, and whether PEFT still casts its layers' input."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(name), "dtype": "float32", "attention": "sdpa"},
            "data": {"train": "random", "eval": None, "max_length": length},
            "train": {
                "max_steps": WARM + timed, "micro_batch_size": micro, "global_batch_size": micro, "preflight": False,
                "gradient_checkpointing": True, "learning_rate": 1e-5,
            },
            "checkpoint": {"every": None},
            "log": {"every": 1000},
            "export": {"merge": False},
            "trl": {"train_sampling_strategy": "sequential"},
            "output_dir": "unused",
        }
    )  # fmt: skip
    ours = changes.applied(recipe, METHODS[method])
    yield TRL, changes.applied(ours, {"train.optimizer": "adamw_torch_fused"}), True
    cast = True
    for step, keys in STEPS.items():
        ours, cast = changes.applied(ours, keys), cast and step != "cast off"
        yield step, ours, cast
        for other, (behind, instead) in INSTEAD.items():
            if behind == step:
                yield other, changes.applied(ours, instead), cast


def trained(
    given: argparse.Namespace, recipe: Recipe, folder: Path, documents: tuple[int, int, int], *, cast: bool, plain: bool
) -> tuple[float, list[str]]:
    """Train some steps; tokens a second, and what there is to say of them."""
    tokenizer = model.load_tokenizer(recipe.model)
    config = model.load_config(recipe)
    data = random_rows(recipe, config.vocab_size, documents)
    table = data.train.table()
    if plain:
        sft = trl_alone(recipe, Dataset(data.train.table()), folder)
    else:
        network = model.load_model(recipe, tokenizer)
        sft = trainer.build(recipe, network, tokenizer, data, folder, Console(quiet=True))
        for module in sft.model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = cast
    clock = Clock()
    sft.add_callback(clock)
    sft.train()
    peak = f"{torch.cuda.max_memory_allocated() / memory.GIB:.1f}" if not given.cpu else ""
    rows = int(recipe.train.micro_batch_size)
    timed = slice(WARM * rows, (WARM + given.timed) * rows)
    lengths = np.concatenate(table["seq_lengths"].to_pylist()[timed])
    rate = lengths.sum() / clock.seconds
    work = operations(sft.model, recipe.lora is not None, float((lengths**2).sum() / lengths.sum()))
    return rate, [f"{rate:,.0f}", f"{rate * work / 1e12:.1f}", f"{clock.seconds / given.timed:.3f}", peak]


class Clock(TrainerCallback):
    """Seconds from the end of the last step that is not timed to the end of the last of all, the GPU's work included."""

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if torch.cuda.is_available() and state.global_step == 0:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step in (WARM, state.max_steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == WARM:
            self.began = time.perf_counter()
        elif state.global_step == state.max_steps:
            self.seconds = time.perf_counter() - self.began


def operations(network: torch.nn.Module, lora: bool, seen: float) -> float:
    """Of training on a token that sees `seen` tokens of its document on average, itself and those behind it among them."""
    frozen = adapters = 0
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):  # a quantised weight's elements are not its parameters'
            size = module.in_features * module.out_features
            frozen, adapters = (frozen, adapters + size) if "lora_" in name else (frozen + size, adapters)
    config = network.config
    width = config.num_attention_heads * config.head_dim
    return frozen * (4 if lora else 6) + 6 * adapters + 6 * config.num_hidden_layers * width * seen


def trl_alone(recipe: Recipe, rows: Dataset, folder: Path) -> SFTTrainer:
    """TRL with its defaults, on the rows that ours has."""
    quantized = recipe.model.quantization and BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    adapters = recipe.lora and LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = SFTConfig(
        output_dir=str(folder / "trl"), dataset_kwargs={"skip_prepare_dataset": True}, padding_free=True, max_length=None,
        per_device_train_batch_size=recipe.train.micro_batch_size, max_steps=recipe.train.max_steps,
        train_sampling_strategy="sequential", learning_rate=recipe.train.learning_rate, save_strategy="no", report_to="none",
        disable_tqdm=True, logging_steps=1000, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    sft = SFTTrainer(
        recipe.model.name, config, train_dataset=rows, peft_config=adapters, quantization_config=quantized or None
    )
    sft.remove_callback(PrinterCallback)
    return sft


def random_rows(recipe: Recipe, vocabulary: int, documents: tuple[int, int, int]) -> Prepared:
    """As many random tokens as the steps take, all of them trained on, packed as ours are."""
    rng, (length, least, most) = np.random.default_rng(0), documents
    rows = (recipe.train.max_steps or 0) * int(recipe.train.micro_batch_size) + 8  # more than enough
    lengths = np.minimum(most, least + rng.exponential((most - least) / 4, size=rows * length // least)).astype(
        np.int64
    )
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), rows * length)) + 1]
    number, total = len(lengths), int(lengths.sum())
    none = np.zeros(number, dtype=np.bool_)
    made = Documents(
        rng.integers(0, vocabulary, total, dtype=np.int32), np.ones(total, dtype=np.bool_),
        np.concatenate([[0], lengths.cumsum()]), np.zeros(number, dtype=np.int32), ~none, none, none,
        np.arange(number, dtype=np.uint64), np.zeros(number, dtype=np.uint64),
    )  # fmt: skip
    chosen = Chosen(made, np.arange(number), SourceAccount("random", "", "", number), dict.fromkeys)
    return Prepared(lay_out([chosen], recipe.data, rng), None, None, [], None, 1.0, [])


def weights(folder: Path, size: str, given: argparse.Namespace) -> Path:
    """A directory with a model of that size, and the embedded model's tokenizer."""
    place = folder / size
    if not place.exists():
        config = LlamaConfig(
            **(TINY if given.tiny else MODELS[size]), rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        )
        with torch.device(given.device):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
        release_memory()
        embedded = Recipe.model_validate({"model": {"name": "builtin:tiny"}, "data": {"train": "x"}, "output_dir": "x"})
        model.load_tokenizer(embedded.model).save_pretrained(place)
    return place


def products() -> float:
    """TFLOP/s of large products in bfloat16: what is to be had at most."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for times in (10, 100):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        torch.cuda.synchronize()
    return 100 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12


if __name__ == "__main__":
    main()

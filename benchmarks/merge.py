#!/usr/bin/env python3
"""Merging a LoRA adapter, in turns with PEFT and a plain copy of the files: `python benchmarks/merge.py`.

The base has the shapes of Llama 3 8B with fewer layers, bfloat16, in several files, and random weights; the adapter is of rank
16 on all linear layers. Each way runs in a process of its own; times are of the work without the imports, memory is what the
process took beyond them. Prints tables for benchmarks/RESULTS.md, best of `--times`. With `--run RUN` instead: the figures
of the verification of a run's merge.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import measured_on

BEGIN = """
import json, resource, shutil, sys, time
from pathlib import Path
base, adapter, out = map(Path, sys.argv[1:4])
def held(what):  # VmRSS: now; VmHWM: at most
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) / 2**20
"""
END = """
print(json.dumps({"seconds": time.perf_counter() - began, "gib": held("VmHWM") - before, **more}))
"""
WAYS = {
    "plain copy of the base": BEGIN
    + """
more, before, began = {}, held("VmRSS"), time.perf_counter()
shutil.copytree(base, out)
"""
    + END,
    "sft-recipes": BEGIN
    + """
from collections import defaultdict
from sft_recipes.export import merge
merge._verify = lambda *args: {"original": defaultdict(float)}  # verification and hashes are timed separately
merge.write_report = lambda *args: None
more, before, began = {}, held("VmRSS"), time.perf_counter()
merge.merge(adapter, out)
"""
    + END,
    "sft-recipes, verified": BEGIN
    + """
from sft_recipes.export import merge
more, before, began = {}, held("VmRSS"), time.perf_counter()
verify = merge.verify.verify
def timed(request):
    start = time.perf_counter()
    found = verify(request)
    more["verification"] = time.perf_counter() - start
    return found
merge.verify.verify = timed
more["said"] = merge.merge(adapter, out)
more["verifying_gib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
"""
    + END,
    "PEFT": BEGIN
    + """
import torch, peft
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
more, before, began = {}, held("VmRSS"), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="5GB")
"""
    + END,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a run with LoRA: merge it, and print what was verified")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary directory")
    args = parser.parse_args()
    print(measured_on(), "\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.run:
            verification(args.run, folder)
        else:
            against_peft(folder, args)


def against_peft(folder: Path, args: argparse.Namespace) -> None:
    base, adapter = make_base(folder / "base", args.layers), folder / "adapter"
    make_adapter(adapter, base)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9
    print(f"{size:.2f} GB in {len(list(base.glob('*.safetensors')))} files\n")
    best: dict[str, dict[str, Any]] = {}
    bits: dict[str, str] = {}
    for _ in range(args.times):
        for way, code in WAYS.items():
            out = folder / "out"
            done = subprocess.run(
                [sys.executable, "-c", code, base, adapter, out], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            best[way] = min(best.get(way, found), found, key=lambda each: each["seconds"])
            if way in ("sft-recipes", "PEFT") and way not in bits:
                bits[way] = differing(base, adapter, out)
            shutil.rmtree(out)
    print("| way | seconds | peak memory, GiB | elements off the float64 sum rounded once |\n|---|---|---|---|")
    for way, found in best.items():
        print(f"| {way} | {found['seconds']:.1f} | {found['gib']:.2f} | {bits.get(way, '')} |")
    ours, theirs = best["sft-recipes"], best["PEFT"]
    print(
        f"\n{theirs['seconds'] / ours['seconds']:.1f} times as fast as PEFT, {ours['gib'] / theirs['gib']:.2f} of its memory, "
        f"{ours['seconds'] / best['plain copy of the base']['seconds']:.1f} times a copy"
    )
    checked = best["sft-recipes, verified"]
    print(
        f"\nThe proof, with the start of its process, takes {checked['verification']:.1f} s, "
        f"{checked['verification'] / ours['seconds']:.1f} times the merge"
    )
    print(f"\nThe process that verifies takes {checked['verifying_gib']:.1f} GiB at most, and says:\n")
    print("\n".join(f"    {line}" for line in checked["said"]))


def make_base(folder: Path, layers: int) -> Path:
    """Shapes of Llama 3 8B, as many layers, random weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir()
    torch.manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        shard[name] = (torch.randn(shape) * 0.02 + (1 if "norm" in name else 0)).to(torch.bfloat16)
        if sum(t.numel() for t in shard.values()) > 5e8 or name == list(shapes)[-1]:
            file = f"model-{len(set(index.values())):05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1} | {f"{chr(97 + n // 26)}{chr(97 + n % 26)}": n + 2 for n in range(600)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path) -> None:
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    settings.base_model_name_or_path = str(base)
    adapted = peft.get_peft_model(model, settings)
    weights = {
        name: torch.randn(tensor.shape) * 0.02 for name, tensor in peft.get_peft_model_state_dict(adapted).items()
    }
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings.save_pretrained(folder)


def differing(base: Path, adapter: Path, out: Path) -> str:
    """How many elements of adapted weights are not the float64 sum rounded once."""
    from safetensors import safe_open

    from sft_recipes.export import safetensors_io

    before, after = safetensors_io.read_model(base), safetensors_io.read_model(out)
    wrong = total = 0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as given:
        for key in given.keys():  # noqa: SIM118  # no mapping
            if "lora_A" not in key:
                continue
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            a, b = given.get_tensor(key).double(), given.get_tensor(key.replace("lora_A", "lora_B")).double()
            for first in range(0, b.shape[0], 1024):
                last = min(first + 1024, b.shape[0])
                exact = before[name].rows(first, last).double() + 2.0 * (b[first:last] @ a)
                wrong += int((exact.to(after[name].dtype) != after[name].rows(first, last)).sum())
                total += exact.numel()
    return f"{wrong:,} of {total:,}"


def verification(run: Path, folder: Path) -> None:
    from sft_recipes.export import merge

    for line in merge.merge(run / "adapter", folder / "out"):
        print(f"    {line}")


if __name__ == "__main__":
    main()

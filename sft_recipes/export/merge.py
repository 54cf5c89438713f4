"""Merge adapters into their base: W' = round(float32(W) + scale · B·A), with one rounding to the output dtype.

Weights are streamed from file to file in blocks of rows, so that memory does not grow with the model. The merged model is
verified before its directory is renamed into place.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.atomic_files import atomic_dir, file_hashes, write_json
from sft_recipes.errors import ModelError, OutputError, RunError, SFTRecipeError, reason_of
from sft_recipes.export import load_adapter, probe, safetensors_io, verify
from sft_recipes.export.dequantize import as_loaded, dequantize, merge_dtype
from sft_recipes.export.load_adapter import Adapter
from sft_recipes.export.merge_plan import NotStreamable, plan_merge
from sft_recipes.export.probe import Probe, rows_of_texts
from sft_recipes.export.reference import Record, run_model
from sft_recipes.export.save_model import save_around, save_model
from sft_recipes.export.weights import check_bits
from sft_recipes.run_dir import MERGE, REFERENCE

BASES = ("original", "dequantized")


@dataclass
class _Job:
    """Inputs and settings of a merge."""

    adapter: Adapter
    probe: Probe
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    dtype: str
    max_shard_size: str

    def __post_init__(self) -> None:
        self.rows = self.probe.rows or rows_of_texts(self.tokenizer)
        record = self.adapter.folder.resolve().parent / REFERENCE
        self.record = str(record) if self.probe.rows and record.is_file() else None

    @property
    def save_options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "stops": self.stops}

    def merge_dtype(self, base: str) -> torch.dtype:
        quantized, recorded = bool(self.probe.quantization), self.record is not None
        return merge_dtype(self.probe.loaded, base, quantized=quantized, recorded=recorded)

    def generation_config(self, of_base: GenerationConfig) -> GenerationConfig:
        folder = self.adapter.folder
        return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else of_base


def merge(
    folder: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> list[str]:
    """Merge the adapter in `folder` into its base, verify the model and write it to `out`; returns lines for the console.

    `base` replaces the base that the adapter names. If training quantized the base, it can also be `original` or
    `dequantized`; default: merge into both, and keep the model with the lower loss on the rows of the probe.

    Raises: ModelError if adapter and base do not fit or the result has NaN or Inf, OutputError if `out` is not empty,
    RunError if verification fails.
    """
    if reason := model_dir.unusable(str(out)) or (None if out.exists() else model_dir.path_problem(str(out))):
        raise OutputError(f"{out}: cannot be created: {reason}. Choose another --out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: already exists. Choose another --out, or remove it.")
    adapter = load_adapter.find(folder, None if base in BASES else base, trust_remote_code=trust_remote_code)
    known = probe.of_adapter(folder) or Probe()
    if base in BASES and not known.quantization:
        raise ModelError(
            f"--base {base}: {folder} has no record of a quantized base. Merge the adapter in its run directory, or pass "
            "--base DIR."
        )
    tokenizer = adapter.load_tokenizer()
    job = _Job(adapter, known, tokenizer, load_adapter.stop_tokens(folder, tokenizer), dtype, max_shard_size)
    bases = [str(base)] if base in BASES else [*BASES] if known.quantization else ["original"]
    try:
        with atomic_dir(out) as partial:
            methods = {name: _write(job, partial / name, name, out) for name in bases}
            models = {name: partial / name for name, method in methods.items() if method is not None}
            if not models:
                raise ModelError(f"--base {base}: only PEFT can merge {folder}, and not into a dequantized base.")
            results = _verify(job, models, methods, out)
            chosen = min(models, key=lambda name: float(results[name]["loss"]))
            for file in list(models[chosen].iterdir()):
                file.rename(partial / file.name)
            for name in bases:
                shutil.rmtree(partial / name, ignore_errors=True)
                _peft_outputs(partial / name).unlink(missing_ok=True)
            report = {
                "adapter": str(folder), "base": adapter.base, "revision": adapter.revision, "dtype": dtype,
                "merged_into": chosen, "merged_by": methods[chosen], "verification": results,
            }  # fmt: skip
            write_report(partial / MERGE, report)
    except SFTRecipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: cannot be written: {' '.join(str(error).split())}") from error
    return _summary_lines(chosen, results, methods, dtype, known.split if known.rows else "built-in")


def write_report(file: Path, report: Mapping[str, Any]) -> None:
    """Write a report into a model directory, with size and SHA-256 of every file there."""
    write_json(file, {**report, "files": file_hashes(file.parent)})


def _write(job: _Job, folder: Path, base: str, out: Path) -> str | None:
    """Write one merged model and return the method; None if PEFT would have to merge into a dequantized base."""
    folder.mkdir()
    try:
        try:
            _stream(job, folder, dequantized=base == "dequantized")
            return "streaming"
        except NotStreamable as error:
            if base == "dequantized":
                return None
            _merge_in_memory(job, folder, out)
            return f"PEFT, in memory: {error}"
    except (SFTRecipeError, OSError, SafetensorError):
        raise
    except Exception as error:  # PEFT and transformers raise many types for adapters that make no sense
        raise ModelError(
            f"{job.adapter.folder}: cannot be merged: {type(error).__name__}: {reason_of(error)}"
        ) from error


def _stream(job: _Job, folder: Path, *, dequantized: bool) -> None:
    """Merge in blocks of rows, from file to file. Raises NotStreamable if only PEFT can merge the adapter."""
    adapter, dtype = job.adapter, getattr(torch, job.dtype)
    config, files = adapter.base_config(), adapter.base_files()
    if getattr(config, "auto_map", None):
        raise NotStreamable("the base has custom code")
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{adapter.base}: the base is stored quantized. Pass the model that it was made from with --base."
        )
    with adapter.base_errors():
        with torch.device("meta"):
            model, for_peft = (AutoModelForCausalLM.from_config(config, dtype=dtype) for _ in range(2))
        tensors = safetensors_io.read_model(files)
        if (files / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(files)
    load_adapter.check_complete(adapter, for_peft)
    base = as_loaded(tensors, model, job.merge_dtype("dequantized" if dequantized else "original"))
    if dequantized:
        assert job.probe.quantization is not None
        base = dequantize(base, model, job.probe.quantization, getattr(torch, job.probe.loaded))
    plan = plan_merge(adapter, base, model)
    try:
        safetensors_io.write(plan.tensors, folder, dtype, job.max_shard_size)
    except ModelError as error:
        raise ModelError(f"{adapter.folder}: cannot be merged: {error}") from None
    text_config = model.config.get_text_config()
    text_config.tie_word_embeddings = plan.tied
    if plan.vocab_size != model.get_input_embeddings().weight.shape[0]:
        text_config.vocab_size = plan.vocab_size
    model.generation_config = job.generation_config(model.generation_config)
    save_around(model, job.tokenizer, folder, **job.save_options)


def _merge_in_memory(job: _Job, folder: Path, out: Path) -> None:
    adapted = load_adapter.load(job.adapter, torch.float32, rounded_to=job.merge_dtype("original"))
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)  # ValueError if there is NaN or Inf
    outputs = Record(run_model(merged, job.rows))
    merged.generation_config = job.generation_config(merged.generation_config)
    save_model(merged, job.tokenizer, folder, max_shard_size=job.max_shard_size, **job.save_options)
    check_bits(merged, folder, out)
    outputs.rounded = run_model(merged, job.rows)
    outputs.save(_peft_outputs(folder))


def _peft_outputs(folder: Path) -> Path:
    """Return the file with the outputs of a model that PEFT merged in memory."""
    return folder.with_name(f"{folder.name}.{REFERENCE}")


def _verify(
    job: _Job, models: Mapping[str, Path], methods: Mapping[str, str | None], out: Path
) -> dict[str, dict[str, Any]]:
    request = verify.Request(
        models={name: str(folder.resolve()) for name, folder in models.items()},
        dtype=job.dtype,
        tokenizer=_absolute(job.adapter.tokenizer),
        stops=job.stops,
        base=_absolute(job.adapter.base),
        revision=job.adapter.revision,
        adapter=str(job.adapter.folder.resolve()),
        merged={name: str(_peft_outputs(models[name])) for name in models if methods[name] != "streaming"},
        record=job.record,
        rows=job.rows,
        prompt=job.probe.prompt,
        quantization=job.probe.quantization,
        loaded=job.probe.loaded,
        trust_remote_code=job.adapter.trust_remote_code,
    )
    with verify.naming(out):
        return verify.verify(request)


def _absolute(location: str) -> str:
    return str(Path(location).resolve()) if Path(location).is_dir() else location


def _summary_lines(
    chosen: str, results: Mapping[str, Mapping[str, Any]], methods: Mapping[str, str | None], dtype: str, split: str
) -> list[str]:
    lines = []
    for name, result in results.items():
        if quantized := result.get("vs_quantized_base"):
            lines.append(
                f"merged into {name} base: loss {result['loss']:.4f} (adapter on quantized base: {quantized['loss']:.4f}); "
                f"logit difference max {quantized['max_logit_diff']:.3g}, mean {quantized['mean_logit_diff']:.3g}"
            )
    if len(results) > 1:
        lines.append(f"kept: {chosen} base, by lower loss (--base {' or '.join(BASES)} selects one)")
    elif None in methods.values():
        lines.append("kept: original base; PEFT cannot merge this adapter into a dequantized base")
    if (method := methods[chosen]) != "streaming":
        lines.append(f"merged by {method}")
    return [*lines, *verification_lines(results[chosen], dtype, split)]


def verification_lines(result: Mapping[str, Any], dtype: str, split: str) -> list[str]:
    """Format the results of a verification; `split` is where its rows are from."""
    lines = [
        f"verify: passed in a separate process; max logit difference to trained model {result['max_logit_diff']:.2g} "
        f"(expected from {dtype} rounding: {result['rounding_logit_diff']:.2g}), to base "
        f"{result['max_logit_diff_from_base']:.2g}; loss on {split} samples: exported {result['loss']:.4f}, trained "
        f"{result['trained_loss']:.4f}, base {result['base_loss']:.4f}"
    ]
    if not result["max_logit_change"]:
        lines.append("warning: training changed nothing: the exported model is the base")
    elif result["rounding_logit_diff"] > result["max_logit_change"] / 2:
        lines.append(
            f"warning: rounding to {dtype} changes the logits by up to {result['rounding_logit_diff']:.2g}, training by "
            f"{result['max_logit_change']:.2g}. Set export.dtype: float32 (merge: --dtype float32) to keep what was trained."
        )
    return lines

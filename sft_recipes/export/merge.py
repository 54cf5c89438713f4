"""Merging adapters into their base: W' = round(float32(W) + scale · B·A), with one rounding to the output type.

A few rows at a time, from file to file, so that no model needs more memory than another; and proven to be the model that
was trained before it gets its name.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.atomic_files import atomic_dir, file_hashes, write_json
from sft_recipes.errors import ModelError, OutputError, RunError, SFTRecipeError, reason_of
from sft_recipes.export import load_adapter, probe, safetensors_io, verify
from sft_recipes.export.dequantize import as_loaded, dequantized, held_in
from sft_recipes.export.load_adapter import Origin
from sft_recipes.export.lora_deltas import NotStreamable, TensorMerger, refuse_incomplete
from sft_recipes.export.probe import Probe, rows_of_texts
from sft_recipes.export.reference import Record, run_model
from sft_recipes.export.save_model import DTYPES, save_around, save_model
from sft_recipes.export.weights import check_bits
from sft_recipes.run_dir import MERGE, REFERENCE

BASES = ("original", "dequantized")


@dataclass
class _Job:
    """What is merged, and how it is to be written."""

    adapter: Path
    of: Origin
    probe: Probe
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    dtype: str
    max_shard_size: str
    trust_remote_code: bool

    def __post_init__(self) -> None:
        self.rows = self.probe.rows or rows_of_texts(self.tokenizer)
        record = self.adapter.resolve().parent / REFERENCE
        self.record = str(record) if self.probe.rows and record.is_file() else None

    def held_in(self, kind: str) -> torch.dtype:
        recorded, quantized = self.record is not None, bool(self.probe.quantization)
        return held_in(self.probe.loaded, kind, quantized=quantized, recorded=recorded)


def merge(
    adapter: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> list[str]:
    """Write `adapter` merged into its base as a model directory; returns what is to be said of it.

    `base` is where the base is, if not where the adapter says. Of an adapter trained on a quantized base it may also be
    `original` or `dequantized`: the weights that were quantized, or what became of them. Without it both are tried, and the
    one with the lower loss on the held-out rows is kept. Raises ModelError where adapter and base do not fit or the result is
    not finite, OutputError where `out` is in use, RunError where the result is not the model that was trained.
    """
    if reason := model_dir.unusable(str(out)) or (None if out.exists() else model_dir.path_problem(str(out))):
        raise OutputError(f"{out}: cannot be made: {reason}; choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: in use; choose another --out, or remove it")
    of = load_adapter.origin(adapter, None if base in BASES else base)
    known = probe.of_adapter(adapter) or Probe()
    if base in BASES and not known.quantization:
        raise ModelError(
            f"--base {base}: {adapter} is not known to have been trained on a quantized base; merge it from its run's "
            "directory, or say where the base is"
        )
    tokenizer = load_adapter.tokenizer_of(of, trust_remote_code=trust_remote_code)
    stops = load_adapter.stops(adapter, tokenizer)
    job = _Job(adapter, of, known, tokenizer, stops, dtype, max_shard_size, trust_remote_code)
    names = [base] if base in BASES else [*BASES] if known.quantization else ["original"]
    try:
        with atomic_dir(out) as folder:
            ways = {name: _write(job, folder / name, name, out) for name in names if name}
            folders = {name: folder / name for name, way in ways.items() if way is not None}
            if not folders:
                raise ModelError(
                    f"--base {base}: only PEFT can merge {adapter}, and it cannot do that into such a base"
                )
            figures = _verify(job, folders, ways, out)
            chosen = min(folders, key=lambda name: float(figures[name]["loss"]))
            for file in list(folders[chosen].iterdir()):
                file.rename(folder / file.name)
            for name in names:
                shutil.rmtree(folder / str(name), ignore_errors=True)
                _computed(folder / str(name)).unlink(missing_ok=True)
            report = {
                "adapter": str(adapter), "base": of.base, "revision": of.revision, "dtype": dtype,
                "merged_into": chosen, "merged_by": ways[chosen], "verification": figures,
            }  # fmt: skip
            write_report(folder / MERGE, report)
    except SFTRecipeError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: cannot be written: {reason_of(error)}") from error
    return _lines(chosen, figures, ways, dtype, known.split if known.rows else "built-in")


def write_report(file: Path, report: Mapping[str, Any]) -> None:
    """Write a report of a model's directory, with size and SHA-256 of every file in it."""
    write_json(file, {**report, "files": file_hashes(file.parent)})


def _verify(
    job: _Job, folders: Mapping[str, Path], ways: Mapping[str, str | None], out: Path
) -> dict[str, dict[str, Any]]:
    request = verify.Request(
        models={name: str(folder.resolve()) for name, folder in folders.items()},
        dtype=job.dtype,
        tokenizer=_absolute(job.of.tokenizer),
        stops=job.stops,
        base=_absolute(job.of.base),
        revision=job.of.revision,
        adapter=str(job.adapter.resolve()),
        merged={name: str(_computed(folder)) for name, folder in folders.items() if ways[name] != "streaming"},
        record=job.record,
        rows=job.rows,
        prompt=job.probe.prompt,
        quantization=job.probe.quantization,
        loaded=job.probe.loaded,
        trust_remote_code=job.trust_remote_code,
    )
    try:
        return verify.verify(request)
    except RunError as error:
        raise RunError(*(f"{out}: not kept: {line}" for line in error.lines)) from error


def _write(job: _Job, folder: Path, kind: str, out: Path) -> str | None:
    """Write one merged model, and say how; None where that cannot be done for the dequantized base."""
    folder.mkdir()
    try:
        try:
            _row_by_row(job, folder, dequantize=kind == "dequantized")
            return "streaming"
        except NotStreamable as error:
            if kind == "dequantized":
                return None
            _in_memory(job, folder, out)
            return f"PEFT, in memory: {error}"
    except (SFTRecipeError, OSError, SafetensorError):
        raise
    except Exception as error:  # what PEFT and transformers say of adapters that make no sense has many types
        raise ModelError(f"{job.adapter}: cannot be merged: {type(error).__name__}: {reason_of(error)}") from error


def _row_by_row(job: _Job, folder: Path, *, dequantize: bool) -> None:
    of = job.of
    with load_adapter.as_base_error(of.base):
        files = load_adapter.files(of)
        config = AutoConfig.from_pretrained(files, trust_remote_code=job.trust_remote_code)
        model_dir.reject_hub_kernels(config, trust_remote_code=job.trust_remote_code)
        if getattr(config, "auto_map", None):
            raise NotStreamable("the base brings code of its own")
        if getattr(config, "quantization_config", None):
            raise ModelError(f"{of.base}: the base is stored quantized; give the one it was made from with --base")
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[job.dtype])
        base = safetensors_io.in_model(files)
        if (files / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(files)
        with torch.device("meta"):
            twin = AutoModelForCausalLM.from_config(config, dtype=DTYPES[job.dtype])
    refuse_incomplete(job.adapter, of.config, twin)
    base = as_loaded(base, model, job.held_in("dequantized" if dequantize else "original"))
    if dequantize:
        assert job.probe.quantization is not None
        base = dequantized(base, model, job.probe.quantization, DTYPES[job.probe.loaded])
    merged = TensorMerger(job.adapter, of.config, base, model)
    try:
        safetensors_io.write(merged.wanted, folder, DTYPES[job.dtype], job.max_shard_size)
    except ModelError as error:
        raise ModelError(f"{job.adapter}: cannot be merged: {error}") from None
    text = model.config.get_text_config()
    text.tie_word_embeddings = merged.tied
    if merged.height != model.get_input_embeddings().weight.shape[0]:
        text.vocab_size = merged.height
    model.generation_config = _generation(job, model.generation_config)
    save_around(model, job.tokenizer, folder, dtype=job.dtype, stops=job.stops)


def _in_memory(job: _Job, folder: Path, out: Path) -> None:
    adapted, _ = load_adapter.adapted(
        job.adapter, torch.float32, base=job.of.base, revision=job.of.revision, trust_remote_code=job.trust_remote_code,
        rounded_to=job.held_in("original"),
    )  # fmt: skip
    merged = adapted.merge_and_unload(safe_merge=True)  # ValueError where a number is not finite
    computed = Record(run_model(merged, job.rows))
    merged.generation_config = _generation(job, merged.generation_config)
    save_model(
        merged, job.tokenizer, folder, dtype=job.dtype, max_shard_size=job.max_shard_size, stops=job.stops
    )  # fmt: skip
    check_bits(merged, folder, out)
    computed.rounded = run_model(merged, job.rows)
    computed.save(_computed(folder))


def _computed(folder: Path) -> Path:
    """The file of what a merge in memory computes."""
    return folder.with_name(f"{folder.name}.{REFERENCE}")


def _generation(job: _Job, of_base: GenerationConfig) -> GenerationConfig:
    own = (job.adapter / "generation_config.json").is_file()
    return GenerationConfig.from_pretrained(job.adapter) if own else of_base


def _absolute(place: str) -> str:
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def _lines(
    chosen: str, figures: Mapping[str, Mapping[str, Any]], ways: Mapping[str, str | None], dtype: str, split: str
) -> list[str]:
    """What is to be said of a merge."""
    lines = []
    for name, found in figures.items():
        if quantized := found.get("vs_quantized_base"):
            lines.append(
                f"merged into the {name} base: held-out loss {found['loss']:.4f} (the adapter on its quantized base "
                f"{quantized['loss']:.4f}), logits up to {quantized['max_logit_diff']:.3g} off, "
                f"{quantized['mean_logit_diff']:.3g} in the mean"
            )
    if len(figures) > 1:
        lines.append(f"merged into: {chosen}, by the loss (--base {' or '.join(BASES)} chooses)")
    elif None in ways.values():
        lines.append("merged into: original; PEFT cannot merge this adapter into a dequantized base")
    if (way := ways[chosen]) != "streaming":
        lines.append(f"merged by {way}")
    return [*lines, *proof_in_words(figures[chosen], dtype, split)]


def proof_in_words(found: Mapping[str, Any], dtype: str, split: str) -> list[str]:
    """Format the results of a verification; `split` is where its rows are from."""
    lines = [
        f"verify: passed in a separate process; max logit difference to trained model {found['max_logit_diff']:.2g} "
        f"(expected from {dtype} rounding: {found['rounding_logit_diff']:.2g}), to base "
        f"{found['max_logit_diff_from_base']:.2g}; loss on {split} samples: exported {found['loss']:.4f}, trained "
        f"{found['trained_loss']:.4f}, base {found['base_loss']:.4f}"
    ]
    if not found["max_logit_change"]:
        lines.append("warning: the training has changed nothing: the model is the base")
    elif found["rounding_logit_diff"] > found["max_logit_change"] / 2:
        lines.append(
            f"warning: rounding to {dtype} changes the logits by as much as {found['rounding_logit_diff']:.2g}, the "
            f"training did by {found['largest_change_by_training']:.2g}; float32 (export.dtype, --dtype) keeps it"
        )
    return lines

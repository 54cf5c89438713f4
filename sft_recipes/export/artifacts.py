"""Write and verify the artifacts of a run: adapter/ and model/."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.atomic_files import atomic_dir, remove
from sft_recipes.data.prepare import Prepared
from sft_recipes.errors import InputError, ModelError, RunError, reason_of
from sft_recipes.export import safetensors_io, save_model, verify
from sft_recipes.export.merge import merge, verification_lines, write_report
from sft_recipes.export.probe import Probe, rows_of
from sft_recipes.export.reference import Record
from sft_recipes.export.save_model import GatheredWeights
from sft_recipes.export.weights import check_bits
from sft_recipes.recipe.schema import Recipe
from sft_recipes.run_dir import ADAPTER, EXPORT, MODEL, REFERENCE


@contextmanager
def write_gathered(
    recipe: Recipe,
    model: PreTrainedModel,
    shapes: Mapping[str, torch.Tensor] | None,
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    main: bool,
) -> Iterator[GatheredWeights | None]:
    """Write the weights of a sharded, fully fine-tuned model to a temporary directory for `export`.

    All ranks have to enter; see `save_model.write_gathered`.
    """
    if main and shapes is not None:
        with suppress(OSError):  # `export` reports it
            remove(folder / MODEL)  # of a run resumed after its export: there may be no space for both
    with save_model.write_gathered(
        model, shapes, weights, folder / ".weights", main=main, max_shard_size=recipe.export.max_shard_size
    ) as gathered:
        yield gathered


def export(
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    folder: Path,
    record: Record,
    adapter: dict[str, torch.Tensor] | None = None,
    weights: GatheredWeights | None = None,
) -> list[str]:
    """Write adapter/ and model/ into the run directory, verify them, and return lines for the console.

    `record` has the outputs of the trained model. A sharded model does not hold its weights: then `adapter` has the trained
    ones by name or, after full fine-tuning, `weights` all of them.

    Raises RunError if trained weights have NaN or Inf, the merge is impossible, verification fails, or the disk does.
    """
    diverged = f"{folder}: %s, so nothing is exported. Training diverged: set a lower train.learning_rate."
    held = [parameter for parameter in model.parameters() if parameter.requires_grad] if weights is None else []
    if not all(bool(tensor.isfinite().all()) for tensor in (held if adapter is None else adapter.values())):
        raise RunError(diverged % "the trained weights have NaN or Inf")
    try:
        if weights is not None and isinstance(weights.error, ModelError):
            raise RunError(diverged % str(weights.error))
        if weights is not None and weights.error is not None:
            raise weights.error
        for earlier in (folder / ADAPTER, folder / MODEL):
            remove(earlier)  # of a run resumed after its export
        quantization = getattr(model.config, "quantization_config", None)
        probe = Probe(
            rows_of(data.eval or data.train),
            asdict(data.prompt) if data.prompt and data.chat_template else None,
            quantization.to_dict() if quantization is not None else None,
            recipe.model.dtype,
            "evaluation" if data.eval else "training",
        )
        probe.save(folder)
        record.save(folder / REFERENCE)
        if not recipe.trains_adapters:
            return _export_full(recipe, model, tokenizer, data.stops, probe, folder / MODEL, weights)
        save_model.save_adapter(model, tokenizer, folder / ADAPTER, stops=data.stops, weights=adapter)
        if probe.quantization:
            probe.save_quantization(folder / ADAPTER)
        if not recipe.export.merge:
            return []
        return merge(
            folder / ADAPTER, folder / MODEL, dtype=recipe.export.dtype, max_shard_size=recipe.export.max_shard_size,
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip
    except InputError as error:
        reason = str(error).rstrip(".")
        raise RunError(
            f"{folder}: not merged: {reason}. The adapter is complete. After a fix: sft-recipe merge {folder} --out DIR"
        ) from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: export failed: {reason_of(error)}. After a fix, continue with --resume.") from error


def _export_full(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    probe: Probe,
    out: Path,
    weights: GatheredWeights | None,
) -> list[str]:
    """Write a fully fine-tuned model, of which `weights` may be written already, and verify it."""
    dtype = recipe.export.dtype
    with atomic_dir(out) as folder, tempfile.TemporaryDirectory() as trained_tokenizer:
        if weights is not None:
            for file in weights.folder.iterdir():
                file.rename(folder / file.name)
            save_model.save_around(model, tokenizer, folder, dtype=dtype, stops=stops)
            _check_hashes(weights, folder, out)
        else:
            shard = recipe.export.max_shard_size
            save_model.save_model(model, tokenizer, folder, dtype=dtype, max_shard_size=shard, stops=stops)
            check_bits(model, folder, out)
        tokenizer.save_pretrained(trained_tokenizer)
        request = verify.Request(
            models={"model": str(folder.resolve())},
            dtype=dtype,
            tokenizer=trained_tokenizer,
            stops=list(stops),
            base=model_dir.location(recipe.model.name),
            revision=recipe.model.revision,
            record=str((out.parent / REFERENCE).resolve()),
            rows=probe.rows,
            prompt=probe.prompt,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        with verify.naming(out):
            result = verify.verify(request)["model"]
        write_report(folder / EXPORT, {"base": recipe.model.name, "dtype": dtype, "verification": result})
    return [*([weights.note] if weights and weights.note else []), *verification_lines(result, dtype, probe.split)]


def _check_hashes(weights: GatheredWeights, folder: Path, out: Path) -> None:
    """Raise RunError if a weight in the files is not bitwise the one that was gathered."""
    for name, stored in safetensors_io.read_model(folder).items():
        if stored.sha256() != weights.sha256[name]:
            raise RunError(f"{out}: verification failed: {name} in the file is not the weight that was gathered.")

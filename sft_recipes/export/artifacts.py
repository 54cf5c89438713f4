"""What a run leaves: the adapter and the model."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from sft_recipes.export import safetensors_io, verify
from sft_recipes.export.merge import merge, proof_in_words, write_report
from sft_recipes.export.probe import Probe, rows_of
from sft_recipes.export.reference import Record
from sft_recipes.export.save_model import Written, save_adapter, save_around, save_model
from sft_recipes.export.save_model import written as write_gathered
from sft_recipes.export.weights import check_bits
from sft_recipes.recipe.schema import Recipe
from sft_recipes.run_dir import ADAPTER, EXPORT, MODEL, REFERENCE


@contextmanager
def written(
    recipe: Recipe,
    model: PreTrainedModel,
    shapes: Mapping[str, torch.Tensor] | None,
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    main: bool,
) -> Iterator[Written | None]:
    """Write the weights of a sharded model of which all were trained to a directory of its own, which `export` takes them
    from; see `save.written`. Every rank has to come here."""
    if main and shapes is not None:
        with suppress(OSError):  # `export` says so
            remove(folder / MODEL)  # of a run that is resumed after its export; there may be no room for both
    with write_gathered(
        model, shapes, weights, folder / ".weights", main=main, max_shard_size=recipe.export.max_shard_size
    ) as found:
        yield found


def export(
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    folder: Path,
    record: Record,
    adapter: dict[str, torch.Tensor] | None = None,
    weights: Written | None = None,
) -> list[str]:
    """Write adapter/ and model/ into the run directory, and `record` beside them; returns what is to be said of them.

    A model that is sharded across ranks does not hold its weights: then `adapter` has the trained ones by name or, if all
    were trained, `weights` says where they are.

    Raises RunError where the trained weights are not finite, the merge is impossible, the model is not the one that was
    trained, or the disk fails.
    """
    held = [parameter for parameter in model.parameters() if parameter.requires_grad] if weights is None else []
    if not all(bool(tensor.isfinite().all()) for tensor in (held if adapter is None else adapter.values())):
        raise RunError(
            f"{folder}: the trained weights are not finite, so nothing is exported: the training diverged; set a lower "
            "train.learning_rate"
        )
    try:
        if weights is not None and isinstance(weights.error, ModelError):
            raise RunError(
                f"{folder}: {weights.error}, so nothing is exported: the training diverged; set a lower train.learning_rate"
            )
        if weights is not None and weights.error is not None:
            raise weights.error
        for earlier in (folder / ADAPTER, folder / MODEL):
            remove(earlier)  # of a run that is resumed after its export
        quantization = getattr(model.config, "quantization_config", None)
        probe = Probe(
            rows_of(data.eval or data.train),
            {"messages": data.prompt.messages, "ids": data.prompt.ids} if data.prompt and data.chat_template else None,
            quantization.to_dict() if quantization is not None else None,
            recipe.model.dtype,
            "evaluation" if data.eval else "training",
        )
        probe.save(folder)
        record.save(folder / REFERENCE)
        if not recipe.trains_adapters:
            return _whole(recipe, model, tokenizer, data.stops, probe, folder / MODEL, weights)
        save_adapter(model, tokenizer, folder / ADAPTER, stops=data.stops, weights=adapter)
        if probe.quantization:
            probe.save_quantization(folder / ADAPTER)
        if not recipe.export.merge:
            return []
        return merge(
            folder / ADAPTER, folder / MODEL, dtype=recipe.export.dtype, max_shard_size=recipe.export.max_shard_size,
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip
    except InputError as error:
        raise RunError(
            f"{folder}: trained, but not merged: {error}; the adapter is whole: sft-recipe merge {folder} --out DIR, when "
            "that is mended"
        ) from error
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder}: export failed: {reason_of(error)}; when that is mended, continue with --resume"
        ) from error


def _whole(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    probe: Probe,
    out: Path,
    weights: Written | None,
) -> list[str]:
    """Write a model of which all weights were trained, unless they are written already, and prove that it is that model."""
    dtype = recipe.export.dtype
    with atomic_dir(out) as folder, tempfile.TemporaryDirectory() as elsewhere:
        if weights is not None:
            for file in weights.folder.iterdir():
                file.rename(folder / file.name)
            save_around(model, tokenizer, folder, dtype=dtype, stops=stops)
            _check_hashes(weights, folder, out)
        else:
            shard = recipe.export.max_shard_size
            save_model(model, tokenizer, folder, dtype=dtype, max_shard_size=shard, stops=stops)
            check_bits(model, folder, out)
        tokenizer.save_pretrained(elsewhere)
        request = verify.Request(
            models={"model": str(folder.resolve())},
            dtype=dtype,
            tokenizer=elsewhere,
            stops=list(stops),
            base=model_dir.location(recipe.model.name),
            revision=recipe.model.revision,
            record=str((out.parent / REFERENCE).resolve()),
            rows=probe.rows,
            prompt=probe.prompt,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        try:
            figures = verify.verify(request)["model"]
        except RunError as error:
            raise RunError(*(f"{out}: not kept: {line}" for line in error.lines)) from error
        write_report(folder / EXPORT, {"base": recipe.model.name, "dtype": dtype, "verification": figures})
    return [*([weights.note] if weights and weights.note else []), *proof_in_words(figures, dtype, probe.split)]


def _check_hashes(weights: Written, folder: Path, out: Path) -> None:
    """Every weight in the files is, to the bit, the one that was gathered. Raises RunError."""
    for name, stored in safetensors_io.in_model(folder).items():
        if safetensors_io.sha256(stored) != weights.sha256[name]:
            raise RunError(f"{out}: not kept: {name} is not in the file as it was gathered")

"""Save a model directory that loads with plain transformers: weights, configs, tokenizer, chat template."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.atomic_files import atomic_dir
from sft_recipes.export.safetensors_io import Writer
from sft_recipes.upstream import unsaved_weights


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: str,
    max_shard_size: str,
    stops: Sequence[int],
) -> None:
    """Save a model with its weights rounded to `dtype`, which the model in memory then has, too."""
    round_weights(model, getattr(torch, dtype))
    tie_if_equal(model)
    set_generation_config(model, tokenizer, stops)  # save_pretrained() rejects an invalid one
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_around(model, tokenizer, folder, dtype=dtype, stops=stops)


@dataclass
class GatheredWeights:
    """A temporary directory of weights that were written while they were gathered."""

    folder: Path
    sha256: dict[str, str] = field(default_factory=dict)  # of each tensor's bytes, by its name in the files
    error: Exception | None = None  # why they are incomplete
    note: str | None = None


@contextmanager
def write_gathered(
    model: PreTrainedModel,
    shapes: Mapping[str, torch.Tensor] | None,
    weights: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    main: bool,
    max_shard_size: str,
) -> Iterator[GatheredWeights | None]:
    """Write the weights of a sharded model to `folder` while they are gathered. The folder is removed on exit.

    All ranks have to iterate over all of `weights`, so an error of rank 0 (`main`), which writes, is not raised but yielded.
    `model` is used for names and config. `shapes` are meta tensors of the final dtype by their names in the state dict (None:
    yield None), `weights` all-gathered tensors with the same names in any order.
    """
    if shapes is None:
        yield None
        return
    found = GatheredWeights(folder)
    try:
        files = None
        if main:
            with _keep_error(found):
                shutil.rmtree(folder, ignore_errors=True)  # left over from a killed run
                folder.mkdir()
                files = _Files(model, shapes, folder, max_shard_size)
        for name, weight in weights:
            if files is not None and found.error is None:
                with _keep_error(found):
                    files.put(name, weight)
            if not main and weight.is_cuda:
                torch.cuda.synchronize()  # NCCL's time-out starts when a collective is enqueued, and rank 0 writes in between
            del weight  # before the next one is gathered
        if files is not None and found.error is None:
            with _keep_error(found):
                files.close()
                found.sha256, found.note = files.writer.sha256, files.note
        yield found
    finally:
        if main:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _keep_error(found: GatheredWeights) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found.error = error


class _Files:
    """The files that `save_pretrained` would write, written tensor by tensor in the order of gathering."""

    def __init__(
        self, model: PreTrainedModel, shapes: Mapping[str, torch.Tensor], folder: Path, max_shard_size: str
    ) -> None:
        self._model, self._folder = model, folder
        ignored = unsaved_weights(model)
        saved = {name: shape for name, shape in shapes.items() if name not in ignored}
        saved = remove_tied_weights_from_state_dict(saved, model)
        # Files can differ from memory in names and layout: the experts of a layer can be one tensor in memory. Usually each
        # tensor can be converted alone.
        files = revert_weight_conversion(model, dict(saved))
        for self.note, self._group_of in _GROUPINGS:
            self._groups = defaultdict[str, dict[str, torch.Tensor]](dict)
            for name, shape in saved.items():
                self._groups[self._group_of(name)][name] = shape
            if self._converts_to(files):
                break
        else:
            raise ValueError(f"the weights of {type(model).__name__} cannot be converted to those of its files")
        self._waiting = defaultdict[str, dict[str, torch.Tensor]](dict)
        self.writer = Writer(
            {name: (shape.dtype, tuple(shape.shape)) for name, shape in files.items()}, folder, max_shard_size
        )
        self._parameters = sum(shapes[name].numel() for name, _ in model.named_parameters())

    def _converts_to(self, files: Mapping[str, torch.Tensor]) -> bool:
        found: dict[str, torch.Tensor] = {}
        for group in self._groups.values():
            try:
                found |= revert_weight_conversion(self._model, dict(group))
            except (ValueError, RuntimeError, LookupError):  # it requires a tensor of another group
                return False
        return {n: s.shape for n, s in found.items()} == {n: s.shape for n, s in files.items()}

    def put(self, name: str, weight: torch.Tensor) -> None:
        key = self._group_of(name)
        if name not in self._groups.get(key, ()):
            return  # not saved, or tied to one that is
        group = self._waiting[key]
        group[name] = weight if len(self._groups[key]) == 1 else weight.cpu()
        if len(group) == len(self._groups[key]):
            for file_name, tensor in revert_weight_conversion(self._model, self._waiting.pop(key)).items():
                self.writer.put(file_name, tensor)

    def close(self) -> None:
        self.writer.close({"total_parameters": self._parameters})
        model, config = self._model, self._model.config.get_text_config()
        if model.is_remote_code():
            custom_object_save(model, self._folder, config=model.config)
        head = model.get_output_embeddings()
        if config.tie_word_embeddings and head is not None:
            config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight


def _layer(name: str) -> str:
    """Return a name up to the layer's number."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


_GROUPINGS: list[tuple[str | None, Callable[[str], str]]] = [
    (None, lambda name: name),
    ("weights gathered layer by layer: tensors of the files are made of several", _layer),
    ("weights gathered as a whole in host memory: they cannot be converted layer by layer", lambda _: ""),
]


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round what is saved to `dtype`, but not the buffers that a model computes from its config when it is loaded, such as
    rotary frequencies and Gemma's embedding scale."""
    saved = model.state_dict().keys()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name in computed:
            buffer.data = computed[name]


def save_around(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: str, stops: Sequence[int]
) -> None:
    """Write config, generation config and tokenizer for weights of `dtype`; `stops` are the EOS token ids."""
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    model.config.dtype = getattr(torch, dtype)
    set_generation_config(model, tokenizer, stops)
    model.config.save_pretrained(folder)
    write_rope_v4_keys(folder / "config.json")
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_adapter(
    model: peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    stops: Sequence[int],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter with tokenizer and generation config; `weights` replace those of the model."""
    set_generation_config(model, tokenizer, stops)
    with atomic_dir(out) as folder:
        # New-token embeddings are trained weights of the adapter, so whole embeddings are not saved.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        model.generation_config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer under a class name that transformers 4, and servers built on it, know too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for local in ("is_local", "local_files_only"):  # describe this machine
        config.pop(local, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rope_v4_keys(file: Path) -> None:
    """Write the rotary embedding of a config.json also in the keys of transformers 4.

    It ignores `rope_parameters` silently and uses a base of 10,000, with which the model computes other outputs.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        rope = part.get("rope_parameters") or {}
        if "rope_theta" not in rope:
            continue  # none, or one per type of layer, for which transformers 4 has no common keys
        part["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            part["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if rope.get("rope_type", "default") != "default":
            part["rope_scaling"] = {
                key: rope[key] for key in rope if key not in ("rope_theta", "partial_rotary_factor")
            }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def set_generation_config(
    model: PreTrainedModel | peft.PeftModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> None:
    """Let `generate` stop at the EOS tokens of training, and at those of the base."""
    config: GenerationConfig = model.generation_config
    own = config.eos_token_id if config.eos_token_id is not None else []
    # A config made without a tokenizer can name EOS ids that are ordinary tokens in it.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    own = [end for end in ([own] if isinstance(own, int) else own) if end in special]
    ends = list(dict.fromkeys([*stops, *own]))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # some models have sampling settings without do_sample, and cannot be saved


def untie(model: PreTrainedModel) -> None:
    """Give the LM head a weight of its own if it shares that of the embeddings."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if config.tie_word_embeddings and head is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        config.tie_word_embeddings = False


def tie_if_equal(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to whether LM head and embeddings are equal; an LM head that differs is saved separately."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if config.tie_word_embeddings and head is not None:
        config.tie_word_embeddings = torch.equal(head.weight, model.get_input_embeddings().weight)

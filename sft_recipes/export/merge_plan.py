"""Plan a merge as a list of operations on the base's tensors: printable, validated, computed in blocks of rows.

A weight with LoRA becomes float32(W) + scale · B·A; rounding is left to whoever writes it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_recipes.errors import ModelError
from sft_recipes.export.load_adapter import LEAVES_BASE, PREFIX, Adapter, end_names
from sft_recipes.export.safetensors_io import LazyTensor, Shape, StoredTensor, stored_name

_LORA = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_TOKENS = (".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight")
# Settings that change the formula of an adapter, or the layers it is on.
_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip
Tensors = Mapping[str, LazyTensor]


class NotStreamable(Exception):
    """Only PEFT can merge the adapter; the message says why."""


# --- Operations: `name` is that of the tensor in the base's files ----------------------------------------------------


@dataclass(frozen=True)
class ReplaceTensor:
    """A layer that was trained in full, or embeddings with more rows."""

    name: str
    tensor: StoredTensor

    def __str__(self) -> str:
        return f"{self.name}: replace with {list(self.tensor.shape)}"

    def apply(self, _tensors: Tensors) -> LazyTensor:
        return self.tensor


@dataclass(frozen=True)
class Untie:
    """An LM head that no longer shares the weight of the embeddings: it starts as a copy."""

    name: str
    embeddings: str

    def __str__(self) -> str:
        return f"{self.name}: copy of {self.embeddings}"

    def apply(self, tensors: Tensors) -> LazyTensor:
        return tensors[self.embeddings]


@dataclass(frozen=True)
class AddLora:
    """W + scale · B·A; after DoRA, the weights of each output are then scaled to the length `magnitude` (arXiv:2402.09353)."""

    name: str
    a: StoredTensor  # (rank, in)
    b: StoredTensor  # (out, rank)
    scale: float
    transposed: bool  # W is (in, out): embeddings, and the convolutions of GPT-2
    magnitude: StoredTensor | None = None

    def __str__(self) -> str:
        return (
            f"{self.name}: add {'DoRA' if self.magnitude else 'LoRA'} of rank {self.a.shape[0]}, scale {self.scale:g}"
        )

    def apply(self, tensors: Tensors) -> LazyTensor:
        base = tensors[self.name]
        inputs, outputs = base.shape if self.transposed else base.shape[::-1]
        if self.a.shape[1:] != (inputs,) or self.b.shape != (outputs, self.a.shape[0]):
            raise ValueError(
                f"{self.name} has shape {list(base.shape)} (lora_B {list(self.b.shape)}, lora_A {list(self.a.shape)})"
            )
        return Computed(self, base, base.shape)

    def blocks(self, base: LazyTensor, height: int) -> Iterator[torch.Tensor]:
        if self.magnitude is None:
            yield from self._sums(base, height)
            return
        magnitude = self.magnitude.whole().float()
        if self.transposed:
            magnitude = magnitude / sum(block.square_().sum(0) for block in self._sums(base, 512)).sqrt_()
        first = 0
        for block in self._sums(base, height):
            if self.transposed:
                block *= magnitude
            else:
                norm = torch.linalg.vector_norm(block, dim=1, keepdim=True)
                block *= magnitude[first : first + len(block)].view(-1, 1) / norm
            first += len(block)
            yield block

    def _sums(self, base: LazyTensor, height: int) -> Iterator[torch.Tensor]:
        a, b = self.a.whole().float(), self.b.whole().float()
        left, right = (a.T.contiguous(), b.T.contiguous()) if self.transposed else (b, a)
        first = 0
        for rows in base.blocks(height):
            block = torch.mm(left[first : first + len(rows)], right)
            block *= self.scale
            block += rows
            first += len(rows)
            yield block


@dataclass(frozen=True)
class AddBias:
    """b + scale · the bias of lora_B."""

    name: str
    bias: StoredTensor
    scale: float

    def __str__(self) -> str:
        return f"{self.name}: add the bias of LoRA, scale {self.scale:g}"

    def apply(self, tensors: Tensors) -> LazyTensor:
        if self.name not in tensors:
            raise ValueError(f"lora_bias: the base has no {self.name}")
        return Computed(self, tensors[self.name], self.bias.shape)

    def blocks(self, base: LazyTensor, height: int) -> Iterator[torch.Tensor]:
        for bias, rows in zip(self.bias.blocks(height), base.blocks(height), strict=True):
            yield bias.float() * self.scale + rows


@dataclass(frozen=True)
class ReplaceRows:
    """Rows of trained tokens, some of them beyond the base's last row (new tokens)."""

    name: str
    rows: StoredTensor
    tokens: Sequence[int]

    def __str__(self) -> str:
        return f"{self.name}: replace rows {', '.join(map(str, self.tokens))}"

    def apply(self, tensors: Tensors) -> LazyTensor:
        base = tensors[self.name]
        if self.rows.shape != (len(self.tokens), *base.shape[1:]):
            raise ValueError(
                f"{self.name} has shape {list(base.shape)} (rows {list(self.rows.shape)} for {len(self.tokens)} tokens)"
            )
        height = max(base.shape[0], *(token + 1 for token in self.tokens))
        if missing := set(range(base.shape[0], height)) - set(self.tokens):
            raise ValueError(f"neither base nor adapter has weights of token {min(missing)}")
        return Computed(self, base, (height, *base.shape[1:]))

    def blocks(self, base: LazyTensor, height: int) -> Iterator[torch.Tensor]:
        rows = dict(zip(self.tokens, self.rows.whole(), strict=True))
        added = max(0, *(token + 1 - base.shape[0] for token in self.tokens))
        first = 0
        for block in itertools.chain(base.blocks(height), torch.empty(added, *base.shape[1:]).split(height)):
            replaced = block.to(torch.float32, copy=True)
            for token in rows.keys() & set(range(first, first + len(block))):
                replaced[token - first] = rows[token]
            first += len(block)
            yield replaced


Operation = ReplaceTensor | Untie | AddLora | AddBias | ReplaceRows


@dataclass(frozen=True)
class Computed:
    """The tensor that an operation computes from one of the base."""

    operation: AddLora | AddBias | ReplaceRows
    base: LazyTensor
    shape: Shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def blocks(self, height: int) -> Iterator[torch.Tensor]:
        return self.operation.blocks(self.base, height)


# --- The plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergePlan:
    """Operations, and the tensors of the merged model by their names in its files."""

    operations: list[Operation]
    tensors: dict[str, LazyTensor]
    tied: bool  # the head shares the weight of the embeddings
    vocab_size: int  # rows of the embeddings

    def __str__(self) -> str:
        return "\n".join(map(str, self.operations))


class _Base:
    """Names, layers and weights of the base."""

    def __init__(self, tensors: Mapping[str, StoredTensor], model: PreTrainedModel) -> None:
        self.tensors, self.model = tensors, model
        self.modules = dict(model.named_modules())
        self.embeddings, self.head = end_names(model)
        self.embeddings_file, self.head_file = (
            self.file_name(f"{name}.weight") for name in (self.embeddings, self.head)
        )
        if self.embeddings_file not in tensors:
            raise NotStreamable(f"{self.embeddings_file} is missing in the base's files")
        tied = bool(self.head) and bool(model.config.get_text_config().tie_word_embeddings)
        # If the files hold two different weights, transformers does not tie them, whatever the config says.
        stored_head = tensors.get(self.head_file)
        self.tied = tied and (stored_head is None or _same(tensors[self.embeddings_file], stored_head))

    def file_name(self, name: str) -> str:
        return stored_name(name, self.tensors, self.model.base_model_prefix)

    def target(self, name: str) -> str:
        """Return the name in the files of a parameter that changes. Raises NotStreamable if the files have none."""
        file_name = self.file_name(name)
        if file_name not in self.tensors and not (self.tied and file_name == self.head_file):
            raise NotStreamable(f"{name} is missing in the base's files")
        return file_name


def plan_merge(adapter: Adapter, base: Mapping[str, StoredTensor], model: PreTrainedModel) -> MergePlan:
    """Plan the merge of an adapter into the tensors of the base's files. `model` is the base on the meta device.

    Raises NotStreamable if only PEFT can merge it, ModelError if adapter and base do not fit.
    """
    config = adapter.config
    if config.peft_type != peft.PeftType.LORA:
        raise NotStreamable(f"its type is {config.peft_type}")
    if config.init_lora_weights not in LEAVES_BASE:
        raise NotStreamable(f"init_lora_weights {config.init_lora_weights} changes the base")
    if variant := next((name for name in _VARIANTS if getattr(config, name, None)), None):
        raise NotStreamable(f"it uses {variant}")
    known = _Base(base, model)
    layers: dict[str, dict[str, StoredTensor]] = {}
    replaced: list[Operation] = []
    unknown: list[str] = []
    for key, tensor in adapter.tensors().items():
        name = key.removeprefix(PREFIX)
        part = next((part for part in (*_LORA, *_EMBEDDING, *_TOKENS) if name.endswith(part)), None)
        module, _, parameter = name.replace(".base_layer.", ".").rpartition(".")
        if part is not None:
            layers.setdefault(name.removesuffix(part), {})[part] = tensor
        elif isinstance(getattr(known.modules.get(module), parameter, None), torch.Tensor):
            replaced.append(ReplaceTensor(known.target(f"{module}.{parameter}"), tensor))
        else:
            unknown.append(key)
    computed: list[Operation] = []
    for layer, parts in layers.items():
        if known.tied and layer == known.head and _TOKENS[0] in parts:
            continue  # the rows of the embeddings once more
        operations = _plan_layer(known, config, layer, parts)
        computed += operations
        unknown += [] if operations else [layer + part for part in parts]
    if known.tied:
        replaced = _untie(known, config, replaced, computed)
    if unknown:
        raise NotStreamable(f"it has {', '.join(sorted(unknown)[:3])}")
    return _apply(known, [*replaced, *computed], adapter.folder)


def _plan_layer(base: _Base, config: peft.PeftConfig, layer: str, parts: Mapping[str, StoredTensor]) -> list[Operation]:
    """Return the operations of a layer; [] if its tensors are none that are known."""
    module = base.modules.get(layer)
    embedding = parts.keys() == set(_EMBEDDING)
    linear = set(_LORA[:2]) <= parts.keys() <= set(_LORA) and isinstance(module, (torch.nn.Linear, Conv1D))
    if parts.keys() <= set(_TOKENS) and _TOKENS[0] in parts:
        name = base.target(f"{layer}.weight")
        grown = [ReplaceTensor(name, parts[part]) for part in _TOKENS[1:] if part in parts]
        return [*grown, ReplaceRows(name, parts[_TOKENS[0]], _tokens(config, layer))]
    if not embedding and not linear:
        return []
    a, b = (parts[part] for part in (_EMBEDDING if embedding else _LORA[:2]))
    patterns = config.alpha_pattern
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), config.lora_alpha)
    scale = alpha / (math.sqrt(a.shape[0]) if config.use_rslora else a.shape[0])
    transposed = embedding or isinstance(module, Conv1D)
    operations: list[Operation] = [
        AddLora(base.target(f"{layer}.weight"), a, b, scale, transposed, parts.get(_LORA[3]))
    ]
    if bias := parts.get(_LORA[2]):
        operations.append(AddBias(base.file_name(f"{layer}.bias"), bias, scale))
    return operations


def _tokens(config: peft.PeftConfig, layer: str) -> list[int]:
    """Return the token ids of the rows that were trained in a layer."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, list):
        return tokens
    return next((ids for name, ids in (tokens or {}).items() if layer == name or layer.endswith(f".{name}")), [])


def _untie(
    base: _Base, config: peft.PeftConfig, replaced: list[Operation], computed: Sequence[Operation]
) -> list[Operation]:
    """Return `replaced` with an operation that unties the head, if embeddings and head are no longer equal.

    Rows of tokens stay shared: PEFT trains them for both. Raises NotStreamable.
    """
    ends = (base.embeddings_file, base.head_file)
    lora = any(isinstance(each, AddLora) and each.name in ends for each in computed)
    rows = any(isinstance(each, ReplaceRows) and each.name in ends for each in computed)
    tokens = config.trainable_token_indices
    if lora and getattr(config, "ensure_weight_tying", False):
        raise NotStreamable("it uses ensure_weight_tying")
    if lora and rows:
        raise NotStreamable("it has both token rows and LoRA on tied weights")
    if isinstance(tokens, dict) and any(name in base.head for name in tokens):
        raise NotStreamable("it has token rows of a tied head")
    names = {each.name for each in replaced}
    if base.head_file in names or rows or not (lora or base.embeddings_file in names):
        return replaced
    untie = Untie(base.head_file, base.embeddings_file)
    # LoRA is trained on top of embeddings that have grown; embeddings trained in full leave the head as it was.
    return [*replaced, untie] if lora else [untie, *replaced]


def _apply(base: _Base, operations: list[Operation], adapter: Path) -> MergePlan:
    """Apply operations to the weights of the base, and validate the shapes. Raises ModelError."""
    tensors: dict[str, LazyTensor] = dict(base.tensors)
    for operation in operations:
        try:
            tensors[operation.name] = operation.apply(tensors)
        except ValueError as error:
            raise ModelError(f"{adapter}: does not fit the base: {error}") from None
    embeddings, head = tensors[base.embeddings_file], tensors.get(base.head_file)
    changed = any(operation.name == base.head_file for operation in operations)
    tied = base.tied and (not changed or head is None or _same(embeddings, head))
    if tied:
        tensors.pop(base.head_file, None)
    vocab_size = embeddings.shape[0]
    for name, parameter in base.model.named_parameters():
        file_name, shape = base.file_name(name), tuple(parameter.shape)
        if file_name in (base.embeddings_file, base.head_file):
            shape = (vocab_size, *shape[1:])
        if file_name in tensors and tensors[file_name].shape != shape:
            raise ModelError(
                f"{adapter}: does not fit the base: {name} would have shape {list(tensors[file_name].shape)} instead of "
                f"{list(shape)}"
            )
    return MergePlan(operations, tensors, tied, vocab_size)


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Return True if two tensors, neither of which is computed, are equal."""
    if isinstance(one, Computed) or isinstance(other, Computed) or one.shape != other.shape:
        return False
    return one == other or all(
        torch.equal(a.float(), b.float()) for a, b in zip(one.blocks(4096), other.blocks(4096), strict=True)
    )

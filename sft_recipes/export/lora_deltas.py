"""What an adapter changes in its base, tensor by tensor: W' = float32(W) + scale · B·A, a few rows at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_recipes.errors import ModelError, reason_of
from sft_recipes.export.safetensors_io import Stored, Wanted, in_file

_PREFIX = "base_model.model."
_LORA = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_TOKENS = (".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight")
# Ways to begin an adapter that leave the base as it is; others (pissa, olora, loftq, ...) take something away from it.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
# What makes another sum of an adapter, or of the layers it is on.
_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip


class NotStreamable(Exception):
    """An adapter has something that only PEFT knows how to merge; the message says what."""


@dataclass
class LowRank:
    """float32(W) + scale · B·A, for a base weight of (out, in), or (in, out) if `transposed`; of DoRA, each output's
    weights are then scaled to the length `magnitude` (https://arxiv.org/abs/2402.09353, equation 5)."""

    base: Stored
    a: Stored  # (rank, in)
    b: Stored  # (out, rank)
    scale: float
    transposed: bool = False
    magnitude: Stored | None = None

    def __post_init__(self) -> None:
        self._left: torch.Tensor | None = None

    def add(self, first: int, last: int, block: torch.Tensor) -> None:
        if self._left is None:  # read when its turn has come, so that few are in memory at once
            left, right = (self.a, self.b) if self.transposed else (self.b, self.a)
            self._left, self._right = left.whole().float(), right.whole().float()
            if self.transposed:
                self._left, self._right = self._left.T.contiguous(), self._right.T.contiguous()
            self._length = self._lengths() if self.magnitude and self.transposed else None
        self._sum(first, last, block)
        if self.magnitude is not None:
            if self._length is not None:
                block *= self.magnitude.whole().float() / self._length
            else:
                norm = torch.linalg.vector_norm(block, dim=1, keepdim=True)
                block *= self.magnitude.rows(first, last).float().view(-1, 1) / norm
        if last == self.base.shape[0]:
            self._left = self._right = torch.empty(0)

    def _sum(self, first: int, last: int, block: torch.Tensor) -> None:
        assert self._left is not None
        torch.mm(self._left[first:last], self._right, out=block)
        block *= self.scale
        block += self.base.rows(first, last)

    def _lengths(self) -> torch.Tensor:
        """The length of each output's weights where these stand in columns."""
        squares = torch.zeros(self.base.shape[1])
        height = 512
        for first in range(0, self.base.shape[0], height):
            last = min(first + height, self.base.shape[0])
            block = torch.empty(last - first, self.base.shape[1])
            self._sum(first, last, block)
            squares += block.square_().sum(0)
        return squares.sqrt_()


@dataclass
class ReplacedRows:
    """Rows of the base, of which those numbered in `places` are others, and may lie beyond its last."""

    base: Stored
    rows: Stored
    places: Sequence[int]

    def add(self, first: int, last: int, block: torch.Tensor) -> None:
        there = min(last, self.base.shape[0])
        if first < there:
            block[: there - first].copy_(self.base.rows(first, there))
        for number, place in enumerate(self.places):
            if first <= place < last:
                block[place - first].copy_(self.rows.rows(number, number + 1)[0])


@dataclass
class Bias:
    """A bias of the base and one of the adapter."""

    base: Stored
    more: Stored
    scale: float

    def add(self, first: int, last: int, block: torch.Tensor) -> None:
        block.copy_(self.more.rows(first, last))
        block *= self.scale
        block += self.base.rows(first, last)


def vocabulary(given: Mapping[str, Stored], config: peft.PeftConfig, model: PreTrainedModel) -> int:
    """How many rows of the embeddings an adapter knows of; 0 where it says nothing about them."""
    inside = ("", ".base_layer", ".token_adapter.base_layer")
    ends = {f"{_PREFIX}{name}{part}.weight" for name in names_of_ends(model) if name for part in inside}
    whole = [tensor.shape[0] for key, tensor in given.items() if key in ends]
    chosen = getattr(config, "trainable_token_indices", None) or []
    places = chosen if isinstance(chosen, list) else [place for some in chosen.values() for place in some]
    return max([*whole, *(place + 1 for place in places)], default=0)


def names_of_ends(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the modules that are the embeddings and the head; "" where there is none."""
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    return names[model.get_input_embeddings()], names[head] if head is not None else ""


def refuse_incomplete(adapter: Path, config: peft.PeftConfig, model: PreTrainedModel) -> None:
    """Raise ModelError where an adapter lacks tensors that its config asks for. `model`, on the meta device, is changed."""
    if config.peft_type != peft.PeftType.LORA or config.init_lora_weights not in _BEGINNINGS:
        return
    try:
        wanted = peft.get_peft_model_state_dict(peft.get_peft_model(model, config), save_embedding_layers=False)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ModelError(f"{adapter}: does not fit the base: {reason_of(error)}") from None
    given = in_file(adapter / "adapter_model.safetensors")
    if missing := sorted(key for key in wanted.keys() - given.keys() if "lora_" in key):
        raise ModelError(
            f"{adapter}: lacks {len(missing)} of the tensors that its adapter_config.json asks for, such as {missing[0]}"
        )
    for key in sorted(wanted.keys() & given.keys()):
        rank, asked = given[key].shape[0], wanted[key].shape[0]
        if key.endswith(".lora_A.weight") and rank != asked:
            raise ModelError(
                f"{adapter}: {key} is of rank {rank}, and adapter_config.json asks for {asked}; get its files again"
            )


class TensorMerger:
    """The tensors of base and adapter together: `wanted`, by their names in the base's files.

    `model` is the base on the meta device: its modules say which layers there are, and of what kind. `tied` says in the end
    whether embeddings and head are one, `height` how many rows the embeddings have. Raises NotRowByRow for what PEFT has to
    merge, ModelError where adapter and base do not fit.
    """

    def __init__(
        self, adapter: Path, config: peft.PeftConfig, base: Mapping[str, Stored], model: PreTrainedModel
    ) -> None:
        if config.peft_type != peft.PeftType.LORA:
            raise NotStreamable(f"it is of the kind {config.peft_type}")
        if config.init_lora_weights not in _BEGINNINGS:
            raise NotStreamable(f"it was begun with {config.init_lora_weights}, which changes the base")
        if found := next((name for name in _VARIANTS if getattr(config, name, None)), None):
            raise NotStreamable(f"it has {found}")
        self.adapter, self.config, self.base, self.model = adapter, config, base, model
        self.modules = dict(model.named_modules())
        self.embeddings, self.head = names_of_ends(model)
        self.tied = bool(self.head) and bool(model.config.get_text_config().tie_word_embeddings)
        inputs, head = (self._in_files(f"{name}.weight") for name in (self.embeddings, self.head))
        if inputs not in base:
            raise NotStreamable(f"the base's files have no {inputs}")
        if self.tied and head in base and not _same(base[inputs], base[head]):
            self.tied = False  # whatever the config says, and so transformers has it
        self.wanted = {name: Wanted(stored.shape, stored) for name, stored in base.items()}
        given = in_file(adapter / "adapter_model.safetensors")
        if left := given.keys() - self._merge(given):
            raise NotStreamable(f"it has {', '.join(sorted(left)[:3])}")
        self._settle_head()
        self.height = self.wanted[self._in_files(f"{self.embeddings}.weight")].shape[0]
        self._check_shapes()

    def _merge(self, given: Mapping[str, Stored]) -> set[str]:
        """Apply what is understood of the adapter's tensors, and say which these are."""
        layers: dict[str, dict[str, Stored]] = {}
        merged: set[str] = set()
        for key, tensor in given.items():
            name = key.removeprefix(_PREFIX)
            if kind := next((kind for kind in (*_LORA, *_EMBEDDING, *_TOKENS) if name.endswith(kind)), None):
                layers.setdefault(name.removesuffix(kind), {})[kind] = tensor
            elif self._replace(name.replace(".base_layer.", "."), tensor):
                merged.add(key)
        ends = [parts.keys() for layer, parts in layers.items() if layer in (self.embeddings, self.head)]
        if self.tied and ends and set().union(*ends) - set(_TOKENS):
            if getattr(self.config, "ensure_weight_tying", False):
                raise NotStreamable("it has ensure_weight_tying")
            if any(_TOKENS[0] in kinds for kinds in ends):
                raise NotStreamable("it has both rows of tokens and LoRA on weights that are shared")
        for layer, parts in layers.items():
            if parts.keys() <= set(_LORA) and {*_LORA[:2]} <= parts.keys() and self._is_matrix(layer):
                self._low_rank(layer, *(parts.get(kind) for kind in _LORA))
            elif parts.keys() == set(_EMBEDDING):
                self._low_rank(layer, *(parts[kind] for kind in _EMBEDDING), embedding=True)
            elif parts.keys() <= set(_TOKENS) and _TOKENS[0] in parts:
                if not (self.tied and layer == self.head):  # then they are those of the embeddings
                    self._rows_of_tokens(layer, parts[_TOKENS[0]], parts.get(_TOKENS[1]))
            else:
                continue
            merged |= {_PREFIX + layer + kind for kind in parts}
        return merged

    def _replace(self, name: str, tensor: Stored) -> bool:
        """A layer that was trained in full."""
        inside, _, parameter = name.rpartition(".")
        if not isinstance(getattr(self.modules.get(inside), parameter, None), torch.Tensor):
            return False
        self._refuse_unknown(name)
        self.wanted[self._in_files(name)] = Wanted(tensor.shape, tensor)
        return True

    def _refuse_unknown(self, name: str) -> None:
        """Some models have other names in memory than in their files."""
        if self._in_files(name) not in self.base and not (self.tied and name == f"{self.head}.weight"):
            raise NotStreamable(f"the base's files have no {name}")

    def _low_rank(
        self,
        layer: str,
        a: Stored | None,
        b: Stored | None,
        bias: Stored | None = None,
        magnitude: Stored | None = None,
        *,
        embedding: bool = False,
    ) -> None:
        assert a is not None
        assert b is not None
        transposed = embedding or isinstance(self.modules[layer], Conv1D)
        base = self._stored(f"{layer}.weight")
        inputs, outputs = base.shape if transposed else base.shape[::-1]
        if a.shape[1:] != (inputs,) or b.shape != (outputs, a.shape[0]):
            raise ModelError(
                f"{self.adapter}: does not fit the base: the adapter of {layer} is {list(b.shape)} times {list(a.shape)}, "
                f"the base's weight {list(base.shape)}"
            )
        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), layer), self.config.lora_alpha)
        scale = alpha / (math.sqrt(a.shape[0]) if self.config.use_rslora else a.shape[0])
        change = LowRank(base, a, b, scale, transposed, magnitude)
        self.wanted[self._in_files(f"{layer}.weight")] = Wanted(base.shape, base, change.add)
        if bias is not None:
            if self._in_files(f"{layer}.bias") not in self.base:
                raise ModelError(
                    f"{self.adapter}: cannot be merged: it has a bias for {layer} (lora_bias), and the base has none there"
                )
            own = self._stored(f"{layer}.bias")
            self.wanted[self._in_files(f"{layer}.bias")] = Wanted(own.shape, own, Bias(own, bias, scale).add)

    def _rows_of_tokens(self, layer: str, rows: Stored, resized: Stored | None) -> None:
        chosen = self.config.trainable_token_indices
        places = chosen if isinstance(chosen, list) else next(
            (places for name, places in (chosen or {}).items() if layer == name or layer.endswith(f".{name}")), []
        )  # fmt: skip
        self._refuse_unknown(f"{layer}.weight")
        if self.tied and isinstance(chosen, dict) and any(name in self.head for name in chosen):
            raise NotStreamable("it has rows of tokens for a head that shares its weight")
        base = resized or self._stored(f"{layer}.weight")
        if rows.shape != (len(places), *base.shape[1:]):
            raise ModelError(
                f"{self.adapter}: does not fit the base: rows {list(rows.shape)} for {len(places)} tokens of {layer}, whose "
                f"weight is {list(base.shape)}"
            )
        height = max(base.shape[0], *(place + 1 for place in places))
        if missing := set(range(base.shape[0], height)) - set(places):
            raise ModelError(
                f"{self.adapter}: cannot be merged: neither it nor the base has weights of token {min(missing)}"
            )
        change = ReplacedRows(base, rows, places)
        self.wanted[self._in_files(f"{layer}.weight")] = Wanted((height, *base.shape[1:]), base, change.add)

    def _settle_head(self) -> None:
        """Where the head shares the embeddings' weight, and only one of them was trained, there are two from now on.

        Rows of tokens stay shared: PEFT trains them for both.
        """
        if not self.tied:
            return
        inputs, head = (self._in_files(f"{name}.weight") for name in (self.embeddings, self.head))
        embedded = self.wanted[inputs]
        before = embedded.stored if embedded.add else self.base[inputs]  # with the rows of a grown vocabulary
        shared = Wanted(before.shape, before)
        answered = self.wanted.get(head, shared)
        if head in self.base and answered.stored is self.base[head] and answered.add is None:
            answered = shared  # written twice, read once
        if isinstance(getattr(embedded.add, "__self__", None), ReplacedRows):
            answered = embedded
        self.tied = embedded == answered or (
            embedded.add is answered.add is None
            and embedded.shape == answered.shape
            and _same(embedded.stored, answered.stored)
        )
        self.wanted.pop(head, None)
        if not self.tied:
            self.wanted[head] = answered

    def _check_shapes(self) -> None:
        ends = {f"{name}.weight" for name in (self.embeddings, self.head)}
        for name, parameter in self.model.named_parameters():
            tensor, shape = self.wanted.get(self._in_files(name)), tuple(parameter.shape)
            shape = (self.height, *shape[1:]) if name in ends else shape
            if tensor is not None and tensor.shape != shape:
                raise ModelError(
                    f"{self.adapter}: does not fit the base: {name} would be {list(tensor.shape)} instead of {list(shape)}"
                )

    def _is_matrix(self, layer: str) -> bool:
        return isinstance(self.modules.get(layer), (torch.nn.Linear, Conv1D))

    def _stored(self, name: str) -> Stored:
        self._refuse_unknown(name)
        shared = f"{self.embeddings}.weight" if self.tied and name == f"{self.head}.weight" else name
        for known in (name, shared):  # as it is, or as the adapter has it whole
            now = self.wanted.get(self._in_files(known))
            if now is not None and now.add is None:
                return now.stored
        return self.base[self._in_files(shared)]

    def _in_files(self, name: str) -> str:
        """The name by which the files know a parameter: some are written without the prefix of the whole model."""
        without = name.removeprefix(f"{self.model.base_model_prefix}.")
        return without if name not in self.base and without in self.base else name


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tensors of rows are equal; some rows are in memory at a time."""
    if one.shape != other.shape or one == other:
        return one.shape == other.shape
    ranges = ((first, min(first + 4096, one.shape[0])) for first in range(0, one.shape[0], 4096))
    return all(torch.equal(one.rows(*some).float(), other.rows(*some).float()) for some in ranges)

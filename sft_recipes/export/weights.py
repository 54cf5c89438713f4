"""Check of each merged tensor against base + scale · B·A, by arithmetic of its own: PEFT says which layers there are and how
they are scaled, and neither PEFT's nor our merge is asked for a sum. Some rows are in memory at a time.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_recipes.errors import RunError
from sft_recipes.export import load_adapter, safetensors_io
from sft_recipes.export.dequantize import as_loaded, dequantized
from sft_recipes.export.load_adapter import Origin
from sft_recipes.export.lora_deltas import names_of_ends
from sft_recipes.export.safetensors_io import Stored
from sft_recipes.export.save_model import DTYPES

_PREFIX = "base_model.model."
_BLOCK = 1 << 20  # elements at once
_AT_ONCE = 2  # tensors


@dataclass
class _Sum:
    """What a tensor should be: `base`, with some of its rows replaced, plus scale · left @ right, with each output's weights
    then scaled to the length `magnitude`."""

    base: Stored
    replaced: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: float = 0.0
    left: torch.Tensor | None = None  # (rows, rank); of a bias what is added to it
    right: torch.Tensor | None = None  # (rank, columns)
    magnitude: torch.Tensor | None = None
    outputs_are_columns: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.replaced) or self.left is not None

    @property
    def shape(self) -> tuple[int, ...]:
        height = max([*self.base.shape[:1], *(row + 1 for row in self.replaced)], default=0)
        return (height, *self.base.shape[1:]) if self.base.shape else ()

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows of the base, some of them replaced."""
        if not self.replaced:
            return self.base.rows(first, last)
        there = min(last, self.base.shape[0])
        rows = torch.zeros(last - first, *self.base.shape[1:])
        if first < there:
            rows[: there - first] = self.base.rows(first, there)
        for row in self.replaced.keys() & set(range(first, last)):
            rows[row - first] = self.replaced[row]
        return rows

    def add(self, base: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """The sum, for rows of `base` and `left` of one dtype, without the lengths."""
        if self.right is None:
            return base + self.scale * left
        return torch.addmm(base, left, self.right.to(base), alpha=self.scale)

    def lengths(self, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """What columns are multiplied with, if they are the outputs of a layer with magnitudes."""
        if self.magnitude is None or self.left is None or not self.outputs_are_columns:
            return None
        whole = self.add(self.read(0, self.shape[0]).double(), self.left.double())
        return (self.magnitude / whole.norm(dim=0)).to(device)

    def stretch(self, first: int, last: int, base: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor | None:
        """What these rows are multiplied with."""
        if self.magnitude is None or self.left is None or lengths is not None:
            return lengths
        plain = self.add(base.double(), self.left[first:last].to(base.device).double())
        return (self.magnitude[first:last].to(base.device) / plain.norm(dim=1)).unsqueeze(1)

    def rows(self, first: int, last: int, base: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """These rows in the dtype of those of the base."""
        assert self.left is not None
        stretch = self.stretch(first, last, base, lengths)
        rows = self.add(base, self.left[first:last].to(base))
        return rows if stretch is None else rows * stretch.to(base)


class Expected:
    """What each tensor of a merged model should be.

    `quantization` is that of a base that was dequantized before the merge (None: the original base was merged), `loaded` the
    dtype to which the other weights were rounded when they were loaded (float32: they were not).
    """

    def __init__(
        self,
        adapter: Path,
        of: Origin,
        dtype: str,
        *,
        trust_remote_code: bool = False,
        quantization: Mapping[str, Any] | None = None,
        loaded: torch.dtype = torch.float32,
    ) -> None:
        files = load_adapter.files(of)
        config = AutoConfig.from_pretrained(files, trust_remote_code=trust_remote_code)
        self._dtype = DTYPES[dtype]
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=self._dtype)
        self._head = names_of_ends(network)[1]
        self.loaded = loaded
        self._base = as_loaded(safetensors_io.in_model(files), network, loaded)
        if quantization is not None:
            self._base = dequantized(self._base, network, quantization, loaded)
        self._sums = _sums(adapter, of, self._base, network)

    def problems(self, folder: Path) -> list[str]:
        """Compare every tensor in the files of a merged model, and return what is wrong."""
        written, sums = safetensors_io.in_model(folder), self._sums
        problems = [
            f"{name} is a tensor of neither base nor adapter" for name in sorted(written.keys() - sums.keys())[:1]
        ]
        missing = self._base.keys() - written.keys() - {f"{self._head}.weight"}  # which is not written if it is tied
        problems += [f"{name} is missing" for name in sorted(missing)[:1]]
        both = [name for name in written if name in sums]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = pool.map(lambda name: _compare(written[name], sums[name], self._dtype), both)
            wrong = {name: what for name, what in zip(both, found, strict=True) if what}
        for name in list(wrong)[:1]:
            more = f" (and {len(wrong) - 1:,} others)" if len(wrong) > 1 else ""
            problems.append(f"{name} is not what base and adapter make together: {wrong[name]}{more}")
        return problems

    def exact(self, name: str, into: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Write a tensor, or some of its rows, as it is before it is rounded. Does nothing if it is not rounded."""
        wanted = self._sums[name]
        if not wanted.changed and wanted.base.verbatim and self._dtype in (wanted.base.dtype, torch.float32):
            return
        lengths, height = wanted.lengths(into.device), max(1, _BLOCK // max(1, into[0].numel()))
        starts = range(0, len(into), height) if rows is None else rows.tolist()
        for number, first in enumerate(starts):
            last = min(first + height, len(into)) if rows is None else first + 1
            block = into[first:last] if rows is None else into[number : number + 1]
            base = wanted.read(first, last).to(into.device).to(into.dtype)
            block.copy_(base if wanted.left is None else wanted.rows(first, last, base, lengths))

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    @property
    def rounds_the_base(self) -> bool:
        return any(tensor.dtype.itemsize > self._dtype.itemsize for tensor in self._base.values())


def _sums(adapter: Path, of: Origin, base: Mapping[str, Stored], network: PreTrainedModel) -> dict[str, _Sum]:
    """What each tensor should be, by its name in the files."""
    given = safetensors_io.in_file(adapter / "adapter_model.safetensors")
    embeddings, head = names_of_ends(network)

    def in_files(name: str) -> str:
        without = name.removeprefix(f"{network.base_model_prefix}.")
        return without if name not in base and without in base else name

    sums = {name: _Sum(stored) for name, stored in base.items()}
    shared, tied = in_files(f"{embeddings}.weight"), in_files(f"{head}.weight")
    tied = "" if tied in sums or shared not in sums else tied  # written if the two are no longer the same
    if tied:
        sums[tied] = _Sum(base[shared])
    for key, tensor in given.items():  # layers that were trained in full, and embeddings that have grown
        name = in_files(key.removeprefix(_PREFIX).replace(".token_adapter", "").replace(".base_layer", ""))
        if name in sums:
            sums[name] = _Sum(tensor)
            if tied and name == shared and ".base_layer" in key:
                sums[tied] = _Sum(tensor)
    adapted = peft.get_peft_model(network, of.config)
    for layer, module in adapted.named_modules():
        weight = sums.get(in_files(f"{layer.removeprefix(_PREFIX)}.weight"))
        if weight is None or not isinstance(module, LoraLayer | TrainableTokensWrapper):
            continue
        own = {key.removeprefix(f"{layer}."): tensor for key, tensor in given.items() if key.startswith(f"{layer}.")}
        if rows := own.get("token_adapter.trainable_tokens_delta"):
            places = module.token_adapter.token_indices["default"]
            weight.replaced = dict(zip(places, rows.whole(), strict=True))
        elif isinstance(module, LoraLayer) and own:
            _add(weight, own, module)
            if "lora_B.bias" in own:
                bias = sums[in_files(f"{layer.removeprefix(_PREFIX)}.bias")]
                bias.left, bias.scale = own["lora_B.bias"].whole().float(), weight.scale
    return sums


def _add(weight: _Sum, own: Mapping[str, Stored], module: LoraLayer) -> None:
    embedded = "lora_embedding_A" in own
    a, b = (own[f"lora_embedding_{part}" if embedded else f"lora_{part}.weight"].whole().float() for part in "AB")
    weight.outputs_are_columns = embedded or isinstance(module.get_base_layer(), Conv1D)
    weight.left, weight.right = (a.T, b.T) if weight.outputs_are_columns else (b, a)
    weight.scale = module.scaling["default"]
    if "lora_magnitude_vector" in own:
        weight.magnitude = own["lora_magnitude_vector"].whole().double().flatten()


def _compare(stored: Stored, wanted: _Sum, dtype: torch.dtype) -> str:
    """How a tensor in a file differs from the rounded sum; "" if it does not.

    Most numbers are what rounding the sum in float32 gives. The others have to be within half a unit in the last place of the
    sum in float64, and what sums in float32 are off.
    """
    shape = wanted.shape
    if stored.shape != shape:
        return f"its shape is {list(stored.shape)} instead of {list(shape)}"
    if wanted.base.dtype.is_floating_point and stored.dtype != dtype:
        return f"its dtype is {_name(stored.dtype)} instead of {_name(dtype)}"
    rows, width = (shape[0], torch.Size(shape[1:]).numel()) if shape else (1, 1)
    height, lengths = max(1, _BLOCK // max(1, width)), wanted.lengths()
    wrong, off = 0, 0.0
    for first in range(0, rows, height):
        last = min(first + height, rows)
        base, found = wanted.read(first, last), stored.rows(first, last)
        if wanted.left is None:
            exact = base.to(found.dtype)
            differing = exact != found
            if differing.any():
                wrong += int(differing.sum())
                off = max(off, _largest((found.double() - exact.double())[differing]))
            continue
        exact = wanted.rows(first, last, base.float(), lengths)
        chosen = (exact.to(found.dtype) != found).view(last - first, -1).any(1).nonzero().flatten()
        if not len(chosen):
            continue
        stretch = wanted.stretch(first, last, base, lengths)
        stretch = stretch if stretch is None or lengths is not None else stretch[chosen]
        base, left, found = base[chosen].double(), wanted.left[first:last][chosen].double(), found[chosen].double()
        exact = wanted.add(base, left)
        exact = exact if stretch is None else exact * stretch
        size, rank = base.abs(), 1
        if wanted.right is None:
            size = size + abs(wanted.scale) * left.abs()
        else:
            size = torch.addmm(size, left.abs(), wanted.right.double().abs(), alpha=abs(wanted.scale))
            rank = wanted.right.shape[0]
        size = size if stretch is None else size * stretch.abs()
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + (rank + 64) * 2**-24 * size + torch.finfo(dtype).tiny
        difference = (found - exact).abs()
        differing = ~(difference <= allowed)
        wrong += int(differing.sum())
        off = max(off, _largest(difference[differing]))
    if not wrong:
        return ""
    return f"{wrong:,} of {rows * width:,} numbers differ by more than rounding to {_name(dtype)}, by up to {off:.3g}"


def _largest(differences: torch.Tensor) -> float:
    return float(differences.abs().nan_to_num(torch.inf).max()) if differences.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_bits(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """Raise RunError if a weight in the files is not bitwise the one in memory."""
    held = model.state_dict()
    for name, stored in safetensors_io.in_model(folder).items():
        if name in held and not torch.equal(stored.whole(), held[name].cpu()):
            raise RunError(f"{out}: not kept: {name} is not in the file as it is in memory")

"""Compare each merged tensor with base + scale · B·A, computed independently of the merge.

PEFT says which layers have adapters and how they are scaled; the sums use neither PEFT's merge nor ours.
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
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sft_recipes.errors import RunError
from sft_recipes.export.dequantize import as_loaded, dequantize
from sft_recipes.export.load_adapter import PREFIX, Adapter, end_names
from sft_recipes.export.safetensors_io import StoredTensor, dtype_name, ranges, read_model, rows_within, stored_name

_BLOCK = 1 << 20  # elements compared at once
_THREADS = 2


@dataclass
class _Sum:
    """The expected value of a tensor: `base`, with some rows replaced, plus scale · left @ right; after DoRA, the weights of
    each output are then scaled to the length `magnitude`."""

    base: StoredTensor
    replaced: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: float = 0.0
    left: torch.Tensor | None = None  # (rows, rank); for a bias, what is added
    right: torch.Tensor | None = None  # (rank, columns); None for a bias
    magnitude: torch.Tensor | None = None
    outputs_are_columns: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.replaced) or self.left is not None

    @property
    def shape(self) -> tuple[int, ...]:
        height = max([*self.base.shape[:1], *(row + 1 for row in self.replaced)], default=0)
        return (height, *self.base.shape[1:]) if self.base.shape else ()

    def base_rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows of the base, some of them replaced."""
        if not self.replaced:
            return self.base.rows(first, last)
        end = min(last, self.base.shape[0])
        rows = torch.zeros(last - first, *self.base.shape[1:])
        if first < end:
            rows[: end - first] = self.base.rows(first, end)
        for row in self.replaced.keys() & set(range(first, last)):
            rows[row - first] = self.replaced[row]
        return rows

    def plain(self, base: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Return the sum without magnitudes, for rows of `base` and `left` of one dtype."""
        if self.right is None:
            return base + self.scale * left
        return torch.addmm(base, left, self.right.to(base), alpha=self.scale)

    def column_factors(self, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Return the factors of DoRA if outputs are columns; they depend on all rows."""
        if self.magnitude is None or self.left is None or not self.outputs_are_columns:
            return None
        whole = self.plain(self.base_rows(0, self.shape[0]).double(), self.left.double())
        return (self.magnitude / whole.norm(dim=0)).to(device)

    def factors(self, first: int, last: int, base: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor | None:
        """Return the factors of DoRA for these rows; None without magnitudes."""
        if self.magnitude is None or self.left is None or columns is not None:
            return columns
        plain = self.plain(base.double(), self.left[first:last].to(base.device).double())
        return (self.magnitude[first:last].to(base.device) / plain.norm(dim=1)).unsqueeze(1)

    def rows(self, first: int, last: int, base: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """Return the sum for these rows, in the dtype of `base`."""
        assert self.left is not None
        factors = self.factors(first, last, base, columns)
        rows = self.plain(base, self.left[first:last].to(base))
        return rows if factors is None else rows * factors.to(base)


class ExpectedWeights:
    """The expected tensors of a merged model.

    Args:
        dtype: of the merged model's files.
        quantization: of training, if the dequantized base was merged.
        loaded: dtype to which training rounded the base when it was loaded; float32: it was not rounded.
    """

    def __init__(
        self,
        adapter: Adapter,
        dtype: torch.dtype,
        *,
        quantization: Mapping[str, Any] | None = None,
        loaded: torch.dtype = torch.float32,
    ) -> None:
        self._dtype, self.loaded = dtype, loaded
        config = adapter.base_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._head = end_names(model)[1]
        self._base = as_loaded(read_model(adapter.base_files()), model, loaded)
        if quantization is not None:
            self._base = dequantize(self._base, model, quantization, loaded)
        self._sums = _sums(adapter, self._base, model)

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    @property
    def rounds_the_base(self) -> bool:
        return any(tensor.dtype.itemsize > self._dtype.itemsize for tensor in self._base.values())

    def problems(self, folder: Path) -> list[str]:
        """Compare every tensor in the files of a merged model, and return the differences."""
        written, sums = read_model(folder), self._sums
        problems = [f"{name} is in neither base nor adapter" for name in sorted(written.keys() - sums.keys())[:1]]
        missing = self._base.keys() - written.keys() - {f"{self._head}.weight"}  # not written if it is tied
        problems += [f"{name} is missing" for name in sorted(missing)[:1]]
        both = [name for name in written if name in sums]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda name: _compare(written[name], sums[name], self._dtype), both)
            wrong = {name: difference for name, difference in zip(both, found, strict=True) if difference}
        for name in list(wrong)[:1]:
            more = f" (and {len(wrong) - 1:,} other tensors)" if len(wrong) > 1 else ""
            problems.append(f"{name} is not the sum of base and adapter: {wrong[name]}{more}")
        return problems

    def write_exact(self, name: str, into: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Write a tensor, or some of its rows, as it is before rounding. Does nothing if it is not rounded."""
        expected = self._sums[name]
        if not expected.changed and expected.base.verbatim and self._dtype in (expected.base.dtype, torch.float32):
            return
        columns, height = expected.column_factors(into.device), rows_within(_BLOCK, tuple(into.shape))
        starts = range(0, len(into), height) if rows is None else rows.tolist()
        for number, first in enumerate(starts):
            last = min(first + height, len(into)) if rows is None else first + 1
            block = into[first:last] if rows is None else into[number : number + 1]
            base = expected.base_rows(first, last).to(into.device).to(into.dtype)
            block.copy_(base if expected.left is None else expected.rows(first, last, base, columns))


def _sums(adapter: Adapter, base: Mapping[str, StoredTensor], model: PreTrainedModel) -> dict[str, _Sum]:
    """Return the expected value of each tensor, by its name in the files."""
    given = adapter.tensors()

    def file_name(name: str) -> str:
        return stored_name(name, base, model.base_model_prefix)

    sums = {name: _Sum(stored) for name, stored in base.items()}
    embeddings, head = (file_name(f"{name}.weight") for name in end_names(model))
    tied = head not in sums and embeddings in sums
    if tied:  # the head is written if the two are no longer equal
        sums[head] = _Sum(base[embeddings])
    for key, tensor in given.items():  # fully trained layers, and embeddings that have grown
        name = file_name(key.removeprefix(PREFIX).replace(".token_adapter", "").replace(".base_layer", ""))
        if name in sums:
            sums[name] = _Sum(tensor)
            if tied and name == embeddings and ".base_layer" in key:
                sums[head] = _Sum(tensor)
    for layer, module in peft.get_peft_model(model, adapter.config).named_modules():
        weight = sums.get(file_name(f"{layer.removeprefix(PREFIX)}.weight"))
        if weight is None or not isinstance(module, LoraLayer | TrainableTokensWrapper):
            continue
        own = {key.removeprefix(f"{layer}."): tensor for key, tensor in given.items() if key.startswith(f"{layer}.")}
        if rows := own.get("token_adapter.trainable_tokens_delta"):
            tokens = module.token_adapter.token_indices["default"]
            weight.replaced = dict(zip(tokens, rows.whole(), strict=True))
        elif isinstance(module, LoraLayer) and own:
            _add_lora(weight, own, module)
            if "lora_B.bias" in own:
                bias = sums[file_name(f"{layer.removeprefix(PREFIX)}.bias")]
                bias.left, bias.scale = own["lora_B.bias"].whole().float(), weight.scale
    return sums


def _add_lora(weight: _Sum, own: Mapping[str, StoredTensor], module: LoraLayer) -> None:
    embedding = "lora_embedding_A" in own
    a, b = (own[f"lora_embedding_{part}" if embedding else f"lora_{part}.weight"].whole().float() for part in "AB")
    weight.outputs_are_columns = embedding or isinstance(module.get_base_layer(), Conv1D)
    weight.left, weight.right = (a.T, b.T) if weight.outputs_are_columns else (b, a)
    weight.scale = module.scaling["default"]
    if "lora_magnitude_vector" in own:
        weight.magnitude = own["lora_magnitude_vector"].whole().double().flatten()


def _compare(stored: StoredTensor, expected: _Sum, dtype: torch.dtype) -> str | None:
    """Return how a tensor in a file differs from the rounded sum; None if it does not.

    Most elements equal the sum in float32, rounded. The others have to be within half a unit in the last place of the sum in
    float64, plus the error of sums in float32.
    """
    shape = expected.shape
    if stored.shape != shape:
        return f"shape {list(stored.shape)} instead of {list(shape)}"
    if expected.base.dtype.is_floating_point and stored.dtype != dtype:
        return f"dtype {dtype_name(stored.dtype)} instead of {dtype_name(dtype)}"
    columns = expected.column_factors()
    wrong, largest = 0, 0.0
    for first, last in ranges(shape, rows_within(_BLOCK, shape)):
        found, base = stored.rows(first, last), expected.base_rows(first, last)
        if expected.left is not None:
            difference = _sum_differences(found, base, expected, (first, last), columns, dtype)
        else:
            exact = base.to(found.dtype)
            differing = exact != found
            difference = (found[differing].double() - exact[differing].double()).abs()
        if len(difference):
            wrong += len(difference)
            largest = max(largest, float(difference.nan_to_num(torch.inf).max()))
    if not wrong:
        return None
    return f"{wrong:,} of {stored.size:,} elements differ by more than rounding to {dtype_name(dtype)}, by up to {largest:.3g}"


def _sum_differences(
    found: torch.Tensor,
    base: torch.Tensor,
    expected: _Sum,
    block: tuple[int, int],
    columns: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the distances from the sum in float64 of the elements of a block of rows that are wrong."""
    assert expected.left is not None
    first, last = block
    in_float32 = expected.rows(first, last, base.float(), columns)
    rows = (in_float32.to(found.dtype) != found).view(last - first, -1).any(1).nonzero().flatten()
    if not len(rows):
        return torch.empty(0)
    factors = expected.factors(first, last, base, columns)
    factors = factors if factors is None or columns is not None else factors[rows]
    base, left, found = base[rows].double(), expected.left[first:last][rows].double(), found[rows].double()
    exact = expected.plain(base, left)
    if expected.right is None:
        size, rank = base.abs() + abs(expected.scale) * left.abs(), 1
    else:
        size = torch.addmm(base.abs(), left.abs(), expected.right.double().abs(), alpha=abs(expected.scale))
        rank = expected.right.shape[0]
    if factors is not None:
        exact, size = exact * factors, size * factors.abs()
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + (rank + 64) * 2**-24 * size + torch.finfo(dtype).tiny
    difference = (found - exact).abs()
    return difference[~(difference <= allowed)]


def check_bits(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """Raise RunError if a weight in the files is not bitwise the one in memory."""
    held = model.state_dict()
    for name, stored in read_model(folder).items():
        if name in held and not torch.equal(stored.whole(), held[name].cpu()):
            raise RunError(f"{out}: verification failed: {name} in the file is not the weight in memory.")

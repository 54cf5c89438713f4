"""Compute the outputs of a model on the probe rows, and record those of the trained model as reference.

The training process records the weights that it trained, after its last step, so that verification compares with them and not
with files. All is computed in float32, layer by layer: memory is that of the weights as stored, and of the largest layer in
float32.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sft_recipes import upstream
from sft_recipes.atomic_files import atomic_file
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED
from sft_recipes.errors import ModelError, RunError, reason_of
from sft_recipes.export.probe import rows_of
from sft_recipes.recipe.schema import Recipe

Rows = Sequence[dict[str, list[int]]]
# Changes a weight in place before it is used. Arguments: its module, its name there, its values in the dtype of the
# computation, and the rows of it that these are (None: all).
Change = Callable[[torch.nn.Module, str, torch.Tensor, torch.Tensor | None], None]

_SHARDED = ("fsdp2", "zero3")  # strategies whose forward pass needs all ranks
_POSITIONS = 8  # per row, whose logits are compared
_ENTRIES = 4096  # of a larger vocabulary, evenly spaced, in addition to the tokens of the rows
_LOGITS, _TOKENS = 1 << 27, 1 << 10  # per batch: 512 MiB of logits; tokens whose hidden states are in memory
_BLOCK = 1 << 22  # elements rounded at once
# Parts of a layer's name in PEFT that its name in the base does not have.
_IN_PEFT = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.\w+)(?=\.|$)")
_PARTS = ("logits", "losses", "hidden")
_MODELS = ("trained", "base", "rounded")


class TrainerState(Protocol):
    """The attributes of a trainer that `record` uses."""

    model: Any
    accelerator: Any
    args: Any
    run_dir: Path

    def is_world_process_zero(self) -> bool: ...
    def describe_last_checkpoint(self) -> str: ...


@dataclass
class Outputs:
    """Outputs of a model for each row: float32 tensors on the CPU."""

    logits: list[torch.Tensor]  # (positions, vocabulary): at the first trained positions
    losses: list[torch.Tensor]  # (trained tokens,)
    hidden: list[
        torch.Tensor
    ]  # (layers + 1, width): embeddings and output of each layer, at the first trained position

    @property
    def loss(self) -> float:
        """The mean over all trained tokens."""
        return float(torch.cat(self.losses).double().mean())

    def of_rows(self, rows: Sequence[int]) -> "Outputs":
        return Outputs(*([getattr(self, part)[row] for row in rows] for part in _PARTS))

    def logit_diff(self, other: "Outputs") -> torch.Tensor:
        """Return the absolute differences of the logits, for the vocabulary that both have."""
        size = min(self.logits[0].shape[1], other.logits[0].shape[1])
        return torch.cat([(a[:, :size] - b[:, :size]).abs() for a, b in zip(self.logits, other.logits, strict=True)])


@dataclass
class Record:
    """Outputs of the trained model, and of two others that only the training process can run."""

    trained: Outputs
    base: Outputs | None = None  # adapters disabled; None after full fine-tuning
    rounded: Outputs | None = None  # after full fine-tuning: weights rounded to the export dtype
    compute: str = "float32"  # dtype of the computation: that of training if the model was sharded

    def of_rows(self, rows: Sequence[int]) -> "Record":
        base, rounded = (each and each.of_rows(rows) for each in (self.base, self.rounded))
        return Record(self.trained.of_rows(rows), base, rounded, self.compute)

    def save(self, file: Path) -> None:
        tensors = {
            f"{name}.{row}.{part}": tensor
            for name in _MODELS
            if (outputs := getattr(self, name)) is not None
            for part in _PARTS
            for row, tensor in enumerate(getattr(outputs, part))
        }
        with atomic_file(file) as temporary:
            save_file(tensors, temporary, metadata={"compute": self.compute})


def load(file: Path) -> Record | None:
    """Read a record; None if there is no file. Raises ModelError if it is corrupt."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stream:
            keys = set(stream.keys())

            def read(name: str) -> Any:
                rows = range(sum(key.startswith(f"{name}.") for key in keys) // len(_PARTS))
                parts = ([stream.get_tensor(f"{name}.{row}.{part}") for row in rows] for part in _PARTS)
                return Outputs(*parts) if rows else None

            trained, base, rounded = map(read, _MODELS)
            if trained is None:
                raise KeyError("the outputs of the trained model are missing")
            return Record(trained, base, rounded, stream.metadata()["compute"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file}: cannot be read: {reason_of(error)}. Restore it, or merge the adapter from another directory."
        ) from None


def record(trainer: TrainerState, recipe: Recipe, data: Prepared) -> Record | None:
    """Compute the outputs of the trained model and its base on the probe rows; None on ranks other than 0.

    All ranks have to call this after training, while the process group exists and the shards are in place. Nothing is written
    here: if the disk failed on rank 0, the other ranks would wait for it.
    """
    sharded = recipe.launch.strategy in _SHARDED
    if not sharded and not trainer.is_world_process_zero():
        return None
    # Without accelerate's autocast: the exported model computes in float32 without it.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    rows, device = rows_of(data.eval or data.train), trainer.args.device
    compute = None if sharded else torch.float32
    model.zero_grad(set_to_none=True)  # frees memory for the LM head in float32 and the logits
    try:
        with _exported_attention(model):
            found = Record(run_model(model, rows, compute=compute, device=device))
            if recipe.trains_adapters:
                with model.disable_adapter():
                    found.base = run_model(model, rows, compute=compute, device=device)
            else:
                dtype = getattr(torch, recipe.export.dtype)
                if sharded:  # in place: they are gathered in this dtype
                    _round_shards(model, dtype)
                change = None if sharded else rounding(dtype)
                found.rounded = run_model(model, rows, compute=compute, change=change, device=device)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{trainer.run_dir}: out of memory while computing the reference outputs of the trained model. "
            f"{trainer.describe_last_checkpoint()} Continue with --resume."
        ) from error
    for module in model.modules():
        if isinstance(module, FSDPModule):  # frees what the last forward pass gathered for a backward pass
            module.reshard()
    if sharded:
        found.compute = {"bf16": "bfloat16", "fp16": "float16"}.get(recipe.train.mixed_precision, recipe.model.dtype)
    return found if trainer.is_world_process_zero() else None


def _round_shards(model: torch.nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            # ZeRO-3 keeps small weights unsharded next to their shards; other weights are empty.
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            for tensor in (local, getattr(weight, "ds_tensor", None)):
                if tensor is not None:
                    tensor.copy_(tensor.to(dtype))


def rounding(dtype: torch.dtype) -> Change:
    """Return a change for `run_model` that rounds weights to `dtype`."""

    def change(_module: torch.nn.Module, _name: str, weight: torch.Tensor, _rows: torch.Tensor | None) -> None:
        for block in weight.view(-1).split(_BLOCK):
            block.copy_(block.to(dtype))

    return change


@contextmanager
def _exported_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use the attention of a loaded model, which supports float32, and no compiled layers."""
    before = upstream.attention_of(model.config)
    own = _without_peft(model)
    switch = before not in ("sdpa", "eager")
    if switch:
        own.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if switch:
            own.set_attn_implementation(before)


def _without_peft(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_model(
    model: PreTrainedModel,
    rows: Rows,
    *,
    compute: torch.dtype | None = torch.float32,
    device: torch.device | None = None,
    change: Change | None = None,
) -> Outputs:
    """Compute the outputs of a causal language model for each row.

    The computation is in `compute` (None: the model is left as it is), with rows on `device` (default: that of the
    embeddings), and `change` applied to each weight after it is cast.
    """
    training = model.training
    device = device or model.get_input_embeddings().weight.device
    model.eval()
    outputs = Outputs([], [], [])
    tokens = {token for row in rows for token in row["input_ids"]}
    try:
        casting = nullcontext() if compute is None else _computing_in(compute, model, change)
        with torch.no_grad(), _without_tf32(), casting:
            first, vocab_size = 0, model.config.get_text_config().vocab_size
            while first < len(rows):
                last = first + batch_size(rows[first:], vocab_size)
                _run_batch(model, rows[first:last], tokens, device, outputs)
                first = last
    finally:
        model.train(training)
    return outputs


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Multiply float32 exactly: TF32, which training may use (trl.tf32), rounds more than the comparison allows."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def batch_size(rows: Rows, vocab_size: int) -> int:
    """Return how many of the first rows are one batch."""
    longest = 0
    for number, row in enumerate(rows):
        longest = max(longest, len(row["input_ids"]))
        if number and longest * (number + 1) > min(_LOGITS // vocab_size, _TOKENS):
            return number
    return len(rows)


def _run_batch(model: PreTrainedModel, rows: Rows, tokens: set[int], device: torch.device, into: Outputs) -> None:
    """Run rows that are padded on the right, where no token attends to the padding."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding
        ).to(device)
        for name, padding in (("input_ids", 0), ("labels", IGNORED))
    )
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    logits = output.logits.float()
    labels = labels.to(logits.device)
    # Logits of a large vocabulary are recorded in part; the losses are normalized over all of it.
    step = max(1, logits.shape[2] // _ENTRIES)
    entries = sorted(tokens.union(range(0, logits.shape[2], step))) if step > 1 else range(logits.shape[2])
    recorded = torch.tensor(entries, device=logits.device)
    for row in range(len(rows)):
        at = torch.nonzero(labels[row, 1:] != IGNORED).flatten()
        losses = cross_entropy(logits[row, at], labels[row, at + 1], reduction="none")
        at = at[:_POSITIONS]
        hidden = [states[row, at[0].to(states.device)].float().cpu() for states in output.hidden_states]
        into.logits.append(logits[row, at][:, recorded].cpu().contiguous())
        into.losses.append(losses.cpu())
        into.hidden.append(torch.stack(hidden))


# --- Computing in a different dtype than weights are stored in -------------------------------------------------------


def _units(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the modules whose weights are cast together: each layer, and each module outside of the layers."""
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif any(isinstance(part, torch.nn.ModuleList) for part in child.modules()):
            yield from _units(child)
        else:
            yield child


@contextmanager
def _computing_in(dtype: torch.dtype, model: PreTrainedModel, change: Change | None) -> Iterator[None]:
    """Compute each unit with its weights cast to `dtype`, after `change`."""
    memory: dict[torch.device, torch.Tensor] = {}  # reused by each unit: first use of memory takes longer than the cast
    undo: list[Callable[[], None]] = []

    def swap(
        tensors: Sequence[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]], rows: torch.Tensor | None = None
    ) -> None:
        """Replace the data of tensors by values cast to `dtype`. Items: module, name, tensor, values."""
        if not tensors:
            return
        device, size = tensors[0][3].device, sum(values.numel() for *_, values in tensors)
        if device not in memory or memory[device].numel() < size:
            memory.pop(device, None)
            memory[device] = torch.empty(size, dtype=dtype, device=device)
        first = 0
        for module, name, tensor, values in tensors:
            cast = memory[device][first : first + values.numel()].view(values.shape)
            first += values.numel()
            cast.copy_(values)
            if change is not None:
                change(module, name, cast, rows)
            undo.append(partial(setattr, tensor, "data", tensor.data))
            tensor.data = cast

    def cast_all(unit: torch.nn.Module, _inputs: Any) -> None:
        found = {id(tensor): (module, name, tensor, tensor) for module, name, tensor in _castable(unit)}
        swap([each for each in found.values() if change is not None or each[2].dtype != dtype])
        for module in unit.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if getattr(weight, "quant_state", None) is not None:  # bitsandbytes would dequantize to bfloat16
                undo.append(partial(delattr, module, "forward"))
                module.forward = partial(_linear_4bit, module, dtype)

    def cast_rows(unit: torch.nn.Embedding, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """Cast only the rows that are looked up."""
        rows, ids = inputs[0].unique(return_inverse=True)
        swap([(unit, "weight", unit.weight, unit.weight[rows])], rows)
        undo.append(partial(setattr, unit, "padding_idx", unit.padding_idx))
        unit.padding_idx = None
        return (ids,)

    def restore(_unit: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        while undo:
            undo.pop()()

    computed = [*_computed_buffers(model)] if dtype == torch.float32 else []
    before = [buffer.data for buffer, _ in computed]
    for buffer, value in computed:
        buffer.data = value
    handles = []
    for unit in _units(model):
        cast = cast_rows if type(unit) is torch.nn.Embedding else cast_all
        handles.append(unit.register_forward_pre_hook(cast))
        handles.append(unit.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (buffer, _), data in zip(computed, before, strict=True):
            buffer.data = data


def _castable(unit: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Yield module, name and tensor of the floating-point weights of a unit, and of the buffers that are saved."""
    for module in unit.modules():
        for name, weight in module.named_parameters(recurse=False):
            # Quantized weights have a type of their own, and their modules cast them.
            if weight.dtype.is_floating_point and type(weight) is torch.nn.Parameter:
                yield module, name, weight
        for name, buffer in module.named_buffers(recurse=False):
            if name not in upstream.unsaved_buffers(module) and buffer.dtype.is_floating_point:
                yield module, name, buffer


def _computed_buffers(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each floating-point buffer that no file holds, and its value in a model built in float32.

    Such buffers (Gemma's embedding scale, rotary frequencies) are rounded to the dtype in which a model is built, or to which
    it is moved later, so trained and exported model can differ in them with equal weights and config. Both compute with what
    their config gives in float32, even if training used rounded ones: weights and config are compared.
    """
    own = _without_peft(model)
    with init_empty_weights(include_buffers=False):  # no memory for weights
        in_float32 = type(own)(deepcopy(own.config))
    values = dict(in_float32.named_buffers(remove_duplicate=False))
    for path, module in own.named_modules(remove_duplicate=False):
        prefix = _IN_PEFT.sub("", f".{path}.").lstrip(".")
        for name in upstream.unsaved_buffers(module):
            buffer, value = getattr(module, name), values.get(prefix + name)
            # Skips buffers of a library that wraps layers, and those that grew with the length of the rows.
            if buffer is None or value is None or value.shape != buffer.shape:
                continue
            if buffer.dtype.is_floating_point:
                yield buffer, value.to(buffer.device)


def _linear_4bit(module: Any, dtype: torch.dtype, inputs: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight, module.weight.quant_state).to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    return torch.nn.functional.linear(inputs, weight, bias)

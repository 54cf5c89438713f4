"""What a model computes from the probe rows: recorded of the trained model, and compared with what is exported.

The training process records it at its end, of the very weights that it trained, so that no merge and no file on the disk can
be mistaken for them. All is computed in float32, one layer at a time: a model takes no more memory than its weights as they
are stored, and those of its largest layer in float32.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from sft_recipes import upstream
from sft_recipes.atomic_files import atomic_file
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED
from sft_recipes.errors import ModelError, RunError
from sft_recipes.export.probe import rows_of
from sft_recipes.export.save_model import DTYPES
from sft_recipes.recipe.schema import Recipe

Rows = Sequence[dict[str, list[int]]]
# Changes a weight in place before it is used. Gets its module, its name there, its values in the dtype of the computation, and
# which of its rows these are (None: all).
Change = Callable[[torch.nn.Module, str, torch.Tensor, torch.Tensor | None], None]

FILE = "reference.safetensors"  # in a run's directory, beside probe.json
_SHARDED = ("fsdp2", "zero3")  # strategies whose forward pass needs every rank
_POSITIONS = 8  # per row, whose logits are compared
_WORDS = 4096  # of a larger vocabulary, evenly spaced, beside the tokens of the rows
_LOGITS, _TOKENS = 1 << 27, 1 << 10  # at once: 512 MiB of logits; tokens whose hidden states are held
_PIECE = 1 << 22  # numbers that are rounded at once
# Between a layer's name in the base and that of the same layer inside of PEFT's.
_IN_PEFT = re.compile(r"\.(base_layer|original_module|token_adapter|modules_to_save\.\w+)(?=\.|$)")
_PARTS = ("logits", "losses", "hidden")
_OF = ("trained", "base", "rounded")


@dataclass
class Outputs:
    """What a model computes from each of the rows. All tensors are float32, on the CPU."""

    logits: list[torch.Tensor]  # (positions, words): at the first trained positions
    losses: list[torch.Tensor]  # (trained tokens,)
    hidden: list[
        torch.Tensor
    ]  # (layers + 1, width): embeddings and each layer's output, at the first of these positions

    @property
    def loss(self) -> float:
        """The mean over all trained tokens."""
        return float(torch.cat(self.losses).double().mean())

    def of_rows(self, chosen: Sequence[int]) -> "Outputs":
        return Outputs(*([getattr(self, part)[row] for row in chosen] for part in _PARTS))

    def off(self, other: "Outputs") -> torch.Tensor:
        """Absolute differences of the logits, of those words that both know."""
        words = min(self.logits[0].shape[1], other.logits[0].shape[1])
        return torch.cat([(a[:, :words] - b[:, :words]).abs() for a, b in zip(self.logits, other.logits, strict=True)])


@dataclass
class Record:
    """Outputs of the trained model, of its base, and of the trained model with rounded weights.

    Of the base with the adapters switched off; None after full fine-tuning. Of rounded weights after full fine-tuning; None:
    they are the same, or merged first.
    """

    trained: Outputs
    base: Outputs | None = None
    rounded: Outputs | None = None
    compute: str = "float32"  # dtype of the computation; that of the training if each rank only held shards

    def of_rows(self, chosen: Sequence[int]) -> "Record":
        base, rounded = (each and each.of_rows(chosen) for each in (self.base, self.rounded))
        return Record(self.trained.of_rows(chosen), base, rounded, self.compute)

    def save(self, file: Path) -> None:
        tensors = {
            f"{name}.{row}.{part}": tensor
            for name in _OF
            if (outputs := getattr(self, name)) is not None
            for part in _PARTS
            for row, tensor in enumerate(getattr(outputs, part))
        }
        with atomic_file(file) as partial:
            save_file(tensors, partial, metadata={"compute": self.compute})


def load(file: Path) -> Record | None:
    """Read a record; None if there is no file. Raises ModelError if it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stream:
            known = set(stream.keys())

            def read(name: str) -> Any:
                rows = range(sum(key.startswith(f"{name}.") for key in known) // len(_PARTS))
                parts = ([stream.get_tensor(f"{name}.{row}.{part}") for row in rows] for part in _PARTS)
                return Outputs(*parts) if rows else None

            trained, base, rounded = map(read, _OF)
            if trained is None:
                raise KeyError("it has no outputs of the trained model")
            return Record(trained, base, rounded, stream.metadata()["compute"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file}: cannot be read: {reason}. Restore it, or merge the adapter from another directory."
        ) from None


def record(trainer: Any, recipe: Recipe, data: Prepared) -> Record | None:
    """Compute what the trained model, and its base, make of the probe rows; None in ranks other than 0.

    Every rank has to call this after training, while the process group is alive and the shards are in place. Nothing is
    written here: if the disk fails while other ranks still need this one, they wait for it.
    """
    sharded = recipe.launch.strategy in _SHARDED
    if not sharded and not trainer.is_world_process_zero():
        return None
    # Without accelerate's autocast, in which float32 weights would compute something else than the exported model does.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    rows, device = rows_of(data.eval or data.train), trainer.args.device
    compute = None if sharded else torch.float32
    model.zero_grad(set_to_none=True)  # the head in float32 and the logits need memory
    try:
        with _as_exported(model):
            found = Record(run_model(model, rows, compute=compute, device=device))
            if recipe.lora is not None:
                with model.disable_adapter():
                    found.base = run_model(model, rows, compute=compute, device=device)
            else:
                dtype = DTYPES[recipe.export.dtype]
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
        if isinstance(module, FSDPModule):  # which keeps what the last pass has gathered for a backward pass
            module.reshard()
    if sharded:
        found.compute = {"bf16": "bfloat16", "fp16": "float16"}.get(recipe.train.mixed_precision, recipe.model.dtype)
    return found if trainer.is_world_process_zero() else None


def _round_shards(model: torch.nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            # ZeRO-3 keeps small weights whole beside their shards; of others the weight itself is empty.
            for held in (
                weight.to_local() if isinstance(weight, DTensor) else weight,
                getattr(weight, "ds_tensor", None),
            ):
                if held is not None:
                    held.copy_(held.to(dtype))


def rounding(dtype: torch.dtype) -> Change:
    """A change for `run_model`: weights are rounded to `dtype`."""

    def change(_module: torch.nn.Module, _name: str, weight: torch.Tensor, _rows: torch.Tensor | None) -> None:
        for some in weight.view(-1).split(_PIECE):
            some.copy_(some.to(dtype))

    return change


@contextmanager
def _as_exported(model: Any) -> Iterator[None]:
    """With the attention that a loaded model has, which takes float32, and without compiled layers."""
    before = upstream.attention_of(model.config)
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    other = before not in ("sdpa", "eager")
    if other:
        own.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if other:
            own.set_attn_implementation(before)


def run_model(
    model: Any,
    rows: Rows,
    *,
    compute: torch.dtype | None = torch.float32,
    device: torch.device | None = None,
    change: Change | None = None,
) -> Outputs:
    """Run the rows through a causal language model.

    It computes in `compute`, whatever its weights are stored in (None: as it is), after `change`. The rows go to `device`
    (None: that of the embeddings).
    """
    training = model.training
    device = device or model.get_input_embeddings().weight.device
    model.eval()
    outputs = Outputs([], [], [])
    tokens = {token for row in rows for token in row["input_ids"]}
    try:
        computing = nullcontext() if compute is None else _computing_in(compute, model, change)
        with torch.no_grad(), _without_tf32(), computing:
            vocabulary = model.config.get_text_config().vocab_size
            for batch in _batches(rows, vocabulary):
                _run_batch(model, batch, tokens, device, outputs)
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


def _batches(rows: Rows, vocabulary: int) -> Iterator[Rows]:
    first = 0
    while first < len(rows):
        count = at_once(rows[first:], vocabulary)
        yield rows[first : first + count]
        first += count


def at_once(rows: Rows, vocabulary: int) -> int:
    """How many of the first rows are one batch."""
    longest = 0
    for number, row in enumerate(rows):
        longest = max(longest, len(row["input_ids"]))
        if number and longest * (number + 1) > min(_LOGITS // vocabulary, _TOKENS):
            return number
    return len(rows)


def _run_batch(model: Any, rows: Rows, tokens: set[int], device: torch.device, into: Outputs) -> None:
    """Padded behind their ends, where no token of theirs attends to."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding
        ).to(device)
        for name, padding in (("input_ids", 0), ("labels", IGNORED))
    )
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    logits = output.logits.float()
    labels = labels.to(logits.device)
    # Of a large vocabulary some words stand for all in the record; the losses are normalized over all of them.
    step = max(1, logits.shape[2] // _WORDS)
    words = torch.tensor(sorted(tokens.union(range(0, logits.shape[2], step))) if step > 1 else range(logits.shape[2]))
    for row in range(len(rows)):
        at = torch.nonzero(labels[row, 1:] != IGNORED).flatten()
        losses = cross_entropy(logits[row, at], labels[row, at + 1], reduction="none")
        at = at[:_POSITIONS]
        into.logits.append(logits[row, at][:, words.to(at.device)].cpu().contiguous())
        into.losses.append(losses.cpu())
        into.hidden.append(
            torch.stack([states[row, at[0].to(states.device)].float().cpu() for states in output.hidden_states])
        )


# --- Computing in another dtype than weights are stored in -----------------------------------------------------------


def _units(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules whose weights are cast together: each layer of the stack, and what is in none."""
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif any(isinstance(part, torch.nn.ModuleList) for part in child.modules()):
            yield from _units(child)
        else:
            yield child


@contextmanager
def _computing_in(dtype: torch.dtype, model: torch.nn.Module, change: Change | None) -> Iterator[None]:
    """Within, each unit computes with its weights cast to `dtype`. They are cast into memory that the next unit reuses:
    first use of memory costs more than the cast."""
    space: dict[torch.device, torch.Tensor] = {}
    swapped: list[tuple[torch.nn.Module, str, Any]] = []

    def cast(unit: torch.nn.Module, _inputs: Any) -> None:
        found = [
            (module, name, weight)
            for module in unit.modules()
            for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
            # Quantized weights have a type of their own, and know the dtype that they are computed in.
            if weight.dtype.is_floating_point and type(weight) is torch.nn.Parameter
        ]
        found += [
            (module, name, buffer)
            for module in unit.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
            if name not in upstream.unsaved_buffers(module) and buffer.dtype.is_floating_point
        ]
        if change is None:
            found = [each for each in found if each[2].dtype != dtype]
        swap(found)
        for module in unit.modules():
            if (
                getattr(dict(module.named_parameters(recurse=False)).get("weight"), "quant_state", None) is not None
            ):  # 4 bits, which bitsandbytes would dequantize to another dtype than in training
                swapped.append((module, "forward", None))
                module.forward = partial(_of_4_bits, module, dtype)

    def cast_rows(unit: torch.nn.Embedding, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """A few rows of a large matrix."""
        rows, ids = inputs[0].unique(return_inverse=True)
        weight = unit.weight
        swap([(unit, "weight", weight[rows])], rows)
        swapped[-1] = (unit, "weight", weight)
        swapped.append((unit, "padding_idx", unit.padding_idx))
        unit.padding_idx = None
        return (ids,)

    def swap(found: list[tuple[torch.nn.Module, str, torch.Tensor]], rows: torch.Tensor | None = None) -> None:
        if not found:
            return
        device, needed = found[0][2].device, sum(weight.numel() for *_, weight in found)
        if device not in space or space[device].numel() < needed:
            space.pop(device, None)
            space[device] = torch.empty(needed, dtype=dtype, device=device)
        first = 0
        for module, name, weight in found:
            own = space[device][first : first + weight.numel()].view(weight.shape)
            first += weight.numel()
            own.copy_(weight)
            if change is not None:
                change(module, name, own, rows)
            swapped.append((module, name, weight))
            parameter = isinstance(getattr(module, name), torch.nn.Parameter)
            setattr(module, name, torch.nn.Parameter(own, requires_grad=False) if parameter else own)

    def restore(_unit: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        while swapped:
            module, name, before = swapped.pop()
            if name == "forward":
                del module.forward
            else:
                setattr(module, name, before)

    handles = []
    computed = [*_computed_buffers(model)] if dtype == torch.float32 else []
    held = [(module, name, getattr(module, name)) for module, name, _ in computed]
    for module, name, buffer in computed:
        setattr(module, name, buffer)
    for unit in _units(model):
        before = cast_rows if type(unit) is torch.nn.Embedding else cast
        handles.append(unit.register_forward_pre_hook(before))
        handles.append(unit.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name, buffer in held:
            setattr(module, name, buffer)


def _computed_buffers(model: Any) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Yield module, name and value of each buffer that no file holds, as a model built in float32 computes it.

    Such buffers (Gemma's scale of embeddings, rotary frequencies) are rounded to the dtype in which a model is built, or to
    which it was moved later. The trained model and the exported one can differ in that, with equal weights and config. So
    neither computes with its own: both take what their own config gives in float32, also if training used rounded ones. What
    is compared is weights and config. A config that was damaged still shows.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    with init_empty_weights(include_buffers=False):  # no memory for weights
        twin = type(own)(deepcopy(own.config))
    values = dict(twin.named_buffers(remove_duplicate=False))
    for path, module in own.named_modules(remove_duplicate=False):
        for name in upstream.unsaved_buffers(module):
            buffer, value = (
                getattr(module, name),
                values.get(f"{_IN_PEFT.sub('', f'.{path}')}.{name}".removeprefix(".")),
            )
            if buffer is None or value is None or value.shape != buffer.shape:
                continue  # of a library that wraps layers, or grown with the length of the rows
            if buffer.dtype.is_floating_point:
                yield module, name, value.to(buffer.device)


def _of_4_bits(module: Any, dtype: torch.dtype, inputs: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight, module.weight.quant_state).to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    return torch.nn.functional.linear(inputs, weight, bias)

"""Proof that an exported model is the one that was trained, by a process that knows of nothing but the files.

The reference is the trained model itself: what the training process recorded of it (`reference`), or, of an adapter that comes
without its run, what PEFT computes from base and adapter. Every merged tensor is checked against base + scale · B·A
(`weights`); with these sums in place of the weights in the files the exported model has to compute what the trained one does.
So what rounding explains is measured, and only once: it is no random noise, as it takes small updates back to the base. One
model is in memory at a time, on a GPU if there is one with room.
"""

import ctypes
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.data import sandbox
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import from_transformers
from sft_recipes.errors import RunError
from sft_recipes.export import load_adapter, reference
from sft_recipes.export.dequantize import held_in
from sft_recipes.export.probe import TEXTS
from sft_recipes.export.reference import Change, Outputs, Record, at_once, rounding, run_model
from sft_recipes.export.safetensors_io import in_file, in_model
from sft_recipes.export.save_model import DTYPES
from sft_recipes.export.weights import Expected

_ADAPTER = "adapter_model.safetensors"
# How far a model may be from what is expected: a part of the largest logit, for the arithmetic in float32 (also on another
# device), and a multiple of what computing in half precision does, if the trained model was recorded so.
_OF_LOGITS, _OF_COMPUTING = 1e-4, 4.0
_ON_CPU = 2.5e11  # floating-point operations per pass: a few seconds on two cores
_SPARE = 2 * 2**30  # bytes of a GPU, beside weights: logits, hidden states
_OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
)  # not of the process


@dataclass
class Request:
    """Directories of models by name (`original` and `dequantized`, or one of any name), and what they are to be like."""

    models: dict[str, str]
    dtype: str  # of their weights
    tokenizer: str  # directory or hub id of the one of the training
    stops: list[int]  # tokens that end an answer
    base: str
    revision: str | None = None
    adapter: str | None = None  # null: all weights were trained
    merged: dict[str, str] = field(
        default_factory=dict
    )  # files of what PEFT's merge in memory computes, by the model's name
    record: str | None = None  # file of the training process; null: base and adapter are the reference
    rows: list[dict[str, list[int]]] = field(default_factory=list)  # input_ids and labels
    prompt: dict[str, Any] | None = None  # messages, and the ids that were trained as their prompt
    quantization: dict[str, Any] | None = None
    loaded: str = "float32"  # type in which training loaded its base
    trust_remote_code: bool = False


def verify(request: Request) -> dict[str, dict[str, Any]]:
    """Figures of each model. Raises RunError with everything that is wrong with them."""
    said = verify_in_subprocess(request)
    if said["problems"]:
        raise RunError(*said["problems"])
    return dict(said["figures"])


def verify_in_subprocess(request: Request) -> dict[str, Any]:
    """What `examine` says, in a fresh process."""
    command = [sys.executable, "-P", "-m", "sft_recipes.export.verify"]  # -P: nothing from the working directory
    own = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
    alone = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()  # room for the model that is verified
    done = subprocess.run(
        command, input=json.dumps(asdict(request)), env={**alone, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, start_new_session=True,
    )  # fmt: skip
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == -signal.SIGKILL:
        raise RunError(
            "it could not be verified: the process that does it was killed, most likely because memory ran out; without a GPU "
            "that has room for the model it takes that of its largest layer in float32"
        )
    if done.returncode or not last.startswith("{"):
        reason = done.stderr.strip().rpartition("\n")[2][:300] or f"its process ended with {done.returncode}"
        raise RunError(f"it could not be verified: {reason}")
    return dict(json.loads(last))


def compare_outputs(request: Request) -> dict[str, Any]:
    """`problems`, a line each, and `figures` of each model."""
    folders = {name: Path(folder) for name, folder in request.models.items()}
    problems = [problem for folder in folders.values() for problem in _around_the_weights(request, folder)]
    device_map = _device_map(next(iter(folders.values())))
    chosen = _chosen(request, on_cpu=device_map is None)
    rows = [request.rows[number] for number in chosen]
    recorded = _recorded(request.record, request, chosen) if request.record else None
    references = _references(request, rows, recorded, device_map)
    figures = {}
    for name, folder in folders.items():
        trained, base = references[name]
        expected = _expected(request, name)
        wrong = expected.problems(folder) if expected else []
        problems += [f"{name}: {line}" for line in wrong]
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_held(folder), output_loading_info=True, device_map=device_map, **_options(request)
        )
        for kind in ("missing_keys", "mismatched_keys"):
            if loading[kind]:
                problems.append(f"{kind.replace('_', ' ')}: {', '.join(map(str, list(loading[kind])[:3]))}")
        own = run_model(model, rows)
        half = recorded.compute if recorded is not None else "float32"
        computed = run_model(model, rows, compute=DTYPES[half]).off(own) if half != "float32" else None
        if expected is not None:  # the sums, before they were rounded
            number = at_once(rows, model.config.get_text_config().vocab_size)
            few, own_of_few = rows[:number], own.of_rows(range(number))
            change = _sums(model, expected, request)
            exact = run_model(model, few, change=change)
            rounded = (
                run_model(model, few, change=_then(change, rounding(DTYPES[request.dtype]))) if wrong else own_of_few
            )
            pairs = [(exact, trained.of_rows(range(number))), (own_of_few, rounded)]
        else:
            merged = _recorded(request.merged[name], request, chosen) if name in request.merged else recorded
            assert merged is not None
            exact, rounded = merged.trained, merged.rounded or merged.trained
            pairs = [(exact, trained), (own, rounded)]
        del model
        gc.collect()
        explained = float(rounded.off(exact).max())
        found = figures[name] = _figures(own, trained, base, explained)
        if "quantized" in references:
            quantized, _ = references["quantized"]
            off = own.off(quantized)
            found["to_adapter_on_quantized_base"] = {
                "loss": quantized.loss, "largest_difference": float(off.max()), "mean_difference": float(off.mean())
            }  # fmt: skip
        if (pair := next((pair for pair in pairs if not _near(*pair, "logits", computed)), None)) is not None:
            problems.append(
                f"{name}: this is not the model that was trained: its logits are up to {found['largest_difference']:.3g} off, "
                f"where rounding to {request.dtype} explains {explained:.3g}{_first_layer(*pair, computed)}"
            )
    return {"problems": problems, "figures": figures}


def _figures(own: Outputs, trained: Outputs, base: Outputs, explained: float) -> dict[str, Any]:
    largest = float(own.off(trained).max())
    return {
        "loss": own.loss,
        "trained_loss": trained.loss,
        "base_loss": base.loss,
        "largest_difference": largest,
        "explained_by_rounding": explained,
        "not_explained": max(0.0, largest - explained),
        "largest_difference_from_base": float(own.off(base).max()),
        "largest_change_by_training": float(trained.off(base).max()),
    }


def _near(found: Outputs, expected: Outputs, part: str, computed: torch.Tensor | None) -> bool:
    """Whether the outputs of a model are as expected, but for the arithmetic; not if any is NaN or Inf."""
    theirs, own = _stacked(expected, part), _stacked(found, part)
    words = min(theirs.shape[-1], own.shape[-1])
    off, largest = (own[..., :words] - theirs[..., :words]).abs(), float(theirs.abs().max())
    slack = (0.0, 0.0) if computed is None else (float(computed.max()), float(computed.mean()))
    return all(
        float(found) <= _OF_LOGITS * largest + _OF_COMPUTING * some
        for found, some in zip((off.max(), off.mean()), slack, strict=True)
    )


def _stacked(outputs: Outputs, part: str) -> torch.Tensor:
    """Logits (positions, words), or of a layer (rows, width)."""
    if part == "logits":
        return torch.cat(outputs.logits)
    return torch.stack(outputs.hidden)[:, int(part)]


def _first_layer(found: Outputs, expected: Outputs, computed: torch.Tensor | None) -> str:
    """The first layer that differs, and by how much."""
    for number in range(len(expected.hidden[0])):
        if not _near(found, expected, str(number), computed):
            name = f"layer {number - 1}" if number else "the embeddings"
            off = (_stacked(found, str(number)) - _stacked(expected, str(number))).abs().max()
            return f"; the first to differ is {name}, by up to {off:.3g}"
    return "; the first to differ is the head"


def _sums(model: Any, expected: Expected, request: Request) -> Change:
    """A change for `run_model`: weights are what base and adapter make together, not rounded."""
    names = {module: name for name, module in model.named_modules()}
    if model.config.get_text_config().tie_word_embeddings:
        names[model.get_output_embeddings()] = names[model.get_input_embeddings()]
    prefix = f"{model.base_model_prefix}."

    @cache
    def base() -> Any:
        rounded = expected.loaded != torch.float32
        held = expected.loaded if rounded else _held(load_adapter.files_of(request.base, request.revision))
        return AutoModelForCausalLM.from_pretrained(
            request.base, revision=request.revision, dtype=held, **_options(request)
        )

    def change(module: torch.nn.Module, name: str, weight: torch.Tensor, rows: torch.Tensor | None) -> None:
        whole = f"{names[module]}.{name}"
        stored = next((name for name in (whole, whole.removeprefix(prefix)) if name in expected), None)
        if stored is not None:
            expected.exact(stored, weight, rows)
        elif expected.rounds_the_base:  # transformers makes it of several tensors
            own = base().get_parameter_or_buffer(whole)
            weight.copy_(own if rows is None else own[rows.to(own.device)])

    return change


def _then(first: Change, second: Change) -> Change:
    def change(*what: Any) -> None:
        first(*what)
        second(*what)

    return change


# --- What it is compared with ----------------------------------------------------------------------------------------


def _chosen(request: Request, *, on_cpu: bool) -> list[int]:
    """The rows that are run. On a CPU as many as take a few seconds, the shortest first, unless their loss decides between
    two models."""
    rows = request.rows
    if not on_cpu or len(request.models) > 1:
        return list(range(len(rows)))
    weights = sum(torch.Size(tensor.shape).numel() for tensor in in_model(Path(*request.models.values())).values())
    tokens, chosen = 0, list[int]()
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"])):
        tokens += len(rows[number]["input_ids"])
        if chosen and 2 * weights * tokens > _ON_CPU:
            break
        chosen.append(number)
    return sorted(chosen)


def _recorded(file: str, request: Request, chosen: list[int]) -> Record:
    """What was recorded of these rows."""
    found = reference.load(Path(file))
    if found is None or len(found.trained.losses) != len(request.rows):
        raise RunError(
            f"{file}: is not of the rows in probe.json. Restore both, or merge the adapter from another directory."
        )
    return found.of_rows(chosen)


def _references(
    request: Request, rows: list[dict[str, list[int]]], recorded: Record | None, device_map: Any
) -> dict[str, tuple[Outputs, Outputs]]:
    """Outputs of the trained model and of its base by the name of the exported one; `quantized`: as it was trained on a
    quantized base."""

    def of_adapter(dtype: torch.dtype, **quantization: Any) -> tuple[Outputs, Outputs]:
        model, _ = load_adapter.adapted(
            Path(str(request.adapter)), dtype, base=request.base, revision=request.revision, device_map=device_map,
            trust_remote_code=request.trust_remote_code, **quantization,
        )  # fmt: skip
        _in_full_precision(model, Path(str(request.adapter)))
        trained = run_model(model, rows)
        with model.disable_adapter():
            return trained, run_model(model, rows)

    base_files = load_adapter.files_of(request.base, request.revision)
    held = _held(base_files)
    if request.adapter is not None and (
        request.merged  # some adapters change the base as they are loaded
        or any(".base_layer." in key for key in in_file(Path(request.adapter) / _ADAPTER))  # embeddings that have grown
    ):
        held = torch.float32
    if request.adapter is None:
        assert recorded is not None
        return dict.fromkeys(request.models, (recorded.trained, _base(request, held, rows, device_map)))
    known = (recorded.trained, recorded.base) if recorded is not None and recorded.base is not None else None
    if not request.quantization:
        return dict.fromkeys(request.models, known or of_adapter(held))
    config, loaded = BitsAndBytesConfig.from_dict(dict(request.quantization)), DTYPES[request.loaded]
    references = {"quantized": known or of_adapter(loaded, quantization=config)}
    for name in request.models:
        if name != "dequantized":
            references[name] = of_adapter(held)
        elif config.load_in_8bit:  # which rounds what goes in, too
            references[name] = of_adapter(loaded, quantization=config, back_to=torch.float32)
        else:
            references[name] = references["quantized"]
        gc.collect()
    return references


def _in_full_precision(model: Any, adapter: Path) -> None:
    """Give weights of the adapter the dtype of its file: PEFT loads layers that were trained in full in that of the base."""
    given = in_file(adapter / _ADAPTER)
    known = peft.get_peft_model_state_dict(model, save_embedding_layers=True)
    keys = {tensor.data_ptr(): key for key, tensor in known.items() if key in given}
    for parameter in model.parameters():
        key = keys.get(parameter.data_ptr())
        if key is not None and parameter.dtype != given[key].dtype:
            parameter.data = given[key].whole().to(parameter.device)


def _base(request: Request, held: torch.dtype, rows: list[dict[str, list[int]]], device_map: Any) -> Outputs:
    model = AutoModelForCausalLM.from_pretrained(
        request.base, revision=request.revision, dtype=held, device_map=device_map, **_options(request)
    )
    exported = AutoConfig.from_pretrained(
        next(iter(request.models.values())), trust_remote_code=request.trust_remote_code
    )
    if (words := exported.get_text_config().vocab_size) > model.get_input_embeddings().weight.shape[0]:  # new tokens
        model.resize_token_embeddings(words, mean_resizing=False)
    return run_model(model, rows)


def _expected(request: Request, name: str) -> Expected | None:
    if request.adapter is None or name in request.merged:
        return None
    adapter = Path(request.adapter)
    of = replace(load_adapter.origin(adapter, request.base), revision=request.revision)
    return Expected(
        adapter, of, request.dtype, trust_remote_code=request.trust_remote_code,
        quantization=request.quantization if name == "dequantized" else None,
        loaded=held_in(
            request.loaded, name, quantized=bool(request.quantization), recorded=request.record is not None
        ),
    )  # fmt: skip


# --- Loading ---------------------------------------------------------------------------------------------------------


def _options(request: Request) -> dict[str, Any]:
    return {"use_safetensors": True, "trust_remote_code": request.trust_remote_code}


def _held(folder: Path) -> torch.dtype:
    """The widest dtype in a model's files. So loaded on a CPU, weights stay in the files until they are used."""
    dtypes = {tensor.dtype for tensor in in_model(folder).values() if tensor.dtype in DTYPES.values()}
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _device_map(folder: Path) -> Any:
    """The GPU with the most free memory if the model fits, else all GPUs if it fits into them, else None: the CPU."""
    if not torch.cuda.is_available():
        return None
    units = defaultdict[str, int](int)  # a layer, or a tensor that is in none: what is in float32 at once
    size = 0
    for name, tensor in in_model(folder).items():
        number = torch.Size(tensor.shape).numel()
        size += number * tensor.dtype.itemsize
        units[(re.match(r".*?\.\d+\.", name) or [name])[0]] += number
    beside = 4 * max(units.values()) + _SPARE
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    most = max(free, key=lambda number: free[number])
    if free[most] > size + beside:
        return {"": most}
    room = {number: left - beside for number, left in free.items() if left > beside}
    # Whole layers do not fill a GPU.
    return "balanced" if sum(room.values()) > 1.2 * size else None


def _around_the_weights(request: Request, folder: Path) -> Iterator[str]:
    """What is wrong with the tokenizer, the chat template and the generation config."""
    options = {"trust_remote_code": request.trust_remote_code}
    own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    trained = AutoTokenizer.from_pretrained(request.tokenizer, **options)
    texts = [*TEXTS, *(trained.decode(row["input_ids"]) for row in request.rows)]
    if different := next((text for text in texts if own(text)["input_ids"] != trained(text)["input_ids"]), None):
        yield f"the tokenizer gives other ids than that of the training, for {different[:60]!r}"
    if request.prompt is not None:
        chat = Chat(
            own.chat_template or "", "all", from_transformers(own).specials, (), name=f"{folder}: its chat template"
        )
        try:
            sandbox.limited(chat.name, chat.prompt, request.prompt["messages"], str(folder))  # it may be anyone's
            ids = own.apply_chat_template(request.prompt["messages"], add_generation_prompt=True, return_dict=False)
        except Exception as error:  # there is none, or whatever a program can do
            yield f"the chat template does not give the prompt of the training: {str(error)[:300]}"
        else:
            if list(ids) != request.prompt["ids"]:
                yield f"the chat template does not give the prompt of the training: {own.decode(ids)[:60]!r}"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if missing := set(request.stops) - set([ends] if isinstance(ends, int) else ends or []):
        yield f"generation_config.json does not stop at {own.decode([min(missing)])!r}, which ends the training's answers"


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that asked for it
    print(json.dumps(compare_outputs(Request(**json.load(sys.stdin)))))

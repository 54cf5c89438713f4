"""Verify an exported model in a separate process that uses only its files.

The reference is the trained model: the outputs that the training process recorded (`reference`) or, for an adapter without its
run, what PEFT computes from base and adapter. Every merged weight is compared with base + scale · B·A (`weights`). With these
unrounded sums as its weights, the exported model has to compute the outputs of the trained one; so the effect of rounding is
measured, not estimated: it is not random, because it rounds small updates back to the base. One model is in memory at a time,
on a GPU if it fits.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.data import sandbox
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import from_transformers
from sft_recipes.errors import RunError
from sft_recipes.export import load_adapter, reference
from sft_recipes.export.dequantize import merge_dtype
from sft_recipes.export.load_adapter import Adapter, model_files
from sft_recipes.export.probe import TEXTS
from sft_recipes.export.reference import Change, Outputs, Record, batch_size, rounding, run_model
from sft_recipes.export.safetensors_io import read_model
from sft_recipes.export.weights import ExpectedWeights

# Allowed difference: this part of the largest logit, for arithmetic in float32 on a different device, plus this multiple of
# what half precision changes, if the trained model was recorded in it.
_OF_LOGITS, _OF_HALF_PRECISION = 1e-4, 4.0
_CPU_FLOPS = 2.5e11  # per forward pass: a few seconds on two cores
_GPU_SPARE = 2 * 2**30  # bytes of a GPU in addition to weights: logits, hidden states
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass
class Request:
    """What to verify, and what to compare it with."""

    models: dict[str, str]  # directories: `original` and `dequantized`, or one of any name
    dtype: str  # of their weights
    tokenizer: str  # of training: directory or Hub id
    stops: list[int]  # EOS token ids of training
    base: str
    revision: str | None = None
    adapter: str | None = None  # directory; None after full fine-tuning
    merged: dict[str, str] = field(default_factory=dict)  # outputs of PEFT's merge in memory: files by the model's name
    record: str | None = None  # file of the training process; None: base and adapter are the reference
    rows: list[dict[str, list[int]]] = field(default_factory=list)  # input_ids and labels
    prompt: dict[str, Any] | None = None  # messages, and the ids of their prompt in training
    quantization: dict[str, Any] | None = None
    loaded: str = "float32"  # dtype in which training loaded the base
    trust_remote_code: bool = False


def verify(request: Request) -> dict[str, dict[str, Any]]:
    """Return the metrics of each model. Raises RunError with all problems."""
    answer = verify_in_subprocess(request)
    if answer["problems"]:
        raise RunError(*answer["problems"])
    return dict(answer["results"])


@contextmanager
def naming(out: Path) -> Iterator[None]:
    """Name the directory in errors of `verify`."""
    try:
        yield
    except RunError as error:
        raise RunError(*(f"{out}: verification failed: {line}" for line in error.lines)) from error


def verify_in_subprocess(request: Request) -> dict[str, Any]:
    """Run `compare_outputs` in a separate process."""
    command = [sys.executable, "-P", "-m", "sft_recipes.export.verify"]  # -P: no imports from the working directory
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    if torch.cuda.is_initialized():  # free memory for the model that is verified
        gc.collect()
        torch.cuda.empty_cache()
    done = subprocess.run(
        command, input=json.dumps(asdict(request)), env={**environment, "PYTHONPATH": path},
        capture_output=True, text=True, check=False, start_new_session=True,
    )  # fmt: skip
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == -signal.SIGKILL:
        raise RunError(
            "its process was killed, probably out of memory. Without a GPU that the model fits on, it needs memory for the "
            "largest layer in float32."
        )
    if done.returncode or not last.startswith("{"):
        reason = done.stderr.strip().rpartition("\n")[2][:300] or f"exit code {done.returncode}"
        raise RunError(f"its process failed: {reason}")
    return dict(json.loads(last))


def compare_outputs(request: Request) -> dict[str, Any]:
    """Return `problems`, one line each, and the metrics of each model as `results`."""
    models = {name: Path(folder) for name, folder in request.models.items()}
    problems = [problem for folder in models.values() for problem in _compare_configs(request, folder)]
    device_map = _device_map(next(iter(models.values())))
    numbers = _select_rows(request, on_cpu=device_map is None)
    rows = [request.rows[number] for number in numbers]
    recorded = _load_record(request.record, request, numbers) if request.record else None
    references = _references(request, rows, recorded, device_map)
    results = {}
    for name, folder in models.items():
        trained, base = references[name]
        expected = _expected_weights(request, name)
        wrong_weights = expected.problems(folder) if expected else []
        problems += [f"{name}: {line}" for line in wrong_weights]
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_widest_dtype(folder), output_loading_info=True, device_map=device_map, **_options(request)
        )
        for kind in ("missing_keys", "mismatched_keys"):
            if loading[kind]:
                problems.append(f"{kind.replace('_', ' ')}: {', '.join(map(str, list(loading[kind])[:3]))}")
        exported = run_model(model, rows)
        half = None  # what half precision changes, if the trained model was recorded in it
        if recorded is not None and recorded.compute != "float32":
            half = run_model(model, rows, compute=getattr(torch, recorded.compute)).logit_diff(exported)
        if expected is not None:
            pairs = _run_exact(request, model, expected, rows, (exported, trained), wrong=bool(wrong_weights))
        else:
            merged = _load_record(request.merged[name], request, numbers) if name in request.merged else recorded
            assert merged is not None
            pairs = [(merged.trained, trained), (exported, merged.rounded or merged.trained)]
        del model
        gc.collect()
        (exact, _), (_, rounded) = pairs
        result = results[name] = _metrics(exported, trained, base, float(rounded.logit_diff(exact).max()))
        if "quantized" in references:
            quantized = references["quantized"][0]
            diff = exported.logit_diff(quantized)
            result["vs_quantized_base"] = {
                "loss": quantized.loss, "max_logit_diff": float(diff.max()), "mean_logit_diff": float(diff.mean())
            }  # fmt: skip
        if where := next(filter(None, (_first_difference(*pair, half) for pair in pairs)), None):
            problems.append(
                f"{name}: the exported model is not the trained model: max logit difference {result['max_logit_diff']:.3g} "
                f"(expected from {request.dtype} rounding: {result['rounding_logit_diff']:.3g}); first difference in {where}"
            )
    return {"problems": problems, "results": results}


def _run_exact(
    request: Request,
    model: PreTrainedModel,
    expected: ExpectedWeights,
    rows: list[dict[str, list[int]]],
    outputs: tuple[Outputs, Outputs],
    *,
    wrong: bool,
) -> list[tuple[Outputs, Outputs]]:
    """Run the exported model with the unrounded sums as its weights, for as many rows as are one batch.

    `outputs` are those of the exported and of the trained model, `wrong` whether weights in the files are. Returns what has to
    be equal: unrounded and trained, exported and rounded outputs.
    """
    count = batch_size(rows, model.config.get_text_config().vocab_size)
    exported, trained = (each.of_rows(range(count)) for each in outputs)
    change = _exact_weights(model, expected, request)
    exact, rounded = run_model(model, rows[:count], change=change), exported
    if wrong:

        def rounded_change(*args: Any) -> None:
            change(*args)
            rounding(getattr(torch, request.dtype))(*args)

        rounded = run_model(model, rows[:count], change=rounded_change)
    return [(exact, trained), (exported, rounded)]


def _metrics(exported: Outputs, trained: Outputs, base: Outputs, rounding_diff: float) -> dict[str, Any]:
    diff = float(exported.logit_diff(trained).max())
    return {
        "loss": exported.loss,
        "trained_loss": trained.loss,
        "base_loss": base.loss,
        "max_logit_diff": diff,
        "rounding_logit_diff": rounding_diff,
        "unexplained_logit_diff": max(0.0, diff - rounding_diff),
        "max_logit_diff_from_base": float(exported.logit_diff(base).max()),
        "max_logit_change": float(trained.logit_diff(base).max()),
    }


def _first_difference(found: Outputs, expected: Outputs, half: torch.Tensor | None) -> str | None:
    """Return where outputs differ by more than arithmetic explains; None if the logits do not."""
    if _close(torch.cat(found.logits), torch.cat(expected.logits), half):
        return None
    layers = zip(torch.stack(found.hidden, 1), torch.stack(expected.hidden, 1), strict=True)
    for number, (own, other) in enumerate(layers):
        if not _close(own, other, half):
            name = f"layer {number - 1}" if number else "the embeddings"
            return f"{name} (up to {(own - other).abs().max():.3g})"
    return "the LM head"


def _close(found: torch.Tensor, expected: torch.Tensor, half: torch.Tensor | None) -> bool:
    """Compare outputs up to the arithmetic; False if any is NaN or Inf."""
    size = min(found.shape[-1], expected.shape[-1])
    diff, largest = (found[..., :size] - expected[..., :size]).abs(), float(expected.abs().max())
    slack = (0.0, 0.0) if half is None else (float(half.max()), float(half.mean()))
    return all(
        float(off) <= _OF_LOGITS * largest + _OF_HALF_PRECISION * allowed
        for off, allowed in zip((diff.max(), diff.mean()), slack, strict=True)
    )


def _exact_weights(model: PreTrainedModel, expected: ExpectedWeights, request: Request) -> Change:
    """Return a change for `run_model`: weights become the unrounded sums of base and adapter."""
    names = {module: name for name, module in model.named_modules()}
    if model.config.get_text_config().tie_word_embeddings:
        names[model.get_output_embeddings()] = names[model.get_input_embeddings()]
    prefix = f"{model.base_model_prefix}."

    @cache
    def base() -> Any:
        rounded = expected.loaded != torch.float32
        dtype = expected.loaded if rounded else _widest_dtype(model_files(request.base, request.revision))
        return _load_base(request, dtype)

    def change(module: torch.nn.Module, name: str, weight: torch.Tensor, rows: torch.Tensor | None) -> None:
        full_name = f"{names[module]}.{name}"
        stored = next((each for each in (full_name, full_name.removeprefix(prefix)) if each in expected), None)
        if stored is not None:
            expected.write_exact(stored, weight, rows)
        elif expected.rounds_the_base:  # transformers makes this weight of several tensors
            own = base().get_parameter_or_buffer(full_name)
            weight.copy_(own if rows is None else own[rows.to(own.device)])

    return change


# --- References ------------------------------------------------------------------------------------------------------


def _select_rows(request: Request, *, on_cpu: bool) -> list[int]:
    """Return the rows to run: on a CPU those that take a few seconds, shortest first, unless their loss decides between two
    models."""
    rows = request.rows
    if not on_cpu or len(request.models) > 1:
        return list(range(len(rows)))
    weights = sum(tensor.size for tensor in read_model(Path(*request.models.values())).values())
    tokens, selected = 0, list[int]()
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"])):
        tokens += len(rows[number]["input_ids"])
        if selected and 2 * weights * tokens > _CPU_FLOPS:
            break
        selected.append(number)
    return sorted(selected)


def _load_record(file: str, request: Request, rows: Sequence[int]) -> Record:
    record = reference.load(Path(file))
    if record is None or len(record.trained.losses) != len(request.rows):
        raise RunError(
            f"{file}: does not match the rows in probe.json. Restore both, or merge the adapter from another directory."
        )
    return record.of_rows(rows)


def _references(
    request: Request, rows: list[dict[str, list[int]]], recorded: Record | None, device_map: Any
) -> dict[str, tuple[Outputs, Outputs]]:
    """Return outputs of the trained model and of its base for each exported model; `quantized`: on the quantized base."""
    dtype = _widest_dtype(model_files(request.base, request.revision))
    if request.adapter is None:
        assert recorded is not None
        return dict.fromkeys(request.models, (recorded.trained, _run_base(request, dtype, rows, device_map)))
    adapter = _adapter(request)
    # Loading some adapters changes the base, and some contain embeddings that have grown.
    if request.merged or any(".base_layer." in key for key in adapter.tensors()):
        dtype = torch.float32

    def run_adapter(dtype: torch.dtype, **quantization: Any) -> tuple[Outputs, Outputs]:
        model = load_adapter.load(adapter, dtype, device_map=device_map, **quantization)
        _restore_dtypes(model, adapter)
        trained = run_model(model, rows)
        with model.disable_adapter():
            return trained, run_model(model, rows)

    known = (recorded.trained, recorded.base) if recorded is not None and recorded.base is not None else None
    if not request.quantization:
        return dict.fromkeys(request.models, known or run_adapter(dtype))
    config, loaded = BitsAndBytesConfig.from_dict(dict(request.quantization)), getattr(torch, request.loaded)
    references = {"quantized": known or run_adapter(loaded, quantization=config)}
    for name in request.models:
        if name != "dequantized":
            references[name] = run_adapter(dtype)
        elif config.load_in_8bit:  # int8 also rounds activations
            references[name] = run_adapter(loaded, quantization=config, dequantized_to=torch.float32)
        else:
            references[name] = references["quantized"]
        gc.collect()
    return references


def _adapter(request: Request) -> Adapter:
    return load_adapter.find(
        Path(str(request.adapter)), request.base, request.revision, trust_remote_code=request.trust_remote_code
    )


def _restore_dtypes(model: peft.PeftModel, adapter: Adapter) -> None:
    """Give the adapter's weights the dtype of its file: PEFT loads fully trained layers in the dtype of the base."""
    given = adapter.tensors()
    known = peft.get_peft_model_state_dict(model, save_embedding_layers=True)
    keys = {tensor.data_ptr(): key for key, tensor in known.items() if key in given}
    for parameter in model.parameters():
        key = keys.get(parameter.data_ptr())
        if key is not None and parameter.dtype != given[key].dtype:
            parameter.data = given[key].whole().to(parameter.device)


def _run_base(request: Request, dtype: torch.dtype, rows: list[dict[str, list[int]]], device_map: Any) -> Outputs:
    model = _load_base(request, dtype, device_map)
    exported = AutoConfig.from_pretrained(
        next(iter(request.models.values())), trust_remote_code=request.trust_remote_code
    )
    vocab_size = exported.get_text_config().vocab_size
    if vocab_size > model.get_input_embeddings().weight.shape[0]:  # new tokens
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return run_model(model, rows)


def _expected_weights(request: Request, name: str) -> ExpectedWeights | None:
    if request.adapter is None or name in request.merged:
        return None
    quantized, recorded = bool(request.quantization), request.record is not None
    return ExpectedWeights(
        _adapter(request),
        getattr(torch, request.dtype),
        quantization=request.quantization if name == "dequantized" else None,
        loaded=merge_dtype(request.loaded, name, quantized=quantized, recorded=recorded),
    )


# --- Loading ---------------------------------------------------------------------------------------------------------


def _options(request: Request) -> dict[str, Any]:
    return {"use_safetensors": True, "trust_remote_code": request.trust_remote_code}


def _load_base(request: Request, dtype: torch.dtype, device_map: Any = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        request.base, revision=request.revision, dtype=dtype, device_map=device_map, **_options(request)
    )


def _widest_dtype(folder: Path) -> torch.dtype:
    """Return the widest dtype of 16 or 32 bits in a model's files. Loaded in it on a CPU, weights stay in the files."""
    dtypes = {tensor.dtype for tensor in read_model(folder).values()} & {torch.float32, torch.bfloat16, torch.float16}
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _device_map(folder: Path) -> Any:
    """Return the GPU with the most free memory if the model fits, else all GPUs if it fits there, else None: the CPU."""
    if not torch.cuda.is_available():
        return None
    units = defaultdict[str, int](int)  # what is in float32 at once: layers, and tensors outside of layers
    size = 0
    for name, tensor in read_model(folder).items():
        size += tensor.size * tensor.dtype.itemsize
        units[(re.match(r".*?\.\d+\.", name) or [name])[0]] += tensor.size
    needed = 4 * max(units.values()) + _GPU_SPARE
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    most = max(free, key=lambda number: free[number])
    if free[most] > size + needed:
        return {"": most}
    # Whole layers leave a part of each GPU empty.
    return "balanced" if sum(left - needed for left in free.values() if left > needed) > 1.2 * size else None


def _compare_configs(request: Request, folder: Path) -> Iterator[str]:
    """Yield the problems of tokenizer, chat template and generation config."""
    trust = {"trust_remote_code": request.trust_remote_code}
    own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **trust)
    trained = AutoTokenizer.from_pretrained(request.tokenizer, **trust)
    texts = [*TEXTS, *(trained.decode(row["input_ids"]) for row in request.rows)]
    if different := next((text for text in texts if own(text)["input_ids"] != trained(text)["input_ids"]), None):
        yield f"tokenizer: the token ids differ from those of training, for {different[:60]!r}"
    if request.prompt is not None:
        chat = Chat(
            own.chat_template or "", "all", from_transformers(own).specials, (), name=f"{folder}: its chat template"
        )
        try:
            messages, tools = request.prompt["messages"], request.prompt.get("tools")
            sandbox.limited(chat.name, chat.prompt, messages, str(folder), tools)  # it may be anyone's
            ids = own.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # there is none, or whatever a program can do
            yield f"chat template: it does not render the prompt of training: {str(error)[:300]}"
        else:
            if list(ids) != request.prompt["ids"]:
                yield f"chat template: the prompt differs from that of training: {own.decode(ids)[:60]!r}"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if missing := set(request.stops) - set([ends] if isinstance(ends, int) else ends or []):
        yield f"generation_config.json: does not stop at {own.decode([min(missing)])!r}, an EOS token of training"


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent process
    print(json.dumps(compare_outputs(Request(**json.load(sys.stdin)))))

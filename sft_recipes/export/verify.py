"""Proof that an exported model is the one that was trained, by a process that knows of nothing but the files.

It is compared with the base and its adapter or, where all weights were trained, with what the training's own model makes of
the same rows. What may differ is what rounding explains, and that is measured: PEFT merges the adapter in memory, in float32,
and these weights are rounded to the type of the export. The right model differs from that one by next to nothing.
"""

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.errors import RunError
from sft_recipes.export import load
from sft_recipes.export.save import DTYPES
from sft_recipes.export.tensors import Stored, in_model

Rows = Sequence[dict[str, list[int]]]

_POSITIONS = 8  # of each row, at which logits are compared
# How far the model may be from the reference that is rounded: a part of what rounding does to the logits, because sums in
# another order round some weights the other way (a few in a million), and a part of the largest logit, for the arithmetic
# (in half precision also on another device).
_OF_ROUNDING = 0.5
_NUMBERS = 1 << 22  # that are worked on at once
_NOISE = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.1}
_TEXTS = ["Name three colours.", "  The cat's 12 hats\n\ncost $3.50 – naïve? 日本 🙂", "def f(x):\n\treturn x</s>"]


@dataclass
class Request:
    """Directories of models by name (`original` and `dequantized`, or one of any name), and what they are to be like."""

    models: dict[str, str]
    dtype: str  # of their weights
    tokenizer: str  # directory or hub id of the one of the training
    stops: list[int]  # tokens that end an answer
    base: str
    revision: str | None = None
    adapter: str | None = None
    trained: str | None = None  # files of what the trained model makes of the rows, see `keep`,
    rounded: str | None = None  # and with its weights rounded to `dtype`
    rows: list[dict[str, list[int]]] = field(default_factory=list)  # input_ids and labels; [] for rows of one's own
    prompt: dict[str, Any] | None = None  # messages, and the ids that were trained as their prompt
    quantization: dict[str, Any] | None = None
    loaded: str = "float32"  # type of the weights that were quantised
    trust_remote_code: bool = False
    compute: str | None = None  # null: float32, or where that is too large bfloat16


@dataclass
class Seen:
    """What a model makes of the rows: logits (positions, vocabulary) and hidden states (positions, width) of each layer at
    some positions, and the mean loss over all trained tokens."""

    logits: torch.Tensor
    hidden: list[torch.Tensor]
    loss: float

    def apart(self, other: "Seen") -> torch.Tensor:
        """By how much logits differ, in those words that both know."""
        words = min(self.logits.shape[1], other.logits.shape[1])
        return (self.logits[:, :words] - other.logits[:, :words]).abs()


def prove(request: Request) -> dict[str, dict[str, Any]]:
    """Figures of each model. Raises RunError with everything that is wrong with them."""
    said = elsewhere(request)
    if said["problems"]:
        raise RunError(*said["problems"])
    return dict(said["figures"])


def elsewhere(request: Request) -> dict[str, Any]:
    """What `examine` says, in a fresh process."""
    command = [sys.executable, "-P", "-m", "sft_recipes.export.verify"]  # -P: nothing from the working directory
    own = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, input=json.dumps(asdict(request)), env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, start_new_session=True,
    )  # fmt: skip
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == -signal.SIGKILL:
        raise RunError(
            "it could not be verified: the process that does it was killed, most likely because memory ran out; it holds the "
            "whole model, 2 bytes a parameter at the least"
        )
    if done.returncode or not last.startswith("{"):
        reason = done.stderr.strip().rpartition("\n")[2][:300] or f"its process ended with {done.returncode}"
        raise RunError(f"it could not be verified: {reason}")
    return dict(json.loads(last))


def examine(request: Request) -> dict[str, Any]:
    """`problems`, a line each, and `figures` of each model."""
    folders = {name: Path(folder) for name, folder in request.models.items()}
    problems = [problem for folder in folders.values() for problem in _around_the_weights(request, folder)]
    rows = request.rows or list(_rows_of_our_own(request))
    compute = request.compute or _compute_type(next(iter(folders.values())))
    seen = _references(request, rows, compute, problems)
    figures = {}
    for name, folder in folders.items():
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[compute], output_loading_info=True, **_options(request)
        )
        for kind in ("missing_keys", "mismatched_keys"):
            if loading[kind]:
                problems.append(f"{kind.replace('_', ' ')}: {', '.join(map(str, list(loading[kind])[:3]))}")
        own = look(model, rows)
        del model
        gc.collect()
        kind = "dequantized " if name == "dequantized" else ""
        trained, rounded = seen[f"{kind}trained"], seen[f"{kind}rounded"]
        figures[name] = _figures(own, trained, rounded, seen)
        if not _near(own.logits, trained.logits, rounded.logits, compute):
            problems.append(
                f"{name}: this is not the model that was trained: its logits are up to "
                f"{figures[name]['largest_difference']:.3g} off, where rounding to {request.dtype} explains "
                f"{figures[name]['explained_by_rounding']:.3g}{_first_layer(own, trained, rounded, compute)}"
            )
    return {"problems": problems, "figures": figures}


def _near(own: torch.Tensor, trained: torch.Tensor, rounded: torch.Tensor, compute: str) -> bool:
    """Whether `own` is as `rounded`; not where there are numbers that are none."""
    limit = _OF_ROUNDING * (rounded - trained).abs().max() + _NOISE[compute] * trained.abs().max()
    return bool((own - rounded).abs().max() <= limit)


def look(model: PreTrainedModel, rows: Rows) -> Seen:
    """Run the rows through a model, each alone."""
    logits, hidden, loss, trained = [], [], 0.0, 0
    model.eval()
    device = model.get_input_embeddings().weight.device
    for row in rows:
        ids, labels = (torch.tensor(row[name], device=device) for name in ("input_ids", "labels"))
        with torch.no_grad():
            output = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        own = output.logits[0].float()
        loss += float(torch.nn.functional.cross_entropy(own[:-1], labels[1:], reduction="sum"))
        at = torch.nonzero(labels[1:] != -100).flatten()
        trained += len(at)
        at = at[:_POSITIONS]
        logits.append(own[at].cpu())
        hidden.append([states[0, at.to(states.device)].float().cpu() for states in output.hidden_states])
    layers = [torch.cat(layer) for layer in zip(*hidden, strict=True)]
    return Seen(torch.cat(logits), layers, loss / max(trained, 1))


def keep(model: PreTrainedModel, rows: Rows, file: Path) -> None:
    """Write down what a model makes of the rows."""
    save_seen(look(model, rows), file)


def save_seen(seen: Seen, file: Path) -> None:
    save_file({"logits": seen.logits, "loss": torch.tensor(seen.loss, dtype=torch.float64)}, file)


def _kept(file: str) -> Seen:
    there = load_file(file)
    return Seen(there["logits"], [], float(there["loss"]))


def _options(request: Request) -> dict[str, Any]:
    return {"use_safetensors": True, "trust_remote_code": request.trust_remote_code}


def _references(request: Request, rows: Rows, compute: str, problems: list[str]) -> dict[str, Seen]:
    """What `base`, the model as it was `trained`, that `rounded`, and the adapter on the `quantized` base make of the rows.

    Adds to `problems` where weights are not those that PEFT merges.
    """
    if request.trained is not None:
        base = AutoModelForCausalLM.from_pretrained(
            request.base, revision=request.revision, dtype=DTYPES[compute], **_options(request)
        )
        largest = max(max(row["input_ids"]) for row in rows)
        if largest >= base.get_input_embeddings().weight.shape[0]:  # a new token
            base.resize_token_embeddings(largest + 1, mean_resizing=False)
        assert request.rounded is not None
        return {"base": look(base, rows), "trained": _kept(request.trained), "rounded": _kept(request.rounded)}
    seen = {}
    model = _adapted(request, compute)
    with model.disable_adapter():
        seen["base"] = look(model, rows)
    seen["trained"] = look(model, rows)
    if own := request.models.keys() - {"dequantized"}:
        merged = _rounded(model, request.dtype)
        seen["rounded"] = look(merged, rows)
        problems += [line for name in own for line in _weights(merged, name, request, compute)]
        del merged
    del model
    gc.collect()
    if request.quantization:
        config = BitsAndBytesConfig.from_dict({**request.quantization, "bnb_4bit_compute_dtype": compute})
        seen["quantized"] = look(_adapted(request, compute, quantization=config), rows)
        gc.collect()
    if "dequantized" in request.models:
        model = _adapted(request, request.loaded, quantization=config, back_to=DTYPES[compute])
        seen["dequantized trained"] = look(model, rows)
        merged = _rounded(model, request.dtype)
        seen["dequantized rounded"] = look(merged, rows)
        problems += _weights(merged, "dequantized", request, compute)
    return seen


def _adapted(request: Request, dtype: str, **quantization: Any) -> Any:
    assert request.adapter is not None
    adapted, _ = load.adapted(
        Path(request.adapter), DTYPES[dtype], base=request.base, revision=request.revision,
        trust_remote_code=request.trust_remote_code, **quantization,
    )  # fmt: skip
    return adapted


def _rounded(model: Any, dtype: str) -> PreTrainedModel:
    """An adapter and its base, merged by PEFT in memory, with weights that `dtype` can hold."""
    merged = model.merge_and_unload()
    with torch.no_grad():
        for parameter in merged.parameters():
            for some in parameter.view(-1).split(_NUMBERS):
                some.copy_(some.to(DTYPES[dtype]))
    return merged


def _weights(merged: PreTrainedModel, name: str, request: Request, compute: str) -> Iterator[str]:
    """The first weight in the files that is not the one that PEFT merges, to two units in its last place.

    Sums in another order round a few in a million the other way; PEFT's own in half precision, which round twice, a few in
    a hundred.
    """
    files, prefix = in_model(Path(request.models[name])), f"{merged.base_model_prefix}."
    for parameter, theirs in merged.named_parameters():
        stored = files.get(parameter, files.get(parameter.removeprefix(prefix)))
        if stored is None:
            continue  # written under another name, which its loading and its logits will tell
        ways = [theirs.detach()]
        if name == "dequantized" and theirs.ndim == 2:
            ways.append(theirs.detach().T)  # transformers makes linear layers of quantised convolutions
        found = [_differing(stored, way, request.dtype, compute) for way in ways if stored.shape == way.shape]
        if found and all(found):
            yield f"{name}: {parameter} is not what base and adapter make together: {found[0]}"
            return


def _differing(stored: Stored, theirs: torch.Tensor, dtype: str, compute: str) -> str:
    """How a tensor in a file differs from one in memory by more than rounding explains; "" where it does not."""
    half = dtype != "float32"
    allowed, unit = 1e-3 if compute == "float32" else 0.1, torch.finfo(DTYPES[dtype]).eps
    unequal, off = 0, 0.0
    height = max(1, _NUMBERS // max(1, theirs[0].numel()))
    for first in range(0, len(theirs), height):
        rows = theirs[first : first + height].float()
        difference = (stored.rows(first, first + len(rows)).float() - rows).abs()
        unequal += int((difference > 0).sum())
        off = max(off, float((difference - 2 * unit * rows.abs()).max()))
    if off <= 1e-5 * float(theirs.abs().max()) and not (half and unequal > allowed * theirs.numel() + 8):
        return ""
    return f"{unequal:,} of {theirs.numel():,} numbers differ, by up to {max(off, 0):.3g} more than rounding to {dtype} does"


def _figures(own: Seen, trained: Seen, rounded: Seen, seen: dict[str, Seen]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "loss": own.loss,
        "trained_loss": trained.loss,
        "base_loss": seen["base"].loss,
        "largest_difference": float(own.apart(trained).max()),
        "explained_by_rounding": float(rounded.apart(trained).max()),
        "not_explained": float(own.apart(rounded).max()),
        "largest_difference_from_base": float(own.apart(seen["base"]).max()),
        "largest_change_by_training": float(trained.apart(seen["base"]).max()),
    }
    if "quantized" in seen:
        apart = own.apart(seen["quantized"])
        figures["to_adapter_on_quantized_base"] = {
            "loss": seen["quantized"].loss,
            "largest_difference": float(apart.max()),
            "mean_difference": float(apart.mean()),
        }
    return figures


def _first_layer(own: Seen, trained: Seen, rounded: Seen, compute: str) -> str:
    """The first layer that differs by more than rounding explains, and by how much."""
    for number, states in enumerate(zip(own.hidden, trained.hidden, rounded.hidden, strict=False)):
        if not _near(*states, compute):
            name = f"layer {number - 1}" if number else "the embeddings"
            return f"; the first to differ is {name}, by up to {(states[0] - states[2]).abs().max():.3g}"
    return "; the first to differ is the head" if trained.hidden else ""


def _compute_type(folder: Path) -> str:
    weights = sum(torch.Size(tensor.shape).numel() for tensor in in_model(folder).values())
    return "float32" if 5 * weights < psutil.virtual_memory().available else "bfloat16"


def _rows_of_our_own(request: Request) -> Iterator[dict[str, list[int]]]:
    encode = AutoTokenizer.from_pretrained(request.tokenizer, trust_remote_code=request.trust_remote_code)
    for text in _TEXTS:
        ids = encode(text)["input_ids"]
        yield {"input_ids": ids, "labels": ids}


def _around_the_weights(request: Request, folder: Path) -> Iterator[str]:
    """What is wrong with the tokenizer, the chat template and the generation config."""
    options = {"trust_remote_code": request.trust_remote_code}
    own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    trained = AutoTokenizer.from_pretrained(request.tokenizer, **options)
    texts = [*_TEXTS, *(trained.decode(row["input_ids"]) for row in request.rows)]
    if different := next((text for text in texts if own(text)["input_ids"] != trained(text)["input_ids"]), None):
        yield f"the tokenizer gives other ids than that of the training, for {different[:60]!r}"
    if request.prompt is not None:
        try:
            ids = own.apply_chat_template(request.prompt["messages"], add_generation_prompt=True, return_dict=False)
        except Exception as error:  # there is none, or whatever a program can do
            yield f"the chat template does not give the prompt of the training: {str(error)[:100]}"
        else:
            if list(ids) != request.prompt["ids"]:
                yield f"the chat template does not give the prompt of the training: {own.decode(ids)[:60]!r}"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if missing := set(request.stops) - set([ends] if isinstance(ends, int) else ends or []):
        yield f"generation_config.json does not stop at {own.decode([min(missing)])!r}, which ends the training's answers"


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that asked for it
    print(json.dumps(examine(Request(**json.load(sys.stdin)))))

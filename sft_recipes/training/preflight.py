"""Proof on the real model, before the first step, that what silently goes wrong does not."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from sft_recipes.data.prepare import Prepared
from sft_recipes.errors import ModelError, RunError
from sft_recipes.planning.memory import GIB
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import fitting
from sft_recipes.training.logging import peak_memory
from sft_recipes.training.sharded import SHARDED

_TOKENS = 64  # of each of the two documents that are compared
# Relative difference of a document's logits packed and alone. It is computed in other shapes, which in half precision
# moves logits by a few per cent; positions that do not start again at a document move them far more.
_SHIFT = 0.1
# Optimizers whose step at a rate of 0 leaves the weights as they are, and whose state can be thrown away after it.
_STILL_AT_RATE_0 = ("adamw", "lion", "rmsprop", "adagrad", "adafactor", "sgd")
# Of the loss on shuffled tokens, above which a model does not know the language. SmolLM2-135M has 0.24 on instructions and
# 0.32 on GSM8K, a story teller of 260,000 parameters 0.50 and 0.43; SmolLM2 with its vocabulary mixed up 0.65, random
# weights 1.
_SHARE_OF_SHUFFLED = 0.6
_DOCUMENTS, _LENGTH = 4, 128  # that this is looked at with, and tokens of each


@dataclass
class Preflight:
    """What was looked at before the first step: figures for the manifest, and what deserves a warning."""

    figures: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def examine(trainer: Any, *, packed: bool) -> Preflight:
    """Run the model on documents of the data as the training will, and leave everything as it was.

    Raises ModelError where packed documents see each other or nothing is trained, RunError where memory does not suffice
    or a number is not finite. `packed`: documents share a row of the model's input. Where weights are yet to be shared
    out, as the training begins, there is no model to run: its figures are predictions.
    """
    found, began = Preflight(), time.perf_counter()
    if trainer.recipe.launch.strategy in SHARDED:
        found.figures = _predicted(trainer.recipe, trainer.rows.mean_document())
        return found
    with _untouched(trainer):
        found.figures["base"] = _know_the_language(trainer, found.warnings)
        if packed:
            found.figures["isolation"] = check_isolation(trainer)
        found.figures |= _predicted(trainer.recipe, trainer.rows.mean_document())
        found.figures["longest"] = _run_the_longest(trainer, found.warnings)
    found.figures["seconds"] = round(time.perf_counter() - began, 1)
    return found


def _predicted(recipe: Recipe, document: float) -> dict[str, Any]:
    """Peak memory of full sequences in GiB, and the model's operations a token; None for a model that cannot be predicted."""
    try:
        peak, flops = fitting.here(recipe).peak_bytes, fitting.model_flops_per_token(recipe, document)
        return {"predicted_gib": round(peak / GIB, 3), "flops_per_token": flops}
    except ModelError:
        return {"predicted_gib": None, "flops_per_token": None}


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Weights, optimizer, random states, gradients and averages are afterwards what they were."""
    model, optimizer = trainer.model, trainer.optimizer
    devices = range(torch.cuda.device_count())
    states = random.getstate(), np.random.get_state()
    rates = [torch.as_tensor(group["lr"]).clone() for group in optimizer.param_groups]
    with torch.random.fork_rng(devices=devices):
        for group in optimizer.param_groups:
            _set_rate(group, 0.0)
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                _set_rate(group, rate.item())
            optimizer.state.clear()
            model.zero_grad(set_to_none=True)
            random.setstate(states[0])
            np.random.set_state(states[1])
            for averages in trainer._metrics.values():
                averages.clear()
            trainer._total_train_tokens = 0
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers take no other
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


# --- Do packed documents see each other? -----------------------------------------------------------------------------


def check_isolation(trainer: Any) -> dict[str, Any] | None:
    """Two documents of the data, packed into one sequence, must not see each other.

    The gradient of the second one's logits to the first one's embeddings has to be zero to the last bit, which also holds
    under quantisation and in half precision; and the logits have to be those that the document has alone. Some models
    read neither the positions nor the sequence lengths that tell packed documents apart (OPT, Falcon, BLOOM, those with a
    recurrent state), and would let each document see those before it. Raises ModelError.
    """
    documents = _two_documents(trainer)
    if documents is None:
        return None
    before, document = documents
    first, second = len(before), len(document)
    packed, embedded = _forward(trainer, before + document, [first, second])
    alone, _ = _forward(trainer, document, [second])
    packed, alone = packed[first:].float(), alone.float()
    (gradient,) = torch.autograd.grad((packed**2).sum(), embedded)
    leak = (gradient[0, :first].float().norm() / gradient.float().norm()).item()
    shift = ((packed - alone).norm() / alone.norm()).item()
    config = trainer.model.config
    if not (leak == 0 and shift < _SHIFT):
        raise ModelError(
            f"data.packing: documents packed into one sequence see each other in a model of type {config.model_type} with "
            f"attention {config._attn_implementation} ({leak:.1%} of the gradient of one's logits falls on its neighbour, "
            f"and they are {shift:.1%} off those it has alone); set data.packing: none"
        )
    return {"attention": config._attn_implementation, "gradient_to_neighbour": leak, "logits_off": round(shift, 6)}


def _two_documents(trainer: Any) -> tuple[list[int], list[int]] | None:
    """The beginnings of two documents that share a row of the model's input, None where none ever do.

    That is the documents of one sequence, and those of one micro-batch, which is laid out as a single row.
    """
    micro = trainer.args.per_device_train_batch_size
    found: list[list[int]] = []
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        for row in dataset or ():
            start = 0
            for length in row["seq_lengths"][:2]:
                found.append(row["input_ids"][start : start + min(length, _TOKENS)])
                start += length
            if len(row["seq_lengths"]) > 1 or (len(found) > 1 and micro > 1):
                return found[-2], found[-1]
            if micro == 1:
                found = []
    return None


def _forward(trainer: Any, ids: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, vocabulary) of documents laid out as the training lays them out, and the embeddings
    (1, tokens, width) that they were computed from."""
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = trainer.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = _logits(trainer, ids, lengths)
    finally:
        hook.remove()
    return logits, embedded[0]


def _logits(trainer: Any, ids: list[int], lengths: list[int]) -> torch.Tensor:
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    batch = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with trainer.accelerator.autocast():
            return trainer.model(**batch, use_cache=False).logits[0]
    finally:
        trainer.model.train(was_training)


# --- Does the base know the language of the data? ---------------------------------------------------------------------


def _know_the_language(trainer: Any, warnings: list[str]) -> dict[str, float]:
    """Loss a token on documents, and on the same tokens in random order.

    A pretrained model predicts a text far better than its tokens shuffled, whatever the format; one with random weights,
    another tokenizer than its own, or numbers that overflow does not.
    """
    shuffle, losses = torch.Generator().manual_seed(0), {"loss": 0.0, "loss_of_shuffled_tokens": 0.0}
    number = min(_DOCUMENTS, len(trainer.train_dataset))
    for row in trainer.train_dataset.select(range(number)):
        ids = row["input_ids"][:_LENGTH]
        shuffled = [ids[place] for place in torch.randperm(len(ids), generator=shuffle).tolist()]
        for name, tokens in zip(losses, (ids, shuffled), strict=True):
            with torch.no_grad():
                logits = _logits(trainer, tokens, [len(tokens)]).float()
            target = torch.tensor(tokens[1:], device=logits.device)
            losses[name] += cross_entropy(logits[:-1], target).item() / number
    if not np.isfinite(losses["loss"]):
        raise RunError(
            f"model.name: before the first step the loss on the data is {losses['loss']}: numbers overflow in "
            f"{trainer.model.dtype}, or the weights are damaged; set model.dtype: bfloat16 or float32, or get the files again"
        )
    # The embedded model knows its own small world, and nothing of the template around it.
    known = trainer.recipe.model.name.startswith("builtin:")
    if not known and losses["loss"] > _SHARE_OF_SHUFFLED * losses["loss_of_shuffled_tokens"]:
        warnings.append(
            "model.name: the base predicts the data ({loss:.2f} a token) not much better than the same tokens in random order "
            "({loss_of_shuffled_tokens:.2f}): random or damaged weights, another model's tokenizer, or a language it has not "
            "seen".format(**losses)
        )
    return {name: round(loss, 4) for name, loss in losses.items()}


# --- Does it learn to stop? -------------------------------------------------------------------------------------------


def where_answers_end(data: Prepared, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens that end answers, which the export's generation config will list, and the rows that end in none of them or
    are cut before it. That most do has been seen to with the data."""
    accounts = [each.stats for each in data.train.chosen]
    return {
        "tokens": tokenizer.convert_ids_to_tokens(data.stops),
        "rows_without": sum(each.missing_eos + each.truncated_rows for each in accounts),
    }


# --- Does the longest batch fit, and does everything that is trained learn? -------------------------------------------


def _run_the_longest(trainer: Any, warnings: list[str]) -> dict[str, Any]:
    """Forward, backward, optimizer step and again, on the longest sequences of the data put into one micro-batch; then the
    longest validation micro-batch. What is too large for the memory is so now, and not after an hour."""
    micro = trainer.args.per_device_train_batch_size
    figures: dict[str, Any] = {}
    trainer.model.train()
    batch = [trainer.train_dataset[row] for row in _longest(trainer.train_dataset, micro)]
    figures["tokens"] = sum(len(row["input_ids"]) for row in batch)
    _backward(trainer, batch)
    figures |= _see_what_learns(trainer, warnings)
    if trainer.recipe.train.optimizer.startswith(_STILL_AT_RATE_0):
        trainer.optimizer.step()
        _backward(trainer, batch)  # now with gradients and optimizer states in memory
    if trainer.eval_dataset is not None:
        size = trainer.args.per_device_eval_batch_size
        batch = [trainer.eval_dataset[row] for row in _longest(trainer.eval_dataset, size)]
        figures["eval_tokens"] = sum(len(row["input_ids"]) for row in batch)
        with torch.no_grad():
            _loss(trainer, batch)
    return figures | {"peak_gib": round(peak_memory(), 3)}


def _longest(dataset: Any, number: int) -> list[int]:
    lengths = dataset.data.column("input_ids").combine_chunks().value_lengths().to_numpy()
    return [int(row) for row in np.argsort(-lengths, kind="stable")[:number]]


def _loss(trainer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, inputs)


def _backward(trainer: Any, rows: list[dict[str, Any]]) -> None:
    loss = _loss(trainer, rows)
    if not loss.isfinite():
        raise RunError(
            f"before the first step the loss of the longest micro-batch is {loss.item()}: numbers overflow, or the weights "
            "are damaged; set train.mixed_precision: bf16 where it is fp16"
        )
    loss.backward()


def _see_what_learns(trainer: Any, warnings: list[str]) -> dict[str, Any]:
    """After a backward pass: what is to be trained has a gradient, what is frozen has none and no optimizer.

    The first factor of an adapter has none yet, because the second is zero. Neither have rows of new tokens that are not in
    the batch, nor experts that no token was sent to.
    """
    trained = dict(_of_model(trainer, trained=True))
    learns = {name for name, weight in trained.items() if weight.grad is not None and bool(weight.grad.any())}
    excused = ("lora_A", "lora_embedding_A", "trainable_tokens", "experts")
    idle = [name for name in trained if name not in learns and not any(word in name for word in excused)]
    if not learns:
        raise ModelError(
            "lora: no weight that is to be trained gets a gradient from the data; set train.gradient_checkpointing: false"
        )
    if idle:
        more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
        warnings.append(f"these weights are trained, and get no gradient from the data: {', '.join(idle[:5])}{more}")
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    strays = [
        name for name, weight in _of_model(trainer, trained=False) if weight.grad is not None or id(weight) in held
    ]
    if strays:
        raise ModelError(f"model.name: {strays[0]} is frozen, and would be trained all the same")
    return {"trained_tensors": len(trained), "without_gradient": len(idle)}


def _of_model(trainer: Any, *, trained: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad == trained)

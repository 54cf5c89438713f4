"""Try the prepared model on the data before the first step: isolation, memory, gradients, base loss."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from sft_recipes import upstream
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED
from sft_recipes.errors import ModelError, RunError, SFTRecipeError
from sft_recipes.memory import autosize, memory_trace
from sft_recipes.memory.prediction import GIB
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training.metrics import peak_memory

# Relative difference between a document's logits packed and alone. The two are computed in different shapes, which moves
# logits by a few percent in half precision; positions that do not restart at a document move them far more.
_MAX_LOGIT_SHIFT = 0.1
# Base loss over loss on shuffled tokens, above which a model does not know the language. SmolLM2-135M has 0.24 on instructions
# and 0.32 on GSM8K, a story model with 260,000 parameters 0.50 and 0.43; SmolLM2 with a permuted vocabulary 0.65, random
# weights 1.
_MAX_LOSS_RATIO = 0.6
# Sequences of the base loss check and tokens of each. They run one by one, without gradients and through the loss head of
# training, which builds no logits: this takes less than a training step.
_BASE_SEQUENCES, _BASE_TOKENS = 4, 128
# Optimizers whose states a trial step may create. Not the paged ones: bitsandbytes keeps a list of all paged memory, which
# would never be freed.
_TRIAL_STEPS = ("adafactor", "adagrad", "adamw", "ademamix", "lion", "rmsprop", "sgd")
# Optimizers that update weights within the backward pass, where no trial can be taken back.
_STEP_IN_BACKWARD = ("lomo", "adalomo", "layerwise")
# Trained tensors that may lack a gradient: the second factor of an adapter starts at zero, which makes the gradient of the
# first one zero; new tokens may not occur in the batch, and experts may receive no token.
_MAY_LACK_GRADIENT = ("lora_A", "lora_embedding_A", "trainable_tokens", "experts")


@dataclass
class Preflight:
    """Results for the manifest, and warnings."""

    results: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run_preflight(trainer: Any, *, packed: bool) -> Preflight:
    """Run the model on the data as training does, and restore all state afterwards.

    Call it in `on_train_begin`: only then have transformers and accelerate set up what is trained (activation checkpointing,
    Liger, NEFTune, DDP, FSDP2 or DeepSpeed, the optimizer's states on resume). All ranks have to call it. `packed`: documents
    share a row of the model's input.

    Raises ModelError if packed documents attend to each other or nothing gets a gradient, RunError if memory does not suffice
    or the loss is NaN or Inf.
    """
    preflight, start = Preflight(), time.perf_counter()
    results = preflight.results
    with _restore_state(trainer):
        results["base"] = _check_base_loss(trainer, preflight.warnings)
        if packed:
            results["isolation"] = _check_isolation(trainer)
        results |= _predict(trainer.recipe, trainer.rows.mean_document())
        results["largest_micro_batch"] = _check_largest_micro_batch(trainer, preflight.warnings)
    results["eos"] = eos_statistics(trainer.data, trainer.processing_class)
    results["seconds"] = round(time.perf_counter() - start, 1)
    return preflight


def _predict(recipe: Recipe, document: float) -> dict[str, Any]:
    """Peak memory of full sequences in GiB, and FLOPs per token; None for a model that cannot be predicted."""
    try:
        found = autosize.predict_here(recipe)
        flops = autosize.model_flops_per_token(recipe, found.size, document)
        return {"predicted_peak_gib": round(found.peak_bytes / GIB, 3), "flops_per_token": flops}
    except ModelError:
        return {"predicted_peak_gib": None, "flops_per_token": None}


def _raise_if(condition: bool, error: SFTRecipeError, trainer: Any) -> None:
    """Raise the error in all ranks if the condition holds in one, so that none waits for another."""
    if trainer.any_rank(condition):
        raise type(error)(trainer.first_message(str(error) if condition else None))


# --- State ------------------------------------------------------------------------------------------------------------


@contextmanager
def _restore_state(trainer: Any) -> Iterator[None]:
    """Restore afterwards whatever a step changes: optimizer, random states, gradients, averages, counters.

    Weights need no copy: no step within updates them (`_harmless_steps`).
    """
    accelerator, optimizer = trainer.accelerator, _base_optimizer(trainer)
    device = trainer.args.device
    on_device = None if device.type == "cpu" else torch.get_device_module(device)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator_state = on_device.get_rng_state() if on_device else None
    training, sync_gradients = trainer.model.training, accelerator.sync_gradients
    averages, counters = upstream.averages(trainer), _deepspeed_counters(trainer)
    trial = trainer.recipe.train.optimizer.startswith(_TRIAL_STEPS)
    with _harmless_steps(optimizer, create_states=trial):
        try:
            yield
        finally:
            trainer.model.zero_grad(set_to_none=True)
            trainer.model.train(training)
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if on_device:
                on_device.set_rng_state(accelerator_state)
            upstream.set_averages(trainer, averages)
            trainer.losses.clear()
            accelerator.sync_gradients = sync_gradients
            for owner, name, value in counters:
                setattr(owner, name, value)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _harmless_steps(optimizer: torch.optim.Optimizer, *, create_states: bool) -> Iterator[None]:
    """Make each optimizer step within create the states that are missing, and do nothing else.

    They are created from gradients of zero at a learning rate of zero, which leaves every weight as it is (torchao's
    optimizers turn -0.0 into 0.0). Parameters that have states, on resume or because the optimizer creates them when it is
    constructed, hide their gradients, so that the step skips them: that memory is held already. New states stay in memory
    until the end, as in training, but outside of `optimizer.state`: DeepSpeed links what it finds there to the parameters.
    """
    before = set(optimizer.state)
    created: dict[torch.Tensor, Any] = {}
    hidden: dict[torch.Tensor, torch.Tensor] = {}
    settings = [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in group.items()}
        for group in optimizer.param_groups
    ]

    def pre_step(*_: Any) -> None:
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            if parameter.grad is None:
                continue
            if create_states and parameter not in before and parameter not in created:
                parameter.grad.zero_()
            else:
                hidden[parameter], parameter.grad = parameter.grad, None

    def post_step(*_: Any) -> None:
        for parameter, gradient in hidden.items():
            parameter.grad = gradient
        hidden.clear()
        for parameter in [each for each in optimizer.state if each not in before]:
            state = optimizer.state.pop(parameter)
            if state:
                created[parameter] = state

    hooks = [optimizer.register_step_pre_hook(pre_step), optimizer.register_step_post_hook(post_step)]
    for group in optimizer.param_groups:
        _set(group, "lr", 0.0)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in [each for each in optimizer.state if each not in before]:
            del optimizer.state[parameter]
        for group, saved in zip(optimizer.param_groups, settings, strict=True):
            for name in group.keys() - saved.keys():
                del group[name]
            for name in saved.keys() - {"params"}:
                _set(group, name, saved[name])


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group.get(name), torch.Tensor):  # torchao's optimizers require the learning rate to stay one
        group[name].copy_(torch.as_tensor(value))
    else:
        group[name] = value


def _base_optimizer(trainer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _deepspeed_counters(trainer: Any) -> list[tuple[Any, str, Any]]:
    """What DeepSpeed counts in a step, as (owner, name, value)."""
    if not trainer.is_deepspeed_enabled:
        return []
    engine = trainer.model_wrapped
    names = {
        engine: ("micro_steps", "global_steps", "global_samples", "skipped_steps"),
        engine.optimizer: (upstream.DEEPSPEED_LINKED,),
        engine.optimizer.loss_scaler: tuple(vars(engine.optimizer.loss_scaler)),
    }
    return [(o, name, getattr(o, name)) for o, each in names.items() for name in each if hasattr(o, name)]


# --- Are packed documents isolated? -----------------------------------------------------------------------------------


def _check_isolation(trainer: Any) -> dict[str, Any] | None:
    """Check that two documents of the data, packed into one sequence, do not attend to each other.

    The gradient of the second one's logits with respect to the first one's embeddings has to be exactly zero, which also holds
    under quantization and in half precision, and the logits have to match those of the document alone. Some models use neither
    the positions nor the sequence lengths that separate packed documents (OPT, Falcon, BLOOM, models with a recurrent state),
    so that each document would attend to the ones before it. Raises ModelError.
    """
    documents = _two_documents(trainer)
    if documents is None:
        return None
    before, document = documents
    first, second = len(before), len(document)
    packed, embeddings = _logits_and_embeddings(trainer, before + document, [first, second])
    (gradient,) = torch.autograd.grad((packed[first:].float() ** 2).sum(), embeddings)
    packed = packed[first:].detach().float()
    with torch.no_grad():
        alone = _logits(trainer, document, [second]).float()
    leak = (gradient[0, :first].float().norm() / gradient.float().norm()).item()
    shift = ((packed - alone).norm() / alone.norm()).item()
    config, attention = trainer.model.config, upstream.attention_of(trainer.model.config)
    _raise_if(
        not (leak == 0 and shift < _MAX_LOGIT_SHIFT),
        ModelError(
            f"data.packing: packed documents attend to each other in a model of type {config.model_type} with attention "
            f"{attention} ({leak:.1%} of the gradient of a document's logits goes to its neighbor, and they "
            f"differ by {shift:.1%} from those of the document alone). Set data.packing: none."
        ),
        trainer,
    )
    return {"attention": attention, "gradient_leak": leak, "logit_shift": round(shift, 6)}


def _two_documents(trainer: Any) -> tuple[list[int], list[int]] | None:
    """The beginnings of two documents that share a row of the model's input; None if no two documents do.

    These are documents of one sequence or of one micro-batch, which is laid out as a single row.
    """
    micro = trainer.args.per_device_train_batch_size
    found: list[list[int]] = []
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        for row in dataset or ():
            start = 0
            for length in row["seq_lengths"][:2]:
                found.append(row["input_ids"][start : start + min(length, memory_trace.ISOLATION_TOKENS)])
                start += length
            if len(row["seq_lengths"]) > 1 or (len(found) > 1 and micro > 1):
                return found[-2], found[-1]
            if micro == 1:
                found = []
    return None


def _logits_and_embeddings(trainer: Any, ids: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, vocabulary), and the embeddings (1, tokens, width) that they were computed from."""
    embeddings: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    hook = trainer.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = _logits(trainer, ids, lengths)
    finally:
        hook.remove()
    return logits, embeddings[0]


def _logits(trainer: Any, ids: list[int], lengths: list[int]) -> torch.Tensor:
    logits: torch.Tensor = _run_eagerly(trainer, ids, lengths).logits[0]
    return logits


def _run_eagerly(trainer: Any, ids: list[int], lengths: list[int], **more: Any) -> Any:
    """The model's outputs for documents that are laid out as in training; `more` are arguments of the model.

    Of the model that evaluation runs too: with DDP and DeepSpeed the one inside their wrappers, which expect a backward pass
    of their own after each forward pass. Not compiled, because these lengths do not occur in training.
    """
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    if "fused_lm_head" not in more:
        del batch["labels"]
    trainer.model.eval()
    with trainer.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        return trainer.model(**send_to_device(batch, trainer.args.device), use_cache=False, **more)


# --- Does the base model know the language of the data? ---------------------------------------------------------------


def _check_base_loss(trainer: Any, warnings: list[str]) -> dict[str, float]:
    """Compare the loss per token on sequences with the loss on the same tokens in random order.

    A pretrained model predicts text far better than its shuffled tokens, whatever the format. A model with random weights,
    with another model's tokenizer, or with numbers that overflow does not.
    """
    shuffle, losses = torch.Generator().manual_seed(0), {"loss": 0.0, "shuffled_loss": 0.0}
    number = min(_BASE_SEQUENCES, len(trainer.train_dataset))
    for row in trainer.train_dataset.select(range(number)):
        ids = row["input_ids"][:_BASE_TOKENS]
        shuffled = [ids[place] for place in torch.randperm(len(ids), generator=shuffle).tolist()]
        for name, tokens in zip(losses, (ids, shuffled), strict=True):
            losses[name] += _loss_per_token(trainer, tokens) / number
    _raise_if(
        not np.isfinite(losses["loss"]),
        RunError(
            f"model.name: the loss on the data before the first step is {losses['loss']}: numbers overflow in "
            f"{trainer.model.dtype}, or the weights are damaged. Set model.dtype: bfloat16 or float32, or download the model "
            "again."
        ),
        trainer,
    )
    # The built-in model knows its own small world, but not the template around it.
    known = trainer.recipe.model.name.startswith("builtin:")
    if not known and losses["loss"] > _MAX_LOSS_RATIO * losses["shuffled_loss"]:
        warnings.append(
            "model.name: the base model predicts the data ({loss:.2f} per token) not much better than the same tokens in "
            "random order ({shuffled_loss:.2f}): random or damaged weights, another model's tokenizer, or an unknown "
            "language.".format(**losses)
        )
    return {name: round(loss, 4) for name, loss in losses.items()}


def _loss_per_token(trainer: Any, tokens: list[int]) -> float:
    with torch.no_grad():
        outputs = _run_eagerly(trainer, tokens, [len(tokens)], fused_lm_head=True)
    return -(outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)).item()


# --- Does the model learn to stop? ------------------------------------------------------------------------------------


def eos_statistics(data: Prepared, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """EOS tokens that end answers, which the exported generation config will list, and the number of rows without one."""
    accounts = [each.stats for each in data.train.chosen]
    return {
        "tokens": tokenizer.convert_ids_to_tokens(data.stops),
        "rows_without": sum(each.missing_eos + each.truncated_rows for each in accounts),
    }


# --- Does the largest micro-batch fit, and does everything that is trained get a gradient? ----------------------------


def _check_largest_micro_batch(trainer: Any, warnings: list[str]) -> dict[str, Any]:
    """Train on the longest sequences as one micro-batch, then validate on the longest ones, to find a lack of memory now.

    First a step that creates the optimizer's states, then a step with them in memory. With accumulation, gradients are in
    memory before the last micro-batch of that step, otherwise they are not: it takes what it takes in training, and no more.
    """
    results: dict[str, Any] = {}
    if not trainer.recipe.train.optimizer.endswith(_STEP_IN_BACKWARD):
        rows = _longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)
        results["tokens"] = sum(len(row["input_ids"]) for row in rows)
        accumulates = trainer.args.gradient_accumulation_steps > 1
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # set by each step
        with _watch_gradients(trainer) as gradients:
            trained_tokens = _train_micro_batch(trainer, rows)
            if trained_tokens:  # none in a piece of a long prompt
                results |= _check_gradients(trainer, gradients, warnings)
        _step(trainer, keep_gradients=accumulates)
        if accumulates and trainer.is_deepspeed_enabled:  # its step has removed the gradients
            _train_micro_batch(trainer, rows, last=False)
        _train_micro_batch(trainer, rows)
        trainer.model.zero_grad(set_to_none=True)
    if trainer.eval_dataset is not None:
        rows = _longest_rows(trainer.eval_dataset, trainer.args.per_device_eval_batch_size)
        results["eval_tokens"] = sum(len(row["input_ids"]) for row in rows)
        trainer.model.eval()
        trainer.prediction_step(trainer.model, trainer.data_collator(rows), prediction_loss_only=True)
    return results | {"peak_gib": round(peak_memory(), 3)}


def _longest_rows(dataset: Any, number: int) -> list[dict[str, Any]]:
    lengths = dataset.data.column("input_ids").combine_chunks().value_lengths().to_numpy()
    return [dataset[int(row)] for row in np.argsort(-lengths, kind="stable")[:number]]


def _train_micro_batch(trainer: Any, rows: list[dict[str, Any]], *, last: bool = True) -> int:
    """Run forward and backward as a training step does; returns the number of trained tokens.

    After the `last` micro-batch of a step DeepSpeed takes the step itself. DDP does not sum these gradients: after its first
    synchronized pass it rebuilds its buckets, which with more than two ranks would change the rounding of sums in training.
    """
    inputs = trainer.data_collator(rows)
    trained_tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
    trainer.accelerator.sync_gradients = last
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    with nullcontext() if sharded else trainer.accelerator.no_sync(trainer.model_wrapped):
        loss = trainer.training_step(trainer.model_wrapped, inputs, trained_tokens.to(trainer.args.device))
    _raise_if(
        not loss.isfinite(),
        RunError(
            f"model.name: the loss of the largest micro-batch before the first step is {loss.item()}: numbers overflow, or "
            "the weights are damaged. Set train.mixed_precision: bf16 if it is fp16."
        ),
        trainer,
    )
    return int(trained_tokens)


def _step(trainer: Any, *, keep_gradients: bool) -> None:
    """Create the optimizer's states. Not through fp16's loss scaler, which would skip the step if a gradient overflows."""
    if trainer.is_deepspeed_enabled:
        return
    if trainer.recipe.train.optimizer.startswith(_TRIAL_STEPS):
        _base_optimizer(trainer).step()
    if not keep_gradients:
        trainer.model.zero_grad(set_to_none=True)


@contextmanager
def _watch_gradients(trainer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """By name, whether a trained tensor gets a gradient other than zero, under DeepSpeed: it takes gradients as they come."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, weight: torch.Tensor) -> Any:
        return weight.register_hook(lambda gradient: found.update({name: gradient.any()}))

    hooks = [watch(*each) for each in _parameters(trainer, trained=True)] if trainer.is_deepspeed_enabled else []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _check_gradients(trainer: Any, gradients: dict[str, torch.Tensor], warnings: list[str]) -> dict[str, Any]:
    """Check after a backward pass that trained weights have a gradient, and frozen ones neither a gradient nor an optimizer.

    DeepSpeed's optimizer holds flat copies in place of the weights, so that the latter cannot be checked there.
    """
    trained = dict(_parameters(trainer, trained=True))
    for name, weight in trained.items():
        if weight.grad is not None:
            shard = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
            gradients[name] = shard.any()
    device = trainer.args.device
    found = torch.stack([gradients.get(name, torch.zeros(())).to(device).long() for name in trained])
    if trainer.args.world_size > 1:
        found = trainer.accelerator.reduce(found, "sum")
    idle = [name for name, number in zip(trained, found.tolist(), strict=True) if not number]
    if len(idle) == len(trained):
        raise ModelError(
            "lora: no trained weight gets a gradient from the data. Set train.gradient_checkpointing: false."
        )
    idle = [name for name in idle if not any(word in name for word in _MAY_LACK_GRADIENT)]
    if idle:
        more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
        warnings.append(f"these trained weights get no gradient from the data: {', '.join(idle[:5])}{more}")
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    strays = [n for n, weight in _parameters(trainer, trained=False) if weight.grad is not None or id(weight) in held]
    if strays:
        raise ModelError(f"model.name: {strays[0]} is frozen but would be trained.")
    return {"trained_tensors": len(trained), "tensors_without_gradient": len(idle)}


def _parameters(trainer: Any, *, trained: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad == trained)

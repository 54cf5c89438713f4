"""Proof on the real model, before the first step, that what silently goes wrong does not."""

from typing import Any

import torch

from sft_recipes.errors import ModelError

_TOKENS = 64  # of each of the two documents that are compared
# Relative difference of a document's logits packed and alone. It is computed in other shapes, which in half precision
# moves logits by a few per cent; positions that do not start again at a document move them far more.
_SHIFT = 0.1


def check_isolation(trainer: Any) -> None:
    """Two documents of the data, packed into one sequence, must not see each other.

    The gradient of the second one's logits to the first one's embeddings has to be zero to the last bit, which also holds
    under quantisation and in half precision; and the logits have to be those that the document has alone. Some models
    read neither the positions nor the sequence lengths that tell packed documents apart (OPT, Falcon, BLOOM, those with a
    recurrent state), and would let each document see those before it. Raises ModelError.
    """
    documents = _two_documents(trainer)
    if documents is None:
        return
    before, document = documents
    first, second = len(before), len(document)
    packed, embedded = _forward(trainer, before + document, [first, second])
    alone, _ = _forward(trainer, document, [second])
    packed, alone = packed[first:].float(), alone.float()
    (gradient,) = torch.autograd.grad((packed**2).sum(), embedded)
    leak = (gradient[0, :first].float().norm() / gradient.float().norm()).item()
    shift = ((packed - alone).norm() / alone.norm()).item()
    if not (leak == 0 and shift < _SHIFT):
        config = trainer.model.config
        raise ModelError(
            f"data.packing: documents packed into one sequence see each other in a model of type {config.model_type} with "
            f"attention {config._attn_implementation} ({leak:.1%} of the gradient of one's logits falls on its neighbour, "
            f"and they are {shift:.1%} off those it has alone); set data.packing: none"
        )


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
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    batch = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    was_training = trainer.model.training
    trainer.model.eval()
    hook = trainer.model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad(), trainer.accelerator.autocast():
            logits = trainer.model(**batch, use_cache=False).logits[0]
    finally:
        hook.remove()
        trainer.model.train(was_training)
    return logits, embedded[0]

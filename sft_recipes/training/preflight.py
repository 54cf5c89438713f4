"""Proof on the real model, before the first step, that what silently goes wrong does not."""

from typing import Any

import torch

from sft_recipes.errors import ModelError

_TOKENS = 64  # of each of the two documents that are compared
# Relative differences. The same batch with another neighbour is computed alike to the last bits; alone, a document is
# computed in other shapes, which in half precision moves logits by a few per cent.
_NEIGHBOUR, _ALONE = 1e-3, 0.1


def check_isolation(trainer: Any) -> None:
    """Two documents of the data must give the same logits packed into one sequence and alone.

    Some models read neither the positions nor the sequence lengths that tell packed documents apart (OPT, Falcon, BLOOM,
    those with a recurrent state), and would let each document see those before it. Raises ModelError.
    """
    row = next((row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    start = row["seq_lengths"][0]
    lengths = [min(length, _TOKENS) for length in row["seq_lengths"][:2]]
    before, document = row["input_ids"][: lengths[0]], row["input_ids"][start : start + lengths[1]]
    packed = _logits(trainer, before + document, lengths)[lengths[0] :]
    beside_another = _logits(trainer, before[::-1] + document, lengths)[lengths[0] :]
    alone = _logits(trainer, document, lengths[1:])
    leak, shift = ((packed - other).norm() / alone.norm() for other in (beside_another, alone))
    if not (leak < _NEIGHBOUR and shift < _ALONE):
        config = trainer.model.config
        raise ModelError(
            f"data.packing: documents packed into one sequence see each other in a model of type {config.model_type} with "
            f"attention {config._attn_implementation} (one's logits move by {leak.item():.1%} with its neighbour, and by "
            f"{shift.item():.1%} from those it has alone); set data.packing: none"
        )


def _logits(trainer: Any, ids: list[int], lengths: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) in float32 of documents laid out as the training lays them out."""
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    batch = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        logits = trainer.model(**batch, use_cache=False).logits[0]
    trainer.model.train(was_training)
    return logits.float()

#!/usr/bin/env python3
"""A training step of packed documents, sdpa with its mask against varlen: `python benchmarks/attention.py MODEL DATA`.

LoRA in bfloat16, forward and backward pass of one micro-batch of 4 x 512 tokens, in turns in one process, best of several.
Then attention alone, in the model's shape, on rows of the documents of the data.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import measured_on
from rich.console import Console
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sft_recipes.data import encoder, prepare
from sft_recipes.models import attention, model
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import trainer
from sft_recipes.training.build import build_trainer

TURNS = 4


def seconds(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def in_turns(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least seconds of each, after one turn that is not counted."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(TURNS + 1):
        for name, do in ways.items():
            best[name] = min(best[name], seconds(do) if turn else (do(), float("inf"))[1])
    return best


def step(sft: trainer.Trainer, batch: dict[str, Any], name: str) -> None:
    sft.model.get_base_model().config._attn_implementation = name
    with sft.accelerator.autocast():
        loss = sft.compute_loss(sft.model, dict(batch))
    loss.backward()
    sft.model.zero_grad()


def alone(config: Any, lengths: list[int], name: str) -> None:
    """Forward and backward pass of one layer's attention, with the making of the mask that all layers share."""
    module, rows = torch.nn.Module(), sum(lengths)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    module.num_key_value_groups = heads // groups
    width = config.hidden_size // heads
    query, key, value = (
        torch.randn(1, number, rows, width, dtype=torch.bfloat16, requires_grad=True)
        for number in (heads, groups, groups)
    )
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    if name == "sdpa":
        of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        mask = (of[:, None] == of[None]).tril()[None, None]
        out, _ = sdpa_attention_forward(module, query, key, value, mask)
    else:
        out, _ = attention.attend(module, query, key, value, None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    out.sum().backward()


arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("model")
arguments.add_argument("data")
given = arguments.parse_args()
with tempfile.TemporaryDirectory() as folder:
    recipe = Recipe.model_validate(
        {
            "model": {"name": given.model, "dtype": "bfloat16"},
            "data": {"train": given.data, "eval": None, "max_length": 512},
            "lora": {},
            "train": {
                "micro_batch_size": 4, "max_steps": 1, "mixed_precision": "bf16", "gradient_checkpointing": False,
                "preflight": False,
            },
            "output_dir": folder,
        }
    )  # fmt: skip
    tokenizer = load_tokenizer(recipe.model)
    data = prepare.prepare(recipe, encoder.from_transformers(tokenizer), cached=False)
    sft = build_trainer(recipe, model.load_model(recipe, tokenizer), tokenizer, data, Path(folder), Console(quiet=True))
    sft.model.train()
    batch = next(iter(sft.get_train_dataloader()))
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    print(f"{measured_on()}, {torch.get_num_threads()} threads, {len(lengths)} documents in {sum(lengths):,} tokens\n")
    print("| | sdpa, seconds | varlen, seconds | times as fast |\n|---|---|---|---|")
    found = in_turns({name: partial(step, sft, batch, name) for name in ("sdpa", "varlen")})
    print(f"| step | {found['sdpa']:.2f} | {found['varlen']:.2f} | {found['sdpa'] / found['varlen']:.2f} |", flush=True)
    for times in (1, 2):
        ways = {name: partial(alone, sft.model.config, lengths * times, name) for name in ("sdpa", "varlen")}
        found = in_turns(ways)
        print(
            f"| attention of a layer, {sum(lengths) * times:,} tokens | {found['sdpa']:.3f} | {found['varlen']:.3f} | "
            f"{found['sdpa'] / found['varlen']:.1f} |"
        )

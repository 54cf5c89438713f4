"""Rebuild `builtin:tiny` and its data from scratch: `python -m tools.builtin_model.make`.

Writes `tiny/` (tokenizer and model) and `tasks/` (training and held-out rows) into sft_recipes/builtin, which the wheel
contains; this code stays in the checkout. The data files are identical on every machine; the weights differ in the last
bits. 60 million tokens take about 40 minutes on two cores.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_recipes.data import templates
from sft_recipes.data.formats import registry as formats
from sft_recipes.export.save_model import save_tokenizer
from sft_recipes.model_dir import BUILTIN
from tools.builtin_model import corpus

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
LENGTH, BATCH, PEAK_RATE = 256, 32, 3e-3


def write_rows(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "train": corpus.rows(6000, seed=1),
        "heldout": corpus.rows(200, seed=2, unseen=True),
    }.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 1,024 tokens on pretraining text and fine-tuning rows in the Alpaca template."""
    rng = random.Random(0)
    text, render = [corpus.document(rng) for _ in range(5000)], templates.Alpaca()
    text += [render(formats.to_example(row, "alpaca", {}, "")).text for row in corpus.rows(2000, seed=0)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=[BEGIN, END, PAD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def token_blocks(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield endless batches (BATCH, LENGTH): documents with BOS and EOS, concatenated and chunked."""
    rng, stream = random.Random(seed), []
    while True:
        documents = [corpus.document(rng) for _ in range(200)]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents):
            stream += [*encoding.ids, tokenizer.eos_token_id]
        while len(stream) >= BATCH * LENGTH:
            yield torch.tensor(stream[: BATCH * LENGTH]).view(BATCH, LENGTH)
            del stream[: BATCH * LENGTH]


def pretrain(tokenizer: PreTrainedTokenizerFast, tokens: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    steps = max(1, tokens // (BATCH * LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    start = time.monotonic()
    for step, batch in enumerate(itertools.islice(token_blocks(tokenizer, seed=3), steps), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            rate = step * BATCH * LENGTH / (time.monotonic() - start)
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {rate:,.0f} tokens/s", flush=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=60_000_000, help="number of pretraining tokens")
    parser.add_argument("--out", type=Path, default=BUILTIN, help="output directory of tiny/ and tasks/")
    args = parser.parse_args()
    write_rows(args.out / "tasks")
    tokenizer = make_tokenizer()
    model = pretrain(tokenizer, args.tokens)
    model.save_pretrained(args.out / "tiny")
    save_tokenizer(tokenizer, args.out / "tiny")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""From a fine-tuned model to DPO with TRL; docs/dpo.md says what is what.

python docs/dpo.py runs/quickstart/model pairs.jsonl --out runs/dpo             all weights
python docs/dpo.py runs/quickstart/model pairs.jsonl --out runs/dpo --lora 16   a new adapter on the frozen model
python docs/dpo.py runs/quickstart/adapter pairs.jsonl --out runs/dpo           the run's adapter, trained further
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from sft_recipes.export.load_adapter import stop_tokens
from sft_recipes.export.save_model import save_adapter, save_model


def read(pairs: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows of messages, which the chat template turns into the tokens of the fine-tuning: prompt, chosen, rejected."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    lines = pairs.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if found := next((token for token in special if token in line), None):
            raise SystemExit(f"{pairs}:{number}: the text contains {found!r}, which TRL reads as a special token")
    return Dataset.from_list([json.loads(line) for line in lines])


def build(start: Path, pairs: Path, out: Path, *, lora: int | None = None, **settings: float) -> DPOTrainer:
    """A trainer whose policy begins as the fine-tuned model, and whose reference is that model."""
    tokenizer, config = AutoTokenizer.from_pretrained(start), None
    if adapter := (start / "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(start, dtype="auto", is_trainable=True)
    elif lora:
        model = AutoModelForCausalLM.from_pretrained(start, dtype="auto")
        config = LoraConfig(task_type="CAUSAL_LM", r=lora, lora_alpha=2 * lora, target_modules="all-linear")
    else:  # all weights, in float32: bfloat16 would round small updates away
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    on_gpu = torch.cuda.is_available()
    arguments = DPOConfig(str(out), max_length=None, bf16=on_gpu, logging_steps=1, save_strategy="no", **settings)
    # Without a ref_model TRL takes the files of `model` again; the model without its new adapter; a copy of the adapter.
    trainer = DPOTrainer(
        model=model, ref_model=None, peft_config=config,
        args=arguments, train_dataset=read(pairs, tokenizer), processing_class=tokenizer,
    )  # fmt: skip
    if adapter:  # the copy that TRL 1.16 makes lacks adapters on the embeddings
        set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(trainer.model), adapter_name="ref")
    return trainer


def save(trainer: DPOTrainer, start: Path, out: Path) -> None:
    """Write model/ or adapter/ as a run does: for servers, `sft-recipe generate` and `sft-recipe merge`."""
    model, tokenizer = trainer.model, trainer.processing_class
    if trainer.ref_model is None:
        if "ref" in model.peft_config:
            model.delete_adapter("ref")
        save_adapter(model, tokenizer, out / "adapter", stops=stop_tokens(start, tokenizer))
    else:
        dtype = json.loads((start / "config.json").read_text("utf-8"))["dtype"]
        save_model(
            model, tokenizer, out / "model", dtype=dtype, max_shard_size="5GB", stops=stop_tokens(start, tokenizer)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("start", type=Path, help="model/ or adapter/ of a run")
    parser.add_argument("pairs", type=Path, help="JSON lines of prompt, chosen and rejected")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora", type=int, help="rank of a new adapter; the model itself stays as it is")
    parser.add_argument("--steps", type=int, default=-1, help="instead of three passes over the pairs")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    asked = parser.parse_args()
    settings = {"max_steps": asked.steps, "learning_rate": asked.learning_rate}
    trainer = build(asked.start, asked.pairs, asked.out, lora=asked.lora, **settings)
    trainer.train()
    save(trainer, asked.start, asked.out)

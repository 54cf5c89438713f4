"""recipes/quickstart.yaml by hand, with TRL and PEFT: python examples/plain_trl.py [STEPS [SEED]]; docs/comparison.md."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

BUILTIN, OUT = Path(__file__).parents[1] / "sft_recipes" / "builtin", Path("runs/plain-trl")
TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
CONTEXT = ", paired with an input that provides further context"


def alpaca(row: dict[str, str]) -> dict[str, str]:
    context, given = (CONTEXT, f"### Input:\n{row['input']}\n\n") if row["input"] else ("", "")
    prompt = f"{TASK.format(context)}\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}  # to which TRL adds the end token


def rows(file: str) -> Dataset:
    lines = (BUILTIN / "tasks" / file).read_text("utf-8").splitlines()
    return Dataset.from_list([alpaca(json.loads(line)) for line in lines])


def build(steps: int = -1, seed: int = 0) -> SFTTrainer:
    config = SFTConfig(
        str(OUT), max_length=256, packing=True, num_train_epochs=2, max_steps=steps, per_device_train_batch_size=2,
        per_device_eval_batch_size=2, gradient_accumulation_steps=4, learning_rate=5e-3, lr_scheduler_type="cosine",
        warmup_steps=0.03, bf16=False, gradient_checkpointing=False, eval_strategy="steps", eval_steps=0.25,
        eval_on_start=True, save_steps=0.25, save_total_limit=2, logging_steps=20, report_to="none", seed=seed,
    )  # fmt: skip
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(BUILTIN / "tiny", dtype="float32"), config,
        train_dataset=rows("train.jsonl"), eval_dataset=rows("heldout.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(BUILTIN / "tiny", padding_side="left"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def exact_match(trainer: SFTTrainer, asked: Dataset) -> float:
    prompts = trainer.processing_class(asked["prompt"][:], return_tensors="pt", padding=True).to(trainer.model.device)
    output = trainer.model.eval().generate(**prompts, max_new_tokens=24, do_sample=False)
    answers = trainer.processing_class.batch_decode(output[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(a.strip() == b for a, b in zip(answers, asked["completion"], strict=True)) / len(answers)


if __name__ == "__main__":
    trainer, asked = build(*map(int, sys.argv[1:])), rows("heldout.jsonl")
    print(f"exact match before: {exact_match(trainer, asked):.1%}")
    trainer.train()
    print(f"exact match after: {exact_match(trainer, asked):.1%}")
    for name in ("loss", "eval_loss"):
        plt.plot(*zip(*((log["step"], log[name]) for log in trainer.state.log_history if name in log), strict=True))
    plt.savefig(OUT / "learning_curve.png")
    trainer.model.merge_and_unload().save_pretrained(OUT / "model")
    trainer.processing_class.save_pretrained(OUT / "model")

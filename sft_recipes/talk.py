"""`sft-recipe generate`: talking to a trained model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes.export import load
from sft_recipes.recipe import model_files
from sft_recipes.training.generate import answer, prompt_ids


def talk(path: Path, prompt: str, input: str = "", *, max_new_tokens: int, temperature: float) -> str:
    """The answer of the model at `path`: a model or adapter directory, or a run that exported one.

    Raises ModelError where there is none.
    """
    folder = model_files.find_model(path)
    if model_files.is_adapter(folder):
        model, tokenizer = load.adapted(folder, "auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    message: dict[str, Any] = {"role": "user", "content": prompt, **({"input": input} if input else {})}
    [text] = answer(
        model.to(torch.accelerator.current_accelerator() or "cpu"),
        tokenizer,
        [prompt_ids(tokenizer, [message], raw=_trained_on_text(path))],
        max_new_tokens=max_new_tokens,
        stops=load.stops(folder, tokenizer),
        temperature=temperature,
    )
    return text


def _trained_on_text(path: Path) -> bool:
    """Whether `path` is a run, or in a run, that was trained on plain text, which is continued without a template."""
    file = next((folder / "data.json" for folder in (path, path.parent) if (folder / "data.json").is_file()), None)
    if file is None:
        return False
    return all(source["format"] == "text" for source in json.loads(file.read_text("utf-8"))["train"]["sources"])

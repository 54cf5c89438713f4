"""Implement `sft-recipe generate`: answer one prompt with a trained model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_recipes import model_dir
from sft_recipes.errors import ModelError, RecipeError, SFTRecipeError, reason_of
from sft_recipes.export import load_adapter
from sft_recipes.models.generate import answer, prompt_ids
from sft_recipes.models.library_errors import as_model_error
from sft_recipes.run_dir import DATA, RECIPE


def generate(
    path: Path,
    prompt: str,
    input: str = "",
    *,
    max_new_tokens: int,
    temperature: float,
    trust_remote_code: bool = False,
) -> str:
    """Return the answer of the model at `path`: a model or adapter directory, or a run that exported one.

    Raises ModelError if there is no usable model, RecipeError if its chat template is not allowed.
    """
    if not all(map(_is_unicode, (prompt, input))):
        raise RecipeError("--prompt and --input: not valid Unicode. Pass UTF-8 text.")
    folder = model_dir.find_model(path)
    trust = {"trust_remote_code": trust_remote_code}  # always passed: without it transformers prompts on the terminal
    if model_dir.is_adapter(folder):
        adapter = load_adapter.find(folder, trust_remote_code=trust_remote_code)
        model, tokenizer = load_adapter.load(adapter, "auto"), adapter.load_tokenizer()
    else:
        with as_model_error(str(folder), "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        with as_model_error(str(folder), "weights"):
            config = AutoConfig.from_pretrained(folder, **trust)
            model_dir.reject_hub_kernels(config, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype="auto", use_safetensors=True, **trust
            )
    message: dict[str, Any] = {"role": "user", "content": prompt, **({"input": input} if input else {})}
    with _as_answer_error(path):
        raw, parse = _plain_text(path)
        [ids] = prompt_ids(tokenizer, [([message], None)], raw=raw, parse=parse)
    limit = model_dir.positions(model.config.to_dict())
    if limit is not None and len(ids) >= limit:
        raise ModelError(f"{path}: the prompt is longer than the context length {limit} (got {len(ids)}). Shorten it.")
    stops = load_adapter.stop_tokens(folder, tokenizer)
    with _as_answer_error(path):
        [text] = answer(
            model.to(torch.accelerator.current_accelerator() or "cpu"),
            tokenizer,
            [ids],
            max_new_tokens=min(max_new_tokens, limit - len(ids)) if limit else max_new_tokens,
            stops=stops,
            temperature=temperature,
        )
    return text


@contextmanager
def _as_answer_error(path: Path) -> Iterator[None]:
    """Raise errors of the chat template, the tokenizer and the model as ModelError."""
    try:
        yield
    except SFTRecipeError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: cannot answer this prompt: {type(error).__name__}: {reason_of(error)}") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_text(path: Path) -> tuple[bool, bool]:
    """Return whether `path` is (in) a run trained on plain text, which is continued without a template, and parsed."""
    file = next((folder / DATA for folder in (path, path.parent) if (folder / DATA).is_file()), None)
    if file is None:
        return False, False
    try:
        sources = json.loads(file.read_text("utf-8"))["train"]["sources"]
        recipe = json.loads(file.with_name(RECIPE).read_text("utf-8")) if file.with_name(RECIPE).is_file() else {}
        parse = recipe.get("data", {}).get("special_tokens") == "parse"
        return all(source["format"] == "text" for source in sources), parse
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}. Remove it to use the model's chat template.") from None

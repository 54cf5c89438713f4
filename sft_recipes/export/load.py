"""Loading what was exported: adapters on their base, and the tokens at which a model stops."""

from pathlib import Path
from typing import Any

import peft
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.errors import ModelError
from sft_recipes.export.save import untie
from sft_recipes.recipe import model_files


def adapted(
    adapter: Path, dtype: Any, *, base: str | None = None, trust_remote_code: bool = False
) -> tuple[peft.PeftModel, PreTrainedTokenizerBase]:
    """An adapter on its base (its own, or `base`) with weights in `dtype`, and its tokenizer.

    Raises ModelError where the base cannot be loaded or does not fit.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{adapter}: adapter_model.safetensors is missing")
    config = peft.PeftConfig.from_pretrained(str(adapter))
    try:
        name = model_files.location(base) if base else config.base_model_name_or_path
    except ModelError as error:
        raise ModelError(str(error).replace("model.name", "--base", 1)) from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=None if base else config.revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{name}: the adapter's base cannot be loaded; give it with --base: {_line(error)}") from None
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else name)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    with safe_open(file, "pt") as weights:
        if any("lora_embedding" in key for key in weights.keys()):  # noqa: SIM118  # no mapping
            untie(model)  # the adapter is on the embeddings alone; the head that is tied to them stays as it is
    try:
        return peft.PeftModel.from_pretrained(model, str(adapter)), tokenizer
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{adapter}: does not fit the base {name}: {_line(error)}") from None


def stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer of the model or adapter in `folder`."""
    ends = None
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

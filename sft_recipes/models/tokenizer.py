"""Load the tokenizer, with new tokens, a pad token and the chat template of the data."""

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.data.chat_templates import named
from sft_recipes.errors import ModelError
from sft_recipes.models.library_errors import as_model_error
from sft_recipes.recipe import schema

NEW_PAD = "<|pad|>"


def load_tokenizer(model: schema.Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer; add the recipe's new tokens and a pad token that differs from EOS. Raises ModelError."""
    with as_model_error(f"model.name: {model.name}", "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir.location(model.name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name: {model.name} has no fast tokenizer, which is required. Choose a model with a tokenizer.json."
        )
    tokenizer.add_tokens(named.to_add(model.new_tokens))
    set_pad_token(tokenizer)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token that differs from EOS.

    If they are the same, a collator that masks padding masks every EOS too, and the model never learns to stop.
    Order of preference: its own, a special token with "pad" in its name, the unknown token, a reserved one, a new one.
    """
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in taken:
        return
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    candidates = [
        *(token for token in special if "pad" in token.lower()),
        tokenizer.unk_token,
        *(token for token in special if "reserved" in token.lower()),
    ]
    chosen = next((token for token in candidates if token is not None and token not in taken), NEW_PAD)
    tokenizer.add_special_tokens({"pad_token": chosen})


def tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the size of the tokenizer.json."""
    return len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())

"""Convert errors of torch, transformers, the Hub and safetensors to one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

import torch
from safetensors import SafetensorError

from sft_recipes.errors import ModelError, RunError, reason_of


@contextmanager
def as_model_error(model: str, what: str) -> Iterator[None]:
    """Convert errors of transformers, the Hub and safetensors to a one-line ModelError; RunError if out of memory."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, HTTP errors, SafetensorError and more
        reason = reason_of(error)
        if is_out_of_memory(error):
            raise RunError(
                f"{model}: out of memory while loading its {what}: {reason}. Run `sft-recipe plan` to see what fits."
            ) from error
        if "trust_remote_code" in str(error):
            remedy = (
                "set model.trust_remote_code: true" if model.startswith("model.name") else "pass --trust-remote-code"
            )
            raise ModelError(f"{model} requires custom Python code. Review the code, then {remedy}.") from error
        if isinstance(error, (SafetensorError, JSONDecodeError, UnicodeError, LookupError, TypeError, AttributeError)):
            reason = f"{type(error).__name__}: {reason}. Download the files again."
        if "ignore_mismatched_sizes" in str(error):
            reason = "their shapes do not match its config. Download the files again."
        raise ModelError(f"{model}: its {what} cannot be loaded: {reason}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Return True if device or host memory ran out. CUDA's libraries and torch's CPU allocator say so in text only."""
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)

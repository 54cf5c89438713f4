"""Inspect a local model directory without importing torch."""

import json
import math
import os
import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipes.errors import ModelError
from sft_recipes.run_dir import ADAPTER, MODEL

BUILTIN = Path(__file__).parent / "builtin"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
INDEX = "model.safetensors.index.json"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def unusable(path: str) -> str | None:
    """Return why a path is invalid (too long, unknown home directory, ...), or None."""
    try:
        Path(path).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error).rstrip(".")).lower()
    return None


def path_problem(path: str) -> str | None:
    """Return why a directory cannot be created at a path, or None if it can or already exists."""
    if reason := unusable(path):
        return f"{path}: {reason}"
    folder = Path(path).expanduser()
    file = next((part for part in (folder, *folder.parents) if part.is_file()), None)
    return f"{file} is a file" if file else None


def directory(name: str) -> Path | None:
    """Return the directory of `model.name`, or None if it is a Hub id. Raises ModelError if it is neither."""
    if name.startswith("builtin:"):
        folder = BUILTIN / name.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name: {name}: unknown built-in model. Use builtin:tiny.")
        return folder
    if reason := unusable(name):
        raise ModelError(f"model.name: {name}: {reason}. Use the directory of a model, or a Hub id.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"model.name: {name} is a file. Use the directory of a model, or a Hub id.")
    if not could_be_hub_id(name):
        raise ModelError(f"model.name: {name}: directory not found (working directory: {Path.cwd()}).")
    return None


def could_be_hub_id(name: str) -> bool:
    """Return True if the name is a possible Hub id: NAME or OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def location(name: str) -> str:
    """Return the argument of `from_pretrained`: a directory or a Hub id."""
    return str(directory(name) or name)


def read_ahead(name: str, revision: str | None) -> None:
    """Start reading local weights into the page cache in the background. Errors are left to the loader."""
    with suppress(Exception):
        folder = directory(name)
        if folder is None:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        for file in sorted(folder.glob("*.safetensors")):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)  # Linux only
            finally:
                os.close(descriptor)


def config(folder: Path) -> dict[str, Any]:
    """Read the model's config.json. Raises ModelError if it is missing or invalid."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        merge = "It contains an adapter: merge it first with `sft-recipe merge`."
        remedy = merge if is_adapter(folder) else "Use the directory of a model, or a Hub id."
        raise ModelError(f"model.name: {folder} is not a model directory (config.json is missing). {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: invalid JSON: {error}. Download it again.") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelError(f"{file}: not a model config ('model_type' is missing). Download it again.")
    return content


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def find_adapter(path: Path) -> Path:
    """Return the adapter directory at a path or in a run directory. Raises ModelError."""
    for folder in () if unusable(str(path)) else (path, path / ADAPTER):
        if is_adapter(folder):
            return folder
    raise ModelError(
        f"{path}: no adapter found. Pass a directory with adapter_config.json, or a run that trained an adapter."
    )


def find_model(path: Path) -> Path:
    """Return the model or adapter directory at a path, in a run directory, or of `builtin:tiny`. Raises ModelError."""
    if str(path).startswith("builtin:") and (built_in := directory(str(path))):
        return built_in
    for folder in () if unusable(str(path)) else (path, path / MODEL, path / ADAPTER):
        if (folder / "config.json").is_file() or is_adapter(folder):
            return folder
    raise ModelError(f"{path}: no model found. Pass a model or adapter directory, or a finished run.")


def positions(model_config: dict[str, Any]) -> int | None:
    """Return the context length in tokens, None if the model sets no limit."""
    text = model_config.get("text_config")
    content = text if isinstance(text, dict) else model_config
    numbers = (content.get(name) for name in _POSITIONS)
    return next((number for number in numbers if isinstance(number, int) and number > 0), None)


def parameters(name: str) -> int | None:
    """Count the parameters of a local model from its file headers.

    Returns None if unknown: Hub ids, quantized weights, parts of a larger model. Raises ModelError if there is no model.
    """
    folder = directory(name)
    if folder is None:
        return None
    content = config(folder)
    if "quantization_config" in content or "text_config" in content:
        return None
    whole = folder / "model.safetensors"
    try:
        files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
        return sum(map(_elements, files)) or None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return None  # loading the file reports the error


def _elements(file: Path) -> int:
    """Count the elements of all tensors in a safetensors file: 8 bytes with the header length, then a JSON header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError("truncated")
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")


def end_tokens(name: str) -> list[int]:
    """Return the EOS token ids of a local model's generation_config.json, [] if it has none."""
    folder = directory(name)
    if folder is None:
        return []
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and end >= 0]


def _wrong_index(folder: Path) -> str | None:
    """Return what is wrong with the index of sharded weights, or None."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return None
    try:
        named = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).is_file())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "lists no weight files"
    return f"lists missing files ({', '.join(missing[:3])}{', ...' if missing[3:] else ''})" if missing else None


def reject_hub_kernels(model_config: Any, *, trust_remote_code: bool) -> None:
    """Raise ModelError if a config selects an attention kernel on the Hub, which `kernels` would download and run."""
    from sft_recipes.upstream import attention_of  # imports torch

    for part in (model_config, model_config.get_text_config()):
        kernel = str(attention_of(part) or "")
        if "/" in kernel and not trust_remote_code:
            raise ModelError(
                f"{model_config.name_or_path}: config.json selects attention code from the Hub ({kernel}). Remove that "
                "key, or review the code and set model.trust_remote_code: true (--trust-remote-code)."
            )


def has_tokenizer(folder: Path) -> bool:
    """Return True if a directory has the files of some tokenizer, which transformers may have to convert."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def find_problems(name: str, max_length: int) -> list[str]:
    """Find all problems of a local model directory, one line each; a Hub id is not inspected."""
    try:
        folder = directory(name)
        if folder is None:
            return []
        content = config(folder)
    except ModelError as error:
        return list(error.lines)
    problems = []
    if not has_tokenizer(folder):
        problems.append(
            f"model.name: {folder} has no tokenizer (tokenizer.json). Copy it from the source of the model."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("pytorch_model*.bin"))
        remedy = (
            "Its pytorch_model.bin is a pickle, which can run code, and is not loaded. Convert it with save_pretrained of "
            "transformers."
            if pickled
            else "Add model.safetensors, or shards with model.safetensors.index.json."
        )
        problems.append(f"model.name: {folder} has no safetensors weights. {remedy}")
    elif problem := _wrong_index(folder):
        problems.append(f"model.name: {folder / INDEX} {problem}. Download the files again.")
    limit = positions(content)
    if limit is not None and max_length > limit:
        problems.append(
            f"data.max_length: exceeds the context length of {name}, {limit} (got {max_length}). "
            f"Set data.max_length to {limit} or less."
        )
    return problems

"""What can be said of a model before it is loaded: from its directory, with neither transformers nor torch."""

import json
import math
import os
import re
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipes.errors import ModelError

BUILTIN = Path(__file__).parent.parent / "builtin"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
INDEX = "model.safetensors.index.json"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def unusable(path: str) -> str | None:
    """Why nothing can be at a path: it is too long, somebody's whose home is not known, ...; None where something can."""
    try:
        Path(path).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error).rstrip(".")).lower()
    return None


def path_problem(path: str) -> str | None:
    """Why no directory can be made at a path; None where one can, or is there."""
    if reason := unusable(path):
        return f"{path}: {reason}"
    folder = Path(path).expanduser()
    file = next((each for each in (folder, *folder.parents) if each.is_file()), None)
    return f"{file} is a file" if file else None


def directory(name: str) -> Path | None:
    """The directory that `model.name` means; None where it can only be a hub id. Raises ModelError where it is neither."""
    if name.startswith("builtin:"):
        folder = BUILTIN / name.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.name: {name}: no such built-in model; there is builtin:tiny")
        return folder
    if reason := unusable(name):
        raise ModelError(f"model.name: {name}: {reason}; expected the directory of a model, or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"model.name: {name} is a file; expected the directory of a model, or a hub id")
    if not could_be_hub_id(name):
        raise ModelError(f"model.name: {name}: no such directory (working directory {Path.cwd()})")
    return None


def could_be_hub_id(name: str) -> bool:
    """Whether the hub could have something of that name: NAME or OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def location(name: str) -> str:
    """What `from_pretrained` is to be given: a directory or a hub id."""
    return str(directory(name) or name)


def read_ahead(name: str, revision: str | None) -> None:
    """Have the system read the weights from the disk, if they are on it, while something else is done; errors are left to who
    loads them."""
    with suppress(Exception):
        folder = directory(name)
        if folder is None:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        for file in sorted(folder.glob("*.safetensors")):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)  # Linux; elsewhere nothing is read ahead
            finally:
                os.close(descriptor)


def config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelError where it is missing or broken."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        adapter = "; it holds an adapter: merge it first with `sft-recipe merge`" if is_adapter(folder) else ""
        raise ModelError(f"model.name: {folder} has no config.json, so it is no model directory{adapter}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}; get the file again") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelError(f"{file}: no 'model_type', so it is not the config of a model; get the file again")
    return content


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def find_adapter(path: Path) -> Path:
    """The adapter that a path means: an adapter directory, or a run that trained one. Raises ModelError."""
    for folder in () if unusable(str(path)) else (path, path / "adapter"):
        if is_adapter(folder):
            return folder
    raise ModelError(
        f"{path}: no adapter here; expected a directory with adapter_config.json, or a run that trained one"
    )


def find_model(path: Path) -> Path:
    """The model or adapter that a path means: its directory, a run that exported one, `builtin:tiny`. Raises ModelError."""
    if str(path).startswith("builtin:") and (built_in := directory(str(path))):
        return built_in
    for folder in () if unusable(str(path)) else (path, path / "model", path / "adapter"):
        if (folder / "config.json").is_file() or is_adapter(folder):
            return folder
    raise ModelError(f"{path}: no model here; expected a model or adapter directory, or a run that has finished")


def positions(model_config: dict[str, Any]) -> int | None:
    """The longest sequence the model can take, in tokens; None where it sets no limit."""
    text = model_config.get("text_config")
    content = text if isinstance(text, dict) else model_config
    found = (content.get(name) for name in _POSITIONS)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def parameters(name: str) -> int | None:
    """How many parameters the files of a local model hold, from their headers; None where that cannot be known: on the
    hub, of weights that are quantised, of a part of a larger model. Raises ModelError where no model is there."""
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
        return None  # what is wrong with a file is said when it is loaded


def _elements(file: Path) -> int:
    """Elements of all tensors in a safetensors file: 8 bytes say how long its header is, which is JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError("it has been cut off")
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")


def end_tokens(name: str) -> list[int]:
    """The tokens at which a local model stops, by its generation_config.json; [] where it says none."""
    folder = directory(name)
    if folder is None:
        return []
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int and end >= 0]


def _wrong_index(folder: Path) -> str | None:
    """What is wrong with the index of weights in several files; None where nothing is, or there is none."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return None
    try:
        named = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).is_file())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "does not name the files of the weights"
    return f"names {', '.join(missing[:3])}{', ...' if missing[3:] else ''}, not there" if missing else None


def reject_hub_kernels(model_config: Any, *, trust_remote_code: bool) -> None:
    """Raise ModelError where a config of transformers names an attention kernel on the hub: compiled code, which would be
    fetched and run (by the package `kernels`, where it is installed)."""
    for part in (model_config, model_config.get_text_config()):
        wanted = str(getattr(part, "_attn_implementation", None) or "")
        if "/" in wanted and not trust_remote_code:
            raise ModelError(
                f"{model_config.name_or_path}: its config.json has attention run by code from the hub ({wanted}); take that "
                "key out, or trust the code with model.trust_remote_code: true (--trust-remote-code)"
            )


def find_problems(name: str, max_length: int) -> list[str]:
    """Everything wrong with a local model directory, a line each; [] also for a hub id, which is not looked at."""
    try:
        folder = directory(name)
        if folder is None:
            return []
        content = config(folder)
    except ModelError as error:
        return list(error.lines)
    problems = []
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        problems.append(
            f"model.name: {folder} has no tokenizer (tokenizer.json); copy it there from the model's source"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("pytorch_model*.bin"))
        remedy = (
            "its pytorch_model.bin is a pickle, which can run code, and is not loaded; convert it with "
            "transformers' save_pretrained"
            if pickled
            else "expected model.safetensors, or shards with model.safetensors.index.json"
        )
        problems.append(f"model.name: {folder} has no safetensors weights; {remedy}")
    elif wrong := _wrong_index(folder):
        problems.append(f"model.name: {folder / INDEX} {wrong}; get the files again")
    limit = positions(content)
    if limit is not None and max_length > limit:
        problems.append(
            f"data.max_length: {max_length} is more than the {limit} positions of {name}; set at most {limit}"
        )
    return problems

"""Loading what was exported: adapters on their base, and the tokens at which a model stops."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.errors import ModelError, reason_of
from sft_recipes.export.dequantize import is_rounded
from sft_recipes.export.lora_deltas import names_of_ends, vocabulary
from sft_recipes.export.safetensors_io import INDEX, in_file
from sft_recipes.export.save_model import untie

_GIVE_IT = "give it with --base (of sft-recipe merge)"


@dataclass(frozen=True)
class Origin:
    """An adapter's own settings, and where its base and its tokenizer are."""

    config: peft.PeftConfig
    base: str
    revision: str | None
    tokenizer: str


def origin(adapter: Path, base: str | None = None) -> Origin:
    """What an adapter is of; `base` instead of the base that it names. Raises ModelError."""
    if not (adapter / "adapter_model.safetensors").is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        remedy = (
            "its adapter_model.bin is a pickle, which can run code, and is not read; save it again with PEFT"
            if pickled
            else "get the adapter's files again"
        )
        raise ModelError(f"{adapter}: adapter_model.safetensors is missing; {remedy}")
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{adapter}: its adapter_config.json cannot be read: {reason_of(error)}; get the file again"
        ) from None
    named = base or config.base_model_name_or_path
    if not named or not isinstance(named, str):
        raise ModelError(f"{adapter}: does not say what its base is; {_GIVE_IT}")
    try:
        name = model_dir.location(named)
    except ModelError as error:
        if base:
            raise ModelError(str(error).replace("model.name", "--base", 1)) from None
        reason = str(error).removeprefix(f"model.name: {named}").lstrip(": ")
        raise ModelError(f"{named}: the adapter's base cannot be loaded; {_GIVE_IT}: {reason}") from None
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    return Origin(config, name, None if base else config.revision, str(adapter) if has_tokenizer else name)


def files(of: Origin) -> Path:
    """The directory of the base's files, fetched from the hub where it is there."""
    folder = files_of(of.base, of.revision)
    if not (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        remedy = (
            "its pytorch_model.bin is a pickle, which can run code, and is not read; convert it with transformers' "
            "save_pretrained"
            if pickled
            else "expected model.safetensors, or shards with their index"
        )
        raise ModelError(f"{of.base}: the base has no safetensors weights; {remedy}")
    return folder


def files_of(model: str, revision: str | None) -> Path:
    """The directory of a model's files, which are downloaded if they are on the hub."""
    if Path(model).is_dir():
        return Path(model)
    wanted = ["model*.safetensors", INDEX, "config.json", "generation_config.json"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


@contextmanager
def as_base_error(name: str) -> Iterator[None]:
    """What the libraries say of a base that cannot be loaded, as ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: the adapter's base brings Python code; read it, then say --trust-remote-code"
            ) from None
        raise ModelError(f"{name}: the adapter's base cannot be loaded; {_GIVE_IT}: {reason_of(error)}") from None


def tokenizer_of(of: Origin, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, or of its base. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(of.tokenizer, trust_remote_code=trust_remote_code)
    except Exception as error:  # their types are many
        remedy = "get its files again"
        if "trust_remote_code" in str(error):
            remedy = "it brings Python code; read it, then say --trust-remote-code"
        raise ModelError(f"{of.tokenizer}: its tokenizer cannot be loaded: {reason_of(error)}; {remedy}") from None


def adapted(
    adapter: Path,
    dtype: Any,
    *,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    back_to: Any = None,
    rounded_to: torch.dtype = torch.float32,
    device_map: Any = None,
) -> tuple[peft.PeftModel, PreTrainedTokenizerBase]:
    """An adapter on its base (its own, or `base`) with weights in `dtype`, or quantized, or that and `back_to` another
    type, or rounded to a narrower one first; and its tokenizer.

    Raises ModelError where the base cannot be loaded or does not fit.
    """
    of = origin(adapter, base)
    with as_base_error(of.base):
        there = {"revision": revision or of.revision, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(of.base, **there)
        model_dir.reject_hub_kernels(config, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            of.base,
            config=config,
            **there,
            dtype=dtype,
            use_safetensors=True,
            device_map=device_map or ({"": "cpu"} if quantization else None),
            **({"quantization_config": quantization} if quantization else {}),
        )
    if back_to is not None:
        model = model.dequantize(dtype=back_to).to(back_to)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if is_rounded(model, name, weight.dtype, rounded_to):
                weight.copy_(weight.to(rounded_to))
    for module in model.modules():  # as in training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = tokenizer_of(of, trust_remote_code=trust_remote_code)
    given = in_file(adapter / "adapter_model.safetensors")
    if (rows := vocabulary(given, of.config, model)) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    alone = {f"base_model.model.{name}" for name in names_of_ends(model)}
    grown = given.get(f"base_model.model.{names_of_ends(model)[0]}.base_layer.weight")
    if grown is not None:  # saved beside the adapter, and shared with the head until they are untied
        model.get_input_embeddings().weight.data.copy_(grown.whole())
    together = getattr(of.config, "ensure_weight_tying", False)
    if not together and any(key.rpartition(".lora_")[0] in alone for key in given):
        untie(model)  # the adapter is on one of embeddings and head; the other, which shares its weight, stays as it is
    try:
        whole = peft.PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{adapter}: does not fit the base {of.base}: {reason_of(error)}") from None
    known = peft.get_peft_model_state_dict(whole, save_embedding_layers=True)
    if missing := sorted(key for key in known.keys() - given.keys() if "lora_" in key):
        raise ModelError(f"{adapter}: lacks {', '.join(missing[:3])}, which its adapter_config.json asks for")
    if unknown := sorted(given.keys() - known.keys()):
        raise ModelError(f"{adapter}: does not fit the base {of.base}: it has no place for {', '.join(unknown[:3])}")
    return whole, tokenizer


def stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer of the model or adapter in `folder`."""
    ends = None
    if (folder / "generation_config.json").is_file():
        try:
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{folder}: its generation_config.json cannot be read: {reason_of(error)}; get it again"
            ) from None
    if ends is None:
        ends = tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])

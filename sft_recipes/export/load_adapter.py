"""Load adapters on their base model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.errors import ModelError, reason_of
from sft_recipes.export.dequantize import is_rounded
from sft_recipes.export.safetensors_io import INDEX, StoredTensor, read_file
from sft_recipes.export.save_model import untie

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in it
# Values of init_lora_weights that leave the base as it is; others (pissa, olora, loftq, ...) subtract something from it.
LEAVES_BASE = (True, False, "gaussian", "eva", "orthogonal")
_USE_BASE = "Pass the base with --base (of sft-recipe merge)."
_CODE = "Review the code, then pass --trust-remote-code."


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, and where its base and its tokenizer are."""

    folder: Path
    config: peft.PeftConfig
    base: str  # directory or Hub id
    revision: str | None
    tokenizer: str
    trust_remote_code: bool

    @property
    def _options(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def tensors(self) -> dict[str, StoredTensor]:
        return read_file(self.folder / WEIGHTS)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the adapter's tokenizer, or that of its base. Raises ModelError."""
        try:
            return AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # of many types
            remedy = _CODE if "trust_remote_code" in str(error) else "Copy or download its files again."
            raise ModelError(
                f"{self.tokenizer}: its tokenizer cannot be loaded: {reason_of(error)}. {remedy}"
            ) from None

    def base_config(self) -> Any:
        """Load the config of the base. Raises ModelError."""
        with self.base_errors():
            config = AutoConfig.from_pretrained(self.base, **self._options)
        model_dir.reject_hub_kernels(config, trust_remote_code=self.trust_remote_code)
        return config

    def base_files(self) -> Path:
        """Return the directory of the base's files, downloaded if it is on the Hub. Raises ModelError."""
        with self.base_errors():
            folder = model_files(self.base, self.revision)
        if not (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            remedy = (
                "Its pytorch_model.bin is a pickle, which can run code, and is not loaded. Convert it with save_pretrained "
                "of transformers."
                if pickled
                else "Add model.safetensors, or shards with model.safetensors.index.json."
            )
            raise ModelError(f"{self.base}: the adapter's base has no safetensors weights. {remedy}")
        return folder

    @contextmanager
    def base_errors(self) -> Iterator[None]:
        """Raise errors of the libraries as ModelError that names the base."""
        try:
            yield
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if "trust_remote_code" in str(error):
                raise ModelError(f"{self.base}: the adapter's base requires custom Python code. {_CODE}") from None
            raise ModelError(
                f"{self.base}: the adapter's base cannot be loaded: {reason_of(error)}. {_USE_BASE}"
            ) from None


def find(
    folder: Path, base: str | None = None, revision: str | None = None, *, trust_remote_code: bool = False
) -> Adapter:
    """Read the config of an adapter. `base` and its `revision` replace the base that it names. Raises ModelError."""
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = (
            "Its adapter_model.bin is a pickle, which can run code, and is not loaded. Save it again with PEFT."
            if pickled
            else "Copy or download the adapter's files again."
        )
        raise ModelError(f"{folder}: {WEIGHTS} is missing. {remedy}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder}: invalid adapter_config.json: {reason_of(error)}. Copy or download it again."
        ) from None
    named = base or config.base_model_name_or_path
    if not named or not isinstance(named, str):
        raise ModelError(f"{folder}: adapter_config.json does not name a base. {_USE_BASE}")
    try:
        location = model_dir.location(named)
    except ModelError as error:
        if base:
            raise ModelError(str(error).replace("model.name", "--base", 1)) from None
        reason = str(error).removeprefix(f"model.name: {named}").lstrip(": ")
        raise ModelError(f"{named}: the adapter's base cannot be loaded: {reason} {_USE_BASE}") from None
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else location
    return Adapter(folder, config, location, revision if base else config.revision, tokenizer, trust_remote_code)


def model_files(model: str, revision: str | None) -> Path:
    """Return the directory of a model's config and weights, downloaded if it is on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    wanted = ["model*.safetensors", INDEX, "config.json", "generation_config.json"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))


def load(
    adapter: Adapter,
    dtype: torch.dtype | str,
    *,
    quantization: BitsAndBytesConfig | None = None,
    dequantized_to: torch.dtype | None = None,
    rounded_to: torch.dtype = torch.float32,
    device_map: Any = None,
) -> peft.PeftModel:
    """Load an adapter on its base. Raises ModelError if the base cannot be loaded or does not fit.

    Weights of the base have `dtype` ("auto": that of the files), are quantized as `quantization` says, then dequantized to
    `dequantized_to`, or rounded to the narrower dtype `rounded_to` (float32: not rounded). Default device: the CPU.
    """
    config = adapter.base_config()
    with adapter.base_errors():
        model = AutoModelForCausalLM.from_pretrained(
            adapter.base,
            config=config,
            revision=adapter.revision,
            trust_remote_code=adapter.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            device_map=device_map or ({"": "cpu"} if quantization else None),
            **({"quantization_config": quantization} if quantization else {}),
        )
    if dequantized_to is not None:
        model = model.dequantize(dtype=dequantized_to).to(dequantized_to)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if is_rounded(model, name, weight.dtype, rounded_to):
                weight.copy_(weight.to(rounded_to))
    for module in model.modules():  # as in training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    given = adapter.tensors()
    _fit_embeddings(model, adapter.config, given)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter.folder))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{adapter.folder}: does not fit the base {adapter.base}: {reason_of(error)}") from None
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=True)
    _check_keys(adapter, given, expected)
    if unknown := sorted(given.keys() - expected.keys()):
        raise ModelError(
            f"{adapter.folder}: does not fit the base {adapter.base}: unknown tensors {', '.join(unknown[:3])}"
        )
    return adapted


def _fit_embeddings(model: PreTrainedModel, config: peft.PeftConfig, given: Mapping[str, StoredTensor]) -> None:
    """Resize the embeddings to those of the adapter, and untie the head if the adapter is on only one of the two."""
    ends = [f"{PREFIX}{name}" for name in end_names(model)]
    inside = ("", ".base_layer", ".token_adapter.base_layer")
    heights = [given[key].shape[0] for end in ends for part in inside if (key := f"{end}{part}.weight") in given]
    tokens = getattr(config, "trainable_token_indices", None) or []
    ids = tokens if isinstance(tokens, list) else [token for some in tokens.values() for token in some]
    vocab_size = max([*heights, *(token + 1 for token in ids)], default=0)
    if vocab_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    if grown := given.get(f"{ends[0]}.base_layer.weight"):  # shared with the head until that is untied
        model.get_input_embeddings().weight.data.copy_(grown.whole())
    together = getattr(config, "ensure_weight_tying", False)
    if not together and any(key.rpartition(".lora_")[0] in ends for key in given):
        untie(model)


def end_names(model: PreTrainedModel) -> tuple[str, str]:
    """Return the module names of embeddings and LM head; "" if there is none."""
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    return names[model.get_input_embeddings()], names[head] if head is not None else ""


def check_complete(adapter: Adapter, model: PreTrainedModel) -> None:
    """Raise ModelError if LoRA tensors that adapter_config.json requires are missing, or of a different rank.

    `model` is the base on the meta device; PEFT changes it.
    """
    if adapter.config.peft_type != peft.PeftType.LORA or adapter.config.init_lora_weights not in LEAVES_BASE:
        return
    try:
        adapted = peft.get_peft_model(model, adapter.config)
        expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ModelError(f"{adapter.folder}: does not fit the base: {reason_of(error)}") from None
    given = adapter.tensors()
    _check_keys(adapter, given, expected)
    for key in sorted(expected.keys() & given.keys()):
        rank, required = given[key].shape[0], expected[key].shape[0]
        if key.endswith(".lora_A.weight") and rank != required:
            raise ModelError(
                f"{adapter.folder}: adapter_config.json requires rank {required} for {key} (got {rank}). Copy or download "
                "its files again."
            )


def _check_keys(adapter: Adapter, given: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if missing := sorted(key for key in expected.keys() - given.keys() if "lora_" in key):
        raise ModelError(
            f"{adapter.folder}: {len(missing)} tensors that adapter_config.json requires are missing, such as {missing[0]}. "
            "Copy or download its files again."
        )


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the EOS token ids of a model or adapter directory: of its generation config, else of the tokenizer."""
    ends = None
    if (folder / "generation_config.json").is_file():
        try:
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{folder}: invalid generation_config.json: {reason_of(error)}. Copy or download it again."
            ) from None
    if ends is None:
        ends = tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])

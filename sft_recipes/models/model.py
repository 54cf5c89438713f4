"""Load the model of a recipe, quantized and with adapters as it says."""

from contextlib import suppress
from typing import Any

import peft
import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.errors import ModelError
from sft_recipes.models import strategies
from sft_recipes.models.adapters import with_adapters
from sft_recipes.models.attention import select_here
from sft_recipes.models.library_errors import as_model_error
from sft_recipes.recipe.schema import Recipe


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Load the model's config. Raises ModelError if it is unavailable or does not match the recipe."""
    wanted, name = recipe.model, model_dir.location(recipe.model.name)
    with as_model_error(f"model.name: {wanted.name}", "config"):
        config = AutoConfig.from_pretrained(name, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
    model_dir.reject_hub_kernels(config, trust_remote_code=wanted.trust_remote_code)
    limit = model_dir.positions(config.to_dict())
    if limit is not None and recipe.data.max_length > limit:
        raise ModelError(
            f"data.max_length: exceeds the context length of {wanted.name}, {limit} (got {recipe.data.max_length}). "
            f"Set data.max_length to {limit} or less."
        )
    return config


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | peft.PeftModel:
    """Load the model in `model.dtype`, quantized and with adapters as the recipe says.

    Raises ModelError for damaged or missing files, and for layers of the recipe that the model does not have.
    """
    wanted, config = recipe.model, load_config(recipe)
    transformers.set_seed(recipe.train.seed)  # new embeddings and adapters are initialized randomly
    with as_model_error(f"model.name: {wanted.name}", "weights"), strategies.loading(recipe):
        empty = _empty_for_broadcast(recipe, config)
        model = _from_pretrained(recipe, config) if empty is None else empty
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks 4-bit weights for inference at the first evaluation: in
        # bfloat16 regardless of the compute dtype, and only for widths that are a multiple of 32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    embeddings = model.get_input_embeddings().weight
    known = getattr(embeddings, "ds_shape", embeddings.shape)[0]  # ZeRO-3 replaces sharded weights by empty tensors
    if len(tokenizer) > known:  # never shrunk: many models have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=empty is None)
    if recipe.lora is None:
        return model
    new = {tokenizer.convert_tokens_to_ids(token) for token in wanted.new_tokens} | set(range(known, len(tokenizer)))
    if new and recipe.launch.strategy in ("fsdp2", "zero3"):
        raise ModelError(
            f"launch.strategy: {recipe.launch.strategy} cannot train new-token embeddings with LoRA (got {len(new)} new "
            "tokens, including a pad token if the tokenizer has none). Set launch.strategy to zero2 or ddp."
        )
    return with_adapters(model, recipe.lora, recipe.model, sorted(new))


def _from_pretrained(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the weights. Raises ModelError if some are missing."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        model_dir.location(recipe.model.name),
        output_loading_info=True,
        config=config,
        revision=recipe.model.revision,
        use_safetensors=True,
        **_options(recipe, config),
        **{**_placement(recipe), **_quantization(recipe, config)},
    )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"model.name: {recipe.model.name}: its files lack {len(missing)} of the weights in its config, which would be "
            f"random ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Download the files again."
        )
    return model


def _empty_for_broadcast(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel | None:
    """Build the model without weights if rank 0 broadcasts them to this rank; else return None."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        return None
    if recipe.launch.strategy != "fsdp2" or recipe.model.quantization:
        return None
    model = strategies.allocate_lazily(lambda: AutoModelForCausalLM.from_config(config, **_options(recipe, config)))
    if not strategies.broadcasts_weights(recipe, model):
        return None
    with suppress(OSError):  # not every model has one
        name = model_dir.location(recipe.model.name)
        model.generation_config = GenerationConfig.from_pretrained(name, revision=recipe.model.revision)
    return model


def _options(recipe: Recipe, config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "trust_remote_code": recipe.model.trust_remote_code,
        "dtype": getattr(torch, recipe.model.dtype),
        "attn_implementation": attention(recipe, config),
    }


def _placement(recipe: Recipe) -> dict[str, Any]:
    """Load unsharded models directly onto this rank's GPU: through host memory, each rank of the node would need a copy there.

    With a single device transformers sets no `hf_device_map`, which Trainer would interpret as model parallelism.
    """
    if recipe.launch.strategy in ("ddp", "zero2") and torch.cuda.is_available():
        return {"device_map": {"": torch.cuda.current_device()}}
    return {}


def attention(recipe: Recipe, config: PreTrainedConfig) -> str | None:
    """Return the attention implementation; None leaves the choice to transformers (sdpa if the model supports it)."""
    if recipe.model.attention == "flex_attention" and not torch.cuda.is_available():
        raise ModelError("model.attention: flex_attention has no backward pass on CPU. Set sdpa or auto.")
    return select_here(recipe, config)[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count all and trainable parameters, over all ranks; a 4-bit weight holds two parameters per byte."""
    total = trained = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trained += count if parameter.requires_grad else 0
    return total, trained


def _quantization(recipe: Recipe, config: PreTrainedConfig) -> dict[str, Any]:
    kind = recipe.model.quantization
    if kind is None:
        return {}
    assert recipe.lora is not None
    compute = torch.bfloat16 if recipe.train.mixed_precision == "bf16" else getattr(torch, recipe.model.dtype)
    fsdp_dtype = getattr(torch, recipe.compute_dtype)  # as in strategies.configure_fsdp
    keep = ["lm_head", *recipe.lora.modules_to_save]  # modules trained in full cannot be quantized
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=keep,
            # FSDP shards floating-point tensors only, so bitsandbytes' uint8 would be whole on each rank. It casts tensors of
            # a dtype other than its compute dtype, which would corrupt the packed values.
            bnb_4bit_quant_storage=fsdp_dtype if recipe.launch.strategy == "fsdp2" else torch.uint8,
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    if device != "cpu" and recipe.launch.strategy == "fsdp2" and not _fits_on_gpu(recipe, config):
        device = "cpu"  # slower; FSDP moves each layer to the GPU when sharding it
    return {"quantization_config": settings, "device_map": {"": device}}


def _fits_on_gpu(recipe: Recipe, config: PreTrainedConfig) -> bool:
    """Return True if the whole model fits on this rank's GPU in 4 bits, with embeddings and LM head not quantized."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **_options(recipe, config))
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    unquantized = sum(weight.numel() for weight in ends)
    quantized = sum(weight.numel() for weight in model.parameters()) - unquantized
    needed = unquantized * model.dtype.itemsize + 0.55 * quantized  # with scales, and the layer being loaded
    return bool(needed < 0.95 * torch.cuda.mem_get_info()[0])

"""Load the tokenizer and the model of a recipe, quantized and with adapters as it says."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from json import JSONDecodeError
from pickle import UnpicklingError
from typing import Any

import peft
import torch
import transformers
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import model_dir
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.templates import BOS
from sft_recipes.errors import ModelError, RunError
from sft_recipes.models import strategies
from sft_recipes.models.attention import select_here
from sft_recipes.models.lora_addition import add_in_place
from sft_recipes.recipe import schema
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import compiled_graphs

NEW_PAD = "<|pad|>"


# --- Tokenizer -------------------------------------------------------------------------------------------------------


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
    tokenizer.add_tokens(model.new_tokens)
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


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: Prepared) -> None:
    """Set the tokenizer's chat template to that of the data. Raises ModelError if it renders prompts differently."""
    if data.chat_template is None or data.prompt is None:
        return
    # SentencePiece-like tokenizers prepend a space to a text, but not after a BOS token inside it.
    with_blank = data.chat_template.replace(BOS, BOS.replace("bos_token", "bos_token + ' '"), 1)
    for template in (data.chat_template, with_blank):
        tokenizer.chat_template = template
        rendered = tokenizer.apply_chat_template(data.prompt.messages, add_generation_prompt=True, return_dict=False)
        if rendered == data.prompt.ids:
            return
    raise ModelError(
        "data.template: the chat template does not reproduce the prompts of the training data (expected "
        f"{tokenizer.decode(data.prompt.ids)[:80]!r}, got {tokenizer.decode(rendered)[:80]!r})."
    )


def tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the size of the tokenizer.json."""
    return len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())


# --- Model -----------------------------------------------------------------------------------------------------------


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


def with_adapters(
    model: PreTrainedModel, lora: schema.Lora, wanted: schema.Model, new_rows: list[int]
) -> peft.PeftModel:
    """Add LoRA adapters. `new_rows` are the new-token embeddings, which are trained and saved with the adapters."""
    _check_layers(model, lora)
    inputs, head = (_name_of(model, end) for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    rows_of = {inputs} if tied else {inputs, head}
    if tied and not {inputs, head}.isdisjoint(lora.modules_to_save):
        rows_of = set()  # trained in full, and kept tied
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        revision=wanted.revision,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=list(lora.modules_to_save) or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        trainable_token_indices=dict.fromkeys(rows_of - set(lora.modules_to_save), new_rows) or None
        if new_rows
        else None,
        # Training only one of two tied layers would untie them.
        ensure_weight_tying=tied and not {inputs, head}.isdisjoint(lora.modules_to_save),
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except (TypeError, ValueError, re.error) as error:
        raise ModelError(f"lora.target_modules: {' '.join(str(error).split())[:300]}") from error
    for module in adapted.modules():
        # TRL's fused head reads the head's bias, which PEFT 0.21's wrapper does not expose.
        if isinstance(module, TrainableTokensWrapper) and not hasattr(module, "bias"):
            module.bias = None
    return adapted


def _check_layers(model: PreTrainedModel, lora: schema.Lora) -> None:
    """Check that every name matches a layer: PEFT ignores names that match none as long as one does."""
    names = [name for name, _ in model.named_modules() if name]
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    for key, wanted in (("target_modules", targets), ("modules_to_save", lora.modules_to_save)):
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ModelError(
                    f"lora.{key}: no layer is named '{target}'. Layers of this model: {_linear_names(model)}."
                )
    head = _name_of(model, model.get_output_embeddings())
    if head and head in targets:
        raise ModelError(
            f"lora.target_modules: the memory-efficient loss does not support an adapter on the LM head (got '{head}'). "
            f"Train the head in full with lora.modules_to_save: [{head}]."
        )


def _linear_names(model: PreTrainedModel) -> str:
    last = {name.rpartition(".")[2]: None for name, module in model.named_modules() if hasattr(module, "weight")}
    return ", ".join(last)


def _name_of(model: PreTrainedModel, wanted: torch.nn.Module | None) -> str:
    """Return the last part of a module's name, as PEFT matches it; "" if it is not part of the model."""
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is wanted), "")


def settle_types(model: torch.nn.Module, recipe: schema.Recipe) -> None:
    """Set the dtypes in which adapters and other trainable weights are stored and computed."""
    assert recipe.lora is not None
    autocast = recipe.train.mixed_precision != "no"
    keep_trainable_in_float32(model, autocast=autocast)
    # PEFT casts each adapter's input to float32, which autocast undoes: without it the product is bitwise identical. With
    # dropout or DoRA it is not.
    if autocast and not recipe.lora.dropout and not recipe.lora.use_dora:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
    add_in_place(model, recipe)


def keep_trainable_in_float32(model: torch.nn.Module, *, autocast: bool) -> None:
    """Store trainable weights on top of frozen ones in float32, so that rounding loses no update.

    PEFT does so for adapters but not for layers trained in full; TRL casts a quantized model's adapters to bfloat16.
    Without autocast a layer that is trained in full needs the dtype of its input.
    """
    input_dtype = model.config.dtype
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if autocast or "lora_" in name else input_dtype)


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the model's decoder layers in order. Raises ValueError if they are not found."""
    number = model.config.get_text_config().num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == number]
    if not lists:
        raise ValueError(f"its {number} layers are not in one ModuleList")
    return list(next((part for part in lists if isinstance(part[0], GradientCheckpointingLayer)), lists[0]))


def compile_layers(model: Any, warn: Callable[[str], None], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the model's layers for training steps, for any number of tokens and documents.

    All layers share the graphs: one for each kind of layer (with a window, with experts), one more of each if only some
    layers are checkpointed, and one for the first layer if nothing below it is trained. Checkpointing is part of a graph: the
    compiled backward pass recomputes. The loss is not compiled: its number of trained tokens differs per micro-batch, and each
    number would be compiled. Nor are evaluation, generation and the preflight's probes: measured, evaluation alone takes a
    graph per kind of layer, two under checkpointing, and torch falls back to eager after 8 graphs.

    `warn` is called once if nothing of a layer can be compiled. Raises: ValueError if the model's layers are not found.
    """
    layers = layers_of(model)
    for layer in layers:
        # The forward and not the layer, so that the layer's FSDP2 and DeepSpeed hooks stay outside the graph.
        layer.forward = _in_training(layer, torch.compile(layer.forward, dynamic=True, backend=backend))
    before = compiled_graphs()

    def check_compiled(layer: torch.nn.Module, *_: Any) -> None:
        if _trains(layer):
            hook.remove()
            if compiled_graphs() == before:
                warn(
                    f"train.compile: torch cannot compile the layers of a {model.config.model_type} model. Set it to false."
                )

    hook = layers[-1].register_forward_hook(check_compiled)


def _in_training(layer: torch.nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return the layer's forward, compiled for training steps only."""
    eager = layer.forward

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if _trains(layer) else eager(*args, **kwargs)

    return forward


def _trains(layer: torch.nn.Module) -> bool:
    return layer.training and torch.is_grad_enabled()


@contextmanager
def as_model_error(model: str, what: str) -> Iterator[None]:
    """Convert errors of transformers, the Hub and safetensors to a one-line ModelError; RunError if out of memory."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, HTTP errors, SafetensorError and more
        reason = " ".join(str(error).split())
        if is_out_of_memory(error):
            reason = reason[:300].rstrip(".")
            raise RunError(
                f"{model}: out of memory while loading its {what}: {reason}. Run `sft-recipe plan` to see what fits."
            ) from error
        if "trust_remote_code" in reason:
            remedy = (
                "set model.trust_remote_code: true" if model.startswith("model.name") else "pass --trust-remote-code"
            )
            raise ModelError(f"{model} requires custom Python code. Review the code, then {remedy}.") from error
        if isinstance(error, (SafetensorError, JSONDecodeError, UnicodeError, LookupError, TypeError, AttributeError)):
            reason = f"{type(error).__name__}: {reason[:200].rstrip('.')}. Download the files again."
        if "ignore_mismatched_sizes" in reason:
            reason = "their shapes do not match its config. Download the files again."
        raise ModelError(f"{model}: its {what} cannot be loaded: {reason[:300]}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Return True if device or host memory ran out. CUDA's libraries and torch's CPU allocator say so in text only."""
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


def reason_of(error: Exception) -> str:
    """Format a library's error as one line."""
    if isinstance(error, UnpicklingError):  # torch's own message advises to load the file anyway
        return (
            "a file of the checkpoint is damaged or contains more than tensors and numbers. It was not loaded, because it "
            "could run code. Remove that checkpoint to continue from the one before it"
        )
    return " ".join(str(error).split())[:400] or type(error).__name__

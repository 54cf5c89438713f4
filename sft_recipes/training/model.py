"""Tokenizer and model, as the recipe wants them trained."""

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

# Not documented: how many graphs have been compiled. Without it a layer that runs eagerly all the same goes unnoticed.
from torch._dynamo.utils import counters
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

from sft_recipes.data.prepare import Prepared
from sft_recipes.data.templates import BOS
from sft_recipes.errors import ModelError, RunError
from sft_recipes.recipe import model_dir, schema
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training import strategies
from sft_recipes.training.attention import select_here
from sft_recipes.training.lora_addition import add_in_place

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NEW_PAD = "<|pad|>"


# --- Tokenizer -------------------------------------------------------------------------------------------------------


def load_tokenizer(model: schema.Model) -> PreTrainedTokenizerBase:
    """The tokenizer, with the recipe's new tokens and a pad token that is not the end token.

    Raises ModelError where it cannot be loaded or is not a fast tokenizer.
    """
    with as_model_error(f"model.name: {model.name}", "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir.location(model.name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name: {model.name}: its tokenizer has no fast version, which the token accounting needs"
        )
    tokenizer.add_tokens(model.new_tokens)
    set_pad_token(tokenizer)
    return tokenizer


def set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is not its end token.

    Where both are one, a collator that masks padding masks the end of every answer, and the model never learns to stop.
    In order of choice: its own, a special token made for padding, its unknown token, one held in reserve, a new one.
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
    """Let the tokenizer's chat template give the prompts that are trained on. Raises ModelError where it does not."""
    if data.chat_template is None or data.prompt is None:
        return
    # SentencePiece-like tokenizers put a blank before a text, but not behind a BOS that stands in it.
    with_blank = data.chat_template.replace(BOS, BOS.replace("bos_token", "bos_token + ' '"), 1)
    for template in (data.chat_template, with_blank):
        tokenizer.chat_template = template
        rendered = tokenizer.apply_chat_template(data.prompt.messages, add_generation_prompt=True, return_dict=False)
        if rendered == data.prompt.ids:
            return
    raise ModelError(
        "data.template: its chat template does not give the prompt that is trained on: "
        f"{tokenizer.decode(rendered)[:80]!r} instead of {tokenizer.decode(data.prompt.ids)[:80]!r}"
    )


def tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Size of its tokenizer.json."""
    return len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())


# --- Model -----------------------------------------------------------------------------------------------------------


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """The model's config, of a directory or from the hub. Raises ModelError where it cannot be had, or does not go with the
    recipe."""
    wanted, name = recipe.model, model_dir.location(recipe.model.name)
    with as_model_error(f"model.name: {wanted.name}", "config"):
        config = AutoConfig.from_pretrained(name, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
    model_dir.reject_hub_kernels(config, trust_remote_code=wanted.trust_remote_code)
    limit = model_dir.positions(config.to_dict())
    if limit is not None and recipe.data.max_length > limit:
        raise ModelError(
            f"data.max_length: {recipe.data.max_length} is more than the {limit} positions of {wanted.name}; "
            f"set at most {limit}"
        )
    return config


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | peft.PeftModel:
    """The model with its weights in `model.dtype`, quantised and with adapters as the recipe says.

    Raises ModelError for what the model's files or the recipe's choice of layers make impossible.
    """
    wanted, config = recipe.model, load_config(recipe)
    transformers.set_seed(recipe.train.seed)  # new embeddings and adapters are drawn at random
    with as_model_error(f"model.name: {wanted.name}", "weights"), strategies.loading(recipe):
        handed = _empty_for_broadcast(recipe, config)
        model = _read(recipe, config) if handed is None else handed
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks 4-bit weights for inference at the first evaluation: in
        # bfloat16 whatever the compute type, and only for widths that are a multiple of 32. Training goes without.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    embeddings = model.get_input_embeddings().weight
    known = getattr(embeddings, "ds_shape", embeddings.shape)[0]  # ZeRO-3 leaves an empty tensor where it has a share
    if len(tokenizer) > known:  # never made smaller: many models have rows to spare
        model.resize_token_embeddings(len(tokenizer), mean_resizing=handed is None)
    if recipe.lora is None:
        return model
    new = {tokenizer.convert_tokens_to_ids(token) for token in wanted.new_tokens} | set(range(known, len(tokenizer)))
    if new and recipe.launch.strategy in ("fsdp2", "zero3"):
        raise ModelError(
            f"launch.strategy: {recipe.launch.strategy} cannot train the rows of new tokens beside adapters (PEFT), and there "
            f"are {len(new)}, a pad token among them where the tokenizer has none; set zero2 or ddp"
        )
    return with_adapters(model, recipe.lora, recipe.model, sorted(new))


def _read(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a directory or of the hub."""
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
            f"model.name: {recipe.model.name}: its files lack {len(missing)} of the weights that its config asks for, which "
            f"would be random ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); get the files again"
        )
    return model


def _empty_for_broadcast(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The model without its weights, where another rank is to hand them to this one; else None."""
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
        "dtype": DTYPES[recipe.model.dtype],
        "attn_implementation": attention(recipe, config),
    }


def _placement(recipe: Recipe) -> dict[str, Any]:
    """Load straight onto this rank's GPU, if the whole model is to be there: read into host memory first, a model takes that
    once for each rank of the machine. With one device transformers sets no `hf_device_map`, which Trainer would take for
    model parallelism."""
    if recipe.launch.strategy in ("ddp", "zero2") and torch.cuda.is_available():
        return {"device_map": {"": torch.cuda.current_device()}}
    return {}


def attention(recipe: Recipe, config: PreTrainedConfig) -> str | None:
    """The attention implementation; None is transformers' own choice, sdpa where the model has it."""
    if recipe.model.attention == "flex_attention" and not torch.cuda.is_available():
        raise ModelError("model.attention: flex_attention has no backward pass on CPU; set sdpa, or auto")
    return select_here(recipe, config)[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters and those that are trained, on all ranks together; a 4-bit weight holds two parameters a byte."""
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
    compute = torch.bfloat16 if recipe.train.mixed_precision == "bf16" else DTYPES[recipe.model.dtype]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    computed = half.get(recipe.train.mixed_precision, DTYPES[recipe.model.dtype])  # as sharded.finish has FSDP do it
    keep = ["lm_head", *recipe.lora.modules_to_save]  # what is trained in full cannot be quantised
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=keep,
            # FSDP shares floating-point numbers out; bitsandbytes' own bytes would be whole on each rank. In another type than
            # it computes in it would round them, as if they were weights.
            bnb_4bit_quant_storage=computed if recipe.launch.strategy == "fsdp2" else torch.uint8,
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    if device != "cpu" and recipe.launch.strategy == "fsdp2" and not _has_room_for_all(recipe, config):
        device = "cpu"  # slower; FSDP takes each layer from there as it is shared out
    return {"quantization_config": settings, "device_map": {"": device}}


def _has_room_for_all(recipe: Recipe, config: PreTrainedConfig) -> bool:
    """Whether this rank's GPU takes the whole model in 4 bits, with the embeddings and the head as they are."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **_options(recipe, config))
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    whole = sum(weight.numel() for weight in ends)
    quantized = sum(weight.numel() for weight in model.parameters()) - whole
    needed = whole * model.dtype.itemsize + 0.55 * quantized  # with scales, and the layer that is being read
    return bool(needed < 0.95 * torch.cuda.mem_get_info()[0])


def with_adapters(
    model: PreTrainedModel, lora: schema.Lora, wanted: schema.Model, new_rows: list[int]
) -> peft.PeftModel:
    """`new_rows` of the embeddings and the head are not in the base; they are trained and saved with the adapters."""
    _check_layers(model, lora)
    inputs, head = (_name_of(model, end) for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    rows_of = {inputs} if tied else {inputs, head}
    if tied and not {inputs, head}.isdisjoint(lora.modules_to_save):
        rows_of = set()  # trained in full, and one with the other
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
        # Training one of two tied layers would untie them, and the merged model would have two.
        ensure_weight_tying=tied and not {inputs, head}.isdisjoint(lora.modules_to_save),
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except (TypeError, ValueError, re.error) as error:
        raise ModelError(f"lora.target_modules: {' '.join(str(error).split())[:300]}") from error
    for module in adapted.modules():
        # TRL's fused head reads the head's bias, which this wrapper (PEFT 0.21) does not pass on.
        if isinstance(module, TrainableTokensWrapper) and not hasattr(module, "bias"):
            module.bias = None
    return adapted


def _check_layers(model: PreTrainedModel, lora: schema.Lora) -> None:
    """Every name has to match a layer: PEFT passes over those that do not as long as one does."""
    names = [name for name, _ in model.named_modules() if name]
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    for key, wanted in (("target_modules", targets), ("modules_to_save", lora.modules_to_save)):
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ModelError(f"lora.{key}: no layer is called '{target}'; there are {_linear_names(model)}")
    head = _name_of(model, model.get_output_embeddings())
    if head and head in targets:
        raise ModelError(
            f"lora.target_modules: an adapter on the head ('{head}') does not go with the memory-saving loss; "
            f"train it in full with lora.modules_to_save: [{head}]"
        )


def _linear_names(model: PreTrainedModel) -> str:
    last = {name.rpartition(".")[2]: None for name, module in model.named_modules() if hasattr(module, "weight")}
    return ", ".join(last)


def _name_of(model: PreTrainedModel, wanted: torch.nn.Module | None) -> str:
    """Last part of a module's name, by which PEFT finds it; "" where it is none of the model's."""
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is wanted), "")


def settle_types(model: torch.nn.Module, recipe: schema.Recipe) -> None:
    """The types in which what LoRA trains is held and computed, of a model that is otherwise ready to train."""
    assert recipe.lora is not None
    autocast = recipe.train.mixed_precision != "no"
    keep_trainable_in_float32(model, autocast=autocast)
    # PEFT makes a float32 copy of each adapter's input, which autocast takes back: without it the product is the same to the
    # bit. What dropout and DoRA compute on that copy is not.
    if autocast and not recipe.lora.dropout and not recipe.lora.use_dora:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
    add_in_place(model, recipe)


def keep_trainable_in_float32(model: torch.nn.Module, *, autocast: bool) -> None:
    """Hold what is trained beside frozen weights in float32, where no update is lost to rounding.

    PEFT does so for adapters but not for layers trained in full; TRL takes a quantised model's adapters to bfloat16.
    Without autocast a layer that is trained in full has to have the type of what it is given.
    """
    given = model.config.dtype
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if autocast or "lora_" in name else given)


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of the model's stack, first to last. Raises ValueError where they are not to be found."""
    number = model.config.get_text_config().num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == number]
    if not lists:
        raise ValueError(f"no list of its {number} layers is found in it")
    return list(next((part for part in lists if isinstance(part[0], GradientCheckpointingLayer)), lists[0]))


def compile_layers(model: Any, warn: Callable[[str], None], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the model's layers for training steps, for any number of tokens and documents.

    All layers share the graphs: one for each kind of layer (with a window, with experts), one more of each if only some
    layers are checkpointed, and one for the first layer if nothing below it is trained. Checkpointing is part of a graph: the
    compiled backward pass recomputes. The loss is not compiled: it takes another number of trained tokens from each
    micro-batch, and would be compiled for each. Nor are evaluation, answers and the preflight's probes. Counted, evaluation
    alone would take a graph per kind of layer, two under checkpointing; and torch runs layers eagerly after 8 graphs.

    `warn` is called once if nothing of a layer can be compiled. Raises: ValueError if the model's layers are not found.
    """
    layers = layers_of(model)
    for layer in layers:
        # Its forward and not the layer, so that the hooks of FSDP2 and DeepSpeed on the layer stay outside of the graph.
        layer.forward = _in_training(layer, torch.compile(layer.forward, dynamic=True, backend=backend))
    before = counters["stats"]["unique_graphs"]

    def look(layer: torch.nn.Module, *_: Any) -> None:
        if _trains(layer):
            hook.remove()
            if counters["stats"]["unique_graphs"] == before:
                warn(
                    f"train.compile: torch cannot compile the layers of a {model.config.model_type} model. Set it to false."
                )

    hook = layers[-1].register_forward_hook(look)


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
    """Errors of transformers, the hub and safetensors in one line: ModelError, RunError where memory is lacking."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # their types are many: OSError, ValueError, KeyError, HTTP errors, SafetensorError
        reason = " ".join(str(error).split())
        if is_out_of_memory(error):
            raise RunError(
                f"{model}: out of memory while its {what} were loaded: {reason[:300]}; `sft-recipe plan` says what would fit"
            ) from error
        if "trust_remote_code" in reason:
            remedy = (
                "set model.trust_remote_code: true" if model.startswith("model.name") else "say --trust-remote-code"
            )
            reason = f"it is Python code that comes with the model; read it, then {remedy}"
        if isinstance(error, (SafetensorError, JSONDecodeError, UnicodeError, LookupError, TypeError, AttributeError)):
            reason = f"{type(error).__name__}: {reason[:200]}; get the files again"
        if "ignore_mismatched_sizes" in reason:
            reason = "they have other shapes than its config says; get the files again"
        raise ModelError(f"{model}: its {what} cannot be loaded: {reason[:300]}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Of a device, which torch has a type for, and CUDA's libraries have words; or of the host, for which there are words."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def reason_of(error: Exception) -> str:
    """What a library's error says, in one line."""
    if isinstance(error, UnpicklingError):  # torch's own words advise to read it all the same
        return (
            "a file of the checkpoint holds more than tensors and numbers, or is damaged; as it could run code, it was not "
            "read; remove that checkpoint to continue from the one before it"
        )
    return " ".join(str(error).split())[:400] or type(error).__name__

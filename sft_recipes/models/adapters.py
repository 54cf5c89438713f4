"""Add LoRA adapters to a model, and set the dtypes in which they are stored and computed."""

import re

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

from sft_recipes.errors import ModelError, reason_of
from sft_recipes.models.lora_addition import add_in_place
from sft_recipes.recipe import schema


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
        target_parameters=list(lora.target_parameters) or None,
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
        raise ModelError(f"lora.target_modules: {reason_of(error)}") from error
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
    parameters = [name for name, _ in model.named_parameters()]
    for target in lora.target_parameters:
        if not any(name == target or name.endswith(f".{target}") for name in parameters):
            raise ModelError(
                f"lora.target_parameters: no parameter is named '{target}'. Parameters of this model: "
                f"{', '.join(dict.fromkeys(re.sub(r'^.*[.][0-9]+[.]', '', name) for name in parameters))}."
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

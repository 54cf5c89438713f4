"""Compile a model's layers for training steps (torch.compile)."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sft_recipes.upstream import compiled_graphs


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

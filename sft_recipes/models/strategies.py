"""Configure FSDP2 and DeepSpeed, and gather weights for export."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.utils import disable_fsdp_ram_efficient_loading, gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sft_recipes.errors import ModelError
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import float32_modules


def arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the SFTConfig arguments of the recipe's strategy."""
    strategy = recipe.launch.strategy
    if strategy == "fsdp2":
        # Sharded checkpoints need no rank to hold the whole model, and a different number of ranks can load them.
        # Activation checkpointing is transformers': FSDP's wraps each layer, and PEFT then finds no adapters to save.
        offload = recipe.launch.cpu_offload and torch.accelerator.is_available()  # on CPUs all is in host memory anyway
        return {
            "fsdp": True,
            "fsdp_config": {"version": 2, "cpu_offload": offload, "state_dict_type": "SHARDED_STATE_DICT"},
        }
    return {"deepspeed": _deepspeed(recipe)} if strategy in ("zero2", "zero3") else {}


def accelerator(recipe: Recipe) -> dict[str, Any]:
    """Return SFTConfig's accelerator_config for the strategy.

    FSDP2 reduces gradients after each micro-batch. With a single reduction per step each rank holds the gradients of the
    whole model, and adapters under autocast failed.
    """
    if recipe.launch.strategy != "fsdp2":
        return {}
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def _deepspeed(recipe: Recipe) -> dict[str, Any]:
    train, stage = recipe.train, int(recipe.launch.strategy[-1])
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # otherwise only shards are saved, without a warning
    if recipe.launch.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    assert train.micro_batch_size != "auto"
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "train_batch_size": recipe.sequences_per_step,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.mixed_precision == "bf16"},
        "fp16": {"enabled": train.mixed_precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the recipe names the optimizer
    }


def configure_fsdp(settings: Any, recipe: Recipe, model: Any) -> None:
    """Set what SFTConfig has no field for: broadcasting of weights, and gradient reduction in float32."""
    if recipe.launch.strategy != "fsdp2":
        return
    broadcast = broadcasts_weights(recipe, model)
    layout = [broadcast, *((name, weight.shape, weight.dtype) for name, weight in model.state_dict().items())]
    if any(other != layout for other in gather_object([layout])):  # otherwise the ranks would deadlock
        raise ModelError(
            f"launch.strategy: fsdp2 cannot broadcast the weights of {recipe.model.name}, because the loaded weights differ "
            "from those that its config creates. Set launch.strategy to ddp or zero3."
        )
    settings.fsdp_plugin_args["cpu_ram_efficient_loading"] = broadcast
    if recipe.train.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        half = getattr(torch, recipe.compute_dtype)
        # No output_dtype: outputs include the loss per token, which accelerate's default policy would round.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        settings.fsdp_plugin_args["mixed_precision_policy"] = policy


def broadcasts_weights(recipe: Recipe, model: Any) -> bool:
    """Return True if only rank 0 loads the weights and FSDP2 broadcasts them while sharding.

    False for quantized weights and persistent buffers (accelerate cannot broadcast them), layers wrapped by PEFT (it would
    tie them again) and weights kept in float32 (it would assume a different dtype).
    """
    if recipe.launch.strategy != "fsdp2" or getattr(model.config, "quantization_config", None):
        return False
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return not (recipe.trains_layers_in_full or buffers or float32_modules(model, torch.float16))


def allocate_lazily(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Create a model for weights that are broadcast later. Until written, its weights take no host memory."""
    with init_empty_weights(include_buffers=False):
        model = make()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            # Not on `meta`, where all weights have the same address: accelerate identifies a weight by its address.
            empty = torch.empty_like(weight, device="cpu")
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=weight.requires_grad))
    model.tie_weights()
    return model


@contextmanager
def loading(recipe: Recipe) -> Iterator[None]:
    """Context in which models are loaded for the strategy: with ZeRO-3, each layer is sharded when it is created."""
    if recipe.launch.strategy == "zero3":
        from transformers.integrations import HfDeepSpeedConfig

        config = HfDeepSpeedConfig(_deepspeed(recipe))  # transformers uses it while it is referenced
        yield
        del config
    else:
        yield


@dataclass
class Gathered:
    """Trained model for export. A sharded model holds no full weights itself.

    With LoRA, `adapter` has the trained weights, on the CPU of rank 0. Otherwise `shapes` has the saved weights as meta
    tensors by name, and `weights` yields them with data, all-gathered during iteration.
    """

    model: Any
    adapter: dict[str, torch.Tensor] | None = None
    shapes: dict[str, torch.Tensor] | None = None
    weights: Iterable[tuple[str, torch.Tensor]] = ()


class Trained(Protocol):
    """What the export needs of a trainer."""

    accelerator: Any
    model: Any
    deepspeed: Any  # DeepSpeed's engine

    def is_world_process_zero(self) -> bool: ...


def gather_for_export(trainer: Trained, recipe: Recipe) -> Gathered:
    """All-gather the trained weights of a sharded model (collective call).

    Every rank has to iterate over all of `Gathered.weights`, which have `export.dtype`. They are gathered one at a time, so
    that no rank holds two of them.
    """
    disable_fsdp_ram_efficient_loading()  # models loaded from here on are not sharded
    # Without accelerate's autocast wrapper, because the exported model is compared without autocast.
    model, strategy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), recipe.launch.strategy
    if strategy not in ("fsdp2", "zero3"):
        return Gathered(model)
    if strategy == "fsdp2":
        # fully_shard changed its class to a subclass, whose name and module would be written to config.json.
        model.__class__ = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    else:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        trainer.deepspeed.optimizer.checkpoint_event_prologue()  # shard weights that a forward pass left gathered
        unset_hf_deepspeed_config()  # models loaded from here on are not sharded
    shards = model.state_dict(keep_vars=True)  # this rank's shard of each weight
    if recipe.trains_adapters:
        shards = {name: weight for name, weight in shards.items() if weight.requires_grad}
        trained = ((name, weight.cpu()) for name, weight in _gather_all(shards, None))
        keep = trainer.is_world_process_zero()
        return Gathered(model, {name: weight for name, weight in trained if keep})
    dtype = getattr(torch, recipe.export.dtype)
    return Gathered(model, None, _shapes(shards, dtype), _gather_all(shards, dtype))


def _shapes(shards: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(
            getattr(weight, "ds_shape", weight.shape),
            dtype=dtype if weight.dtype.is_floating_point else weight.dtype,
            device="meta",
        )
        for name, weight in shards.items()
    }


def _gather_all(shards: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """All-gather weights one at a time, with floating-point weights cast to `dtype` (None: unchanged)."""
    for name, weight in shards.items():
        # Not assigned to a variable, so that a tensor is freed before the next one is gathered.
        yield name, _gather(weight, dtype if dtype is not None and weight.dtype.is_floating_point else weight.dtype)


def _gather(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    shard = weight.detach()
    if isinstance(shard, DTensor):
        # Cast before gathering. With cpu_offload, shards are in host memory but gathered through the GPU.
        return shard.to(device=shard.device_mesh.device_type, dtype=dtype).full_tensor()
    if not hasattr(weight, "ds_id"):
        return shard.to(dtype)
    import deepspeed

    # DeepSpeed trains float32 copies of 16-bit weights: gather those for float32.
    if dtype == torch.float32 and weight.dtype != dtype and weight.requires_grad:
        return deepspeed.utils.safe_get_full_fp32_param(weight).to(dtype)
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().to(dtype, copy=True)  # DeepSpeed frees the gathered tensor

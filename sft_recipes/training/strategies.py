"""FSDP2 and DeepSpeed ZeRO: their settings, and a whole model out of what they have spread over the ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import disable_fsdp_ram_efficient_loading, gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sft_recipes.errors import ModelError
from sft_recipes.recipe.schema import Recipe

SHARDED = ("fsdp2", "zero2", "zero3")


def arguments(recipe: Recipe) -> dict[str, Any]:
    """The part of SFTConfig that makes the recipe's strategy."""
    strategy = recipe.launch.strategy
    if strategy == "fsdp2":
        # Shards in checkpoints: no rank holds it all, and another number of ranks can read them. Checkpointing of activations
        # is transformers' own: with FSDP's, which wraps each layer, PEFT finds no adapters to save.
        offload = recipe.launch.cpu_offload and torch.accelerator.is_available()  # else all is in host memory as it is
        return {
            "fsdp": True,
            "fsdp_config": {"version": 2, "cpu_offload": offload, "state_dict_type": "SHARDED_STATE_DICT"},
        }
    return {"deepspeed": _deepspeed(recipe)} if strategy in ("zero2", "zero3") else {}


def accelerator(recipe: Recipe) -> dict[str, Any]:
    """The part of SFTConfig's accelerator_config that the strategy takes. FSDP2 sums gradients over ranks after each
    micro-batch: left to the last, each rank keeps those of the whole model, and adapters under autocast have failed."""
    if recipe.launch.strategy != "fsdp2":
        return {}
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def _deepspeed(recipe: Recipe) -> dict[str, Any]:
    train, stage = recipe.train, int(recipe.launch.strategy[-1])
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # else shards are all that is saved, without a word
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
    """What SFTConfig has no field for: how the model was loaded; sums of gradients over ranks are made in float32."""
    if recipe.launch.strategy != "fsdp2":
        return
    handed = broadcasts_weights(recipe, model)
    layout = [handed, *((name, weight.shape, weight.dtype) for name, weight in model.state_dict().items())]
    if any(other != layout for other in gather_object([layout])):  # else they would wait for each other in vain
        raise ModelError(
            f"launch.strategy: fsdp2 cannot hand on the weights of {recipe.model.name}, as loaded they are others than its "
            "config makes; set ddp, or zero3"
        )
    settings.fsdp_plugin_args["cpu_ram_efficient_loading"] = handed
    if recipe.train.mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        half = torch.bfloat16 if recipe.train.mixed_precision == "bf16" else torch.float16
        # Outputs stay as they are: among them is each token's loss, which accelerate's own policy would round.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        settings.fsdp_plugin_args["mixed_precision_policy"] = policy


def broadcasts_weights(recipe: Recipe, model: Any) -> bool:
    """Whether the first rank alone reads the weights, and hands them to the others when they are shared out: with FSDP2, but
    for what accelerate cannot hand on (quantised weights, buffers that are saved), would tie again (layers that PEFT has
    wrapped), or would take for another type than it is read in."""
    if recipe.launch.strategy != "fsdp2" or getattr(model.config, "quantization_config", None):
        return False
    wrapped = recipe.lora is not None and bool(recipe.lora.modules_to_save or recipe.model.new_tokens)
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    return not (wrapped or buffers or kept)


def allocate_lazily(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model that is to be handed its weights: until they are written to, they take no memory of the host."""
    with init_empty_weights(include_buffers=False):
        model = make()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            # Not on `meta`, where all have one address: accelerate knows a weight by that.
            empty = torch.empty_like(weight, device="cpu")
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=weight.requires_grad))
    model.tie_weights()
    return model


@contextmanager
def loading(recipe: Recipe) -> Iterator[None]:
    """Within, models are loaded as the strategy wants them: with ZeRO-3 each layer in shares as it is made."""
    if recipe.launch.strategy == "zero3":
        from transformers.integrations import HfDeepSpeedConfig

        config = HfDeepSpeedConfig(_deepspeed(recipe))  # transformers looks at it as long as it lives
        yield
        del config
    else:
        yield


@dataclass
class Gathered:
    """The trained model as the export needs it. A sharded model holds no whole weights of its own.

    With adapters, `adapter` has its trained weights, on the CPU of rank 0. Without, `shapes` has what is saved as meta tensors
    by name, and `weights` the same with data, gathered while they are iterated over.
    """

    model: Any
    adapter: dict[str, torch.Tensor] | None = None
    shapes: dict[str, torch.Tensor] | None = None
    weights: Iterable[tuple[str, torch.Tensor]] = ()


def gather_for_export(trainer: Any, recipe: Recipe) -> Gathered:
    """Collect the trained weights that the ranks hold in shards.

    Every rank has to call this, and to iterate over all of `Gathered.weights`, which come in `export.dtype`: each is
    gathered alone, so that no rank ever holds two of them.
    """
    disable_fsdp_ram_efficient_loading()  # what is loaded from here on is for one process
    # Without accelerate's autocast around it, with which a model of float32 weights would be compared to itself without.
    model, strategy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), recipe.launch.strategy
    if strategy not in ("fsdp2", "zero3"):
        return Gathered(model)
    if strategy == "fsdp2":
        # fully_shard has made it an instance of a subclass, whose name and module would be written to config.json.
        model.__class__ = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    else:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        trainer.deepspeed.optimizer.checkpoint_event_prologue()  # every weight is sharded, also those a pass left whole
        unset_hf_deepspeed_config()  # what is loaded from here on is not to be shared out
    held = model.state_dict(keep_vars=True)  # of each weight this rank's shard
    if recipe.lora is not None:
        held = {name: weight for name, weight in held.items() if weight.requires_grad}
        trained = ((name, weight.cpu()) for name, weight in _whole(held, None))
        keep = trainer.is_world_process_zero()
        return Gathered(model, {name: weight for name, weight in trained if keep})
    dtype = getattr(torch, recipe.export.dtype)
    return Gathered(model, None, _shapes(held, dtype), _whole(held, dtype))


def _shapes(held: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(
            getattr(weight, "ds_shape", weight.shape),
            dtype=dtype if weight.dtype.is_floating_point else weight.dtype,
            device="meta",
        )
        for name, weight in held.items()
    }


def _whole(held: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """All-gather weights one after the other, with floating-point numbers cast to `dtype` (None: as they are)."""
    for name, weight in held.items():
        # Without a name of its own here, a tensor is freed before the next one is gathered.
        yield name, _gather(weight, dtype if dtype is not None and weight.dtype.is_floating_point else weight.dtype)


def _gather(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight_here = weight.detach()
    if isinstance(weight_here, DTensor):
        # Cast before it is sent. With cpu_offload shards are in host memory, and sent from the GPU all the same.
        return weight_here.to(device=weight_here.device_mesh.device_type, dtype=dtype).full_tensor()
    if not hasattr(weight, "ds_id"):
        return weight_here.to(dtype)
    import deepspeed

    # DeepSpeed trains float32 copies of 16-bit weights: float32 is gathered from those.
    if dtype == torch.float32 and weight.dtype != dtype and weight.requires_grad:
        return deepspeed.utils.safe_get_full_fp32_param(weight).to(dtype)
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().to(dtype, copy=True)  # DeepSpeed frees its own

"""Choose fused GPU kernels for RMSNorm, RoPE and SwiGLU, and apply Liger's to a model.

Liger's loss is not used: TRL's fused head (on a CPU, `cpu_loss.py`) avoids logits too, and counts tokens as the recipe says.
transformers' own integration (`use_kernels`) downloads code from the Hub when the model is built, so it is not used.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import unwrap_peft_model

from sft_recipes.errors import ModelError
from sft_recipes.recipe.library_names import installed, liger_model_types
from sft_recipes.recipe.schema import Recipe

# Liger kernels in use; a model's apply function ignores names that it does not have.
_LIGER = {
    "rms_norm": True,
    "rope": True,
    "swiglu": True,
    "geglu": True,
    "layer_norm": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}
_TOKENS = 64  # length of the sequence in compare_layer


@dataclass(frozen=True)
class Kernels:
    """The kernels of a run: name (liger, none), the reason for none, fused operations, replaced functions and their module."""

    name: str = "none"
    why: str = ""
    fused: tuple[str, ...] = ()
    module: Any = None
    functions: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace functions of the model's module, such as apply_rotary_pos_emb, which layers look up at each call."""
        before = {name: getattr(self.module, name) for name in self.functions}
        for name, fused in self.functions.items():
            setattr(self.module, name, fused)
        try:
            yield
        finally:
            for name, eager in before.items():
                setattr(self.module, name, eager)

    def __str__(self) -> str:
        if self.name == "liger":
            return f"Liger ({', '.join(self.fused)})" if self.fused else "Liger"
        return f"none ({self.why})" if self.why else "none"


def select_kernels(recipe: Recipe, config: PreTrainedConfig, device: str) -> Kernels:
    """Select the kernels of a run on `device`, cuda or cpu. Raises ModelError if the recipe requires an unavailable liger."""
    wanted, model_type = recipe.train.kernels, config.model_type
    if wanted == "none":
        return Kernels()
    if device == "cpu":
        if wanted == "liger":
            raise ModelError("train.kernels: liger needs an NVIDIA GPU (got a CPU). Set auto.")
        return Kernels()
    if recipe.launch.strategy == "zero3":  # shards each weight as it is created, so no layer can be compared
        if wanted == "liger":
            raise ModelError(
                "train.kernels: liger cannot be checked under launch.strategy: zero3. Set auto, or use fsdp2."
            )
        return Kernels(why="cannot be checked under zero3")
    # On a node with a GPU, torch includes Triton; elsewhere `plan` predicts for the packages installed here.
    if wanted == "auto" and not (installed("liger_kernel") and installed("triton")):
        return Kernels(why="liger-kernel is not installed")
    if installed("liger_kernel") and model_type not in liger_model_types():
        if wanted == "liger":
            raise ModelError(f"train.kernels: Liger has no kernels for models of type {model_type}. Set auto.")
        return Kernels(why=f"Liger has no kernels for models of type {model_type}")
    return Kernels("liger")


def apply_kernels(model: torch.nn.Module, recipe: Recipe) -> Kernels:
    """Apply the recipe's kernels to a model if one layer computes the same with them on this GPU.

    Returns the kernels in use. Raises ModelError if train.kernels is liger and the results differ.
    """
    kernels = select_kernels(recipe, model.config, "cuda" if torch.cuda.is_available() else "cpu")
    if kernels.name == "none":
        return kernels
    try:
        problem = compare_layer(recipe, model.config, "cuda")
    except Exception as error:  # any type, if Liger does not match the version of transformers or Triton
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if problem is not None:
        if recipe.train.kernels == "liger":
            raise ModelError(
                f"train.kernels: Liger's kernels are incorrect for this model on this GPU: {problem}. Set none."
            )
        return Kernels(why=f"Liger's kernels are incorrect here: {problem}")
    return apply_liger(model)


def apply_liger(model: torch.nn.Module) -> Kernels:
    """Replace the forward of norms and MLPs of a model, with or without adapters, by Liger's.

    Liger also replaces classes and functions in the model's module, for all models of the process. They are restored:
    Kernels.active() replaces the functions while this model trains.
    """
    module = sys.modules[type(unwrap_peft_model(model)).__module__]
    before = dict(vars(module))
    try:
        apply_liger_kernel(model, _LIGER)
        replaced = {name: now for name, now in vars(module).items() if before.get(name) is not now}
    finally:
        for name, eager in before.items():
            setattr(module, name, eager)
    functions = {name: fused for name, fused in replaced.items() if name in before and not isinstance(fused, type)}
    changed = {
        repr(part).partition("(")[0].lower() for part in model.modules() if "forward" in vars(part)
    } | functions.keys()
    fragments = {"RMSNorm": "rmsnorm", "RoPE": "rotary", "SwiGLU": "swiglu", "GeGLU": "geglu"}
    fused = tuple(name for name, fragment in fragments.items() if any(fragment in other for other in changed))
    return Kernels("liger", fused=fused, module=module, functions=functions)


def compare_layer(recipe: Recipe, config: PreTrainedConfig, device: str) -> str | None:
    """Compare Liger's output and gradients of one layer with those of the model's own code, on random input.

    Both run in the run's precision and are compared with float32: Liger's error may be up to twice that of the model's own
    code. Returns what differs, or None.
    """
    autocast = recipe.train.autocast_dtype
    half, dtype = autocast and getattr(torch, autocast), getattr(torch, recipe.model.dtype)
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            one_layer(config), attn_implementation="eager", trust_remote_code=recipe.model.trust_remote_code
        )
        for weight in model.parameters():
            weight.requires_grad_(weight.dim() == 1)  # gradients of norms; torch computes those of matrices
            if weight.dim() == 1:
                weight.data.add_(torch.randn_like(weight), alpha=0.1)  # ones and zeros would hide a wrong offset
            else:
                weight.data.normal_(std=weight.shape[-1] ** -0.5)  # initial ones leave attention no effect
        hidden = torch.randn(1, _TOKENS, config.get_text_config().hidden_size, dtype=dtype)
    model.to(dtype).float()  # the same rounded weights, so that only computation is compared
    exact = _run_layer(model, hidden.float(), None)
    model.to(dtype)
    eager = _run_layer(model, hidden, half)
    with apply_liger(model).active():
        fused = _run_layer(model, hidden, half)
    del model
    if device == "cuda":  # leave no trace in the run's peak memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for name, reference in exact.items():
        own, ours = ((outputs[name] - reference).norm() / reference.norm() for outputs in (eager, fused))
        if not ours <= 2 * own + 1e-4:
            return f"{name} differs by {ours:.1e} from float32 (the model's own code: {own:.1e})"
    return None


def one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the same model with one layer and a small vocabulary."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(text, key, None):
            setattr(text, key, getattr(text, key)[:1])
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 8, None
    return small


def _run_layer(model: Any, hidden: torch.Tensor, half: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return output and gradients, in float32, of a layer and the last norm."""
    hidden = hidden.clone().requires_grad_()
    model.zero_grad()
    autocast = torch.autocast(hidden.device.type, half) if half else nullcontext()
    with autocast:
        out = getattr(model, model.base_model_prefix)(inputs_embeds=hidden * 1, use_cache=False).last_hidden_state
    out.float().square().sum().backward()
    gradients = {
        f"gradient of {name}": weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    outputs = {"output": out, "gradient of the input": hidden.grad} | gradients
    return {name: tensor.detach().float() for name, tensor in outputs.items()}

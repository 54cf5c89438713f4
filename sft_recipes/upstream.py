"""What depends on a library's version, or on a name that is not part of its public API. No other module uses such names.

`tests/test_upstream.py` tests each, and says what to do if a new version of the library has changed it.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# torch's modes for computing without memory, and for observing each operation, have no public name.
__all__ = ["FakeTensorMode", "TorchDispatchMode"]
CAST = torch.ops.aten._to_copy.default
ITEM = torch.ops.aten._local_scalar_dense.default  # tensor.item()

# transformers before 5.23 has only the older name.
CHECKPOINTING = (
    "activation_checkpointing" if Version(version("transformers")) >= Version("5.23") else "gradient_checkpointing"
)

# torch.nn.functional.grouped_mm calls it and cannot be intercepted itself. torch has fake tensors of it for bfloat16 only, so
# memory prediction replaces it: without it, mixtures of experts in float32 cannot be predicted.
GROUPED_MM = torch._grouped_mm


# --- Models ----------------------------------------------------------------------------------------------------------


def attention_of(config: Any) -> str | None:
    """Return the name of a config's attention implementation, which transformers sets by `set_attn_implementation`."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def supports(architecture: Any, feature: str, default: bool = False) -> bool:
    """Return whether a model class declares sdpa, flash_attn or attention_backend, as transformers' guide tells it to."""
    return bool(getattr(architecture, f"_supports_{feature}", default))


def float32_modules(model: Any, dtype: torch.dtype) -> list[str]:
    """Return the parts of names whose weights `from_pretrained` keeps in float32 if it loads a model in `dtype`."""
    kept = [*(model._keep_in_fp32_modules_strict or ())]
    return [*kept, *(model._keep_in_fp32_modules or ())] if dtype == torch.float16 else kept


def unsaved_weights(model: Any) -> set[str]:
    """Return the weights that `save_pretrained` leaves out."""
    return set(model._keys_to_ignore_on_save or ())


def unsaved_buffers(module: torch.nn.Module) -> set[str]:
    """Return a module's own buffers that no file holds; `state_dict` would copy quantized weights to find them."""
    return set(module._non_persistent_buffers_set)


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made, the only sign that it fell back to eager."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


# --- Training --------------------------------------------------------------------------------------------------------


class SaveHook:
    """Mixin that calls `save_checkpoint` when transformers' Trainer would save a checkpoint; callbacks come after that."""

    save_checkpoint: Any

    def _save_checkpoint(self, *_: Any) -> None:
        self.save_checkpoint()


def save_training_state(trainer: Any, folder: Path) -> None:
    """Save model, optimizer, schedule, loss scale and random states. transformers' method for all does not save atomically."""
    trainer.save_model(str(folder), _internal_call=True)
    trainer._save_optimizer_and_scheduler(str(folder))
    trainer._save_scaler(str(folder))
    trainer._save_rng_state(str(folder))


@dataclass(frozen=True)
class Averages:
    """Running averages since the last log, which transformers and TRL do not save in checkpoints.

    Attributes:
        loss: Sum over `steps`.
        values: TRL's averages of "train" and "eval", as one number per micro-batch.
        tokens: Tokens of the run.
    """

    loss: torch.Tensor | float
    steps: int
    values: dict[str, dict[str, list[float]]]
    tokens: int


def averages(trainer: Any) -> Averages:
    """Return a copy of an SFTTrainer's running averages."""
    return Averages(
        trainer._tr_loss.clone(),
        trainer.state.global_step - trainer._globalstep_last_logged,
        {mode: {name: [*values] for name, values in each.items()} for mode, each in trainer._metrics.items()},
        trainer._total_train_tokens,
    )


def set_averages(trainer: Any, saved: Averages) -> None:
    """Set an SFTTrainer's running averages. It has to be in training."""
    trainer._tr_loss.fill_(saved.loss)
    trainer._globalstep_last_logged = trainer.state.global_step - saved.steps
    for mode, values in saved.values.items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(values)
    trainer._total_train_tokens = saved.tokens


def drop_average(trainer: Any, name: str) -> None:
    """Keep one of TRL's averages out of the next log."""
    trainer._metrics["train" if trainer.model.training else "eval"].pop(name, None)


# DeepSpeed's ZeRO-2 links parameters to optimizer states only once; a trial step has to let it do so again.
DEEPSPEED_LINKED = "_hp_optimizer_states_linked"


def reset_accelerate() -> None:
    """Forget the processes of a run in accelerate, which transformers' TrainingArguments do the same way."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def keep_trackio_offline() -> None:
    """Keep trackio from looking up the user name on the Hub, which it does for local runs too if there is a token."""
    import trackio.run

    setattr(trackio.run.Run, "_get_username", lambda _: None)  # noqa: B010


def trackio_is_set_up(callback: Any, space_id: str | None) -> None:
    """Tell transformers' TrackioCallback that `setup` is done, which a subclass with a `setup` of its own has to."""
    callback._space_id, callback._initialized = space_id, True

"""Trace the memory of a training step on fake tensors, which have shapes but no memory.

The model's own code, PEFT's, TRL's loss and the optimizer run as in training under FakeTensorMode, and a StorageTracker counts
their storages. Workspaces inside kernels are not counted; `fake_kernels` replaces operations that differ on a GPU.
"""

import copy
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl.trainer import utils as trl_utils

from sft_recipes.errors import ModelError, reason_of
from sft_recipes.memory import fake_kernels, optimizer_states
from sft_recipes.memory.prediction import Footprint, extrapolate
from sft_recipes.memory.storage_tracker import StorageTracker
from sft_recipes.models.adapters import settle_types, with_adapters
from sft_recipes.models.attention import Capability
from sft_recipes.models.compiled_layers import layers_of
from sft_recipes.models.kernels import select_kernels
from sft_recipes.models.model import DTYPES, load_config
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import CHECKPOINTING, FakeTensorMode

MOST_TOKENS = 2**22  # per micro-batch: the time of a trace grows with them
# Tokens of each of the two documents in the isolation check. Evaluation mode switches checkpointing off, so all activations
# are kept: as many for 2 x 16 tokens as checkpointing keeps for 1,000 (about 70 and 2 hidden-sized values per token and
# layer). Logits are built as well: 20 MB in float32 for a vocabulary of 150,000, about four times that with their gradient. A
# training step needs more, for gradients, optimizer states and a whole layer's activations.
ISOLATION_TOKENS = 16
_KINDS: dict[str, list[Any]] = {}  # kinds of layers, by config
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def predict(
    recipe: Recipe,
    config: PreTrainedConfig,
    device: str,
    capability: Capability | None = None,
    *,
    whole: bool = False,
) -> Footprint:
    """Predict the memory of one process that trains the whole model on `device`, cuda or cpu.

    `capability` is the GPU's, None if unknown. Repeated layers are traced in part and extrapolated, unless `whole`. Raises
    ModelError for a model that cannot be traced without values.
    """
    tokens = recipe.data.max_length * int(recipe.train.micro_batch_size)
    if tokens > MOST_TOKENS:
        raise ModelError(
            f"train.micro_batch_size: memory can be predicted for at most {MOST_TOKENS:,} tokens per micro-batch (got "
            f"{tokens:,}). Reduce train.micro_batch_size or data.max_length."
        )
    logger = logging.getLogger(FakeTensorMode.__module__)  # logs tracebacks of errors reported below
    was_disabled, logger.disabled = logger.disabled, True
    try:
        layers = config.get_text_config().num_hidden_layers
        repeats = None if whole else _repeats(config, recipe)
        if repeats is None:
            return _trace(recipe, config, device, capability)
        first, period = repeats
        least = first + (layers - first) % period
        few, more = (
            _trace(recipe, _with_layers(config, least + n * period), device, capability, period) for n in (2, 4)
        )
        return extrapolate(few, more, layers)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # any type, from the model's code
        raise ModelError(
            f"model.name: {recipe.model.name}: the memory of a model of type {config.model_type} cannot be predicted: "
            f"{reason_of(error)}. Set train.micro_batch_size to a number; the run measures memory before its first step."
        ) from error
    finally:
        logger.disabled = was_disabled


def config_of(recipe: Recipe) -> PreTrainedConfig:
    """Load the model's config. Raises ModelError for a model whose memory cannot be predicted."""
    config = load_config(recipe)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"model.name: {recipe.model.name}: its weights are already quantized, which memory prediction does not support. "
            "Set model.name to the original model, and quantize it with model.quantization."
        )
    return config


def _repeats(config: PreTrainedConfig, recipe: Recipe) -> tuple[int, int] | None:
    """Return the index from which kinds of layers repeat, and their period; None if too few layers repeat."""
    kinds = _kinds(config, recipe)
    for period in range(1, len(kinds) // 5 + 1):
        first = len(kinds) - period
        while first and kinds[first - 1] == kinds[first - 1 + period]:
            first -= 1
        together = math.lcm(period, max(recipe.train.recomputed, 1))
        if len(kinds) - first > 5 * together:
            return first, together
    return None


def _kinds(config: PreTrainedConfig, recipe: Recipe) -> list[Any]:
    """Return each layer's kind: type of attention, and names and shapes of parameters."""
    text, key = config.get_text_config(), config.to_json_string(use_diff=False)
    if isinstance(getattr(type(text), "layer_types", None), property):  # such a model cannot be built with fewer layers
        return []
    if key not in _KINDS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
            layers = layers_of(model)
            attention = getattr(text, "layer_types", None) or [None] * len(layers)
            shapes = [[(name, part.shape) for name, part in layer.named_parameters()] for layer in layers]
            _KINDS[key] = list(zip(attention, shapes, strict=True))
    return _KINDS[key]


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(text, key, None):
            setattr(text, key, getattr(text, key)[:layers])
    text.num_hidden_layers = layers
    return smaller


def _trace(
    recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None, period: int = 1
) -> Footprint:
    # The answer to a model that checks whether attention needs no mask. Packed documents and padded rows need one.
    rows_are_full = recipe.data.cross_document_attention or recipe.train.micro_batch_size == 1
    causal = rows_are_full and not recipe.padding_free
    tracker = StorageTracker(block=512 if device == "cuda" else 1, truth=causal)
    with torch.device("meta"):
        model = _model(recipe, config, device, capability)
    # `tracker` has to be entered last, to receive tensors before FakeTensorMode replaces its results.
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        return _Step(recipe, model, tracker, device, period).run()


def _model(recipe: Recipe, config: PreTrainedConfig, device: str, capability: Capability | None) -> Any:
    """Build the model as it is trained, with parameters on the meta device."""
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=DTYPES[recipe.model.dtype],
        attn_implementation=fake_kernels.attention(recipe, config, device, capability),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if recipe.model.quantization:
        assert recipe.lora is not None
        keep = ["lm_head", *recipe.lora.modules_to_save]
        compute = _AUTOCAST.get(recipe.train.mixed_precision, DTYPES[recipe.model.dtype])
        fake_kernels.quantize(model, recipe.model.quantization, keep, compute, device)
    known = model.get_input_embeddings().weight.shape[0]
    if recipe.model.new_tokens:
        model.resize_token_embeddings(known + len(recipe.model.new_tokens), mean_resizing=False)
    if recipe.lora is not None:
        new_rows = list(range(known, known + len(recipe.model.new_tokens)))
        model = with_adapters(model, recipe.lora, recipe.model, new_rows)
        settle_types(model, recipe)
    return model


@dataclass
class _Step:
    """One process's optimizer step, as in transformers' Trainer and TRL's SFTTrainer."""

    recipe: Recipe
    model: Any
    tracker: StorageTracker
    device: str
    period: int  # number of layers after which kinds of layers repeat
    held: list[torch.Tensor] = field(default_factory=list)  # optimizer states, kept for the whole run

    def run(self) -> Footprint:
        base: PreTrainedModel = self.model.get_base_model() if self.recipe.trains_adapters else self.model
        self._replace_tensors()
        trl_utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        train = self.recipe.train
        if train.recomputed:
            enable = getattr(base, f"{CHECKPOINTING}_enable")
            enable({"use_reentrant": False}, every_n_layers=train.recomputed)
        self.model.train()
        layers = layers_of(base)
        self._mark_phases(base, layers)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: self.tracker.assign(parameter.grad, "gradients")
            )
        step = self._optimizer(trained)
        half, loss_type = train.mixed_precision != "no", self.recipe.trl.get("loss_type", "nll")
        fused = select_kernels(self.recipe, base.config, self.device).name == "liger"
        with (
            fake_kernels.gpu_kernels(self.device, self.tracker, half=half, loss_type=loss_type),
            fake_kernels.liger(base) if fused else nullcontext(),
        ):
            if train.preflight and self.recipe.padding_free:
                self._isolation_check()
            # The first step creates the optimizer's states; its gradients need no backward pass.
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                self.tracker.assign(parameter.grad, "gradients")
            with self.tracker.during("optimizer", "optimizer"):
                step()
            if self.recipe.accumulation == 1:  # else gradients of earlier micro-batches exist
                for parameter in trained:
                    parameter.grad = None
            self._micro_batch()
            with self.tracker.during("clip", "activations"):
                norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm or math.inf)
            with self.tracker.during("optimizer", "optimizer"):
                step()
            del norm
        return self._footprint(base, layers, trained)

    def _footprint(self, base: PreTrainedModel, layers: list[torch.nn.Module], trained: list[Any]) -> Footprint:
        largest = max(layers, key=lambda layer: _count(layer)[0])
        in_layers = [sum(counts) for counts in zip(*map(_count, layers), strict=True)]
        total, trainable = _count(self.model)
        in_one, of_one = _count(largest)
        return Footprint(
            phases=self.tracker.peaks,
            parameters=total,
            trained=trainable,
            layers=len(layers),
            layer=in_one,
            rest=total - in_layers[0],
            trained_layer=of_one,
            trained_rest=trainable - in_layers[1],
            experts=sum(part.numel() for part in base.parameters() if part.dim() == 3),
        )

    def _replace_tensors(self) -> None:
        """Replace parameters and buffers by fake tensors that are counted; tied weights share one."""
        given: dict[int, torch.Tensor] = {}
        for module in self.model.modules():
            for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                if id(parameter) not in given:
                    new = torch.nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                    )
                    of_lora = self.recipe.trains_adapters and parameter.requires_grad
                    self.tracker.assign(new, "adapters" if of_lora else "weights")
                    given[id(parameter)] = new
                setattr(module, name, given[id(parameter)])
            for name, tensor in [*module.named_buffers(recurse=False, remove_duplicate=False), *vars(module).items()]:
                if isinstance(tensor, torch.Tensor):
                    new = given.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype))
                    self.tracker.assign(new, "weights" if hasattr(module, "quantized") else "buffers")
                    setattr(module, name, new)

    def _mark_phases(self, base: PreTrainedModel, layers: list[torch.nn.Module]) -> None:
        """Mark where phases begin: "forward" before the first layer; in the backward pass "lower layers" at the middle, and
        "embeddings" after the first layer."""
        tracker = self.tracker

        def at_gradient(before: str, phase: str) -> Any:
            def hook(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                if tracker.phase == before:
                    tracker.enter("forward", "activations")
                    if hidden.requires_grad:
                        hidden.register_hook(lambda _: tracker.enter(phase, "activations"))

            return hook

        layers[0].register_forward_pre_hook(at_gradient("before the layers", "backward, embeddings"), with_kwargs=True)
        if middle := len(layers) // self.period // 2 * self.period:
            layers[middle].register_forward_pre_hook(at_gradient("forward", "backward, lower layers"), with_kwargs=True)

    def _isolation_check(self) -> None:
        """Trace the preflight's one pass with other activations than a training step's: it is not checkpointed, because the
        model is in evaluation mode, and builds logits. The rest of the preflight is a training step, or less."""
        embeddings: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            embeddings.append(output.detach().requires_grad_())
            return embeddings[0]

        inputs = self._inputs(sequences=2, length=ISOLATION_TOKENS)
        del inputs["labels"]
        half = _AUTOCAST.get(self.recipe.train.mixed_precision)
        hook = self.model.get_input_embeddings().register_forward_hook(keep)
        self.model.eval()
        with self.tracker.during("preflight", "activations"):
            with torch.autocast("cpu", dtype=half) if half else nullcontext():
                logits = self.model(**inputs, use_cache=False).logits[0]
            torch.autograd.grad((logits[ISOLATION_TOKENS:].float() ** 2).sum(), embeddings)
        hook.remove()
        self.model.train()

    def _micro_batch(self) -> None:
        train, tracker = self.recipe.train, self.tracker
        half = _AUTOCAST.get(train.mixed_precision)
        with tracker.during("before the layers", "activations"):
            inputs = self._inputs(int(train.micro_batch_size), self.recipe.data.max_length)
            number = torch.ones((), dtype=torch.int64)
            with torch.autocast("cpu", dtype=half) if half else nullcontext():
                outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
            loss = (-outputs.log_probs).sum() / number.clamp(min=1)
            outputs.label_mask.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()
        with tracker.during("loss, backward", "head"):
            loss.backward()
        del outputs, loss, inputs

    def _inputs(self, sequences: int, length: int) -> dict[str, Any]:
        """Build a micro-batch of full sequences in the layout of TRL's collator."""
        shape = (1, sequences * length) if self.recipe.padding_free else (sequences, length)
        inputs: dict[str, Any] = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
        if not self.recipe.padding_free:
            return inputs | {"attention_mask": torch.ones(shape, dtype=torch.int64)}
        inputs["position_ids"] = torch.ones(shape, dtype=torch.int64)
        inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = torch.ones(sequences + 1, dtype=torch.int32)
        inputs["max_length_q"] = inputs["max_length_k"] = length
        return inputs | {"seq_idx": torch.ones(shape, dtype=torch.int32)}

    def _optimizer(self, trained: list[Any]) -> Any:
        """Return a function that runs an optimizer step, or only allocates its memory if it cannot run here."""
        name, rate = self.recipe.train.optimizer, {"lr": self.recipe.train.learning_rate}
        on_gpu = self.device == "cuda"
        optimizer = {
            "adamw_torch": lambda: torch.optim.AdamW(trained, foreach=on_gpu, **rate),
            "adamw_torch_fused": lambda: torch.optim.AdamW(trained, fused=True, **rate),
            "sgd": lambda: torch.optim.SGD(trained, foreach=on_gpu, **rate),
            "rmsprop": lambda: torch.optim.RMSprop(trained, foreach=on_gpu, **rate),
            "adagrad": lambda: torch.optim.Adagrad(trained, foreach=on_gpu, **rate),
        }.get(name)
        if optimizer is not None:
            with self.tracker.during("optimizer", "optimizer"):
                return optimizer().step

        embeddings = {id(module.weight) for module in self.model.modules() if isinstance(module, torch.nn.Embedding)}

        def step() -> None:
            if not self.held:
                for parameter in trained:
                    size = optimizer_states.state_bytes(
                        name,
                        tuple(parameter.shape),
                        parameter.element_size(),
                        self.device,
                        embedding=id(parameter) in embeddings,
                    )
                    self.held.append(torch.empty(round(size), dtype=torch.uint8))
            largest = max(parameter.numel() for parameter in trained)
            torch.empty(optimizer_states.temporary_bytes(name, largest, self.device), dtype=torch.uint8)

        return step


def _count(module: torch.nn.Module) -> tuple[int, int]:
    """Count all and trainable parameters; a quantized weight counts as the values that it represents."""
    total = trained = 0
    for parameter in module.parameters():
        total += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    total += sum(part.in_features * part.out_features for part in module.modules() if hasattr(part, "quantized"))
    return total, trained

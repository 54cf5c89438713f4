"""Trace the memory of a training step on fake tensors, which have shapes but no memory.

The model's own code, PEFT's and the optimizer run as in training under FakeTensorMode, and a StorageTracker counts their
storages. Workspaces inside kernels are not counted; `fake_kernels` replaces operations that differ on a GPU.
"""

import copy
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sft_recipes.errors import ModelError
from sft_recipes.memory import fake_kernels, optimizer_states, per_rank_memory
from sft_recipes.memory.prediction import Footprint, Part, Phase, extrapolate, fits
from sft_recipes.memory.storage_tracker import StorageTracker
from sft_recipes.models import cpu_loss
from sft_recipes.models.adapters import settle_types, with_adapters
from sft_recipes.models.attention import Capability
from sft_recipes.models.compiled_layers import layers_of
from sft_recipes.models.kernels import Kernels, select_kernels
from sft_recipes.models.model import load_config
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe.schema import Recipe
from sft_recipes.upstream import CHECKPOINTING, FakeTensorMode

MOST_TOKENS = 2**22  # per micro-batch: the time of a trace grows with them
# Tokens of each of the two documents in the isolation check. Evaluation mode switches checkpointing off, so all activations
# are kept: as many for 2 x 16 tokens as checkpointing keeps for 1,000 (about 70 and 2 hidden-sized values per token and
# layer). Logits are built as well: 20 MB in float32 for a vocabulary of 150,000, about four times that with their gradient. A
# training step needs more, for gradients, optimizer states and a whole layer's activations.
ISOLATION_TOKENS = 16


def load_traceable_config(recipe: Recipe) -> PreTrainedConfig:
    """Load the model's config. Raises ModelError for a model whose memory cannot be predicted."""
    config = load_config(recipe)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"model.name: {recipe.model.name}: its weights are already quantized, which memory prediction does not support. "
            "Set model.name to the original model, and quantize it with model.quantization."
        )
    return config


class Predictor:
    """Predicts the memory of one process that trains the whole of one model on one device; each recipe is traced once.

    `device` is cuda or cpu, `capability` the GPU's, None if unknown. Repeated layers are traced in part and extrapolated,
    unless `whole`.
    """

    def __init__(
        self, config: PreTrainedConfig, device: str, capability: Capability | None = None, *, whole: bool = False
    ) -> None:
        self.config, self.device, self.capability, self.whole = config, device, capability, whole
        self._known: list[tuple[Any, Footprint]] = []
        self._kinds: list[Any] | None = None

    def __call__(self, recipe: Recipe) -> Footprint:
        """Predict the memory of a recipe. Raises ModelError for a model that cannot be traced without values."""
        data, train = recipe.data, recipe.train
        # All that a footprint depends on. Compared, not hashed: parts of a recipe are lists.
        key = (
            recipe.model, recipe.lora, data.max_length, data.packing, data.cross_document_attention, recipe.launch.strategy,
            recipe.accumulation > 1, train.micro_batch_size, train.mixed_precision, train.optimizer, train.recomputed,
            train.kernels, train.preflight, train.compile,
        )  # fmt: skip
        for known, footprint in self._known:
            if known == key:
                return footprint
        footprint = self._predict(recipe)
        self._known.append((key, footprint))
        return footprint

    def on_rank(self, recipe: Recipe) -> Footprint:
        """Predict the memory of one rank under the recipe's `launch`, with the workspaces of the device's libraries."""
        return per_rank_memory.on_rank(self(recipe), recipe, self.device)

    def fits(self, recipe: Recipe, capacity: float) -> bool:
        """Return True if a rank fits on a device of `capacity` bytes."""
        return fits(self.on_rank(recipe), capacity, self.device)

    def _predict(self, recipe: Recipe) -> Footprint:
        tokens = recipe.data.max_length * int(recipe.train.micro_batch_size)
        if tokens > MOST_TOKENS:
            raise ModelError(
                f"train.micro_batch_size: memory can be predicted for at most {MOST_TOKENS:,} tokens per micro-batch (got "
                f"{tokens:,}). Reduce train.micro_batch_size or data.max_length."
            )
        logger = logging.getLogger(FakeTensorMode.__module__)  # logs tracebacks of errors reported below
        was_disabled, logger.disabled = logger.disabled, True
        try:
            layers = self.config.get_text_config().num_hidden_layers
            repeats = None if self.whole else self.repeats(recipe)
            if repeats is None:
                return self._trace(recipe, self.config)
            first, period = repeats
            least = first + (layers - first) % period
            few, more = (self._trace(recipe, with_layers(self.config, least + n * period), period) for n in (2, 4))
            return extrapolate(few, more, layers)
        except (ModelError, MemoryError):
            raise
        except Exception as error:  # any type, from the model's code
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise ModelError(
                f"model.name: {recipe.model.name}: the memory of a model of type {self.config.model_type} cannot be "
                f"predicted: {reason}. Set train.micro_batch_size to a number; the run measures memory before its first step."
            ) from error
        finally:
            logger.disabled = was_disabled

    def repeats(self, recipe: Recipe) -> tuple[int, int] | None:
        """Return the index from which kinds of layers repeat, and their period; None if too few layers repeat."""
        if self._kinds is None:
            self._kinds = _layer_kinds(self.config, recipe.model.trust_remote_code)
        kinds = self._kinds
        for period in range(1, len(kinds) // 5 + 1):
            first = len(kinds) - period
            while first and kinds[first - 1] == kinds[first - 1 + period]:
                first -= 1
            together = math.lcm(period, max(recipe.train.recomputed, 1))
            if len(kinds) - first > 5 * together:
                return first, together
        return None

    def _trace(self, recipe: Recipe, config: PreTrainedConfig, period: int = 1) -> Footprint:
        tracker = StorageTracker(block=512 if self.device == "cuda" else 1)
        with torch.device("meta"):
            model = self._build_model(recipe, copy.deepcopy(config))
        # `tracker` has to be entered last, to receive tensors before FakeTensorMode replaces its results.
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            return _Step(recipe, model, tracker, self.device, period).run()

    def _build_model(self, recipe: Recipe, config: PreTrainedConfig) -> Any:
        """Build the model as it is trained."""
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, recipe.model.dtype),
            attn_implementation=fake_kernels.attention(recipe, config, self.device, self.capability),
            trust_remote_code=recipe.model.trust_remote_code,
        )
        if recipe.model.quantization:
            assert recipe.lora is not None
            keep = ["lm_head", *recipe.lora.modules_to_save]
            compute = getattr(torch, recipe.compute_dtype)
            fake_kernels.quantize(model, recipe.model.quantization, keep, compute, self.device)
        known = model.get_input_embeddings().weight.shape[0]
        if recipe.model.new_tokens:
            model.resize_token_embeddings(known + len(recipe.model.new_tokens), mean_resizing=False)
        if recipe.lora is not None:
            new_rows = list(range(known, known + len(recipe.model.new_tokens)))
            model = with_adapters(model, recipe.lora, recipe.model, new_rows)
            settle_types(model, recipe)
        return model


def _layer_kinds(config: PreTrainedConfig, trust_remote_code: bool) -> list[Any]:
    """Return each layer's kind: type of attention, and names and shapes of parameters."""
    text = config.get_text_config()
    if isinstance(getattr(type(text), "layer_types", None), property):  # such a model cannot be built with fewer layers
        return []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    layers = layers_of(model)
    attention = getattr(text, "layer_types", None) or [None] * len(layers)
    shapes = [[(name, part.shape) for name, part in layer.named_parameters()] for layer in layers]
    return list(zip(attention, shapes, strict=True))


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of the same model with fewer layers."""
    smaller = copy.deepcopy(config)
    text = smaller.get_text_config()
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(text, key, None):
            setattr(text, key, getattr(text, key)[:layers])
    text.num_hidden_layers = layers
    return smaller


@dataclass
class _Step:
    """One process's optimizer step, as in transformers' Trainer and TRL's SFTTrainer."""

    recipe: Recipe
    model: Any
    tracker: StorageTracker
    device: str
    period: int  # number of layers after which kinds of layers repeat

    def run(self) -> Footprint:
        train, tracker = self.recipe.train, self.tracker
        base: PreTrainedModel = self.model.get_base_model() if self.recipe.trains_adapters else self.model
        layers = layers_of(base)
        kernels = fake_kernels.FakeKernels(self.device, autocast=train.autocast_dtype is not None)
        self._replace_tensors()
        if train.recomputed:
            enable = getattr(base, f"{CHECKPOINTING}_enable")
            # The contexts of the forward pass and of the recomputation in the backward pass.
            options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), kernels)}
            enable(options, every_n_layers=train.recomputed)
        self._mark_phases(layers)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: tracker.assign(parameter.grad, Part.GRADIENTS)
            )
        step = self._optimizer(trained)
        fused = select_kernels(self.recipe, base.config, self.device).name == "liger"
        with kernels, (fake_kernels.apply_liger(base) if fused else Kernels()).active():
            if train.preflight and self.recipe.padding_free:
                self._isolation_check()
            self.model.train()
            # The first step creates the optimizer's states; its gradients need no backward pass.
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                tracker.assign(parameter.grad, Part.GRADIENTS)
            with tracker.during(Phase.OPTIMIZER, Part.OPTIMIZER):
                step()
            if self.recipe.accumulation == 1:  # else gradients of earlier micro-batches exist
                for parameter in trained:
                    parameter.grad = None
            self._micro_batch(base)
            with tracker.during(Phase.CLIP, Part.ACTIVATIONS):
                norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm or math.inf)
            with tracker.during(Phase.OPTIMIZER, Part.OPTIMIZER):
                step()
            del norm
        return Footprint(tracker.peaks, self._size(base, layers))

    def _size(self, base: PreTrainedModel, layers: list[torch.nn.Module]) -> ModelSize:
        counts = [_count(layer) for layer in layers]
        total, trained = _count(self.model)
        layer, trained_layer = max(counts)
        return ModelSize(
            parameters=total,
            trained=trained,
            layers=len(layers),
            layer=layer,
            rest=total - sum(count for count, _ in counts),
            trained_layer=trained_layer,
            trained_rest=trained - sum(count for _, count in counts),
            embeddings=base.get_input_embeddings().weight.numel(),
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
                    self.tracker.assign(new, Part.ADAPTERS if of_lora else Part.WEIGHTS)
                    given[id(parameter)] = new
                setattr(module, name, given[id(parameter)])
            for name, tensor in [*module.named_buffers(recurse=False, remove_duplicate=False), *vars(module).items()]:
                if isinstance(tensor, torch.Tensor):
                    new = given.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype))
                    quantized = isinstance(module, fake_kernels.QuantizedLinear)
                    self.tracker.assign(new, Part.WEIGHTS if quantized else Part.BUFFERS)
                    setattr(module, name, new)

    def _mark_phases(self, layers: list[torch.nn.Module]) -> None:
        """Enter the phases that begin at a layer: at the first the forward pass, and on the way back at the middle the lower
        layers' backward pass, after the first that of the embeddings."""
        tracker = self.tracker

        def at_gradient(before: Phase, phase: Phase) -> Any:
            def hook(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                if tracker.phase == before:
                    tracker.enter(Phase.FORWARD, Part.ACTIVATIONS)
                    if hidden.requires_grad:
                        hidden.register_hook(lambda _: tracker.enter(phase, Part.ACTIVATIONS))

            return hook

        first = at_gradient(Phase.BEFORE_LAYERS, Phase.BACKWARD_EMBEDDINGS)
        layers[0].register_forward_pre_hook(first, with_kwargs=True)
        if middle := len(layers) // self.period // 2 * self.period:
            lower = at_gradient(Phase.FORWARD, Phase.BACKWARD_LOWER)
            layers[middle].register_forward_pre_hook(lower, with_kwargs=True)

    def _isolation_check(self) -> None:
        """Trace the preflight's one pass with other activations than a training step's: it is not checkpointed, because the
        model is in evaluation mode, and builds logits."""
        embeddings: list[torch.Tensor] = []

        def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            embeddings.append(output.detach().requires_grad_())
            return embeddings[0]

        hook = self.model.get_input_embeddings().register_forward_hook(keep)
        self.model.eval()
        with self.tracker.during(Phase.PREFLIGHT, Part.ACTIVATIONS):
            with self._autocast():
                inputs = self._inputs(sequences=2, length=ISOLATION_TOKENS)
                logits = self.model(**inputs, use_cache=False).logits[0]
            torch.autograd.grad((logits[ISOLATION_TOKENS:].float() ** 2).sum(), embeddings)
        hook.remove()

    def _micro_batch(self, base: PreTrainedModel) -> None:
        with self.tracker.during(Phase.BEFORE_LAYERS, Part.ACTIVATIONS):
            inputs = self._inputs(int(self.recipe.train.micro_batch_size), self.recipe.data.max_length)
            labels = torch.ones_like(inputs["input_ids"])
            with self._autocast():
                loss = self._loss(base, inputs, labels[:, 1:].flatten())
        with self.tracker.during(Phase.LOSS_BACKWARD, Part.HEAD):
            loss.backward()

    def _loss(self, base: PreTrainedModel, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of all tokens, as if all were trained. Their hidden states are copied first."""
        hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        if hidden.requires_grad:  # called when the loss's own backward pass is done
            hidden.register_hook(lambda _: self.tracker.enter(Phase.BACKWARD_UPPER, Part.ACTIVATIONS))
        head: Any = base.get_output_embeddings()
        with self.tracker.during(Phase.LOSS_FORWARD, Part.HEAD):
            rows = hidden.clone(memory_format=torch.contiguous_format).flatten(0, 1)
            if self.device == "cuda":
                log_probs = fake_kernels.Loss.apply(rows, head.weight)
            else:
                softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
                log_probs, _ = cpu_loss.LogProbs.apply(True, rows, head.weight, head.bias, labels, 1.0, softcap)
            return -log_probs.sum() / len(rows)

    def _autocast(self) -> Any:
        dtype = self.recipe.train.autocast_dtype
        return torch.autocast("cpu", getattr(torch, dtype)) if dtype else nullcontext()

    def _inputs(self, sequences: int, length: int) -> dict[str, Any]:
        """Build a micro-batch of full sequences in the layout of TRL's collator."""
        shape = (1, sequences * length) if self.recipe.padding_free else (sequences, length)
        inputs: dict[str, Any] = {"input_ids": torch.ones(shape, dtype=torch.int64)}
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
            with self.tracker.during(Phase.OPTIMIZER, Part.OPTIMIZER):
                return optimizer().step

        embeddings = {id(module.weight) for module in self.model.modules() if isinstance(module, torch.nn.Embedding)}
        states: list[torch.Tensor] = []

        def step() -> None:
            for parameter in [] if states else trained:
                shape, itemsize = tuple(parameter.shape), parameter.element_size()
                size = optimizer_states.state_bytes(
                    name, shape, itemsize, self.device, embedding=id(parameter) in embeddings
                )
                states.append(torch.empty(round(size), dtype=torch.uint8))
            largest = max(parameter.numel() for parameter in trained)
            torch.empty(optimizer_states.temporary_bytes(name, largest, self.device), dtype=torch.uint8)

        return step


def _count(module: torch.nn.Module) -> tuple[int, int]:
    """Count all and trainable parameters; a quantized weight counts as the values that it represents."""
    total = trained = 0
    for parameter in module.parameters():
        total += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    total += sum(
        part.in_features * part.out_features
        for part in module.modules()
        if isinstance(part, fake_kernels.QuantizedLinear)
    )
    return total, trained

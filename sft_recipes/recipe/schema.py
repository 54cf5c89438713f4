"""The recipe's fields, each said once: help, JSON schema and docs/recipe.md come from here.

A section's presence is its switch: no `lora:` means full fine-tuning.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_GLOBAL_BATCH_SIZE = 32

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
# A float is a fraction of the run, an int a number of optimizer steps.
Interval = Annotated[float, Field(gt=0, le=1)] | Positive | None
DType = Literal["bfloat16", "float16", "float32"]
Format = Literal["alpaca", "prompt_completion", "messages", "text"]


class _Section(BaseModel):
    # strict: "5" is not 5 and true is not 1; the names in `model:` are ours, not pydantic's.
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Model(_Section):
    """What is trained."""

    name: Name
    """Hub id, local directory, or `builtin:tiny`."""
    revision: Name | None = None
    """Branch, tag or commit on the hub; null: the default branch."""
    dtype: DType = "bfloat16"
    """Type of the weights as loaded and trained."""
    attention: Literal[
        "auto", "flash_attention_2", "flash_attention_3", "varlen", "flex_attention", "sdpa", "eager"
    ] = "auto"
    """Attention implementation; varlen: packed documents with torch alone; auto: the fastest correct one that is installed."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantise the frozen base with bitsandbytes; needs `lora:` (QLoRA)."""
    new_tokens: list[Name] = []
    """Tokens added to the tokenizer and the embeddings; they are trained, saved and merged."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class Source(_Section):
    """Where rows come from."""

    path: Name
    """Path, glob, `builtin:` name or hub id."""
    name: Name | None = None
    """Of a hub data set's configurations, which; null: the only one."""
    split: Name | None = None
    """Of a hub data set's splits, which; null: train, of data.eval validation or test."""
    format: Format | None = None
    """As `data.format`, for this source."""
    columns: dict[str, str] = {}
    """As `data.columns`, for this source."""


class WeightedSource(Source):
    """One of several sources of training rows."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often the rows are seen in an epoch: 2 is twice, 0.5 a random half."""


class Data(_Section):
    """What it is trained on."""

    train: Name | Annotated[list[Name | WeightedSource], Field(min_length=1)]
    """Path, glob, `builtin:` name, hub id, or a list of these or of {path, weight, name, split, format, columns}."""
    eval: Annotated[float, Field(gt=0, lt=1)] | Name | Source | None = 0.02
    """Fraction of the training rows to set aside, path, hub id, {path, name, split, format, columns}, or null: none."""
    format: Format | None = None
    """Null: found from the columns."""
    columns: dict[str, str] = {}
    """The data's own names for the columns a format needs, such as {prompt: question, completion: answer}."""
    template: Name | None = None
    """alpaca, chat (the tokenizer's own), or the path of a .jinja file; null: chat for messages, else alpaca."""
    train_on: Literal["completion", "all", "assistant"] = "completion"
    """completion: the last answer; assistant: every assistant message; all: every token."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 512
    """Tokens in a sequence."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a row of more than max_length tokens. With packing wrapped no row is an error or need be split."""
    packing: Literal["bfd", "wrapped", "none"] = "bfd"
    """bfd: whole documents, best fit decreasing; wrapped: concatenate and cut; none: one document a sequence, padded."""
    cross_document_attention: bool = False
    """Whether documents packed into one sequence see each other."""
    shuffle: bool = True
    """Shuffle documents before packing and sequences in each epoch; false: in file order."""
    max_train_samples: Positive | None = None
    """Use at most so many training rows; null: all."""
    max_eval_samples: Positive | None = None
    """Use at most so many validation rows; null: all."""


class Lora(_Section):
    """Train low-rank adapters beside frozen weights."""

    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input."""
    target_modules: Name | Annotated[list[Name], Field(min_length=1)] = "all-linear"
    """Names of the layers that get an adapter, a regular expression, or all-linear: every linear layer but the head."""
    modules_to_save: list[Name] = []
    """Layers trained and saved in full, such as embed_tokens and lm_head."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA)."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""


class Train(_Section):
    """How it is trained."""

    epochs: Annotated[float, Field(gt=0, lt=2**31)] | None = None
    """Passes over the data; null: 1, or as many as max_steps takes."""
    max_steps: Positive | None = None
    """Optimizer steps; null: as epochs says. If both are given, whichever ends first."""
    micro_batch_size: Positive | Literal["auto"] = 2
    """Sequences per device and forward pass; auto: the largest that fits."""
    global_batch_size: Positive | None = None
    """Sequences per optimizer step; null: 32, or as gradient_accumulation_steps says."""
    gradient_accumulation_steps: Positive | None = None
    """Forward passes per optimizer step and device; null: as global_batch_size says. Give one of the two."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    lr_scheduler: str = "cosine"
    """Any schedule transformers knows: cosine, linear, constant, constant_with_warmup, ..."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; biases and norms are left out."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run before it reaches the weights, or the step is skipped."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Type that matrix products are computed in (autocast); no: in the weights' own."""
    optimizer: str = "adamw_torch_fused"
    """Any optimizer transformers knows, or adamw_8bit_sr: 8-bit states and stochastic rounding (extra: torchao)."""
    gradient_checkpointing: bool | Positive | Literal["auto"] = "auto"
    """Recompute activations in the backward pass to save memory; N: of every Nth layer; auto: of as few as must be."""
    kernels: Literal["auto", "liger", "none"] = "auto"
    """Fused GPU kernels for RMSNorm, RoPE and SwiGLU. auto: Liger's, if installed, correct on this GPU and made for the model
    (extra: liger)."""
    compile: bool = False
    """Compile the model's layers (torch.compile): a minute or more at the start, for runs that last."""
    preflight: bool = True
    """Try the model on the data before the first step: isolation of packed documents, memory of the largest micro-batch,
    gradients, loss of the base model."""
    deterministic: bool = False
    """Use deterministic algorithms only, which makes runs and --resume bitwise reproducible on a GPU, at some speed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the split, the order of the data, new weights and dropout."""

    @property
    def micro_batch_size_or_1(self) -> int:
        """micro_batch_size; 1 for auto, which does not change the sequences per step."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def recomputed(self) -> int:
        """Of how many layers one is recomputed, 0 where none is; auto is taken for true where it is not settled yet."""
        return 1 if self.gradient_checkpointing == "auto" else int(self.gradient_checkpointing)

    @property
    def recomputed_in_words(self) -> str:
        every = self.recomputed
        return "off" if not every else "every layer" if every == 1 else f"every {every} layers"


class Prompt(_Section):
    """A prompt to answer at each evaluation."""

    prompt: str
    """The instruction."""
    input: str = ""
    """The Alpaca input, if any."""
    expected: str | None = None
    """The right answer; with it, the share of exact matches is logged (spaces around an answer aside)."""


class Eval(_Section):
    """Validation during training. It also runs before the first step and at the end."""

    every: Interval = 0.1
    """Fraction of the run, or a number of steps; null: only at the start and the end."""
    generate: Name | list[str | Prompt] = []
    """Prompts to answer at each evaluation, or a file of rows, whose answers are what is expected, or of {prompt, input,
    expected}."""
    max_new_tokens: Positive = 128
    """Length at which an answer is cut off."""


class Checkpoint(_Section):
    """Saving during training, to resume from."""

    every: Interval = 0.25
    """Fraction of the run, or a number of steps; null: never."""
    keep: Positive = 2
    """How many of the latest are kept, besides the best with export_best."""
    on_failure: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written, on a full disk for one, stops the run, or it goes on without."""
    export_best: bool = False
    """Export the checkpoint with the lowest validation loss instead of the last."""


class Log(_Section):
    """What is recorded while training."""

    every: Positive = 10
    """Steps between two lines of metrics.jsonl and the console."""
    to: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = []
    """Experiment trackers besides metrics.jsonl: wandb, tensorboard, trackio, mlflow; each is an extra of the same name."""
    project: Name | None = None
    """Project of wandb and trackio, experiment of mlflow; null: as WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say, else
    sft-recipes."""
    name: Name | None = None
    """What wandb, trackio and mlflow call the run; null: the last part of output_dir."""
    group: Name | None = None
    """Runs that belong together: the group of wandb and trackio, a tag of mlflow; null: none."""


class Export(_Section):
    """What comes out."""

    merge: bool = True
    """With lora: also write the merged model."""
    dtype: DType = "bfloat16"
    """Type of the exported weights."""
    max_shard_size: Annotated[str, Field(pattern=r"^(0*[1-9]\d*(\.\d+)?|0*\.0*[1-9]\d*)(KB|MB|GB)$")] = "5GB"
    """Largest size of one safetensors file, such as 500MB or 5GB."""


class Launch(_Section):
    """Where it runs. `run` starts the processes, unless torchrun, accelerate, srun or mpirun have."""

    processes: Positive = 1
    """Processes per machine, one a device; also --processes. train.global_batch_size stays: each accumulates less."""
    machines: Positive = 1
    """Machines; `run` is started on each, with MASTER_ADDR, MASTER_PORT and its NODE_RANK (or by srun) in the environment, and
    an output_dir that all of them see."""
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """How several processes share the work. ddp: each holds all. fsdp2, zero3: each holds a share of weights, gradients and
    optimizer; zero2: of gradients and optimizer. zero2 and zero3 are DeepSpeed's. On CPUs too, to try a recipe on a laptop."""
    cpu_offload: bool = False
    """Keep parameters and optimizer states (zero2: optimizer states) in host memory."""

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.processes * self.machines


class Recipe(_Section):
    """One fine-tuning run. Only model.name, data.train and output_dir have to be given."""

    model: Model
    data: Data
    lora: Lora | None = None
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    export: Export = Export()
    launch: Launch = Launch()
    output_dir: Name
    """The run directory: it must not exist yet, or be empty."""
    trl: dict[str, Any] = {}
    """Any other field of TRL's SFTConfig, by its own name."""

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, the defaults that depend on other keys included; reads back as the same recipe."""
        values = self.model_dump()
        if self.train.gradient_accumulation_steps is None:
            values["train"]["global_batch_size"] = self.train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
        if self.train.max_steps is None:
            values["train"]["epochs"] = self.train.epochs or 1.0
        return values

    @property
    def method(self) -> str:
        """Name of the fine-tuning method."""
        if self.lora is None:
            return "full fine-tuning"
        return "QLoRA" if self.model.quantization else "DoRA" if self.lora.use_dora else "LoRA"

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step on each device."""
        train, world = self.train, self.launch.world_size
        if train.gradient_accumulation_steps is not None:
            return train.gradient_accumulation_steps
        # At least 1 also where the division does not come out, which is an error: the rest can still be looked at.
        return max(1, (train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE) // (train.micro_batch_size_or_1 * world))

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step over all devices."""
        return self.train.micro_batch_size_or_1 * self.accumulation * self.launch.world_size

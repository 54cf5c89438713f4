"""The recipe's fields; the JSON schema and docs/recipe.md are generated from these docstrings.

The presence of a section enables it: without `lora:` a run is full fine-tuning.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sft_recipes.data.chat_templates import named
from sft_recipes.data.formats.registry import FORMATS
from sft_recipes.trackers.base import kinds as trackers

DEFAULT_GLOBAL_BATCH_SIZE = 32
DEFAULT_WARMUP_RATIO = 0.03

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Name = Annotated[str, Field(min_length=1)]
# A float is a fraction of the run, an int a number of optimizer steps.
Interval = Annotated[float, Field(gt=0, le=1)] | Positive | None
DType = Literal["bfloat16", "float16", "float32"]  # names of torch's
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
if TYPE_CHECKING:
    FormatName = str
    TrackerName = str
else:
    FormatName = Literal[*FORMATS]
    TrackerName = Literal[*trackers()]


class _Section(BaseModel):
    # strict: "5" is not 5 and true is not 1. protected_namespaces: our section is called `model`.
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Model(_Section):
    """Model and tokenizer."""

    name: Name
    """Hub id, local directory or `builtin:tiny`."""
    revision: Name | None = None
    """Branch, tag or commit on the Hub. Default: the default branch."""
    dtype: DType = "bfloat16"
    """Data type in which the weights are loaded and trained."""
    attention: Literal[
        "auto", "flash_attention_2", "flash_attention_3", "varlen", "flex_attention", "sdpa", "eager"
    ] = "auto"
    """Attention implementation. auto: the fastest correct one available; varlen: packed documents without flash-attn."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantize the frozen base model with bitsandbytes. Requires `lora:` (QLoRA)."""
    new_tokens: list[Name] = []
    """Tokens to add to the tokenizer and the embeddings. They are trained, saved and merged."""
    trust_remote_code: bool = False
    """Allow the model's custom Python code to run. Review the code first."""


class Source(_Section):
    """A source of rows."""

    path: Name
    """Path of a file or directory, glob, `builtin:` name, Hub id or URL (s3://, gs://, hf://)."""
    name: Name | None = None
    """Configuration of a Hub dataset. Default: the only one."""
    split: Name | None = None
    """Split of a Hub dataset or a directory. Default: train; for data.eval: validation or test."""
    format: FormatName | None = None
    """Overrides `data.format` for this source."""
    columns: dict[str, str] = {}
    """Overrides `data.columns` for this source."""


class WeightedSource(Source):
    """One of several sources of training rows."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Repetitions of the rows per epoch: 2 repeats each row twice, 0.5 samples a random half."""
    max_samples: Positive | None = None
    """Maximum number of rows of this source, before rows are held out for evaluation or repeated. Default: all."""


class Data(_Section):
    """Training and evaluation data."""

    train: Name | Annotated[list[Name | WeightedSource], Field(min_length=1)]
    """Path, glob, `builtin:` name, Hub id or URL, or a list of these or of {path, weight, max_samples, name, split,
    format, columns}."""
    eval: Annotated[float, Field(gt=0, lt=1)] | Name | Source | None = 0.02
    """Evaluation rows: a fraction of the training rows to hold out, a path, a Hub id, {path, name, split, format, columns}, or
    null for none."""
    format: FormatName | None = None
    """Row format. Default: detected from the columns."""
    columns: dict[str, str] = {}
    """Maps the format's columns to the data's, e.g. {prompt: question, completion: answer}."""
    input_separator: str | None = None
    """Text that joins instruction and input of Alpaca rows to one text. Default: the template decides (alpaca: a block of its
    own, chat: a blank line)."""
    on_bad_row: Literal["error", "drop"] = "error"
    """How to handle rows that cannot be read or rendered. drop: leave them out, and report how many and the first ones."""
    template: Name | None = None
    """alpaca, chatml, llama3, chat (the tokenizer's chat template) or the path of a .jinja file. chatml and llama3 add
    their tokens to model.new_tokens. Default: chat for conversations, else alpaca."""
    chat_template_kwargs: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Any] = {}
    """Arguments of the chat template, e.g. {enable_thinking: false}. They become defaults of the exported template."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$", examples=["2026-12-31"])] | None = None
    """Date that chat templates take for today, in training and in the exported template. Default: the day of the run."""
    train_on: Literal["completion", "all", "assistant"] = "completion"
    """Tokens in the loss. completion: the last answer; assistant: every assistant message; all: every token."""
    train_on_reasoning: bool = True
    """Train on the thoughts of answers. false: the model reads them, but only what follows is in the loss."""
    special_tokens: Literal["text", "parse"] = "text"
    """Text in the rows that is a special token, e.g. <|im_start|>. text: plain characters, and an error in a chat template;
    parse: the token."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 512
    """Sequence length in tokens."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """How to handle rows longer than max_length. With packing: wrapped, error and split have no effect."""
    packing: Literal["bfd", "wrapped", "none"] = "bfd"
    """bfd: whole documents (best-fit decreasing); wrapped: concatenate and chunk; none: one padded document per sequence."""
    cross_document_attention: bool = False
    """Allow documents packed into one sequence to attend to each other. Requires packing: wrapped."""
    shuffle: bool = True
    """Shuffle documents before packing, and sequences in each epoch. false: keep the file order."""
    max_train_samples: Positive | None = None
    """Maximum number of training rows. Default: all."""
    max_eval_samples: Positive | None = None
    """Maximum number of evaluation rows. Default: all."""


class Lora(_Section):
    """LoRA adapters on top of frozen weights."""

    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scaling: updates are multiplied by alpha / rank (use_rslora: alpha / sqrt(rank))."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    target_modules: Name | Annotated[list[Name], Field(min_length=1)] = "all-linear"
    """Layers to adapt: a list of names, a regular expression, or all-linear (every linear layer except the LM head)."""
    target_parameters: list[Name] = []
    """Parameters to adapt that are not weights of layers, e.g. [mlp.experts.gate_up_proj, mlp.experts.down_proj]."""
    modules_to_save: list[Name] = []
    """Layers to train and save in full, e.g. embed_tokens and lm_head."""
    use_dora: bool = False
    """Use weight-decomposed adapters (DoRA)."""
    use_rslora: bool = False
    """Use rank-stabilized scaling (rsLoRA)."""


class Train(_Section):
    """Optimization."""

    epochs: Annotated[float, Field(gt=0, lt=2**31)] | None = None
    """Passes over the data. Default: 1, or derived from max_steps if that is set."""
    max_steps: Positive | None = None
    """Optimizer steps. Default: derived from epochs. If both are set, the first limit reached ends training."""
    micro_batch_size: Positive | Literal["auto"] = 2
    """Sequences per device and forward pass. auto: the largest that fits in memory."""
    global_batch_size: Positive | None = None
    """Sequences per optimizer step. Default: 32, or derived from gradient_accumulation_steps if that is set."""
    gradient_accumulation_steps: Positive | None = None
    """Forward passes per optimizer step and device. Default: derived from global_batch_size. Set only one of the two."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    lr_scheduler: str = "cosine"
    """Any learning rate scheduler of transformers: cosine, linear, constant, constant_with_warmup, ..."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the steps used for linear warmup from 0. Default: 0.03, or derived from warmup_steps if that is set."""
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Steps of linear warmup from 0. Default: derived from warmup_ratio. Set only one of the two."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay. Biases and normalization layers are excluded."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Maximum gradient norm for clipping. 0: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or a gradient is NaN or Inf: stop before the weights are updated, or skip the step."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Data type of matrix multiplications (autocast). no: that of the weights."""
    optimizer: str = "adamw_torch_fused"
    """Any optimizer of transformers, or adamw_8bit_sr: 8-bit states and stochastic rounding (extra: torchao)."""
    gradient_checkpointing: bool | Positive | Literal["auto"] = "auto"
    """Recompute activations in the backward pass to save memory. N: of every Nth layer; auto: of as few layers as possible."""
    kernels: Literal["auto", "liger", "none"] = "auto"
    """Fused GPU kernels for RMSNorm, RoPE and SwiGLU. auto: Liger's if installed, correct on this GPU and available for the
    model (extra: liger)."""
    compile: bool = False
    """Compile the model's layers (torch.compile). Takes a minute or more at the start, which pays off in long runs."""
    preflight: bool = True
    """Before the first step, check the isolation of packed documents, the memory of the largest micro-batch, the gradients
    and the loss of the base model."""
    deterministic: bool = False
    """Use only deterministic algorithms: runs and --resume are bitwise reproducible on a GPU, but slower."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the evaluation split, data order, new weights and dropout."""

    @property
    def micro_batch_size_or_1(self) -> int:
        """micro_batch_size; 1 for auto, which does not change the sequences per step."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def warmup_ratio_or_default(self) -> float:
        return DEFAULT_WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio

    @property
    def autocast_dtype(self) -> DType | None:
        """Data type of mixed precision, None without."""
        return {"bf16": "bfloat16", "fp16": "float16", "no": None}[self.mixed_precision]

    @property
    def recomputed(self) -> int:
        """N if activations of every Nth layer are recomputed, 0 if none; an unresolved auto counts as every layer."""
        return 1 if self.gradient_checkpointing == "auto" else int(self.gradient_checkpointing)

    @property
    def checkpointing_summary(self) -> str:
        every = self.recomputed
        return "off" if not every else "every layer" if every == 1 else f"every {every} layers"


class Prompt(_Section):
    """A prompt to answer at each evaluation."""

    prompt: str
    """The instruction."""
    input: str = ""
    """The Alpaca input (optional)."""
    expected: str | None = None
    """Expected answer. If set, the exact match rate is logged, ignoring surrounding whitespace."""


class Eval(_Section):
    """Evaluation during training, before the first step and at the end."""

    every: Interval = 0.1
    """Interval as a fraction of the run or a number of steps. null: only at the start and the end."""
    generate: Name | list[str | Prompt] = []
    """Prompts to answer at each evaluation: a list of texts or {prompt, input, expected}, or a file of these or of
    rows, whose answers are the expected ones."""
    max_new_tokens: Positive = 128
    """Maximum length of a generated answer in tokens."""


class Checkpoint(_Section):
    """Checkpoints for resuming."""

    every: Interval = 0.25
    """Interval as a fraction of the run or a number of steps. null: no checkpoints."""
    keep: Positive = 2
    """Number of latest checkpoints to keep, in addition to the best one with export_best."""
    on_failure: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written (e.g. the disk is full): stop the run, or continue without it."""
    export_best: bool = False
    """Export the checkpoint with the lowest evaluation loss instead of the last one."""


class Log(_Section):
    """Logging and experiment trackers."""

    every: Positive = 10
    """Number of steps between lines of metrics.jsonl and the console."""
    to: Annotated[
        list[TrackerName], Field(description=f"Experiment trackers besides metrics.jsonl: {', '.join(trackers())}.")
    ] = []
    project: Name | None = None
    """Project (mlflow: experiment) in the trackers. Default: that of WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else
    sft-recipes."""
    name: Name | None = None
    """Name of the run in the trackers. Default: the last part of output_dir."""
    group: Name | None = None
    """Group of runs in the trackers (mlflow: tag)."""


class Export(_Section):
    """Export of adapter and model."""

    merge: bool = True
    """With `lora:`, also write the merged model."""
    dtype: DType = "bfloat16"
    """Data type of the exported weights."""
    max_shard_size: Annotated[
        str, Field(pattern=r"^(0*[1-9]\d*(\.\d+)?|0*\.0*[1-9]\d*)(KB|MB|GB)$", examples=["5GB", "500MB"])
    ] = "5GB"
    """Maximum size of a safetensors file, e.g. 500MB or 5GB."""


class Launch(_Section):
    """Processes, nodes and sharding. `run` launches the processes, unless torchrun, accelerate, srun or mpirun did."""

    processes: Positive = 1
    """Processes per node, one per device (--processes overrides it). train.global_batch_size does not change."""
    machines: Positive = 1
    """Number of nodes. Start `run` on each node with MASTER_ADDR, MASTER_PORT and NODE_RANK set (or with srun); output_dir
    must be on a shared file system."""
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """Distributed strategy. ddp: replicate everything; fsdp2, zero3: shard weights, gradients and optimizer states; zero2:
    shard gradients and optimizer states. zero2 and zero3 use DeepSpeed. All of them also run on CPUs, for testing."""
    cpu_offload: bool = False
    """Keep parameters and optimizer states (zero2: optimizer states) in CPU memory."""

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.processes * self.machines


class Recipe(_Section):
    """One fine-tuning run. Only model.name, data.train and output_dir are required."""

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
    """Run directory. Must be new or empty, unless a run is resumed."""
    trl: dict[str, Any] = {}
    """Other fields of TRL's SFTConfig, passed through by name."""

    @model_validator(mode="after")
    def _with_tokens_of_the_template(self) -> Self:
        tokens = dict.fromkeys([*self.model.new_tokens, *named.tokens(self.data.template or "")])
        if len(tokens) > len(self.model.new_tokens):
            object.__setattr__(self, "model", self.model.model_copy(update={"new_tokens": list(tokens)}))
        return self

    def resolved(self) -> dict[str, Any]:
        """Return every key with its value, including derived defaults; parsing the result gives the same recipe."""
        values = self.model_dump()
        if self.train.gradient_accumulation_steps is None:
            values["train"]["global_batch_size"] = self.train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
        if self.train.max_steps is None:
            values["train"]["epochs"] = self.train.epochs or 1.0
        if self.train.warmup_steps is None:
            values["train"]["warmup_ratio"] = self.train.warmup_ratio_or_default
        return values

    @property
    def trains_adapters(self) -> bool:
        """True for LoRA, DoRA and QLoRA, False for full fine-tuning."""
        return self.lora is not None

    @property
    def trains_layers_in_full(self) -> bool:
        """True if layers or new-token embeddings are trained next to the adapters; PEFT wraps them."""
        return self.lora is not None and bool(self.lora.modules_to_save or self.model.new_tokens)

    @property
    def method(self) -> str:
        """Name of the fine-tuning method."""
        if self.lora is None:
            return "full fine-tuning"
        return "QLoRA" if self.model.quantization else "DoRA" if self.lora.use_dora else "LoRA"

    @property
    def compute_dtype(self) -> DType:
        """Data type of matrix multiplications."""
        return self.train.autocast_dtype or self.model.dtype

    @property
    def padding_free(self) -> bool:
        """True if a micro-batch is one row, in which tokens attend only within their `seq_lengths` entry.

        Without packing, rows are padded. With cross-document attention they are full, and plain causal attention is faster.
        """
        return self.data.packing != "none" and not self.data.cross_document_attention

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step on each device."""
        train, world = self.train, self.launch.world_size
        if train.gradient_accumulation_steps is not None:
            return train.gradient_accumulation_steps
        # If the batch size is not divisible, which is an error, 1 lets the other checks continue.
        return max(1, (train.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE) // (train.micro_batch_size_or_1 * world))

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimizer step, over all devices."""
        return self.train.micro_batch_size_or_1 * self.accumulation * self.launch.world_size

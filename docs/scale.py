#!/usr/bin/env python3
"""What limits 8, 64 and 512 GPUs, on paper: the tables of docs/scale.md, from the bundled recipes. python docs/scale.py"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from sft_recipes.planning import flops
from sft_recipes.planning.model_size import ModelSize
from sft_recipes.recipe import bundled, parse
from sft_recipes.recipe.schema import Recipe

GPU = flops.gpu_named("H100") or flops.GPUS[0]
REACHED = 0.4  # of the GPU's rate: the middle of what `sft-recipe plan` takes
A_MACHINE = 8  # GPUs
# Bytes a second, in one direction. NVLink: of a GPU (H100's data sheet: 900 GB/s in both). The others: of a whole machine.
NVLINK, INFINIBAND, ETHERNET = 450e9, 8 * 400e9 / 8, 100e9 / 8
LINK = 0.8  # of a link's rate that a collective reaches: taken, not measured
# Seconds that a ring takes whatever it carries: at all, for each step within a machine, and between machines (what NCCL
# chooses its algorithms by: src/graph/tuning.cc, ring, simple).
START, WITHIN, BETWEEN = 8.4e-6, 3.4e-6, 14.0e-6


@dataclass(frozen=True)
class Model:
    """Llama 3.1's sizes, from its config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int = 8
    vocab_size: int = 128256

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's products."""
        wide, narrow = self.hidden_size, self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        inner = self.intermediate_size
        return [(wide, wide), (wide, narrow), (wide, narrow), (wide, wide), (wide, inner), (wide, inner), (inner, wide)]

    def size(self, rank: int | None) -> ModelSize:
        """Parameters alone, with adapters of a rank or without."""
        adapters = sum(rank * (inputs + outputs) for inputs, outputs in self.linear) if rank else 0
        layer = sum(inputs * outputs for inputs, outputs in self.linear) + 2 * self.hidden_size + adapters
        ends = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        layers, total = self.num_hidden_layers, self.num_hidden_layers * layer + ends
        return ModelSize(
            parameters=total, trained=layers * adapters if rank else total, layers=layers, layer=layer, rest=ends,
            trained_layer=adapters if rank else layer, trained_rest=0 if rank else ends,
        )  # fmt: skip


LLAMA_8B, LLAMA_70B = Model(4096, 32, 32, 14336), Model(8192, 80, 64, 28672)
RECIPES = {
    "llama8b_lora": LLAMA_8B,
    "llama8b_full_8gpu": LLAMA_8B,
    "llama70b_qlora_fsdp": LLAMA_70B,
    "llama70b_full_fsdp": LLAMA_70B,
}


@dataclass(frozen=True)
class Work:
    """A recipe on its model."""

    name: str
    recipe: Recipe
    model: Model

    @property
    def found(self) -> ModelSize:
        return self.model.size(self.recipe.lora.rank if self.recipe.lora else None)

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a GPU."""
        assert isinstance(self.recipe.train.micro_batch_size, int)
        return self.recipe.train.micro_batch_size * self.recipe.data.max_length

    @property
    def flops(self) -> float:
        """Operations for a token, as `sft-recipe plan` counts them, with documents as long as a sequence."""
        config = SimpleNamespace(**vars(self.model))
        return flops.flops_per_token(self.recipe, self.found, config, self.recipe.data.max_length, dense=False)

    @property
    def compute(self) -> float:
        """Seconds of a micro-batch."""
        return self.tokens * self.flops / (GPU.teraflops * 1e12 * REACHED)

    @property
    def gathered(self) -> float:
        """Bytes of the weights that are gathered for one pass: half a byte of those in 4 bits, two of others."""
        found = self.found
        of_layers = found.parameters - found.trained - (found.rest - found.trained_rest)
        in_4_bits = of_layers if self.recipe.model.quantization else 0
        return 0.5 * in_4_bits + 2.0 * (found.parameters - in_4_bits)

    @property
    def collectives(self) -> tuple[int, float]:
        """How many, and the bytes that they carry, for a micro-batch (fsdp2) or a step (ddp)."""
        found = self.found
        if self.recipe.launch.strategy == "ddp":  # an all-reduce of float32 gradients is two collectives in one
            return 2, 2 * 4.0 * found.trained
        return 3 * (found.layers + 2), 2 * self.gathered + 4.0 * found.trained  # forward, backward; gradients

    def communication(self, gpus: int, between: float) -> float:
        """Seconds of these collectives, as rings, over machines that are linked by `between` bytes a second."""
        number, size = self.collectives
        machines = -(-gpus // A_MACHINE)
        slowest = NVLINK if machines == 1 else min(NVLINK, between)
        latency = START + (gpus - machines) * WITHIN + (machines - 1) * BETWEEN
        return number * latency + size * (gpus - 1) / gpus / (LINK * slowest)

    def sequences(self, gpus: int) -> int:
        """Of a step: the recipe's, or one micro-batch on each GPU where those are more."""
        return max(self.recipe.sequences_per_step, gpus * self.tokens // self.recipe.data.max_length)

    def share(self, gpus: int, between: float) -> float:
        """Of the time, that which is spent computing, where all is hidden behind it that can be.

        fsdp2: all but what is gathered for the first layer, in the forward and in the backward pass of each micro-batch.
        ddp: the all-reduce of a step, behind its last backward pass.
        """
        at_once = gpus * self.tokens // self.recipe.data.max_length
        accumulated = self.sequences(gpus) // at_once
        communication = self.communication(gpus, between)
        # Of the operations 2 are forward, 2 of what is computed again, 4 backward (2 where weights are frozen).
        forward = self.compute * 2 / (6 if self.recipe.lora else 8)
        if self.recipe.launch.strategy == "ddp":
            waited = max(0.0, communication - (self.compute - forward))
            return accumulated * self.compute / (accumulated * self.compute + waited)
        fetched = communication * self.gathered / self.collectives[1]
        first = fetched / self.found.layers
        rest = max(self.compute - forward, communication - fetched)
        return self.compute / (max(forward, fetched) + rest + first)


def works() -> list[Work]:
    """The recipes, with one sequence at once where that is auto: most GPUs for the same global batch."""
    found = []
    for name, model in RECIPES.items():
        file = bundled.folder() / f"{name}.yaml"
        auto = parse.load(file).recipe.train.micro_batch_size == "auto"
        found.append(Work(name, parse.load(file, ["train.micro_batch_size=1"] * auto).recipe, model))
    return found


def work_table() -> Iterator[str]:
    yield "| recipe | tokens per micro-batch | FLOPs per token | computation | communication |"
    yield "|---|---|---|---|---|"
    for work in works():
        unit = "step" if work.recipe.launch.strategy == "ddp" else "micro-batch"
        carried = f"{work.collectives[1] / 1e9:,.1f} GB per {unit}"
        yield f"| {work.name} | {work.tokens:,} | {work.flops:.2e} | {work.compute * 1000:,.0f} ms | {carried} |"


def strategy_table() -> Iterator[str]:
    """GB that a GPU sends (and receives) of Llama 3.1 8B, where there are many."""
    yield "| strategy | per micro-batch | per step | 8B full | 8B LoRA |"
    yield "|---|---|---|---|---|"
    full, lora = LLAMA_8B.size(None), LLAMA_8B.size(16)

    def row(name: str, often: str, once: str, size: Callable[[ModelSize], tuple[float, float]]) -> str:
        cells = [f"{a / 1e9:,.1f} and {b / 1e9:,.1f}" for a, b in (size(full), size(lora))]
        return f"| {name} | {often} | {once} | {' | '.join(cells)} |"

    yield row("ddp", "", "8 P", lambda found: (0, 8 * found.trained))
    yield row("zero2", "2 P", "2 P", lambda found: (2 * found.trained, 2 * found.trained))
    yield row("fsdp2", "4 N + 4 P", "", lambda found: (4 * found.parameters + 4 * found.trained, 0))
    yield row("zero3", "4 N + 2 P", "", lambda found: (4 * found.parameters + 2 * found.trained, 0))


def share_table() -> Iterator[str]:
    yield "| recipe | GPUs | sequences per step | NVLink or InfiniBand | computing | Ethernet | computing |"
    yield "|---|---|---|---|---|---|---|"
    for work in works():
        launch = work.recipe.launch
        for gpus in (8, 16, 64, 512):
            if gpus < launch.world_size:
                continue  # of its memory
            cells = []
            for between in (INFINIBAND, ETHERNET):
                alone = gpus <= A_MACHINE and between == ETHERNET
                cells += ["", ""] if alone else [
                    f"{work.communication(gpus, between) * 1000:,.0f} ms", f"{work.share(gpus, between):.0%}",
                ]  # fmt: skip
            yield f"| {work.name} | {gpus} | {work.sequences(gpus):,} | {' | '.join(cells)} |"


def tokens_table() -> Iterator[str]:
    """Tokens of a micro-batch from which on a GPU of 64 computes for longer than it waits, latency aside."""
    yield "| recipe | NVLink (8 GPUs) | InfiniBand (64) | Ethernet (64) |"
    yield "|---|---|---|---|"
    for work in works():
        if work.recipe.launch.strategy == "ddp":
            continue
        a_token = work.compute / work.tokens
        _, size = work.collectives
        cells = [
            size * (n - 1) / n / (LINK * link) / a_token for n, link in ((8, NVLINK), (64, INFINIBAND), (64, ETHERNET))
        ]
        yield f"| {work.name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} |"


def steps_table() -> Iterator[str]:
    """Steps of an epoch: tokens of the data by tokens of a step."""
    sizes = (5_000_000, 100_000_000, 2_000_000_000)
    yield "| recipe | GPUs | tokens per step | " + " | ".join(f"{size / 1e6:,.0f}M tokens" for size in sizes) + " |"
    yield "|---|---|---|" + "---|" * len(sizes)
    for work in works()[:2]:  # those of 70B are much alike
        for gpus in (8, 64, 512):
            a_step = work.sequences(gpus) * work.recipe.data.max_length
            yield f"| {work.name} | {gpus} | {a_step:,} | {' | '.join(f'{size / a_step:,.0f}' for size in sizes)} |"


TABLES = (strategy_table, work_table, share_table, tokens_table, steps_table)

if __name__ == "__main__":
    print("\n\n".join("\n".join(table()) for table in TABLES))

"""Training the built-in model: accumulation, schedule, evaluation loss, best checkpoint, failures."""

import math
import shutil
from collections import Counter
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sft_recipes.errors import RecipeError, RunError
from sft_recipes.models.compiled_layers import compile_layers
from sft_recipes.report import page
from sft_recipes.training import trainer
from tests import conftest
from tests.conftest import ROWS, WriteRecipe, metrics, run, write_rows
from tests.models import graphs

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
UNEQUAL = [
    {"instruction": f"Count to {n}.", "input": "x " * (n % 5), "output": " ".join(str(i) for i in range(n + 1))}
    for n in range(24)
]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, as they are before clipping."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.first = self.first or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def build(recipe: Path, *overrides: str) -> trainer.Trainer:
    return conftest.build(recipe, recipe.parent / "built", *overrides)


@pytest.mark.parametrize("packing", ["none", "bfd"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_accumulation_equals_the_large_batch(
    write_recipe: WriteRecipe, tmp_path: Path, packing: str, method: str
) -> None:
    """1 x 8 and 4 x 2 sequences of unequal lengths: losses and gradients to 1e-5 relative in float32."""
    write_rows(tmp_path / "train.jsonl", UNEQUAL)
    sections = {"lora": {"rank": 4}} if method == "lora" else {}
    recipe = write_recipe(
        data={"packing": packing, "eval": None, "shuffle": False},
        train={"max_steps": 2, "global_batch_size": 8, "max_grad_norm": 0.0},
        log={"every": 1},
        **sections,
    )
    losses, gradients = {}, {}
    for micro in (8, 2):
        sft = build(recipe, f"train.micro_batch_size={micro}")
        kept = Gradients()
        sft.add_callback(kept)
        sft.train()
        losses[micro] = [line["loss"] for line in sft.state.log_history if "loss" in line]
        gradients[micro] = kept.first

    assert len(losses[8]) == 2
    assert losses[2] == pytest.approx(losses[8], rel=1e-5)
    assert gradients[2].keys() == gradients[8].keys()
    for name, large in gradients[8].items():
        difference = (gradients[2][name] - large).norm() / large.norm().clamp(min=1e-12)
        assert difference < 1e-5, name


@pytest.mark.parametrize(
    ("scheduler", "formula"),
    [
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("linear", lambda x: 1 - x),
        ("constant_with_warmup", lambda _: 1.0),
    ],
)
def test_the_learning_rate_of_every_step_follows_the_formula(
    write_recipe: WriteRecipe, scheduler: str, formula: Any
) -> None:
    steps, warmup = 10, 3
    folder, _ = run(
        write_recipe(log={"every": 1}, data={"eval": None}, checkpoint={"every": None}),
        f"train.max_steps={steps}",
        "train.warmup_ratio=0.3",
        f"train.lr_scheduler={scheduler}",
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
    )
    expected = [
        step / warmup if step < warmup else formula((step - warmup) / (steps - warmup)) for step in range(steps)
    ]

    assert [line["learning_rate"] for line in metrics(folder)] == pytest.approx(
        [1e-3 * rate for rate in expected], rel=1e-6
    )


@pytest.mark.parametrize(
    ("lora", "checkpointing", "most"),
    [
        (None, True, 1),
        ({"rank": 2, "dropout": 0.1}, True, 1),
        ({"rank": 2}, 2, 2),
        ({"rank": 2}, False, 2),  # the first layer is given what needs no gradient
    ],
    ids=["full", "lora", "every other layer", "none"],
)
def test_compiled_layers_train_the_same_and_are_compiled_once(
    lora: dict[str, Any] | None,
    checkpointing: bool | int,
    most: int,
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batches of many lengths. Traced and differentiated as for any backend; inductor would take minutes here."""
    write_rows(tmp_path / "train.jsonl", UNEQUAL)
    torch.compiler.set_stance("default")  # which another test's optimizer may have changed
    torch.compiler.reset()
    recipe = write_recipe(
        lora=lora, train={"gradient_checkpointing": checkpointing},
        log={"every": 1}, eval={"generate": ["Say it."], "max_new_tokens": 3},
    )  # fmt: skip
    runs: Counter[str] = Counter()
    monkeypatch.setattr(
        "sft_recipes.training.build.compile_layers", partial(compile_layers, backend=graphs.counting(runs))
    )
    logged: list[list[dict[str, Any]]] = []
    steps: list[dict[str, int]] = []
    compiled_graphs: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            assert "inference" not in runs  # evaluation and answers are not compiled
            runs.clear()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(dict(runs))
            compiled_graphs.append(counters["stats"]["unique_graphs"])

    for compiled in (False, True):
        counters.clear()
        overrides = ["train.max_steps=5", "eval.every=2", f"train.compile={str(compiled).lower()}"]
        sft = conftest.build(recipe, tmp_path / str(compiled), *overrides)
        sft.add_callback(Steps())
        trainer.train(sft, None)
        logged.append([line for line in metrics(tmp_path / str(compiled)) if "loss" in line])
        assert len({batch["input_ids"].shape for batch in sft.get_train_dataloader()}) > 3

    assert steps[:5] == [{}] * 5
    # 4 layers, 2 micro-batches per step. The graph of the backward pass recomputes what is checkpointed.
    assert steps[5:] == [{"forward": 8, "backward": 8}] * 5
    assert not counters["graph_break"]
    assert 0 < compiled_graphs[5] == compiled_graphs[-1] <= most
    for eager, fast in zip(*logged, strict=True):
        assert fast["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert fast["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-4)


def test_bf16_on_a_cpu_without_it_is_a_warning(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, recipe = Console(file=StringIO()), write_recipe()
    conftest.build(recipe, tmp_path / "has", "train.mixed_precision=bf16", console=said)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    conftest.build(recipe, tmp_path / "no", console=said)
    assert said.file.getvalue() == ""
    conftest.build(recipe, tmp_path / "imitates", "train.mixed_precision=bf16", console=said)
    assert "train.mixed_precision: bf16 is emulated on this CPU" in said.file.getvalue()


def test_answers_use_the_precision_of_training(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(lora={}, model={"dtype": "bfloat16"}, eval={"generate": ["Say it."], "max_new_tokens": 3})
    sft = build(recipe, "train.mixed_precision=bf16")
    assert sft.generate_samples() == {}
    assert (sft.run_dir / "samples.jsonl").read_text("utf-8")


def test_the_eval_loss_does_not_depend_on_the_micro_batch(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """It is the mean over tokens: rows of unequal lengths in batches of 1, 2 and 5 give the same."""
    write_rows(tmp_path / "train.jsonl", UNEQUAL)
    recipe = write_recipe(data={"packing": "none"})
    losses = [
        build(recipe, f"train.micro_batch_size={micro}", f"train.global_batch_size={micro}").evaluate()
        for micro in (1, 2, 5)
    ]

    assert [line["eval_loss"] for line in losses] == pytest.approx([losses[0]["eval_loss"]] * 3, rel=1e-5)
    assert losses[0]["eval_perplexity"] == pytest.approx(math.exp(losses[0]["eval_loss"]))


def test_the_eval_loss_is_the_mean_over_tokens(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", UNEQUAL)
    sft = build(write_recipe())
    total, count = 0.0, 0
    with torch.no_grad():
        for row in sft.eval_dataset:
            start = 0
            for length in row["seq_lengths"]:  # each document on its own
                ids = torch.tensor([row["input_ids"][start : start + length]])
                labels = torch.tensor(row["labels"][start : start + length])
                logits = sft.model.eval()(input_ids=ids).logits[0, :-1].double()
                target = labels[1:]
                picked = torch.nn.functional.cross_entropy(logits[target >= 0], target[target >= 0], reduction="sum")
                total, count, start = total + picked.item(), count + int((target >= 0).sum()), start + length

    assert sft.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_packed_documents_do_not_attend_to_each_other(write_recipe: WriteRecipe, packing: str) -> None:
    """Changing one document of a packed batch leaves the loss of the others as it is."""
    sft = build(write_recipe(data={"packing": packing, "shuffle": False, "eval": None}))
    batch = next(iter(sft.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    with torch.no_grad():
        before = sft.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
        batch["input_ids"][0, starts[0] : starts[1]] = 7
        after = sft.model(**{k: v for k, v in batch.items() if k != "labels"}).logits

    assert torch.equal(before[0, starts[1] :], after[0, starts[1] :])
    assert not torch.equal(before[0, : starts[1]], after[0, : starts[1]])


def test_with_cross_document_attention_they_attend(write_recipe: WriteRecipe) -> None:
    sft = build(
        write_recipe(data={"packing": "wrapped", "cross_document_attention": True, "shuffle": False, "eval": None})
    )
    batch = next(iter(sft.get_train_dataloader()))
    with torch.no_grad():
        before = sft.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
        batch["input_ids"][0, 0] = 7
        after = sft.model(**{k: v for k, v in batch.items() if k != "labels"}).logits

    assert not torch.equal(before[0, -1], after[0, -1])


def test_the_best_checkpoint_is_exported(write_recipe: WriteRecipe) -> None:
    """A rate far too high makes the last weights worse than those of the first steps."""
    folder, _ = run(
        write_recipe(eval={"every": 1}, checkpoint={"every": 4, "export_best": True, "keep": 1}),
        "train.max_steps=8",
        "train.learning_rate=0.3",
        "train.warmup_ratio=0.6",
        "export.dtype=float32",
    )
    losses = {line["step"]: line["eval_loss"] for line in metrics(folder) if "eval_loss" in line and line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != 8

    recipe = write_recipe(model={"name": str(folder / "model")})
    assert build(recipe).evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert (folder / "checkpoints" / f"checkpoint-{best}").is_dir()


def test_validation_before_the_first_step_and_at_the_end(write_recipe: WriteRecipe) -> None:
    folder, said = run(write_recipe(eval={"every": None}), "train.max_steps=5")

    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [0, 5]
    assert "eval loss:" in said


def test_the_number_of_checkpoints_kept(write_recipe: WriteRecipe) -> None:
    folder, _ = run(write_recipe(checkpoint={"every": 1, "keep": 2}, data={"eval": None}), "train.max_steps=5")

    assert sorted(child.name for child in (folder / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_a_failed_training_is_one_line(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error:\nout of luck")

    monkeypatch.setattr(trainer.Trainer, "training_step", fail)
    with pytest.raises(RunError) as caught:
        run(write_recipe())

    [line] = caught.value.lines
    assert (
        "run: training failed after step 0: CUDA error: out of luck. Last checkpoint: none. Rows in this step: " in line
    )
    assert "train.jsonl:" in line


def test_stochastic_rounding_moves_weights_that_rounding_leaves(write_recipe: WriteRecipe) -> None:
    """bfloat16 weights at 1e-5: AdamW changes few of them, adamw_8bit_sr about as many as it should."""
    moved = {}
    for optimizer in ("adamw_torch_fused", "adamw_8bit_sr"):
        sft = build(
            write_recipe(model={"dtype": "bfloat16"}, data={"eval": None}),
            f"train.optimizer={optimizer}",
            "train.learning_rate=1e-5",
            "train.lr_scheduler=constant",
            "train.warmup_ratio=0",
            "train.max_steps=5",
        )
        weight = sft.model.model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        sft.train()
        moved[optimizer] = (weight != before).float().mean().item()

    assert moved["adamw_torch_fused"] < 0.2
    assert moved["adamw_8bit_sr"] > 1.5 * moved["adamw_torch_fused"]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit", "lion_8bit", "adafactor", "sgd", "rmsprop"])
def test_optimizers(write_recipe: WriteRecipe, optimizer: str) -> None:
    sft = build(write_recipe(), f"train.optimizer={optimizer}", "train.max_steps=8")
    before = sft.evaluate()["eval_loss"]
    sft.train()

    assert sft.evaluate()["eval_loss"] < before


def test_one_process_takes_one_device(write_recipe: WriteRecipe) -> None:
    """With several visible GPUs, the Trainer would wrap the model in nn.DataParallel."""
    assert build(write_recipe()).args.n_gpu <= 1


def test_checkpointing_changes_nothing_but_memory(write_recipe: WriteRecipe) -> None:
    losses = []
    for setting in ("false", "true", "2"):
        sft = build(write_recipe(data={"eval": None}), f"train.gradient_checkpointing={setting}")
        sft.train()
        losses.append([line["loss"] for line in sft.state.log_history if "loss" in line])

    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_an_incomplete_line_of_metrics(write_recipe: WriteRecipe) -> None:
    """A run that is killed while it writes leaves one."""
    recipe = write_recipe(checkpoint={"every": 1})
    folder, _ = run(recipe)
    before = metrics(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page.write(folder)
    shutil.rmtree(folder / "model")  # so that it is not finished
    run(recipe, resume=True)

    assert [line["step"] for line in metrics(folder)] == [line["step"] for line in before]


def test_a_merge_that_fails_keeps_the_adapter(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model is removed before the merge."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    train = trainer.train

    def train_and_lose_the_base(*args: Any) -> None:
        train(*args)
        base.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(trainer, "train", train_and_lose_the_base)
    with pytest.raises(RunError, match=r"not merged: .* After a fix: sft-recipe merge .*/run --out DIR"):
        run(write_recipe(model={"name": str(base)}, lora={"rank": 2}))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("mixed_precision", ["bf16", "no"])
def test_adapters_on_quantized_weights_are_trained_in_float32(write_recipe: WriteRecipe, mixed_precision: str) -> None:
    """TRL casts them to bfloat16."""
    sft = build(
        write_recipe(model={"quantization": "nf4"}, lora={"rank": 2, "modules_to_save": ["lm_head"]}),
        f"train.mixed_precision={mixed_precision}",
    )

    assert {p.dtype for p in sft.model.parameters() if p.requires_grad} == {torch.float32}
    sft.train()


def test_the_eval_loss_of_a_mixture_of_experts_is_that_of_its_tokens(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """It excludes the router loss, which training includes; the exported config is that of the base."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, router_aux_loss_coef=0.5,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "moe")
    sft = build(write_recipe(model={"name": str(tmp_path / "moe")}, data={"packing": "none"}))
    measured = sft.evaluate()["eval_loss"]

    losses = []
    for row in sft.eval_dataset:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = sft.model(ids, output_router_logits=False).logits
        losses.append(cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")[labels[0, 1:] != -100])
    assert measured == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert not sft.model.config.output_router_logits
    sft.train()


def test_answers_beyond_the_context_length(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"eval.max_new_tokens: with a prompt of \d+ tokens exceeds the context length of .*, 1024 \(got 1000\)\. ",
    ):
        run(write_recipe(eval={"generate": ["Say it."], "max_new_tokens": 1000}))
    assert not (tmp_path / "run").exists()


def test_the_seed_decides(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(lora={"rank": 2}, data={"eval": None}, export={"merge": False})
    weights = [
        (
            run(recipe, f"train.seed={seed}", f"output_dir={tmp_path / name}")[0]
            / "adapter"
            / "adapter_model.safetensors"
        ).read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]

    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_sequences_are_those_of_the_recipe(write_recipe: WriteRecipe) -> None:
    assert len(ROWS) == 24
    sft = build(write_recipe(data={"packing": "none"}))

    assert len(sft.train_dataset) == 18
    assert len(sft.eval_dataset) == 6

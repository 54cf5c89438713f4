import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig

from sft_recipes.errors import ModelError, RunError
from sft_recipes.memory.storage_tracker import StorageTracker
from sft_recipes.recipe.library_names import optimizers
from sft_recipes.training import preflight, trainer
from tests.conftest import WriteRecipe, build, metrics, run, write_rows
from tests.kills import TIMES

ON = {"preflight": True}
TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


@pytest.fixture
def opt(tmp_path: Path) -> str:
    """A small OPT, whose mask ignores restarting positions: with sdpa packed documents attend to each other."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=1024, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_a_model_that_leaks_between_packed_documents_is_refused(
    write_recipe: WriteRecipe, opt: str, packing: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="packed documents attend to each other in a model of type opt"):
        run(write_recipe(model={"name": opt, "attention": "sdpa"}, train=ON), f"data.packing={packing}")

    assert not (tmp_path / "run").exists()


def test_isolation_of_documents_in_one_micro_batch(write_recipe: WriteRecipe, opt: str, tmp_path: Path) -> None:
    """With one document per sequence, a micro-batch is still one row."""
    rows = [{"instruction": f"Say {n} times: {'fox ' * 9}", "output": "fox " * 9} for n in range(12)]
    write_rows(tmp_path / "train.jsonl", rows)
    model = {"name": opt, "attention": "sdpa"}
    recipe = write_recipe(model=model, data={"eval": None, "max_length": 100}, train=ON)

    with pytest.raises(ModelError, match="packed documents attend to each other"):
        run(recipe)
    folder, _ = run(recipe, "train.micro_batch_size=1")
    assert (folder / "model").is_dir()


@pytest.mark.parametrize(
    "overrides", [["data.packing=none"], ["data.packing=wrapped", "data.cross_document_attention=true"]]
)
def test_a_leaking_model_trains_where_documents_share_no_row(
    write_recipe: WriteRecipe, opt: str, overrides: list[str]
) -> None:
    folder, _ = run(write_recipe(model={"name": opt}, train=ON), *overrides)

    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_model_that_does_not_leak_passes(write_recipe: WriteRecipe, mixed_precision: str) -> None:
    folder, _ = run(
        write_recipe(model={"dtype": "bfloat16"}, lora={"rank": 1}, train=ON),
        f"train.mixed_precision={mixed_precision}",
    )

    assert (folder / "model").is_dir()


WAYS: dict[str, list[str]] = {
    "full": [],
    "LoRA": ["lora={'rank': 2, 'dropout': 0.1}"],
    "QLoRA": ["lora={'rank': 2, 'dropout': 0.1}", "model.quantization=nf4", "train.mixed_precision=bf16"],
    "embeddings": ["lora={'rank': 2, 'modules_to_save': ['embed_tokens']}"],
    "new tokens": ["lora={'rank': 2}", "model.new_tokens=[<a>]"],
    "padded": ["data.packing=none"],
    "checkpointed": ["lora={'rank': 2, 'dropout': 0.1}", "train.gradient_checkpointing=true"],
    "stochastic rounding": ["model.dtype=bfloat16", "train.optimizer=adamw_8bit_sr", "train.mixed_precision=bf16"],
    **{name: [f"train.optimizer={name}"] for name in ("adamw_bnb_8bit", "lion_8bit", "adafactor")},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_preflight_restores_all_state(write_recipe: WriteRecipe, tmp_path: Path, way: str) -> None:
    """Training is bitwise identical with and without the preflight."""
    weights, lines = [], []
    for name in ("true", "false"):
        sft = build(write_recipe(), tmp_path / name, f"train.preflight={name}", "log.every=1", *WAYS[way])
        trainer.train(sft, None)
        assert (sft.preflight is not None) == (name == "true")
        weights.append(sft.model.state_dict())
        lines.append([{key: line[key] for key in line.keys() - TIMES} for line in metrics(tmp_path / name)])

    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert lines[0] == lines[1]


def test_results_are_in_the_manifest(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder, said = run(write_recipe(lora={"rank": 2}, train=ON))
    found = json.loads((folder / "manifest.json").read_text("utf-8"))["preflight"]

    assert found["isolation"]["gradient_leak"] == 0
    assert 0 < found["base"]["loss"] < found["base"]["shuffled_loss"]
    assert found["largest_micro_batch"]["tokens"] > found["largest_micro_batch"]["eval_tokens"] / 2 > 0
    assert found["largest_micro_batch"]["trained_tensors"] == 56
    assert found["largest_micro_batch"]["tensors_without_gradient"] == 0
    assert found["eos"] == {"tokens": ["<|end|>"], "rows_without": 0}
    assert found["largest_micro_batch"]["peak_gib"] > found["predicted_peak_gib"] > 0
    assert "preflight: " in said
    other, _ = run(write_recipe(), "train.preflight=false", f"output_dir={tmp_path / 'other'}")
    assert json.loads((other / "manifest.json").read_text("utf-8"))["preflight"] == "skipped"


def test_out_of_memory_is_found_before_the_first_step(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest rows are tried, wherever they are in the training or evaluation data."""
    rows = [{"instruction": "Say.", "output": "word " * (60 if number in (3, 17) else 2)} for number in range(24)]
    write_rows(tmp_path / "train.jsonl", rows)
    seen: list[int] = []
    compute = trainer.Trainer.compute_loss

    def compute_loss(
        self: trainer.Trainer, network: object, inputs: dict[str, torch.Tensor], *args: object, **kwargs: object
    ) -> object:
        seen.append(inputs["input_ids"].numel())
        torch.empty(2**60 if seen[-1] > 150 else 1, dtype=torch.uint8)
        return compute(self, network, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "compute_loss", compute_loss)
    with pytest.raises(RunError, match=r"out of memory before the first step \(predicted peak .*, device memory "):
        run(write_recipe(data={"eval": None, "packing": "none"}, train=ON))
    assert len(seen) == 1
    assert not (tmp_path / "run").exists()


def test_random_weights_are_a_warning(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.randn_like(value) * 0.02 for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    _, said = run(write_recipe(model={"name": str(folder)}, train=ON))
    assert "not much better than the same tokens in random order" in said
    _, said = run(write_recipe(train=ON), f"output_dir={tmp_path / 'other'}")
    assert "in random order" not in said


def test_nonfinite_weights(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="the loss on the data before the first step is nan: numbers overflow in"):
        run(write_recipe(model={"name": str(folder)}, train=ON))


def test_weights_without_gradient_are_named(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

    def built(name: str) -> Any:
        return build(write_recipe(train=ON), tmp_path / name)

    sft = built("idle")
    sft.model.model.layers[1].tower = Idle()
    trainer.train(sft, None)
    assert sft.preflight.warnings == [
        "these trained weights get no gradient from the data: model.layers.1.tower.weight"
    ]

    sft = built("frozen")
    sft.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"model.norm.weight is frozen but would be trained"):
        trainer.train(sft, None)

    sft = built("nothing")
    sft.model.requires_grad_(False)
    idle = sft.model.model.norm.weight.requires_grad_(True)
    sft.compute_loss = lambda *_, **__: idle.sum() * 0
    with pytest.raises(ModelError, match="no trained weight gets a gradient from the data"):
        trainer.train(sft, None)


# --- It is a step of training, and no more ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "checkpointed", "noise", "every second layer in bf16"])
def test_the_preflight_runs_the_model_that_is_trained(
    write_recipe: WriteRecipe, tmp_path: Path, way: str, monkeypatch: Any
) -> None:
    """What transformers and accelerate set up within Trainer.train() is set up: each pass over the largest micro-batch is
    one of training's."""
    overrides = {
        "plain": [],
        "checkpointed": ["train.gradient_checkpointing=true"],
        "noise": ["trl={'neftune_noise_alpha': 5.0}"],
        "every second layer in bf16": ["train.gradient_checkpointing=2", "train.mixed_precision=bf16"],
    }[way]
    sft = build(write_recipe(lora={"rank": 2}, train=ON), tmp_path / "run", *overrides)
    layers = [module for module in sft.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    embeddings = sft.model.get_input_embeddings()
    passes: dict[str, list[Any]] = {"preflight": [], "training": []}
    training_step = sft.training_step

    def spy(model: torch.nn.Module, *args: Any) -> Any:
        found = [type(model).__name__, model is sft.model_wrapped, type(sft.optimizer).__name__]

        def at_layer(module: torch.nn.Module, _inputs: Any) -> None:
            noise = [hook.__name__ for hook in embeddings._forward_hooks.values()]
            found.append((module.training, noise, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

        hook = layers[0].register_forward_pre_hook(at_layer)
        loss = training_step(model, *args)
        hook.remove()
        found.append([layer.gradient_checkpointing for layer in layers])
        passes["training" if sft.preflight else "preflight"].append(found)
        return loss

    monkeypatch.setattr(sft, "training_step", spy)
    trainer.train(sft, None)

    assert len(passes["preflight"]) == 2
    assert len(passes["training"]) > 3
    assert all(each == passes["training"][0] for each in passes["preflight"] + passes["training"])
    checkpointed = {"checkpointed": [True] * 4, "every second layer in bf16": [True, False] * 2}
    assert passes["training"][0][-1] == checkpointed.get(way, [False] * 4)
    training, hooks, autocast, _ = passes["training"][0][3]
    assert training
    assert ("neftune_post_forward_hook" in hooks) == (way == "noise")
    assert autocast == way.endswith("bf16")


class _Live(StorageTracker):
    """Counts storages of real tensors, the values of which can be read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), self.part)
        return out


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_its_peak_memory_is_that_of_training(
    write_recipe: WriteRecipe, tmp_path: Path, method: str, accumulation: int, monkeypatch: Any
) -> None:
    """The peak predicted for a training step is that of the preflight. Nearly all micro-batches are equally long here."""
    train = ON | {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": None,
    }
    recipe = write_recipe(
        data={"eval": None, "packing": "wrapped"}, train=train, **({"lora": {"rank": 2}} if method == "LoRA" else {})
    )
    sft = build(recipe, tmp_path / "run")
    monkeypatch.setattr(preflight, "_predict", lambda *_: {"predicted_peak_gib": None, "flops_per_token": None})
    with _Live() as live:
        live.enter("preflight", "")
        trainer.train(sft, None, lambda: live.enter("training", ""))
    found = {phase: peak.total() for phase, peak in live.peaks.items()}

    assert found["preflight"] == pytest.approx(found["training"], rel=0.01)


# --- Optimizers -------------------------------------------------------------------------------------------------------


class _Eager(torch.optim.Adagrad):
    """Adagrad of torch 2.11: states are created by the constructor alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, 0.1)}


def _optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adagrad of torch 2.11":
        return _Eager(parameters, lr=0.1)
    stochastic = name == "adamw_8bit_sr"
    arguments = SFTConfig(
        output_dir="unused", optim="adamw_torch_8bit" if stochastic else name, weight_decay=0.1, use_cpu=True, bf16=False,
        optim_args="bf16_stochastic_round=True" if stochastic else None,
    )  # fmt: skip
    kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*sorted(optimizers()), "adamw_8bit_sr", "adagrad of torch 2.11"])
def test_trial_steps_leave_every_optimizer_unchanged(name: str) -> None:
    """Two trial steps and then one step are that one step, with and without states from before."""

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(64, 128).bfloat16().float()), torch.nn.Parameter(torch.randn(5) * 1e-3)]

    def step(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter], seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    trained, twins = parameters(), parameters()
    try:
        optimizer, twin = _optimizer(name, trained), _optimizer(name, twins)
    except (ImportError, ValueError) as error:
        pytest.skip(f"cannot be made here: {error}")
    with torch.compiler.set_stance("force_eager"):
        for seed in (1, 2):
            before = copy.deepcopy([parameter.data for parameter in trained]), set(optimizer.state)
            create = name.startswith(preflight._TRIAL_STEPS)
            with preflight._harmless_steps(optimizer, create_states=create):
                for trial in (7, 8):
                    step(optimizer, trained, trial)
            assert all(map(torch.equal, before[0], trained))
            assert set(optimizer.state) == before[1]
            step(optimizer, trained, seed)
            step(twin, twins, seed)
            assert all(map(torch.equal, trained, twins))


def test_a_loss_scaler_is_unchanged(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """With fp16, overflowing gradients neither prevent the creation of states nor lower the scale."""
    found = []
    for name in ("true", "false"):
        sft = build(write_recipe(), tmp_path / name, f"train.preflight={name}", "train.max_steps=2")
        sft.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
        trainer.train(sft, None)
        found.append((sft.accelerator.scaler.state_dict(), sft.model.state_dict()))

    assert found[0][0] == found[1][0]
    assert found[0][0]["scale"] < 1e38  # halved by each step
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_optimizer_states_of_the_constructor_are_kept(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "Adagrad", _Eager)
    folder, _ = run(write_recipe(train=ON | {"optimizer": "adagrad"}))

    assert (folder / "model").is_dir()


def test_the_preflight_precedes_trackers_and_progress_bar(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    sft = build(write_recipe(), tmp_path / "run", "log.to=[tensorboard]")
    kinds = [type(callback).__name__ for callback in sft.callback_handler.callbacks]

    assert kinds[:2] == ["DefaultFlowCallback", "_BeforeTraining"]  # the first has nothing to do when training begins


# --- What is left behind ----------------------------------------------------------------------------------------------


def test_a_rejected_resume_discards_nothing(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Manifest and metrics of a run are unchanged if the preflight rejects its resume."""
    recipe = write_recipe(train=ON | {"max_steps": 4}, checkpoint={"every": 2}, log={"every": 1})
    step = trainer.Trainer.training_step

    def fails(self: trainer.Trainer, *args: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise OSError("the machine is gone")
        return step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "training_step", fails)
    with pytest.raises(RunError, match="training failed after step 3: the machine is gone"):
        run(recipe)
    before = {file: (tmp_path / "run" / file).read_bytes() for file in ("manifest.json", "metrics.jsonl")}

    def refuses(*_: Any) -> None:
        raise ModelError("model.name: no")

    monkeypatch.setattr(trainer.Trainer, "training_step", step)
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "_check_base_loss", refuses)
        with pytest.raises(ModelError, match="no"):
            run(recipe, resume=True)
    assert before == {file: (tmp_path / "run" / file).read_bytes() for file in before}

    folder, _ = run(recipe, resume=True)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert [again["preflight"]["isolation"]["gradient_leak"] for again in manifest["resumed"]] == [0]

"""Names of the libraries that are not public: they stand in `upstream.py` only, and each does what the package relies on."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments
from trl.trainer import utils as trl_utils

from sft_recipes import upstream
from tests.conftest import WriteRecipe, build

pytestmark = pytest.mark.compatibility
PACKAGE = Path(__file__).parent.parent / "sft_recipes"
MODULES = sorted(PACKAGE.rglob("*.py"))
STANDARD = {"os._exit", "point._replace"}  # documented; of named tuples


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")


def defined(tree: ast.AST) -> set[str]:
    """Names of functions, methods, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def used(tree: ast.AST) -> set[str]:
    """Private attributes that a module reads or writes, also by `getattr` and the like, and private modules and names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node) not in STANDARD:
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "patch.object"):
            names |= {each.value for each in node.args[1:2] if isinstance(each, ast.Constant) and private(each.value)}
        elif isinstance(node, ast.ImportFrom):
            names |= {part for part in (node.module or "").split(".") if private(part)}
            names |= {alias.name for alias in node.names if private(alias.name)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".") if private(part)}
    return names


def test_private_names_stand_in_upstream_only() -> None:
    trees = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text("utf-8")) for file in MODULES}
    ours = set().union(*(defined(tree) for name, tree in trees.items() if name != "upstream.py"))
    found = {name: sorted(used(tree) - ours) for name, tree in trees.items() if name != "upstream.py"}

    assert {name: names for name, names in found.items() if names} == {}


def test_no_private_method_of_a_library_is_overridden() -> None:
    overridden = set()
    for file in MODULES:
        if file.stem == "__main__" or file.name == "upstream.py":
            continue
        name = ".".join(("sft_recipes", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for kind in vars(importlib.import_module(name)).values():
            if isinstance(kind, type) and kind.__module__ == name:
                theirs = [base for base in kind.__mro__ if not base.__module__.startswith("sft_recipes")]
                overridden |= {
                    f"{name}.{kind.__name__}.{method}"
                    for method, value in vars(kind).items()
                    if private(method) and inspect.isfunction(value) and any(method in vars(base) for base in theirs)
                }

    assert overridden == set()


def test_nothing_is_patched() -> None:
    assert [file.name for file in MODULES if "unittest" in file.read_text("utf-8")] == []


# --- Does each name do what the package relies on? -------------------------------------------------------------------


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(PACKAGE / "builtin" / "tiny")


def test_checkpointing() -> None:
    assert hasattr(TrainingArguments, upstream.CHECKPOINTING), (
        "transformers has renamed gradient checkpointing. Choose the name by version in upstream.CHECKPOINTING."
    )


def test_attention_of(tiny: LlamaForCausalLM) -> None:
    tiny.set_attn_implementation("eager")
    assert upstream.attention_of(tiny.config) == "eager", (
        "A config no longer tells its attention. Read it in upstream.attention_of where set_attn_implementation writes it."
    )


def test_supports() -> None:
    features = ("sdpa", "flash_attn", "attention_backend")
    assert [upstream.supports(LlamaForCausalLM, feature) for feature in features] == [True] * 3, (
        "Model classes no longer declare what they support. Find what transformers checks in set_attn_implementation, and "
        "read it in upstream.supports; otherwise varlen is never selected."
    )


def test_float32_modules(tiny: LlamaForCausalLM) -> None:
    tiny._keep_in_fp32_modules, tiny._keep_in_fp32_modules_strict = {"half"}, {"always"}
    source = inspect.getsource(transformers.modeling_utils)
    assert upstream.float32_modules(tiny, torch.bfloat16) == ["always"]
    assert upstream.float32_modules(tiny, torch.float16) == ["always", "half"]
    assert all(f"._keep_in_fp32_modules{suffix}" in source for suffix in ("", "_strict")), (
        "transformers keeps weights in float32 by other names. Read them in upstream.float32_modules; otherwise the proof of "
        "a merge fails for mixtures of experts, and fsdp2 broadcasts wrong types."
    )


def test_unsaved_weights_and_buffers(tiny: LlamaForCausalLM) -> None:
    rotary = tiny.model.rotary_emb
    assert "inv_freq" in upstream.unsaved_buffers(rotary), (
        "torch names buffers that are not saved differently. Compare named_buffers() with state_dict() in "
        "upstream.unsaved_buffers."
    )
    assert hasattr(tiny, "_keys_to_ignore_on_save"), (
        "transformers leaves weights out of files by another name. Read it in upstream.unsaved_weights, or export a sharded "
        "model with more than save_pretrained writes."
    )
    assert upstream.unsaved_weights(tiny) == set()


def test_compiled_graphs() -> None:
    before = upstream.compiled_graphs()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert upstream.compiled_graphs() > before, (
        "torch counts compiled graphs elsewhere. Find the counter, or remove upstream.compiled_graphs and the warning of "
        "train.compile that a model cannot be compiled."
    )


def test_modes_of_torch() -> None:
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with upstream.FakeTensorMode(), Seen():
        torch.ones(2).to(torch.bfloat16)
    assert upstream.CAST in seen, (
        "torch casts with another operator. Name it in upstream.CAST; otherwise `plan` counts autocast's copies as weights."
    )
    assert issubclass(upstream.TorchDispatchMode, object)


def test_hooks_and_averages_of_the_trainer(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Names of transformers' Trainer and of SFTTrainer."""
    sft, saved = build(write_recipe(checkpoint={"every": 2}, log={"every": 4}), tmp_path / "run"), []
    save = sft.save_checkpoint

    def kept() -> None:
        saved.append(upstream.averages(sft))
        save()

    sft.save_checkpoint = kept
    sft.train()

    assert saved, (
        "The Trainer no longer saves by _save_checkpoint. Override its successor in upstream.SaveHook; otherwise checkpoints "
        "are neither atomic nor complete."
    )
    files = {file.name for file in (tmp_path / "run" / "checkpoints" / "checkpoint-3").iterdir()}
    assert files >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}, (
        "Parts of a checkpoint are saved by other methods. Call them in upstream.save_training_state."
    )
    assert (saved[0].steps, len(saved[0].values["train"]["mean_token_accuracy"])) == (1, 2), (
        "Running averages have moved. Find them in Trainer.log and SFTTrainer.log, and read them in upstream.averages; "
        "otherwise the first log after a resume differs."
    )
    assert saved[0].loss > 0
    upstream.set_averages(sft, saved[0])
    assert upstream.averages(sft) == saved[0]


def test_what_trls_head_reads_from_a_config() -> None:
    source = inspect.getsource(trl_utils.add_fused_lm_head)
    keys = set(re.findall(r'getattr\(\s*text_config, "(\w+)"', source)) | set(re.findall(r"text_config\.(\w+)", source))
    known = {"final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"}
    routers = {"output_router_logits", "router_aux_loss_coef", "num_experts", "num_experts_per_tok", "model_type"}
    assert keys <= known | routers, (
        f"TRL computes logits by more keys of a config: {keys - known - routers}. Read them in models/cpu_loss.py, and "
        "compare both in tests/models/test_cpu_loss.py."
    )


def test_a_variant_of_lora_replaces_the_forward_pass() -> None:
    assert set(inspect.signature(LoraVariant.forward).parameters) >= {"module", "active_adapter", "x", "result"}, (
        "PEFT calls variants of LoRA differently. Adapt models/lora_addition.py, or remove it: PEFT's own addition is slower, "
        "and equal."
    )
    assert "lora_variant" in inspect.getsource(LoraLayer)


def test_deepspeeds_link() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    assert upstream.DEEPSPEED_LINKED in inspect.getsource(zero), (
        "DeepSpeed links optimizer states differently. If zero2 with the preflight resumes exactly without it, remove "
        "upstream.DEEPSPEED_LINKED."
    )


def test_accelerate_forgets() -> None:
    from accelerate import PartialState

    before = PartialState(cpu=True)
    upstream.reset_accelerate()
    assert not before.initialized, (
        "accelerate keeps its state. Find what TrainingArguments calls before a new PartialState, and call it in "
        "upstream.reset_accelerate; otherwise rank 0 waits for others while it exports."
    )


def test_trackio() -> None:
    # In a process of its own: trackio reads its directory once, on import.
    code = "import trackio.run; print(hasattr(trackio.run.Run, '_get_username'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("trackio cannot be imported")
    callback = inspect.getsource(transformers.integrations.TrackioCallback)
    assert done.stdout.split() == ["True"], (
        "trackio finds the user's name elsewhere. If a local run with a token but no internet still begins at once, "
        "remove upstream.keep_trackio_offline."
    )
    assert all(f"self.{name}" in callback for name in ("_initialized", "_space_id")), (
        "transformers' TrackioCallback notes otherwise that it is set up. Set that in upstream.trackio_is_set_up."
    )


def test_experts_of_float32() -> None:
    called = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    rows, experts = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
    with Record():
        torch.nn.functional.grouped_mm(rows, experts, offs=torch.tensor([2, 4], dtype=torch.int32))
    assert upstream.GROUPED_MM in called, (
        "torch.nn.functional.grouped_mm calls another function. Intercept that one in memory/fake_kernels.py, or, if fake "
        "tensors in float32 work, none."
    )


def test_values_of_fake_tensors() -> None:
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        torch.ones(1).double().item()
    assert {upstream.ITEM, upstream.CAST} <= set(called), (
        "torch reads or casts a tensor by another operation. memory/storage_tracker.py has to know it, or traces fail."
    )

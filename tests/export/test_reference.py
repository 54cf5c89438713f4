"""What the training process records of the trained model, and how exports are compared with it."""

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sft_recipes.errors import ModelError, RunError
from sft_recipes.export import merge, reference, save_model, verify
from sft_recipes.export.reference import run_model
from sft_recipes.run_dir import REFERENCE
from tests.conftest import WriteRecipe, run

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"
ROWS = [
    {"input_ids": list(range(first, first + length)), "labels": [-100] * 3 + list(range(first + 3, first + length))}
    for first, length in ((5, 9), (40, 30), (7, 17))
]
BF16 = {"model": {"name": "builtin:tiny", "dtype": "bfloat16"}, "train": {"mixed_precision": "bf16"}}
LORA = {"lora": {"rank": 2}}
FULL = {"model": {"name": "builtin:tiny", "dtype": "float32"}, "train": {"mixed_precision": "bf16"}}
VARLEN = {"model": {**BF16["model"], "attention": "varlen"}}
NF4 = {"model": {**BF16["model"], "quantization": "nf4"}, **LORA}
INT8 = {"model": {**BF16["model"], "quantization": "int8"}, **LORA}
NEW = {"model": {**BF16["model"], "new_tokens": ["<word>"]}, **LORA}
HEAD = {"lora": {"rank": 2, "modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize(
    "sections",
    [BF16 | LORA, BF16 | VARLEN | LORA, FULL, BF16, BF16 | NF4, BF16 | INT8, BF16 | NEW, BF16 | HEAD],
    ids=[
        "LoRA",
        "varlen",
        "full, float32 under autocast",
        "full, bfloat16",
        "nf4",
        "int8",
        "new tokens",
        "head in full",
    ],
)
def test_exports_are_compared_with_the_trained_model(write_recipe: WriteRecipe, sections: dict[str, Any]) -> None:
    folder, said = run(write_recipe(**sections))

    assert "verify: passed in a separate process" in said
    known = reference.load(folder / REFERENCE)
    assert known is not None
    assert known.compute == "float32"
    assert (known.rounded is None) == ("lora" in sections)
    assert len(known.trained.losses) == len(json.loads((folder / "probe.json").read_text("utf-8"))["rows"])
    assert (known.base is None) == ("lora" not in sections)
    report = json.loads((folder / "model" / ("merge.json" if "lora" in sections else "export.json")).read_text("utf-8"))
    figures = report["verification"].get(report.get("merged_into"), report["verification"])
    if "original" not in report["verification"] or len(report["verification"]) == 1:
        assert figures["trained_loss"] == pytest.approx(known.trained.loss)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter on all layers of the built-in model, without a run."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False, target_modules="all-linear"
    )
    peft.get_peft_model(model, settings).save_pretrained(str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_model_in_half_precision_computes_in_float32() -> None:
    half, whole = (AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    before = {name: weight.clone() for name, weight in half.state_dict().items()}
    found, expected = run_model(half, ROWS), run_model(whole, ROWS)

    assert float(found.logit_diff(expected).max()) < 1e-5
    assert [len(losses) for losses in found.losses] == [6, 27, 14]
    assert float(run_model(half, ROWS, compute=None).logit_diff(expected).max()) > 0.01
    after = half.state_dict()
    assert all(
        torch.equal(weight, after[name]) and after[name].dtype == torch.bfloat16 for name, weight in before.items()
    )
    assert half.get_input_embeddings().weight is half.get_output_embeddings().weight


def test_float32_is_not_multiplied_as_tf32() -> None:
    """With trl.tf32 the training may do so, and the verifying process would not."""
    matmul, seen = torch.backends.cuda.matmul, set()
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        model = AutoModelForCausalLM.from_pretrained(TINY)
        model.register_forward_pre_hook(lambda *_: seen.add(matmul.fp32_precision))
        reference.run_model(model, [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}])
        assert seen == {"ieee"}
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_rows_in_one_batch_are_as_they_are_alone() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    together = run_model(model, ROWS)
    for number, row in enumerate(ROWS):
        alone = run_model(model, [row])
        torch.testing.assert_close(together.logits[number], alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.losses[number], alone.losses[0], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_the_files(tmp_path: Path) -> None:
    """Memory for one layer in float32, not for the model."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=4
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    gc.collect()
    size = (tmp_path / "model.safetensors").stat().st_size
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    before = _anonymous()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=verify._widest_dtype(tmp_path))
    run_model(model, rows)

    assert _anonymous() - before < size / 2


def _anonymous() -> int:
    """Bytes of this process's memory that are not of files."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Count models loaded by verification, forward passes, and models in memory at once."""
    found: dict[str, Any] = {"models": 0, "passes": 0, "at once": 0}
    alive: list[Any] = []
    from_pretrained, examine = AutoModelForCausalLM.from_pretrained, verify.compare_outputs

    def loads(*args: Any, **kwargs: Any) -> Any:
        loaded = from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        found["models"] += 1
        alive.append(weakref.ref(model))
        gc.collect()
        found["at once"] = max(found["at once"], sum(each() is not None for each in alive))
        return loaded

    def passes(*args: Any, **kwargs: Any) -> Any:
        found["passes"] += 1
        return run_model(*args, **kwargs)

    def counting(request: verify.Request) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
            patch.setattr(verify, "run_model", passes)
            return examine(request)

    monkeypatch.setattr(verify, "verify_in_subprocess", counting)
    return found


def test_a_run_is_verified_with_the_exported_model_alone(write_recipe: WriteRecipe, counted: dict[str, Any]) -> None:
    run(write_recipe(**LORA))

    assert counted == {"models": 1, "passes": 2, "at once": 1}  # its weights, and the sums before they are rounded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_run_is_verified_with_one_model_in_memory(
    write_recipe: WriteRecipe, counted: dict[str, Any], dtype: str
) -> None:
    run(write_recipe(export={"dtype": dtype}))

    assert counted == {"models": 2, "passes": 2, "at once": 1}  # the base, for what the training has changed


def test_an_adapter_alone_is_verified_with_one_model_in_memory(adapter: Path, counted: dict[str, Any]) -> None:
    merge.merge(adapter, adapter.parent / "out")

    assert counted == {"models": 2, "passes": 4, "at once": 1}  # with and without the adapter; rounded and not


def test_a_base_that_changed_while_the_run_trained_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Base and adapter agree with what is merged, and the trained model does not."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    folder, _ = run(write_recipe(model={"name": str(base), "dtype": "float32"}, export={"merge": False}, **LORA))
    weights = load_file(base / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})

    with pytest.raises(
        RunError, match="out: verification failed: original: the exported model is not the trained model"
    ):
        merge.merge(folder / "adapter", tmp_path / "out")
    (folder / REFERENCE).unlink()
    merge.merge(folder / "adapter", tmp_path / "out")  # nothing tells


def test_what_peft_merges_wrongly_is_refused(tmp_path: Path) -> None:
    """LoRA on embeddings and head that share a weight, each with an adapter of its own (PEFT 0.21)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )  # fmt: skip
    peft.get_peft_model(model, settings).save_pretrained(str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "adapter")

    with pytest.raises(RunError, match="not the trained model: max logit difference"):
        merge.merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")


def test_an_adapter_that_is_not_the_recorded_one_is_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    folder, _ = run(write_recipe(export={"merge": False}, **LORA))
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})

    with pytest.raises(RunError, match="not the trained model"):
        merge.merge(folder / "adapter", tmp_path / "out")


@pytest.mark.parametrize("kind", ["damaged", "of other rows"])
def test_a_record_that_cannot_be_used(write_recipe: WriteRecipe, tmp_path: Path, kind: str) -> None:
    folder, _ = run(write_recipe(export={"merge": False}, **LORA))
    if kind == "damaged":
        (folder / REFERENCE).write_bytes(b"not safetensors")
    else:
        known = reference.load(folder / REFERENCE)
        assert known is not None
        known.of_rows([0]).save(folder / REFERENCE)

    with pytest.raises(
        (ModelError, RunError), match=r"reference.safetensors: (cannot be read|does not match the rows)"
    ):
        merge.merge(folder / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


UP, Q, NORM, OUT = (
    f"model.layers.1.{name}.weight"
    for name in ("mlp.up_proj", "self_attn.q_proj", "input_layernorm", "self_attn.o_proj")
)
Weights = dict[str, torch.Tensor]


def _one_bit(name: str) -> Callable[[Weights], None]:
    def flip(weights: Weights) -> None:
        bits = weights[name].view(torch.int16)
        bits.view(-1)[77] ^= 1 << 2

    return flip


def _put(name: str, make: Callable[[Weights], torch.Tensor]) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = make(weights).contiguous()

    return change


FAULTS: dict[str, Callable[[Weights], Any]] = {
    "one bit, adapted": _one_bit(UP),
    "one bit, not adapted": _one_bit("model.embed_tokens.weight"),
    "one bit of a norm": _one_bit(NORM),
    "transposed": _put(OUT, lambda weights: weights[OUT].T.clone()),
    "another layer's": _put(UP, lambda weights: weights[UP.replace(".1.", ".2.")].clone()),
    "rows shifted by one": _put("model.embed_tokens.weight", lambda w: w["model.embed_tokens.weight"].roll(1, 0)),
    "two heads swapped": _put(Q, lambda weights: torch.cat([weights[Q][16:32], weights[Q][:16], weights[Q][32:]])),
    "scaled": _put(UP, lambda weights: weights[UP] * 1.01),
    "not a number": _put(UP, lambda weights: weights[UP] * float("nan")),
    "a tensor less": lambda weights: weights.pop(NORM),
    "a tensor more": _put("model.layers.9.weight", lambda weights: weights[UP].clone()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_weights_is_refused(
    adapter: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        FAULTS[fault](weights)
        save_file(weights, file, {"format": "pt"})
        save_model.save_around(model, tokenizer, folder, **options)

    monkeypatch.setattr(merge, "save_around", wrong)
    with pytest.raises(RunError, match="verification failed: original: "):
        merge.merge(adapter, adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_fault_in_the_config_is_refused(adapter: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if rounding hides its effect."""

    def wrong(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        save_model.save_around(model, tokenizer, folder, **options)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        where = config if key in config else config["rope_parameters"]
        where[key] *= 1000 if key == "rms_norm_eps" else 1.01
        if "rope_theta" in config:
            config["rope_parameters"]["rope_theta"] = config["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config), "utf-8")

    monkeypatch.setattr(merge, "save_around", wrong)
    with pytest.raises(RunError, match="original: the exported model is not the trained model"):
        merge.merge(adapter, adapter.parent / "out")


@pytest.mark.parametrize(
    ("free", "placed"),
    [((30, 70), {"": 1}), ((6, 6), None), ((10, 10), "balanced"), ((3, 3), None)],
    ids=["the emptier GPU", "full GPUs", "all GPUs", "no room at all"],
)
def test_a_gpu_is_used_if_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: tuple[int, int], placed: Any
) -> None:
    """A model of 9 GiB, whose files hold nothing."""
    from sft_recipes.export.safetensors_io import StoredTensor

    files = {
        f"model.layers.{layer}.up.weight": StoredTensor(tmp_path, "", torch.bfloat16, (1 << 24, 4))
        for layer in range(72)
    }
    monkeypatch.setattr(verify, "read_model", lambda folder: files)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number] * 2**30, 80 * 2**30))

    assert verify._device_map(tmp_path) == placed


def test_large_models_run_few_rows_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_recipes.export.safetensors_io import StoredTensor

    request = verify.Request({"x": str(tmp_path)}, "bfloat16", "", [], "", rows=ROWS)
    weight = StoredTensor(tmp_path, "", torch.bfloat16, (8_000_000_000,))
    monkeypatch.setattr(verify, "read_model", lambda folder: {"w": weight})

    assert verify._select_rows(request, on_cpu=True) == [0]
    assert verify._select_rows(request, on_cpu=False) == [0, 1, 2]
    request.models["y"] = request.models["x"]
    assert verify._select_rows(request, on_cpu=True) == [0, 1, 2]  # a loss of few rows would not decide

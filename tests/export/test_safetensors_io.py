import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sft_recipes.errors import ModelError
from sft_recipes.export import safetensors_io
from sft_recipes.export.safetensors_io import StoredTensor

TENSORS = {
    "wide": torch.randn(300, 70),
    "half": torch.randn(5, 3, 2).to(torch.bfloat16),
    "line": torch.randn(7).half(),
    "one": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "numbers": torch.arange(6),
    "flags": torch.tensor([True, False]),
}


@dataclass
class Constant:
    shape: tuple[int, ...]
    value: float
    dtype: torch.dtype = torch.float32

    def blocks(self, height: int) -> Iterator[torch.Tensor]:
        for first, last in safetensors_io.ranges(self.shape, height):
            yield torch.full((last - first, *self.shape[1:]), self.value)


def stored(tmp_path: Path) -> dict[str, StoredTensor]:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return safetensors_io.read_file(tmp_path / "model.safetensors")


def test_tensors_are_read_as_written(tmp_path: Path) -> None:
    found = stored(tmp_path)

    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name].whole(), tensor), name
        assert found[name].dtype == tensor.dtype
    assert torch.equal(found["wide"].rows(17, 40), TENSORS["wide"][17:40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_safetensors_reads_what_is_written(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    """Floating-point tensors in the output dtype, others unchanged."""
    out = tmp_path / "out"
    out.mkdir()
    safetensors_io.write(stored(tmp_path), out, dtype, size)

    files = sorted(out.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor.to(dtype) if tensor.is_floating_point() else tensor), name
    if size == "5GB":
        assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    else:
        index = json.loads((out / safetensors_io.INDEX).read_text("utf-8"))
        assert index["weight_map"].keys() == TENSORS.keys()
        assert {out / name for name in index["weight_map"].values()} == set(files)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.dtype.itemsize for t in read.values())
        assert all(file.stat().st_size < 11_000 for file in files if "wide" not in load_file(file))
    assert {name: each.whole().sum() for name, each in safetensors_io.read_model(out).items()} == {
        name: tensor.sum() for name, tensor in read.items()
    }


@given(rows=st.integers(1, 40), width=st.integers(1, 9), block=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_blocks_cover_all_rows_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, block: int
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    base = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    save_file({"a": base}, folder / "base.safetensors")
    heights: list[int] = []

    class PlusOne(StoredTensor):
        verbatim = False

        def blocks(self, height: int) -> Iterator[torch.Tensor]:
            for each in super().blocks(height):
                heights.append(len(each))
                yield each + 1

    source = safetensors_io.read_file(folder / "base.safetensors")["a"]
    before, safetensors_io._BLOCK = safetensors_io._BLOCK, block
    try:
        safetensors_io.write({"a": PlusOne(**vars(source))}, folder, torch.float32, "5GB")
    finally:
        safetensors_io._BLOCK = before

    assert torch.equal(load_file(folder / "model.safetensors")["a"], base + 1)
    assert sum(heights) == rows
    assert all(height * width <= max(block, width) for height in heights)


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (-float("inf"), torch.bfloat16), (1e6, torch.float16)]
)
def test_nan_and_inf_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """Also numbers that are finite in float32 and infinite in the output dtype."""
    line = stored(tmp_path)["line"]
    wrong = Constant(line.shape, value)
    with pytest.raises(ModelError, match="x would have NaN or Inf"):
        safetensors_io.write({"x": wrong}, tmp_path, dtype, "5GB")


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_an_incomplete_file_is_refused(tmp_path: Path, cut: int) -> None:
    stored(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])

    with pytest.raises(ModelError, match=r"model.safetensors: not a complete safetensors file"):
        safetensors_io.read_model(tmp_path)


def test_an_index_with_missing_tensors_is_refused(tmp_path: Path) -> None:
    stored(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / safetensors_io.INDEX).write_text('{"weight_map": {"x": "a.safetensors"}}', "utf-8")
    with pytest.raises(ModelError, match="does not match the tensors of its files"):
        safetensors_io.read_model(tmp_path)

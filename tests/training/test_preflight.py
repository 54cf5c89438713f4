from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from sft_recipes.errors import ModelError
from tests.conftest import WriteRecipe, run, write_rows

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


@pytest.fixture
def opt(tmp_path: Path) -> str:
    """A small OPT, which reads no positions that start again: packed documents see each other."""
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
    with pytest.raises(ModelError, match="documents packed into one sequence see each other in a model of type opt"):
        run(write_recipe(model={"name": opt}), f"data.packing={packing}")

    assert not (tmp_path / "run").exists()


def test_documents_of_one_micro_batch_share_a_row_too(write_recipe: WriteRecipe, opt: str, tmp_path: Path) -> None:
    """One document a sequence, which packing does not change: the micro-batch is one row all the same."""
    rows = [{"instruction": f"Say {n} times: {'fox ' * 9}", "output": "fox " * 9} for n in range(12)]
    write_rows(tmp_path / "train.jsonl", rows)
    recipe = write_recipe(model={"name": opt}, data={"eval": None, "max_length": 100})

    with pytest.raises(ModelError, match="documents packed into one sequence see each other"):
        run(recipe)
    folder, _ = run(recipe, "train.micro_batch_size=1")
    assert (folder / "model").is_dir()


@pytest.mark.parametrize(
    "overrides", [["data.packing=none"], ["data.packing=wrapped", "data.cross_document_attention=true"]]
)
def test_it_trains_where_that_does_no_harm(write_recipe: WriteRecipe, opt: str, overrides: list[str]) -> None:
    folder, _ = run(write_recipe(model={"name": opt}), *overrides)

    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_model_that_does_not_leak_passes(write_recipe: WriteRecipe, mixed_precision: str) -> None:
    folder, _ = run(
        write_recipe(model={"dtype": "bfloat16"}, lora={"rank": 1}), f"train.mixed_precision={mixed_precision}"
    )

    assert (folder / "model").is_dir()

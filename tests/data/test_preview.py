import io
from pathlib import Path

import pytest
from rich.console import Console

from sft_recipes.commands.check import preview
from sft_recipes.errors import DataError
from tests.conftest import WriteRecipe, write_rows


def shown(
    recipe: Path, *overrides: str, number: int = 1, rows: tuple[str, ...] = (), ids: bool = False, colors: bool = False
) -> str:
    said = io.StringIO()
    console = Console(
        file=said, width=1000, highlight=False, force_terminal=colors, color_system="standard" if colors else None
    )
    preview(str(recipe), overrides, number, rows, ids=ids, console=console)
    return said.getvalue()


def test_a_row_as_plain_text(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    lines = shown(write_recipe(), "data.packing=none", "data.eval=null", rows=("8",)).splitlines()

    assert any(line.startswith(f"{tmp_path / 'train.jsonl'}:8: positions 0 to ") for line in lines)
    assert lines[-2].startswith("⟦")
    assert lines[-2].replace("|", "") == "⟦word 7<end>⟧"
    assert lines[6].startswith("<|begin|>|Below| is| an| instruction")


def test_documents_of_a_packed_sequence(write_recipe: WriteRecipe) -> None:
    apart = shown(write_recipe(), "data.max_length=128")
    together = shown(
        write_recipe(), "data.packing=wrapped", "data.cross_document_attention=true", "data.max_length=128"
    )

    assert apart.count("positions 0 to ") == apart.count("train.jsonl:") - 1 > 1  # one line with statistics of the data
    assert together.count("positions 0 to ") == 1
    assert " (part): positions" in together


def test_ids_and_colors(write_recipe: WriteRecipe) -> None:
    assert "<|end|>(1)" in shown(write_recipe(), ids=True)
    colored = shown(write_recipe(), colors=True)
    assert "\x1b[" in colored
    assert "⟦" not in colored


def test_control_characters_are_shown(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"instruction": "a\tb\x1b\rc", "output": "d"}])
    said = shown(write_recipe(), "data.eval=null")

    assert all(picture in said for picture in "␉␛␍")
    assert "\x1b" not in said


def test_random_ones_are_seeded(write_recipe: WriteRecipe) -> None:
    one, again, other = (shown(write_recipe(), "data.packing=none", f"train.seed={seed}") for seed in (1, 1, 2))

    assert one == again != other
    assert shown(write_recipe(), "data.packing=none", number=3).count("sequence ") == 3


def test_a_row_by_its_place(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('\n{"instruction": "Other.", "output": "place"}\n', encoding="utf-8")
    both = f"data.train=[{tmp_path / 'train.jsonl'}, {more}]"
    said = shown(write_recipe(), both, "data.eval=null", "data.packing=none", rows=(f"{more}:2",))

    assert said.count("sequence ") == 1
    assert "⟦place<end>⟧" in said.replace("|", "")
    with pytest.raises(DataError, match=rf"--row {more}:1: there is no training row at this location. .*train.jsonl:1"):
        shown(write_recipe(), both, "data.eval=null", rows=(f"{more}:1",))


def test_a_row_that_is_in_no_sequence(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--row 25: not in any training sequence"):
        shown(write_recipe(), rows=("25",))
    write_rows(
        tmp_path / "train.jsonl", [{"instruction": "x " * 300, "output": "y"}, {"instruction": "x", "output": "y"}]
    )
    with pytest.raises(DataError, match="--row 1: not in any training sequence"):
        shown(write_recipe(), "data.eval=null", "data.overlong=drop", rows=("1",))

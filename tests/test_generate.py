from pathlib import Path

from sft_recipes.commands.generate import generate
from tests.conftest import WriteRecipe, run, write_rows


def test_talking_to_a_run_trained_on_plain_text(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Plain text is continued without a template."""
    write_rows(tmp_path / "train.jsonl", [{"text": "hot dog " * 20}] * 8)
    folder, said = run(
        write_recipe(export={"dtype": "float32"}, data={"eval": None}), "train.max_steps=30", "train.learning_rate=5e-3"
    )

    assert "; loss on training samples: exported " in said  # there are no others
    for where in (folder, folder / "model"):
        assert generate(where, "hot dog hot", max_new_tokens=4, temperature=0).startswith(" dog hot dog")

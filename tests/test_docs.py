"""The documentation is that of the code."""

import re
import runpy
from pathlib import Path

import pytest

from sft_recipes.recipe import check, shipped
from sft_recipes.recipe.load import field_names
from tests.conftest import write_rows

ROOT = Path(__file__).parents[1]
PAGES = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("name", PAGES)
def test_the_reference_is_what_the_code_says(name: str) -> None:
    """Write it anew with `python docs/generate.py`."""
    assert (ROOT / "docs" / name).read_text("utf-8") == PAGES[name]()


def test_every_key_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text("utf-8")

    assert all(f"`{name.split('.')[-1]}`" in page or f"## {name}" in page for name in field_names())


def test_the_recipe_of_the_readme_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data" / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")

    assert check.accepted(tmp_path / "recipe.yaml")[1] == []


def test_the_readme_names_every_recipe_that_ships() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")

    assert all(f"(recipes/{name}.yaml)" in readme for name in (each.name for each in shipped.recipes()))


def test_the_readme_and_ci_test_alike() -> None:
    install, test = "-c constraints.txt -e '.[test]'", "pytest"
    readme, ci = (ROOT / "README.md").read_text("utf-8"), (ROOT / ".ci" / "run").read_text("utf-8")

    assert f"pip install {install} && {test}\n" in readme
    assert "pip install --quiet --constraint constraints.txt --editable '.[test]'\n" in ci
    assert f"\n{test}\n" in ci


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_extras_of_the_readme_are_those_of_the_project() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)

    assert {name for row in table for name in re.findall(r"\w+", row)} == set(extras)


def test_results_have_a_command_beside_them() -> None:
    sections = (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8").split("\n## ")[1:]

    assert sections
    assert all("\n`" in section for section in sections)


def test_scale_shows_what_its_script_prints() -> None:
    """Write the tables anew with `python docs/scale.py`."""
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    tables = runpy.run_path(str(ROOT / "docs" / "scale.py"))["TABLES"]

    assert len(tables) == 5
    for table in tables:
        lines = list(table())
        assert len(lines) > 3
        assert "\n\n" + "\n".join(lines) + "\n\n" in page, table.__name__


def test_scale_reckons_with_the_models_that_plan_counts() -> None:
    """Parameters and adapters as tests/test_plan.py finds them from a config; what is sent of them, by hand."""
    script = runpy.run_path(str(ROOT / "docs" / "scale.py"))
    lora, full, qlora, _ = script["works"]()

    assert full.found.parameters == full.found.trained == 8_030_261_248
    assert lora.found.trained == 41_943_040
    assert qlora.found.parameters - qlora.found.trained == 70_553_706_496
    assert full.collectives == (3 * 34, 8 * 8_030_261_248)
    assert lora.collectives[1] == 8 * 41_943_040
    # seven eighths of the bytes, at 0.8 of NVLink, and 7 steps of latency in each of 102
    assert full.communication(8, 1) == pytest.approx(8 * 8_030_261_248 * 7 / 8 / 360e9 + 102 * (8.4e-6 + 7 * 3.4e-6))
    # where the link is as slow as that, nothing is hidden: computing is what is left of it
    slow = full.share(64, 1e9)
    assert slow == pytest.approx(full.compute / full.communication(64, 1e9), rel=0.05)
    assert slow < 0.01

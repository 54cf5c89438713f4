"""The documentation is that of the code."""

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sft_recipes.recipe import bundled, parse, validate
from sft_recipes.recipe.parse import field_names
from sft_recipes.recipe.schema import Recipe
from tests.conftest import minimal, write_rows

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


def test_the_list_of_commands_says_each_in_whole() -> None:
    listed = PAGES["commands.md"]().split("Commands:\n")[1].split("```")[0].strip().splitlines()

    assert len(listed) > 10
    assert [line for line in listed if line.endswith("...")] == []


def test_the_recipe_of_the_readme_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data" / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")

    assert validate.load_valid(tmp_path / "recipe.yaml")[1] == []


def test_the_readme_names_every_recipe_that_ships() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")

    assert all(f"(recipes/{name}.yaml)" in readme for name in (each.name for each in bundled.recipes()))


def test_the_readme_and_ci_test_alike() -> None:
    install, test = "-c constraints.txt -e '.[test]'", "pytest"
    readme, ci = (ROOT / "README.md").read_text("utf-8"), (ROOT / ".ci" / "run").read_text("utf-8")

    assert f"pip install {install} && {test}\n" in readme
    assert "pip install --quiet --constraint constraints.txt --editable '.[test]'\n" in ci
    assert f"\n{test}\n" in ci


def recipes_of(page: Path) -> list[str]:
    """The recipes that a page shows, and parts of recipes."""
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    read = ((text, YAML(typ="safe", pure=True).load(text)) for text in blocks)
    return [text for text, keys in read if keys and set(keys) <= set(Recipe.model_fields)]


@pytest.mark.parametrize("page", filter(recipes_of, MARKDOWN), ids=lambda page: page.name)
def test_recipes_of_the_pages_are_read(page: Path, tmp_path: Path) -> None:
    for text in recipes_of(page):
        whole = minimal(tmp_path)
        for name, value in YAML(typ="safe", pure=True).load(text).items():
            whole[name] = {**whole.get(name, {}), **value} if isinstance(value, dict) else value
        file = tmp_path / "recipe.yaml"
        YAML(typ="safe", pure=True).dump(whole, file)
        parse.load(file)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_extras_of_the_readme_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)

    assert {name for row in table for name in re.findall(r"\w+", row)} == set(extras)


def test_files_that_the_contributor_is_sent_to_are_there() -> None:
    named = re.findall(r"`((?:\w+/)+[\w.]+\.\w+|\w+\.(?:cff|toml|txt))`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))

    assert len(named) > 20
    assert [name for name in named if "NAME" not in name and not (ROOT / name).is_file()] == []


def test_contributing_tests_as_ci_does() -> None:
    page, ci = (ROOT / "CONTRIBUTING.md").read_text("utf-8"), (ROOT / ".ci" / "run").read_text("utf-8")
    hooks = YAML(typ="safe", pure=True).load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]

    assert "pip install -c constraints.txt -e '.[test]' && pre-commit install\n" in page
    for hook in hooks[:3]:
        assert f"\n{hook['entry']}\n" in ci
    assert hooks[3]["entry"] == "python docs/generate.py"


def test_the_citation_is_of_this_version() -> None:
    from sft_recipes import __version__

    citation = YAML(typ="safe", pure=True).load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    assert citation["version"] == __version__
    assert (citation["title"], citation["license"]) == (project["name"], project["license"])
    assert citation["abstract"] == project["description"]


def test_symptoms_have_the_lines_that_the_code_says() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    lines = [line for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]

    assert len(lines) > 30
    assert [line for line in lines if not any(says(message, line) for message in messages())] == []


def says(message: re.Pattern[str], line: str) -> bool:
    """Whether a message is the better part of a line, beside its place, or a remedy that is a message of its own."""
    found = message.search(line)
    return found is not None and len(found[0]) > len(line) / 2


@cache
def messages() -> list[re.Pattern[str]]:
    """What the code can say, with anything in the place of a value."""
    found = []
    for file in (ROOT / "sft_recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = (part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
            known = re.sub(r"\\{[^ ]*?\\}", ".*", re.escape("".join(map(str, texts))))
            if len(known.replace(".*", "")) > 10:
                found.append(re.compile(known))
    return found


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "tutorial.html", "recipe.html", "CONTRIBUTING.html"} <= {page.name for page in pages}
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=[\"']?https?:|<link[^>]+href=[\"']?https?:")
    assert [page.name for page in pages if loads.search(page.read_text("utf-8"))] == []
    assert "adamw_8bit_sr" in (tmp_path / "site" / "search" / "search_index.js").read_text("utf-8")


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

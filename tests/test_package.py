"""The archives of a release: built, checked, and the wheel used where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from sft_recipes import __version__
from tests.conftest import write_rows

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def done(*command: str | Path, cwd: Path) -> str:
    """What a command says; it finds nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [source], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def test_they_pass_twine(archives: tuple[Path, Path]) -> None:
    said = done(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=archives[0].parent)

    assert said.count("PASSED") == 2


def test_they_have_what_is_used(archives: tuple[Path, Path]) -> None:
    source, wheel = archives
    assert source.name == f"sft_recipes-{__version__}.tar.gz"
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = {file.relative_to(ROOT).as_posix() for file in (ROOT / "sft_recipes").rglob("*") if file.is_file()}
    recipes = {f"sft_recipes/recipes/{file.name}" for file in RECIPES}
    notes = f"sft_recipes-{__version__}.dist-info"

    assert inside >= {name for name in package if "__pycache__" not in name} | recipes
    assert inside >= {"sft_recipes/constraints.txt", f"{notes}/licenses/LICENSE"}
    with tarfile.open(source) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    assert there >= {
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "docs/tutorial.md",
        "tests/test_package.py",
        ".ci/run",
    }


def test_the_wheel_works_without_a_checkout(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own, in which the libraries below us are those of this one."""
    done(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    done(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", archives[1], cwd=tmp_path
    )
    [libraries] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    command = tmp_path / "venv" / "bin" / "sft-recipe"
    write_rows(tmp_path / "data" / "train.jsonl")

    where = done(python, "-c", "import sft_recipes; print(sft_recipes.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert done(command, "--version", cwd=tmp_path) == f"sft-recipe {__version__}\n"
    listed = done(command, "list", cwd=tmp_path)
    assert all(file.stem in listed for file in RECIPES)
    done(command, "new", "quickstart", cwd=tmp_path)
    assert "quickstart.yaml: OK" in done(command, "check", "quickstart.yaml", cwd=tmp_path)

"""Tools of the tests: recipes and data written to a temporary directory, and runs on the embedded model."""

import gc
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

# The tests run in as many processes as there are cores; threads of their own would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
# As the command line sets them, which some tests call once the libraries have been imported.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

ROWS = [
    {
        "instruction": f"Say the word number {number}.",
        "input": "" if number % 2 else f"word {number}",
        "output": f"word {number}",
    }
    for number in range(24)
]
WriteRecipe = Callable[..., Path]


# These first, so that no process is left with one of them while the others have nothing to do.
LONGEST = [
    "test_run",
    "test_resume",
    "test_training",
    "test_merge",
    "test_safety",
    "test_make",
    "test_preflight",
    "test_dpo",
    "test_examples",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is taken from, or left in, the user's cache."""
    os.environ["SFT_RECIPES_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def libraries_are_no_garbage() -> None:
    """Each training collects garbage when it ends, and would look at all that the libraries hold, for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def verify_here() -> Iterator[Callable[..., Any]]:
    """Exports are verified in the test's own process, where the libraries are there already."""
    from sft_recipes.export import verify

    with pytest.MonkeyPatch.context() as patch:
        elsewhere = verify.verify_in_subprocess
        patch.setattr(verify, "verify_in_subprocess", verify.compare_outputs)
        yield elsewhere


@pytest.fixture(autouse=True)
def verify_elsewhere(
    request: pytest.FixtureRequest, verify_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of tests that are marked `fresh` are verified as users' are."""
    if "fresh" in request.keywords:
        monkeypatch.setattr("sft_recipes.export.verify.verify_in_subprocess", verify_here)


def write_rows(file: Path, rows: Iterable[Any] = ROWS) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def minimal(folder: Path) -> dict[str, Any]:
    """The least a recipe says, quick on CPU: the embedded model in float32, three steps."""
    return {
        "model": {"name": "builtin:tiny", "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "eval": 0.25, "max_length": 128},
        "train": {
            "max_steps": 3,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "learning_rate": 1e-3,
            "mixed_precision": "no",
            "gradient_checkpointing": False,
            "preflight": False,  # where it is not what is tested: it takes as long as these few steps
        },
        "output_dir": str(folder / "run"),
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> WriteRecipe:
    """Writes recipe.yaml: the minimal recipe with sections or keys replaced, and 24 Alpaca rows for it."""

    def write(**sections: Any) -> Path:
        if not (tmp_path / "train.jsonl").exists():
            write_rows(tmp_path / "train.jsonl")
        recipe = minimal(tmp_path)
        for name, value in sections.items():
            recipe[name] = {**recipe[name], **value} if isinstance(value, dict) and name in recipe else value
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
        return file

    return write


def run(recipe: Path, *overrides: str, resume: bool = False, force: bool = False) -> tuple[Path, str]:
    """Run a recipe in this process; the run directory, and what was said."""
    from sft_recipes.run import run as start

    said = io.StringIO()
    folder = start(str(recipe), overrides, resume=resume, force=force, console=Console(file=said, width=200))
    return folder, said.getvalue()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def build(recipe: Path, folder: Path, *overrides: str, console: Console | None = None, stop: Any = None) -> Any:
    """A trainer that is ready to run in a directory, without the rest of a run."""
    from sft_recipes.data import encoder, prepare
    from sft_recipes.models import model
    from sft_recipes.models.tokenizer import load_tokenizer
    from sft_recipes.recipe import parse
    from sft_recipes.training.build import build_trainer

    wanted = parse.load(recipe, overrides).recipe
    folder.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(wanted.model)
    data = prepare.prepare(wanted, encoder.from_transformers(tokenizer))
    network = model.load_model(wanted, tokenizer)
    return build_trainer(wanted, network, tokenizer, data, folder, console or Console(quiet=True), stop)

"""Every example of the documentation is run: commands and Python, from the top of a page to its end."""

import contextlib
import os
import re
import runpy
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from sft_recipes.data import encoder, prepare
from sft_recipes.recipe import parse
from tests.commands import forked, sft_recipe
from tests.conftest import write_rows
from tests.test_docs import MARKDOWN, ROOT, recipes_of

BLOCK = re.compile(r"^```(sh|console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPTS = {"examples/plain_trl.py": ["2"], "docs/dpo.py": ["--steps", "2"]}  # and what makes them short
ELSEWHERE = {"dpo.md": "tests/test_dpo.py"}
SHORT = (
    "train.max_steps=2", "train.preflight=false", "train.mixed_precision=no", "model.dtype=float32", "eval.every=null",
    "data.max_eval_samples=4", "eval.generate=[Say it.]", "eval.max_new_tokens=4",
)  # fmt: skip
# For what has to be had from the hub.
MODEL, DATA = ("model.name=builtin:tiny",), ("data.train=data/train.jsonl", "data.eval=data/test.jsonl")


@dataclass(frozen=True)
class Step:
    """What a reader types, and what the page shows of the answer; or Python code."""

    words: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    code: str = ""


def steps(page: Path) -> Iterator[Step]:
    for kind, block in BLOCK.findall(page.read_text("utf-8")):
        text = block.replace("\\\n", " ")
        if kind == "python":
            yield Step(code=block)
            continue
        for typed in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:] if kind == "console" else text.splitlines():
            line, *shown = typed.splitlines() or [""]
            for part in line.split(" && "):
                if any(ours in part for ours in ("sft-recipe ", *SCRIPTS)):
                    yield Step(tuple(shlex.split(part, comments=True)), tuple(shown))


RECIPE = recipes_of(ROOT / "README.md")[0]
# What a page begins with instead of a recipe.
BEGIN = {
    "convert.md": (
        "axolotl.yml",
        "{base_model: HuggingFaceTB/SmolLM2-135M, adapter: lora, lora_r: 8, lora_alpha: 16, lora_target_linear: true,"
        " datasets: [{path: data/alpaca.jsonl, ds_type: json, type: alpaca}], sequence_len: 512, sample_packing: true,"
        " micro_batch_size: 2, gradient_accumulation_steps: 4, num_epochs: 1, learning_rate: 2e-4, output_dir: runs/moved}",
    )
}
PAGES = [page for page in MARKDOWN if page.name not in ELSEWHERE and any(steps(page))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take to be there: the repository, a recipe, rows, pairs, and runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "docs", "examples", "sft_recipes"):
        (folder / name).symlink_to(ROOT / name)
    for name, numbers in (("train", range(40)), ("test", range(40, 50))):
        rows = ({"prompt": f"Say the word number {n}.", "response": f"word {n}"} for n in numbers)
        write_rows(folder / "data" / f"{name}.jsonl", rows)
    write_rows(folder / "data" / "alpaca.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    pair = re.findall(r'^{"prompt": \[.*\n', (ROOT / "docs" / "assignment.md").read_text("utf-8"), re.MULTILINE)
    (folder / "pairs.jsonl").write_text("".join(pair * 8), "utf-8")
    do(Step(("sft-recipe", "run", "recipes/quickstart.yaml")), folder)
    do(Step(("sft-recipe", "run", "recipe.yaml")), folder)  # runs/mine
    for other in "abc":
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / other)
    return folder


@pytest.fixture
def place(checkout: Path) -> Iterator[Path]:
    """The checkout, to which a page adds no files but runs."""
    before = set(checkout.iterdir())
    yield checkout
    (checkout / "recipe.yaml").write_text(RECIPE, "utf-8")
    for added in set(checkout.iterdir()) - before:
        shutil.rmtree(added) if added.is_dir() else added.unlink()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Path, place: Path) -> None:
    edits = edits_of(page) if page.name == "assignment.md" else []
    if page.name in BEGIN:
        (place / "recipe.yaml").unlink()
        name, content = BEGIN[page.name]
        (place / name).write_text(content, "utf-8")
    for step in steps(page):
        said = iter(do(step, place, edits))
        for line in step.shown if "generate" not in step.words else ():  # two steps teach no answer
            assert line == "..." or masked(line) in said, f"{step.words} does not say, or not there: {line}"


def edits_of(page: Path) -> list[str]:
    """What the reader is told to write into the recipe, as --set takes it."""
    block = YAML(typ="safe", pure=True).load(recipes_of(page)[0])
    data = [f"data.{key}={value}" for key, value in block.pop("data").items()]
    return ["data.format=null", *data, *(f"{key}={value}" for key, value in block.items())]


def masked(line: str) -> str:
    """Without numbers, which are those of another machine, or of more steps."""
    return re.sub(r"\d[\d.,:]*", "#", line)


def do(step: Step, folder: Path, edits: Sequence[str] = ()) -> list[str]:
    """Do it in a folder, with a small model and few steps. The lines of the answer, without their numbers."""
    if step.code:
        return in_python(folder, _exec, step.code)
    if "sft-recipe" not in step.words:
        at = next(number for number, word in enumerate(step.words) if word in SCRIPTS)
        return script((*step.words[at:], *SCRIPTS[step.words[at]]), folder)
    arguments = step.words[step.words.index("sft-recipe") + 1 :]
    act = once if arguments[0] == "run" else command
    return act(tuple(stand_in(arguments, edits, folder)), folder)


def command(arguments: tuple[str, ...], folder: Path) -> list[str]:
    done = sft_recipe(*arguments, cwd=folder)
    good = (0, 1) if arguments[0] == "doctor" else (2,) if "Did you mean" in done.stderr else (0,)
    assert done.returncode in good, (arguments, done.stderr)
    return [masked(line) for line in (done.stdout + done.stderr).splitlines()]


once = cache(command)  # the same run on two pages is one


def stand_in(arguments: Sequence[str], edits: Sequence[str], folder: Path) -> list[str]:
    """The same command for this machine: a model and data that are there, one process, few steps, short answers."""
    name, *rest = arguments
    if name == "generate":
        return [*arguments, "--max-new-tokens", "4"]
    if name not in ("run", "check", "preview", "plan"):
        return [*arguments]
    if "--processes" in rest:
        name, rest = "check", rest[:1]  # of several processes: tests/distributed
    told = [*edits] if rest[0] == "assignment.yaml" else []
    with contextlib.chdir(folder):
        recipe = parse.load(rest[0], told).recipe
    model, data = recipe.model.name, str(recipe.data.train)
    small = [] if model.startswith("builtin:") else [*MODEL]
    small += [] if data.startswith("builtin:") or (folder / data).exists() else DATA
    small += SHORT if name == "run" else ()
    return [name, rest[0], *as_options(told), *rest[1:], *as_options(small)]


def as_options(settings: Iterable[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@cache
def script(words: tuple[str, ...], folder: Path) -> list[str]:
    return in_python(folder, _script, words)


def in_python(folder: Path, act: Callable[[Any], object], what: object) -> list[str]:
    child = forked(_inside, folder, act, what)
    child.join()
    said = (folder / "said").read_text("utf-8")
    assert child.exitcode == 0, said
    return [masked(line) for line in said.splitlines()]


def _inside(folder: Path, act: Callable[[Any], object], what: object) -> None:
    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(said, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    act(what)
    sys.stdout.flush()


def _exec(code: str) -> None:
    exec(code, {"__name__": "example"})


def _script(words: Sequence[str]) -> None:
    sys.argv = [*words]
    runpy.run_path(words[0], run_name="__main__")


# --- Plain TRL -------------------------------------------------------------------------------------------------------

SCRIPT = ROOT / "examples" / "plain_trl.py"


def test_plain_trl_is_sixty_lines() -> None:
    assert len(SCRIPT.read_text("utf-8").splitlines()) <= 60


def test_plain_trl_trains_on_the_same_tokens(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same documents with the same labels, under the same settings; only which share a sequence is not the same."""
    monkeypatch.chdir(checkout)
    recipe = parse.load("recipes/quickstart.yaml").recipe
    theirs = runpy.run_path(str(SCRIPT))["build"]()
    ours = prepare.prepare(recipe, encoder.from_transformers(theirs.processing_class))
    assert Counter(documents(theirs.train_dataset)) == Counter(documents(ours.train.table().to_pylist()))
    assert Counter(documents(theirs.eval_dataset)) == Counter(documents(ours.eval.table().to_pylist()))

    args, lora, train = theirs.args, theirs.model.peft_config["default"], recipe.train
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == recipe.sequences_per_step
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (
        train.learning_rate, train.epochs, train.warmup_ratio_or_default
    )  # fmt: skip
    assert (args.lr_scheduler_type, args.optim, args.max_grad_norm) == (train.lr_scheduler, train.optimizer, 1.0)
    assert (args.max_length, args.eval_steps, args.weight_decay) == (recipe.data.max_length, recipe.eval.every, 0.0)
    assert recipe.lora is not None
    assert (lora.r, lora.lora_alpha) == (recipe.lora.rank, recipe.lora.alpha)
    assert {weight.dtype for weight in theirs.model.parameters()} == {torch.float32}


def documents(sequences: Iterable[dict[str, Any]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    for row in sequences:
        ids, labels = iter(row["input_ids"]), iter(row["labels"])
        for size in row["seq_lengths"]:
            yield tuple(islice(ids, size)), tuple(islice(labels, size))


def test_plain_trl_writes_a_model(checkout: Path) -> None:
    said = do(Step(("python", "examples/plain_trl.py")), checkout)

    assert "exact match before: #%" in said
    assert "exact match after: #%" in said
    assert {file.name for file in (checkout / "runs" / "plain-trl").iterdir()} >= {"model", "learning_curve.png"}

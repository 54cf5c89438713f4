"""Implement `sft-recipe check` and `preview` without importing torch."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from sft_recipes import model_dir, run_dir
from sft_recipes.data import encoder, prepare, readers, sources
from sft_recipes.data import preview as showing
from sft_recipes.data.encoder import LightTokenizer
from sft_recipes.data.eval_prompts import eval_prompts
from sft_recipes.data.parsers import describe_unused
from sft_recipes.errors import DataError, InputError, ModelError, RecipeError, one_line, reason_of
from sft_recipes.memory import host_memory
from sft_recipes.planning import disk
from sft_recipes.planning.steps import count
from sft_recipes.recipe import machine
from sft_recipes.recipe.schema import Model, Recipe
from sft_recipes.recipe.validate import load_valid, validate_file

_SECONDS = 2.0  # time limit for tokenizing each source; later rows are not checked


@dataclass(frozen=True)
class Findings:
    """Output lines and warnings of a check."""

    lines: list[str]
    warnings: list[str]


def check(recipe_file: str, overrides: Sequence[str] = ()) -> Findings:
    """Validate a recipe, its model directory and its data. Raises RecipeError with every problem at once."""
    loaded, verdict = validate_file(recipe_file, overrides)
    lines, warnings = list[str](), list(verdict.warnings)
    problems = list(verdict.problems)
    for run_check in (_check_data, _check_prompts, _check_disk_space, _check_host_memory):
        if loaded is None:
            break
        try:
            with loaded.locate_errors():
                findings = run_check(loaded.recipe)
            lines += findings.lines
            warnings += map(loaded.with_location, findings.warnings)
        except InputError as error:
            problems += [line for line in error.lines if line not in problems]
    if problems:
        raise RecipeError(*problems)
    assert loaded is not None
    # Only a warning: the recipe of a finished run is valid, too.
    in_use = run_dir.output_dir_problem(loaded.recipe.output_dir)
    warnings += [loaded.with_location(in_use)] if in_use else []
    return Findings([*map(one_line, lines)], [*map(one_line, warnings)])


def preview(
    recipe_file: str,
    overrides: Sequence[str],
    number: int,
    rows: Sequence[str],
    *,
    ids: bool,
    console: Console | None = None,
) -> None:
    """Print the tokens of `number` random training sequences, or of those that contain `rows`. Raises InputError."""
    loaded, warnings = load_valid(recipe_file, overrides)
    console = console or Console(highlight=False, soft_wrap=True)
    with loaded.locate_errors():
        tokenizer, missing = tokenizer_of(loaded.recipe.model)
        if tokenizer is None:
            raise ModelError(f"model.name: {missing}")
        if tokenizer.rebuilt:
            for warning in (line for line in warnings if "trust_remote_code" in line):
                print(f"warning: {warning}", file=sys.stderr)
            from sft_recipes.models.tokenizer import load_tokenizer  # imports torch

            tokenizer = encoder.from_transformers(load_tokenizer(loaded.recipe.model))
        # Specific rows require all data; otherwise the time limit applies.
        train = prepare.prepare(loaded.recipe, tokenizer, seconds=None if rows else _SECONDS).train
        numbers = showing.select_sequences(train, number, rows, loaded.recipe.train.seed)
        for line in train.stats.lines("train"):
            console.print(line, highlight=False, markup=False)
        if not console.is_terminal:
            console.print(showing.LEGEND, markup=False)
        console.print()
        for text in showing.show(train, numbers, tokenizer.backend, colors=console.is_terminal, ids=ids):
            console.print(text)


def _check_data(recipe: Recipe) -> Findings:
    """Count rows, tokens and steps. Raises DataError, ModelError."""
    if remote := _hub_datasets(recipe):
        line = f"data: {', '.join(remote)}: loaded from the Hub when the run starts; rows and steps not counted"
        return Findings([line], [])
    tokenizer, missing = tokenizer_of(recipe.model)
    if tokenizer is None:
        lines, warnings = list[str](), list[str]()
        for source in readers.every_source(recipe.data):
            checked, total, report = readers.look_through(source, recipe.data, _SECONDS)
            rows = f"{total:,} rows" if checked == total else f"first {checked:,} of about {total:,} rows"
            lines.append(
                f"data: {'; '.join((f'{source.path}: {rows}', *report.notes, *describe_unused(report.unused)))}"
            )
            warnings += report.warnings
        return Findings([*lines, f"tokens and steps not counted: {missing}"], warnings)
    data = prepare.prepare(recipe, tokenizer, seconds=_SECONDS)
    rebuilt = [
        f"tokens: counted with tokenizer.json; the run rebuilds the tokenizer ({tokenizer.rebuilt}), so its counts may "
        "differ slightly"
    ]
    return Findings(
        [*data.lines(), *(rebuilt if tokenizer.rebuilt else []), _schedule(recipe, data)],
        data.warnings,
    )


def _schedule(recipe: Recipe, data: prepare.Prepared) -> str:
    """Return steps, epochs and tokens per step as a line, extrapolated from the rows that were read."""
    steps = count(recipe, round(len(data.train) * data.scale(recipe.data.max_train_samples)))
    about = "" if data.share == 1 else "about "
    epochs = steps.total / steps.per_epoch
    passes = f"{epochs:,.2f}".rstrip("0").rstrip(".") if epochs >= 1 else f"{epochs:.2g}"
    stats = data.train.stats
    tokens_per_step, trained_per_step = (
        round(number * recipe.sequences_per_step / stats.sequences) for number in (stats.tokens, stats.trained_tokens)
    )
    return (
        f"schedule: {about}{steps.total:,} steps, {steps.warmup:,} of warmup; {recipe.sequences_per_step} sequences per "
        f"step; {about}{steps.per_epoch:,} steps per epoch, {about}{passes} epoch{'' if passes == '1' else 's'}; about "
        f"{tokens_per_step:,} tokens per step, {trained_per_step:,} trained"
    )


def _check_prompts(recipe: Recipe) -> Findings:
    """Validate the file of eval.generate, if it is one. Raises DataError."""
    path = recipe.eval.generate
    if isinstance(path, str) and sources.files(path) is not None:
        eval_prompts(recipe)
    return Findings([], [])


def _check_disk_space(recipe: Recipe) -> Findings:
    """Check the free space for checkpoints and models of a local model. Raises OutputError.

    With LoRA only the merged model is counted. The run checks again when the size of the adapter is known.
    """
    parameters = model_dir.parameters(recipe.model.name)
    if parameters is None or model_dir.path_problem(recipe.output_dir) or run_dir.output_dir_problem(recipe.output_dir):
        return Findings([], [])  # a resumed run has written part of it already
    folder = Path(recipe.output_dir).expanduser()
    disk.check_room(recipe, folder, parameters, 0 if recipe.trains_adapters else parameters, tokenizer=0)
    return Findings([], [])


def _check_host_memory(recipe: Recipe) -> Findings:
    """Warn if this node has too little host memory for a local model."""
    model = host_memory.of_files(recipe)
    if model is None:
        return Findings([], [])
    device = "cuda" if machine.trains_on_nvidia_gpu() else "cpu"
    short = host_memory.memory_shortage(host_memory.predict(recipe, model, device), adapters=recipe.trains_adapters)
    return Findings([], [short] if short else [])


def _hub_datasets(recipe: Recipe) -> list[str]:
    """Return the sources that are Hub datasets. Raises DataError with every source that looks like a missing file."""
    remote: list[str] = []
    problems: list[str] = []
    for source in readers.every_source(recipe.data):
        try:
            remote += [source.path] if sources.files(source.path) is None else []
        except DataError as error:
            problems += error.lines
    if problems:
        raise DataError(*problems)
    return remote


def tokenizer_of(model: Model) -> tuple[LightTokenizer | None, str]:
    """Return the model's tokenizer, from its directory or the Hub; or None and the reason."""
    folder = model_dir.directory(model.name)
    if folder is None:
        try:
            folder = _download(model)
        except Exception as error:  # network errors, Hub errors, gated models
            return None, f"the tokenizer of {model.name} is unavailable: {reason_of(error)}"
    tokenizer = encoder.from_directory(folder, model.new_tokens)
    if tokenizer is None and (not model_dir.directory(model.name) or model_dir.has_tokenizer(folder)):
        tokenizer = _convert_tokenizer(model)
    return tokenizer, f"{model.name} has no tokenizer.json"


_CONVERT = """
import sys
from sft_recipes.errors import ModelError
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe.schema import Model
try:
    load_tokenizer(Model.model_validate_json(sys.argv[1])).save_pretrained(sys.argv[2])
except ModelError as error:
    print(error)
"""


def _convert_tokenizer(model: Model) -> LightTokenizer:
    """Convert tokenizer.model, tekken.json, ... as the run does, in another process, because that imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-c", _CONVERT, model.model_dump_json(), folder]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        tokenizer = encoder.from_directory(Path(folder))
        if tokenizer is None:
            reason = (done.stdout or done.stderr).strip().splitlines() or [""]
            raise ModelError(reason[-1] if done.stdout else f"model.name: {model.name}: its tokenizer: {reason[-1]}")
        return replace(tokenizer, rebuilt="")


def _download(model: Model) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "config.json",
    ]
    return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=wanted))

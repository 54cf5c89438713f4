"""`sft-recipe check` and `preview`: all that can be known of a run without torch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sft_recipes import run_folder
from sft_recipes.data import prepare, reading, sources, tokens
from sft_recipes.data import preview as showing
from sft_recipes.data.questions import questions
from sft_recipes.data.tokens import LightTokenizer
from sft_recipes.errors import DataError, InputError, ModelError, OutputError, RecipeError, one_line
from sft_recipes.planning import disk, host_memory
from sft_recipes.planning.steps import count
from sft_recipes.recipe import machine, model_files
from sft_recipes.recipe.check import accepted, verdict_on
from sft_recipes.recipe.schema import Model, Recipe

_SECONDS = 2.0  # of tokenising a source; what is found then is found in its first rows


@dataclass(frozen=True)
class Findings:
    """What was found, and what deserves a warning; a line each."""

    lines: list[str]
    warnings: list[str]


def check(recipe_file: str, overrides: Sequence[str] = ()) -> Findings:
    """Validate a recipe, its model directory and its data. Raises RecipeError with every problem at once."""
    loaded, verdict = verdict_on(recipe_file, overrides)
    lines, warnings = list[str](), list(verdict.warnings)
    problems = list(verdict.problems)
    for examine in (_examine_data, _examine_prompts, _examine_room, _check_host_memory):
        if loaded is None:
            break
        try:
            with loaded.placing_errors():
                found = examine(loaded.recipe)
            lines += found.lines
            warnings += map(loaded.placed, found.warnings)
        except InputError as error:
            problems += [line for line in error.lines if line not in problems]
    if problems:
        raise RecipeError(*problems)
    assert loaded is not None
    used = run_folder.in_the_way(loaded.recipe.output_dir)  # a problem of the next run, none of a finished one's recipe
    warnings += [loaded.placed(used)] if used else []
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
    """Print the tokens of `number` random training sequences, or of those that hold `rows`. Raises InputError."""
    loaded, warnings = accepted(recipe_file, overrides)
    console = console or Console(highlight=False, soft_wrap=True)
    with loaded.placing_errors():
        tokenizer, missing = tokenizer_of(loaded.recipe.model)
        if tokenizer is None:
            raise ModelError(f"model.name: {missing}")
        if tokenizer.rebuilt:
            for warning in (line for line in warnings if "trust_remote_code" in line):
                print(f"warning: {warning}", file=sys.stderr)
            tokenizer = _of_transformers(loaded.recipe.model)
        # All rows where one is looked for, else as many as there is time for.
        train = prepare.prepare(loaded.recipe, tokenizer, seconds=None if rows else _SECONDS).train
        numbers = showing.choose(train, number, rows, loaded.recipe.train.seed)
        for line in train.stats.lines("train"):
            console.print(line, highlight=False, markup=False)
        if not console.is_terminal:
            console.print(showing.LEGEND, markup=False)
        console.print()
        for text in showing.show(train, numbers, tokenizer.backend, colors=console.is_terminal, ids=ids):
            console.print(text)


def _examine_data(recipe: Recipe) -> Findings:
    """Rows, tokens and steps. Raises DataError, ModelError."""
    if remote := _on_the_hub(recipe):
        line = f"data: {', '.join(remote)} is looked for on the hub when the run starts; rows and steps are not counted"
        return Findings([line], [])
    tokenizer, missing = tokenizer_of(recipe.model)
    if tokenizer is None:
        lines = []
        for source in reading.every_source(recipe.data):
            looked_at, there = reading.look_through(source, recipe.data, _SECONDS)
            rows = f"{there:,} rows" if looked_at == there else f"the first {looked_at:,} of about {there:,} rows"
            lines.append(f"data: {source.path}: {rows}")
        return Findings([*lines, f"tokens and steps are not counted: {missing}"], [])
    data = prepare.prepare(recipe, tokenizer, seconds=_SECONDS)
    larger = 1 / data.share  # than the sample
    if recipe.data.max_train_samples:
        larger = min(larger, recipe.data.max_train_samples / sum(source.rows for source in data.train.stats.sources))
    anew = [
        f"tokens are those of tokenizer.json; transformers makes a {tokenizer.rebuilt} anew, and the run may count a few "
        "more or less"
    ]
    return Findings(
        [*data.lines(), *(anew if tokenizer.rebuilt else []), _steps(recipe, data, larger)],
        data.warnings,
    )


def _steps(recipe: Recipe, data: prepare.Prepared, larger: float) -> str:
    """Steps, epochs, and tokens a step, of data so many times `larger` than what was looked at."""
    steps = count(recipe, round(len(data.train) * larger))
    about = "" if data.share == 1 else "about "
    epochs = steps.total / steps.per_epoch
    passes = f"{epochs:,.2f}".rstrip("0").rstrip(".") if epochs >= 1 else f"{epochs:.2g}"
    account = data.train.stats
    tokens_a_step, trained_a_step = (
        round(number * recipe.sequences_per_step / account.sequences)
        for number in (account.tokens, account.trained_tokens)
    )
    return (
        f"steps: {about}{steps.total:,} of {recipe.sequences_per_step} sequences, {steps.warmup:,} of them warmup; "
        f"{about}{steps.per_epoch:,} an epoch, {about}{passes} epoch{'' if passes == '1' else 's'}; about {tokens_a_step:,} "
        f"tokens a step, {trained_a_step:,} of them trained on"
    )


def _examine_prompts(recipe: Recipe) -> Findings:
    """Looks at prompts that are to be answered at each evaluation, where they are in a file. Raises DataError."""
    path = recipe.eval.generate
    if isinstance(path, str) and sources.files(path) is not None:
        questions(recipe)
    return Findings([], [])


def _examine_room(recipe: Recipe) -> Findings:
    """Room for checkpoints and models, as far as a local model's files say how much they take. Raises OutputError.

    Of adapters only the merged model is counted: how large they are is known when they are made, and then looked at again.
    """
    parameters = model_files.parameters(recipe.model.name)
    if parameters is None or model_files.not_to_be_made(recipe.output_dir) or run_folder.in_the_way(recipe.output_dir):
        return Findings([], [])  # a run that has written part of it needs only the rest
    folder = Path(recipe.output_dir).expanduser()
    disk_of = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if short := disk.lacking(disk_of, disk.needed(recipe, parameters, 0 if recipe.lora else parameters, 0)):
        raise OutputError(
            f"output_dir: no room in {disk_of} for checkpoints and models{short}; free some, choose another disk with --set "
            "output_dir=DIR, or lower checkpoint.keep"
        )
    return Findings([], [])


def _check_host_memory(recipe: Recipe) -> Findings:
    """Warn if this machine lacks host memory, as far as a local model's files tell how much the run takes."""
    model = host_memory.of_files(recipe)
    if model is None:
        return Findings([], [])
    device = "cuda" if machine.trains_on_nvidia_gpu() else "cpu"
    short = host_memory.lacking(host_memory.predict(recipe, model, device))
    return Findings([], [short] if short else [])


def _on_the_hub(recipe: Recipe) -> list[str]:
    """Sources that are no files. Raises DataError with all that look like files and are none."""
    remote: list[str] = []
    problems: list[str] = []
    for source in reading.every_source(recipe.data):
        try:
            remote += [source.path] if sources.files(source.path) is None else []
        except DataError as error:
            problems += error.lines
    if problems:
        raise DataError(*problems)
    return remote


def tokenizer_of(model: Model) -> tuple[LightTokenizer | None, str]:
    """The model's tokenizer, from its directory or the hub; or None and why."""
    folder = model_files.directory(model.name)
    if folder is None:
        try:
            folder = _download(model)
        except Exception as error:  # whatever the hub, the network or the gate of a model say
            return None, f"the tokenizer of {model.name} cannot be had: {' '.join(str(error).split())[:200]}"
    tokenizer = tokens.from_directory(folder, model.new_tokens)
    return tokenizer, f"{model.name} has no tokenizer.json"


def _of_transformers(model: Model) -> LightTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_files.location(model.name), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # as many types as there are tokenizers
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model.name: {model.name}: its tokenizer cannot be loaded: {reason}") from error
    tokenizer.add_tokens(model.new_tokens)
    return tokens.of_transformers(tokenizer)


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

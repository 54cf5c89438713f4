"""Orchestrate a run: prepare data and model, train, evaluate, export and report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_recipes import run_folder, several
from sft_recipes.data import prepare, tokens
from sft_recipes.export import outputs, reference
from sft_recipes.recipe import check
from sft_recipes.recipe.schema import Recipe
from sft_recipes.report import page, words
from sft_recipes.scale import ranks
from sft_recipes.stopping import Stop
from sft_recipes.training import checkpoints, facts, fitting, model, sharded, trainer
from sft_recipes.training.determinism import deterministic
from sft_recipes.training.logging import peak_memory


def run(
    recipe_file: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    force: bool = False,
    cached: bool = True,
    stop: Stop | None = None,
    console: Console | None = None,
) -> Path:
    """Fine-tune, evaluate and export a model; return the run directory.

    `overrides` are `key=value` strings, as for --set. `resume` continues from the latest complete checkpoint, or starts
    from scratch if there is none; `force` accepts other library versions and non-critical settings. Without `cached`, the
    tokenization cache is ignored. If the recipe requests several processes, they are launched here and `stop` and
    `console` are unused.

    Raises:
        InputError: Recipe, data, model or output directory is wrong (one line per problem); nothing is left on disk.
        RunError: Training or export failed.
        Stopped: `stop` requested it.
    """
    loaded, warnings = check.accepted(recipe_file, overrides)
    recipe = loaded.recipe
    if ranks.to_be_started(recipe.launch):
        return several.run(recipe_file, overrides, resume=resume, force=force, cached=cached)
    console = console or words.Voice(quiet=not ranks.is_main())
    words.warn(console, warnings)
    with (
        loaded.placing_errors(),
        deterministic(recipe.train.deterministic),
        ranks.joined(recipe, lambda: _facts(recipe)),
        run_folder.opened(recipe.output_dir, resume=resume, main=ranks.is_main()) as folder,
    ):
        recipe = fitting.resolved(recipe, folder)
        checkpoint, changes = None, list[str]()
        if resume:
            changes = ranks.as_the_first(
                lambda: run_folder.changes(folder, recipe, prepare.fingerprints(recipe), force=force)
            )
            words.warn(console, changes)
            if ranks.as_the_first(lambda: run_folder.is_finished(folder)):
                words.say(console, [f"{folder}: already finished, nothing to do"])
                return folder
            checkpoint, skipped = ranks.as_the_first(lambda: checkpoints.newest(folder))
            words.warn(console, skipped)
            words.say(
                console,
                [f"Resuming from {checkpoint}" if checkpoint else "No complete checkpoint: starting from scratch"],
            )

        # Tokenizer and data
        tokenizer = model.load_tokenizer(recipe.model)
        with ranks.main_first():  # the other ranks read its cache
            data = prepare.prepare(recipe, tokens.of_transformers(tokenizer), cached=cached)
        model.set_chat_template(tokenizer, data)
        words.say(console, data.lines())
        words.warn(console, [loaded.placed(line) for line in data.warnings])

        # Model and trainer
        network = model.load_model(recipe, tokenizer)
        sft = trainer.build(recipe, network, tokenizer, data, folder, console, stop)
        words.say(console, facts.in_words(recipe, sft))
        counted = data.as_dict() | {"steps": sft.args.max_steps, "sequences_per_step": recipe.sequences_per_step}
        used = facts.used(sft) | {"data_sha256": prepare.fingerprints(recipe)}

        def record() -> None:
            """Write the metadata after the preflight, so that a run that fails before leaves no files."""
            if ranks.is_main():
                results = {"preflight": sft.preflight.results if sft.preflight else "skipped"}
                run_folder.describe(folder, recipe_file, recipe, counted, used | results, checkpoint, changes)

        # Training
        trainer.train(sft, checkpoint, record)

        # On all ranks: record the trained model's outputs, which the export is compared with, and gather its weights
        reference.record(sft, recipe, data, folder)
        trained = sharded.gathered(sft, recipe)
        with outputs.written(
            recipe, trained.model, trained.shapes, trained.weights, folder, ranks.is_main()
        ) as weights:
            ranks.leave()
            if not ranks.is_main():
                return folder

            # Export. Free gradients and optimizer states first: verification may need their memory.
            sft = network = None  # type: ignore[assignment]
            lines = outputs.export(recipe, trained.model, tokenizer, data, folder, trained.adapter, weights)
        words.say(console, lines)
        with words.no_more_than_a_warning(console, "the report"):
            page.write(folder)
        run_folder.finish(folder, peak_memory())
    with words.no_more_than_a_warning(console, "the summary"):
        words.conclude(console, folder)
    return folder


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Return what all ranks must have in common. One rank per node hashes the data."""
    shared = {"recipe": recipe.resolved(), "code": run_folder.code(), "versions": run_folder.versions()}
    if recipe.launch.machines > 1 and ranks.is_local_main():
        shared["data"] = prepare.fingerprints(recipe)
    return shared

"""Orchestrate a run: prepare data and model, train, evaluate, export and report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_recipes import run_dir, run_distributed, run_metadata
from sft_recipes.console import PipeSafeConsole, print_lines, print_summary, warn, warn_on_error
from sft_recipes.data import encoder, prepare
from sft_recipes.distributed import ranks
from sft_recipes.export import artifacts, reference
from sft_recipes.memory import autosize
from sft_recipes.models import model, strategies
from sft_recipes.models.tokenizer import load_tokenizer
from sft_recipes.recipe import validate
from sft_recipes.recipe.schema import Recipe
from sft_recipes.report import page
from sft_recipes.stopping import Stop
from sft_recipes.training import checkpoint_dirs, run_info, trainer
from sft_recipes.training.build import build_trainer
from sft_recipes.training.determinism import deterministic
from sft_recipes.training.metrics import peak_memory


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
    loaded, warnings = validate.load_valid(recipe_file, overrides)
    recipe = loaded.recipe
    ranks.set_launcher_env(recipe.launch)
    if ranks.needs_launch(recipe.launch):
        return run_distributed.run(recipe_file, overrides, resume=resume, force=force, cached=cached)
    console = console or PipeSafeConsole(quiet=not ranks.is_main())
    warn(console, warnings)
    with (
        loaded.locate_errors(),
        deterministic(recipe.train.deterministic),
        ranks.process_group(recipe, lambda: _must_match(recipe)),
        run_dir.open_run_dir(recipe.output_dir, resume=resume, main=ranks.is_main()) as folder,
    ):
        recipe = autosize.resolve_for_run(recipe, folder)
        checkpoint, changes = None, list[str]()
        if resume:
            changes = ranks.run_on_main(
                lambda: run_metadata.settings_changed(folder, recipe, prepare.fingerprints(recipe), force=force)
            )
            warn(console, changes)
            if ranks.run_on_main(lambda: run_dir.is_finished(folder)):
                print_lines(console, [f"{folder}: already finished, nothing to do"])
                return folder
            checkpoint, skipped = ranks.run_on_main(lambda: checkpoint_dirs.latest_complete(folder))
            warn(console, skipped)
            print_lines(
                console,
                [f"Resuming from {checkpoint}" if checkpoint else "No complete checkpoint: starting from scratch"],
            )

        # Tokenizer and data
        tokenizer = load_tokenizer(recipe.model)
        date = ranks.run_on_main(lambda: run_metadata.start_date(folder, recipe))
        with ranks.main_first():  # the other ranks read its cache
            data = prepare.prepare(recipe, encoder.from_transformers(tokenizer), cached=cached, date=date)
        tokenizer.chat_template = data.chat_template or tokenizer.chat_template
        print_lines(console, data.lines())
        warn(console, [loaded.with_location(line) for line in data.warnings])

        # Model and trainer
        network = model.load_model(recipe, tokenizer)
        sft = build_trainer(recipe, network, tokenizer, data, folder, console, stop)
        print_lines(console, run_info.summary_lines(recipe, sft))
        counted = data.as_dict() | {"steps": sft.args.max_steps, "sequences_per_step": recipe.sequences_per_step}
        used = run_info.settings_in_effect(sft) | {"data_sha256": prepare.fingerprints(recipe), "date": date}

        def record() -> None:
            """Write the metadata after the preflight, so that a run that fails before leaves no files."""
            if ranks.is_main():
                results = {"preflight": sft.preflight.results if sft.preflight else "skipped"}
                run_metadata.write(folder, recipe_file, recipe, counted, used | results, checkpoint, changes)

        # Training
        trainer.train(sft, checkpoint, record)

        # On all ranks: record the trained model's outputs, which the export is compared with, and gather its weights
        recorded = reference.record(sft, recipe, data)
        trained = strategies.gather_for_export(sft, recipe)
        with artifacts.write_gathered(
            recipe, trained.model, trained.shapes, trained.weights, folder, ranks.is_main()
        ) as weights:
            ranks.leave()
            if not ranks.is_main():
                return folder

            # Export. Free gradients and optimizer states first: verification may need their memory.
            sft = network = None  # type: ignore[assignment]
            assert recorded is not None
            lines = artifacts.export(recipe, trained.model, tokenizer, data, folder, recorded, trained.adapter, weights)
        print_lines(console, lines)
        with warn_on_error(console, "the report"):
            page.write(folder)
        run_dir.finish(folder, peak_memory())
    with warn_on_error(console, "the summary"):
        print_summary(console, folder)
    return folder


def _must_match(recipe: Recipe) -> dict[str, Any]:
    """Return what all ranks must have in common. One rank per node hashes the data."""
    shared = {"recipe": recipe.resolved(), "code": run_metadata.source_hash(), "versions": run_metadata.versions()}
    if recipe.launch.machines > 1 and ranks.is_local_main():
        shared["data"] = prepare.fingerprints(recipe)
    return shared

"""The story of a run."""

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
    """Train, validate and export what a recipe says; returns the run directory, which holds everything.

    `overrides` are `key=value` as --set takes them. `resume` continues from the newest complete checkpoint, or starts where
    there is none; `force` lets it do so with changes that do no harm. Without `cached` the data is tokenised again, and
    nothing of it kept. Where the recipe wants several processes they are started here: `stop` and `console` are then not
    used, as signals are handed on to them, and the first of them speaks. Raises InputError (a line a problem) where recipe,
    data, model or output directory are wrong, and then leaves nothing behind; RunError where training or export failed;
    Stopped where `stop` asked for that.
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
                words.say(console, [f"{folder}: this run has finished"])
                return folder
            checkpoint, passed_over = ranks.as_the_first(lambda: checkpoints.newest(folder))
            words.warn(console, passed_over)
            words.say(
                console, [f"resumed from {checkpoint}" if checkpoint else "no checkpoint yet: from the first step"]
            )

        # What it is trained on
        tokenizer = model.load_tokenizer(recipe.model)
        with ranks.main_first():  # the others take it from the cache
            data = prepare.prepare(recipe, tokens.of_transformers(tokenizer), cached=cached)
        model.set_chat_template(tokenizer, data)
        words.say(console, data.lines())
        words.warn(console, [loaded.placed(line) for line in data.warnings])

        # What is trained
        network = model.load_model(recipe, tokenizer)
        sft = trainer.build(recipe, network, tokenizer, data, folder, console, stop)
        words.say(console, facts.in_words(recipe, sft))
        counted = data.as_dict() | {"steps": sft.args.max_steps, "sequences_per_step": recipe.sequences_per_step}
        used = facts.used(sft) | {"data": prepare.fingerprints(recipe)}

        def record() -> None:
            """Once the preflight has passed: until then a refused run leaves nothing behind."""
            if ranks.is_main():
                found = {"preflight": sft.preflight.results if sft.preflight else "skipped"}
                run_folder.describe(folder, recipe_file, recipe, counted, used | found, checkpoint, changes)

        # The training itself
        trainer.train(sft, checkpoint, record)

        # What all ranks are needed for: what the trained model computes, which the export is compared with, and its weights
        recorded = reference.record(sft, recipe, data)
        trained = sharded.gathered(sft, recipe)
        with outputs.written(
            recipe, trained.model, trained.shapes, trained.weights, folder, ranks.is_main()
        ) as weights:
            ranks.leave()
            if not ranks.is_main():
                return folder

            # What comes out. Gradients and optimizer states go first: verification may need their memory.
            sft = network = None  # type: ignore[assignment]
            assert recorded is not None
            said = outputs.export(
                recipe, trained.model, tokenizer, data, folder, recorded, trained.adapter, weights
            )  # fmt: skip
        words.say(console, said)
        with words.no_more_than_a_warning(console, "the report"):
            page.write(folder)
        run_folder.finish(folder, peak_memory())
    with words.no_more_than_a_warning(console, "the summary"):
        words.conclude(console, folder)
    return folder


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What processes that train together need to have in common. Of a machine one reads the data."""
    found = {"recipe": recipe.resolved(), "code": run_folder.code(), "versions": run_folder.versions()}
    if recipe.launch.machines > 1 and ranks.is_local_main():
        found["data"] = prepare.fingerprints(recipe)
    return found

"""Prepare a multi-process run once, then launch its ranks, each of which calls `run.run`."""

from collections.abc import Sequence
from pathlib import Path

from sft_recipes import run_dir, run_metadata
from sft_recipes.commands import check
from sft_recipes.data import prepare
from sft_recipes.distributed import launch, ranks
from sft_recipes.errors import OutputError
from sft_recipes.recipe import validate


def run(
    recipe_file: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    force: bool = False,
    cached: bool = True,
    stop_after: str | None = None,
    debug: bool = False,
) -> Path:
    """Check the recipe, tokenize the data into the cache, and launch the processes. Returns the run directory.

    Raises the error of the rank that failed first.
    """
    loaded, _ = validate.load_valid(recipe_file, overrides)  # rank 0 prints the warnings
    recipe = loaded.recipe
    with loaded.locate_errors():
        first = ranks.node_rank(recipe.launch) == 0  # on the other nodes, the run of node 0 may exist already
        if first and (problem := run_dir.output_dir_problem(recipe.output_dir, resume=resume)):
            raise OutputError(problem)
        tokenizer, _ = check.tokenizer_of(recipe.model)
        # Otherwise rank 0 tokenizes, with transformers' tokenizer.
        if cached and tokenizer is not None and not tokenizer.rebuilt:
            date = run_metadata.start_date(Path(recipe.output_dir).expanduser(), recipe)
            prepare.prepare(recipe, tokenizer, date=date)
    options = [f"--set={override}" for override in overrides]
    options += ["--resume"] if resume else []
    options += ["--force"] if force else []
    options += [] if cached else ["--no-cache"]
    options += [f"--stop-after={stop_after}"] if stop_after else []
    options += ["--debug"] if debug else []
    launch.launch(recipe, ["run", recipe_file, *options], debug=debug)
    return Path(recipe.output_dir).expanduser()

"""Write job files for Slurm, SkyPilot and Kubernetes from a recipe's `launch` section.

Each starts `sft-recipe run RECIPE --resume` once per node, with MASTER_ADDR, MASTER_PORT and NODE_RANK if there are several,
and restarts it after exit code 75 or if nodes are preempted. What a recipe does not have (time limit, partition, volume claim)
gets a default for users to edit.
"""

import hashlib
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from sft_recipes import __version__, model_dir
from sft_recipes.data import sources
from sft_recipes.data.readers import every_source
from sft_recipes.errors import RecipeError, one_line
from sft_recipes.recipe import bundled, parse
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import TORCHAO, validate
from sft_recipes.trackers.base import kinds

System = Literal["slurm", "skypilot", "kubernetes"]
_TEMPLATES = {"slurm": "slurm.sh", "skypilot": "skypilot.yaml", "kubernetes": "kubernetes.yaml"}
_CORES = 8  # per process: to tokenize, load data and merge
_MAX_NAME = 50  # characters: Kubernetes allows 63, including its suffix per pod


def job(
    recipe_file: str,
    system: System,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    image: str | None = None,
    gpu: str | None = None,
    cpu: bool = False,
) -> Path:
    """Write a job file and return its path; `out` defaults to the recipe's name plus the system's suffix.

    `image` is a container image that has sft-recipe, `gpu` a GPU type as the system names it; `cpu` requests no GPUs. Raises
    InputError with all problems of the recipe, except that this machine lacks something.
    """
    loaded, problems = parse.parse_recipe(recipe_file, overrides)
    if loaded is None or problems:
        raise RecipeError(*problems)
    if found := validate(loaded.recipe, to_run=False).problems:
        raise RecipeError(*(loaded.with_location(line) for line in found))
    if gpu and cpu:
        raise RecipeError("--gpu, --cpu: cannot be combined. Pass only one of them.")
    if gpu is not None and not re.fullmatch(r"[\w.+:-]+", gpu):
        raise RecipeError(f"--gpu: not a GPU name (got {gpu!r}). Pass one such as H100 or A100-80GB.")
    if image is not None and not re.fullmatch(r"[\w.:/@#+-]+", image):
        raise RecipeError(
            f"--image: not an image name (got {image!r}). Pass one such as registry.example/sft-recipes:1."
        )
    if system == "kubernetes" and image is None:
        raise RecipeError(
            "--image: required with --on kubernetes. Pass a container image that has sft-recipe (see docs/scale.md)."
        )
    if system == "skypilot" and not Path(recipe_file).resolve().is_relative_to(Path.cwd()):
        raise RecipeError(
            f"{recipe_file}: the recipe is outside the working directory, which is all that --on skypilot uploads. Change to "
            "a directory that contains recipe and data."
        )
    out = out or Path(f"{_name(Path(recipe_file))}.{_TEMPLATES[system]}")
    options = [*(["--image", image] if image else []), *(["--gpu", gpu] if gpu else []), *(["--cpu"] if cpu else [])]
    recipe = loaded.recipe
    values = {
        "made_by": shlex.join(["sft-recipe", "job", recipe_file, "--on", system, *_set_options(overrides), *options]),
        "file": shlex.quote(str(out)),
        "image": image,
        "gpu": gpu,
        "gpus": 0 if cpu else recipe.launch.processes,
        "arguments": _run_command(recipe, recipe_file, system, overrides),
    }
    return bundled.write_new(out, _render(recipe, Path(recipe_file), system, values))


def _run_command(recipe: Recipe, recipe_file: str, system: System, overrides: Sequence[str]) -> list[str]:
    """Return the command that each node starts."""
    if system == "kubernetes":
        recipe_file = "/recipe/recipe.yaml"
    elif system == "skypilot":
        recipe_file = str(Path(recipe_file).resolve().relative_to(Path.cwd()))
        # In the bucket, which is all that survives when nodes are replaced.
        kept = [override for override in overrides if override.partition("=")[0].strip() != "output_dir"]
        overrides = [*kept, f"output_dir=/runs/{Path(recipe.output_dir).name}"]
    return ["sft-recipe", "run", recipe_file, "--resume", *_set_options(overrides)]


def _render(recipe: Recipe, recipe_file: Path, system: System, values: dict[str, Any]) -> str:
    launch, name = recipe.launch, _name(recipe_file)
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"quote": shlex.quote, "one_line": one_line}
    template = (
        resources.files("sft_recipes.distributed").joinpath(f"{_TEMPLATES[system]}.jinja").read_text(encoding="utf-8")
    )
    return environment.from_string(template).render(
        values,
        title=f"{recipe_file}: {launch.machines} x {launch.processes} processes, {launch.strategy}",
        name=name,
        machines=launch.machines,
        cpus=_CORES * launch.processes,
        command=shlex.join(values["arguments"]),
        venv=None if sys.prefix == sys.base_prefix else sys.prefix,
        recipe_text=recipe_file.read_text(encoding="utf-8").rstrip("\n"),
        hub=model_dir.directory(recipe.model.name) is None,
        claim="sft-recipes",
        bucket=f"sft-{name[:40]}-{hashlib.sha256(f'{platform.node()}:{Path.cwd()}'.encode()).hexdigest()[:8]}",
        install=_install(recipe),
    )


def _set_options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _name(recipe_file: Path) -> str:
    """Return a job name valid in all three systems: lowercase letters, digits and hyphens, beginning with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe_file.stem.lower()).strip("-")[:_MAX_NAME].strip("-")
    return name if re.match("[a-z]", name) else f"sft-{name}".strip("-")


def _install(recipe: Recipe) -> str:
    """Return pip's arguments to install sft-recipes: this checkout if the working directory is one, else the release."""
    extras = ["torchao"] if recipe.train.optimizer in TORCHAO else []
    trackers = [kinds()[name] for name in recipe.log.to]
    extras += [tracker.extra for tracker in trackers if tracker.extra]
    extras += ["deepspeed"] if recipe.launch.strategy in ("zero2", "zero3") else []
    extras += ["flash"] if recipe.model.attention == "flash_attention_2" else []
    extras += ["liger"] if recipe.train.kernels == "liger" else []
    paths = [source.path for source in every_source(recipe.data)]
    paths += [recipe.eval.generate] if isinstance(recipe.eval.generate, str) else []
    extras += dict.fromkeys(extra for extra in map(sources.extra, paths) if extra)
    suffix = f"[{','.join(extras)}]" if extras else ""
    if Path("sft_recipes").is_dir() and Path("constraints.txt").is_file():
        ours = ["-c", "constraints.txt", "-e", f".{suffix}"]
    else:
        ours = [f"sft-recipes{suffix}=={__version__}"]
    return shlex.join([*ours, *(tracker.package for tracker in trackers if not tracker.extra)])

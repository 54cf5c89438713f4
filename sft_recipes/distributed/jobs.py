"""Job files: a recipe's `launch` in the words of Slurm, SkyPilot and Kubernetes.

All three start `sft-recipe run RECIPE --resume` once on each machine, with MASTER_ADDR, MASTER_PORT and NODE_RANK where there
are several, and start it again when it ended with exit code 75 or its machines were taken away. The files are for their
owner to edit; what is not in a recipe (time, partition, claim) has a default there.
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

from sft_recipes import __version__
from sft_recipes.errors import RecipeError, one_line
from sft_recipes.recipe import bundled, model_dir, parse
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.validate import TORCHAO, validate

System = Literal["slurm", "skypilot", "kubernetes"]
_TEMPLATES = {"slurm": "slurm.sh", "skypilot": "skypilot.yaml", "kubernetes": "kubernetes.yaml"}
_CORES = 8  # for a process: to tokenise, to load data, to merge
_LONGEST = 50  # of a name: Kubernetes allows 63 with what it adds for a machine


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
    """Write a job file; returns where. It is written to `out`, by default to the recipe's name with the system's.

    `image`: a container image that has sft-recipe. `gpu`: which, as the system calls it. `cpu`: no GPUs. Raises InputError
    with every problem of the recipe; what only this machine lacks is none.
    """
    loaded, problems = parse.parse_recipe(recipe_file, overrides)
    if loaded is None or problems:
        raise RecipeError(*problems)
    if found := validate(loaded.recipe, to_run=False).problems:
        raise RecipeError(*(loaded.with_location(line) for line in found))
    if gpu and cpu:
        raise RecipeError("--gpu and --cpu: a run is on one or the other; give one")
    if gpu is not None and not re.fullmatch(r"[\w.+:-]+", gpu):
        raise RecipeError(f"--gpu: {gpu!r} is no name of a GPU; expected such as H100 or A100-80GB")
    if image is not None and not re.fullmatch(r"[\w.:/@#+-]+", image):
        raise RecipeError(f"--image: {image!r} is no name of an image; expected such as registry.example/sft-recipes:1")
    if system == "kubernetes" and image is None:
        raise RecipeError(
            "--on kubernetes needs --image: a container image with sft-recipe in it; docs/scale.md has one"
        )
    if system == "skypilot" and not Path(recipe_file).resolve().is_relative_to(Path.cwd()):
        raise RecipeError(
            f"{recipe_file}: --on skypilot sends the working directory, and the recipe is not in it; change to one that holds "
            "recipe and data"
        )
    out = out or Path(f"{_name(Path(recipe_file))}.{_TEMPLATES[system]}")
    chosen = [*(["--image", image] if image else []), *(["--gpu", gpu] if gpu else []), *(["--cpu"] if cpu else [])]
    recipe = loaded.recipe
    values = {
        "made_by": shlex.join(["sft-recipe", "job", recipe_file, "--on", system, *_options(overrides), *chosen]),
        "file": shlex.quote(str(out)),
        "image": image,
        "gpu": gpu,
        "gpus": 0 if cpu else recipe.launch.processes,
        "arguments": _run(recipe, recipe_file, system, overrides),
    }
    return bundled.write_new(out, _filled(recipe, Path(recipe_file), system, values))


def _run(recipe: Recipe, recipe_file: str, system: System, overrides: Sequence[str]) -> list[str]:
    """What is started on each machine."""
    if system == "kubernetes":
        recipe_file = "/recipe/recipe.yaml"
    elif system == "skypilot":
        recipe_file = str(Path(recipe_file).resolve().relative_to(Path.cwd()))
        # In the bucket: nothing else is there when other machines take over.
        kept = [override for override in overrides if override.partition("=")[0].strip() != "output_dir"]
        overrides = [*kept, f"output_dir=/runs/{Path(recipe.output_dir).name}"]
    return ["sft-recipe", "run", recipe_file, "--resume", *_options(overrides)]


def _filled(recipe: Recipe, recipe_file: Path, system: System, values: dict[str, Any]) -> str:
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


def _options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _name(recipe_file: Path) -> str:
    """A name that is one to all three: small letters, digits and hyphens, from a letter on."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe_file.stem.lower()).strip("-")[:_LONGEST].strip("-")
    return name if re.match("[a-z]", name) else f"sft-{name}".strip("-")


def _install(recipe: Recipe) -> str:
    """What pip has to be told on a machine that has nothing: this checkout where the command is given in one."""
    wanted = ["torchao"] if recipe.train.optimizer in TORCHAO else []
    wanted += recipe.log.to
    wanted += ["deepspeed"] if recipe.launch.strategy in ("zero2", "zero3") else []
    wanted += ["flash"] if recipe.model.attention == "flash_attention_2" else []
    extras = f"[{','.join(wanted)}]" if wanted else ""
    if Path("sft_recipes").is_dir() and Path("constraints.txt").is_file():
        return f"-c constraints.txt -e {shlex.quote('.' + extras)}"
    return shlex.quote(f"sft-recipes{extras}=={__version__}")

"""The command line. Everything that needs torch is imported inside the command that needs it."""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from sft_recipes import __version__
from sft_recipes.errors import RecipeError, SFTRecipeError

UsageError: Any = typer.BadParameter.__base__  # click's, of which typer carries its own copy

app = typer.Typer(
    name="sft-recipe",
    help="Fine-tune a language model from one YAML recipe, and trust the result.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of a recipe (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, such as train.learning_rate=1e-4.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Tokenise again, and keep nothing of it.")]
if TYPE_CHECKING:
    ConvertSource = str
else:  # a tool is added by its table
    TABLES = (Path(__file__).parent / "convert" / "tables").glob("*.yaml")
    ConvertSource = Literal[tuple(sorted(table.stem.replace("_", "-") for table in TABLES))]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries print.")]


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        print(f"sft-recipe {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  # typer reads the default, nothing changes it
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint; start where there is none.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume with other versions, or other settings that do no harm.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one a device; as launch.processes.")
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop after 3h, 90m, 1h30m, with a checkpoint; exit code 75.")
    ] = None,
    no_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """Train, validate, export: the run directory holds everything."""
    from sft_recipes import stopping
    from sft_recipes.recipe import check as recipe_check
    from sft_recipes.recipe.model_files import read_ahead
    from sft_recipes.scale import ranks

    if force and not resume:
        raise RecipeError("--force goes with --resume: it lets a run continue with other versions or settings")
    limit = None if stop_after is None else stopping.seconds(stop_after)
    ranks.end_with_launcher()
    if processes is not None:
        overrides = [*overrides, f"launch.processes={processes}"]
    again = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    started = "torchrun ... -m sft_recipes.cli" if "LOCAL_RANK" in os.environ else "sft-recipe"
    command = None if ranks.BY_US in os.environ else f"{started} {shlex.join(again)}"
    with stopping.on_request(limit, command) as stop:
        # A typo is said at once, not after the seconds that importing torch takes; in these the weights can be read.
        accepted = recipe_check.accepted(recipe, overrides)[0].recipe
        _quiet(debug)
        if ranks.is_local_main():
            Thread(target=read_ahead, args=(accepted.model.name, accepted.model.revision), daemon=True).start()
        if ranks.to_be_started(accepted.launch):
            from sft_recipes import several

            several.run(
                recipe, overrides, resume=resume, force=force, cached=not no_cache, stop_after=stop_after, debug=debug
            )
        else:
            from sft_recipes.run import run as start

            start(recipe, overrides, resume=resume, force=force, cached=not no_cache, stop=stop)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = [], debug: Debug = False) -> None:  # noqa: B006
    """Validate the recipe and the data; every problem at once."""
    _quiet(debug)
    from sft_recipes.checks import check as start

    findings = start(recipe, overrides)
    for line in findings.lines:
        print(line)
    for warning in findings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{recipe}: good")


@app.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    number: Annotated[int, typer.Option("-n", min=1, help="How many sequences, at random.")] = 3,
    rows: Annotated[
        list[str], typer.Option("--row", help="Instead, those that hold this row: its number, or FILE:LINE.")
    ] = [],  # noqa: B006
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids too.")] = False,
    debug: Debug = False,
) -> None:
    """The exact tokens of some sequences: what is trained on, and where documents begin."""
    _quiet(debug)
    from sft_recipes.checks import preview as start

    start(recipe, overrides, number, rows, ids=ids)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of a GPU: 24GB (10^9 bytes), 24GiB; what would make it fit."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many; as launch.processes.")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A GPU of the table, such as H100; see docs/plan.md.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a run on CPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: memory in GiB, time in hours.")] = False,
    debug: Debug = False,
) -> None:
    """Predict memory, steps and time, without a GPU and without weights.

    From the recipe, the model's config, and the data where it is there.
    """
    _quiet(debug)
    from sft_recipes.plan import plan as start

    with contextlib.redirect_stdout(sys.stderr):  # some libraries print when they are imported, which is no JSON
        found = start(recipe, overrides, gpu_memory=gpu_memory, gpus=gpus, gpu=gpu, cpu=cpu)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print("\n".join(found.lines()))


@app.command()
def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_OR_RUN", help="A model, an adapter, a run directory, or builtin:tiny.")
    ],
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    input: Annotated[str, typer.Option(help="The Alpaca input that goes with the prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length at which the answer is cut off.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest tokens; above: drawn at random.")] = 0.0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt with the template the model was trained with."""
    from sft_recipes.recipe import model_files

    model_files.find_model(model)  # what is wrong is said before the seconds that importing torch takes
    _warn_of_code(trust_remote_code)
    _quiet(debug)
    from sft_recipes.talk import talk

    print(
        talk(
            model,
            prompt,
            input,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            trust_remote_code=trust_remote_code,
        )
    )


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_OR_RUN", help="An adapter or a run directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write the merged model to.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory of the base, by default the adapter's own. After QLoRA also: original or dequantized, "
            "by default the better of both."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one file.")] = "5GB",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the base brings.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Merge LoRA weights into the base model, and prove the result.

    It gets its name when a fresh process has found that it is the model that was trained.
    """
    from sft_recipes.recipe.load import expectation, schema_of

    for option, value in (("dtype", dtype), ("max_shard_size", max_shard_size)):
        wanted = schema_of(("export", option))
        if not re.fullmatch(wanted.get("pattern", "|".join(wanted.get("enum", []))), value):
            raise RecipeError(f"--{option.replace('_', '-')} {value}: expected {expectation(wanted)}")
    from sft_recipes.recipe import model_files

    found = model_files.find_adapter(adapter)
    _warn_of_code(trust_remote_code)
    _quiet(debug)
    from sft_recipes.export import merge as merging

    for line in merging.merge(
        found, out, base=base, dtype=dtype, max_shard_size=max_shard_size, trust_remote_code=trust_remote_code
    ):
        print(line)
    print(f"{out}: merged")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run directory; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to write it; by default to the run's directory, of several to comparison/."
        ),
    ] = None,
    table: Annotated[bool, typer.Option("--csv", help="Write metrics.csv, too.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow a run that is training, until it ends, or Ctrl-C.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write the report of a run, or of several side by side.

    Curves, data, answers and facts as HTML and PNG.
    """
    _quiet(debug)
    from sft_recipes.report import page

    def tell(written: list[Path]) -> None:
        print(*written, sep="\n", flush=True)

    if watch:
        page.follow(runs, out, tell, table=table)
    else:
        tell(page.report(runs, out, table=table))


@app.command("list")
def list_recipes() -> None:
    """The recipes that ship: method, model, hardware, measured result."""
    from rich.console import Console
    from rich.table import Table

    from sft_recipes.recipe import shipped

    table = Table("recipe", "method", "model", "hardware", "result", box=None, pad_edge=False, header_style="")
    table.columns[0].no_wrap, table.columns[2].overflow = True, "fold"
    for each in shipped.recipes():
        measured = each.result.partition(" (")[0]  # when and with which versions, its header says
        table.add_row(each.name, each.method, each.model, each.hardware, measured)
    wide = None if sys.stdout.isatty() else 1000  # to a file or another program each recipe is one line
    Console(highlight=False, markup=False, width=wide).print(table)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; by default NAME.yaml.")] = None,
) -> None:
    """Copy a recipe that ships, to edit it.

    With the line for editors, where a schema is beside it or above (see schema).
    """
    from sft_recipes.recipe import shipped

    print(shipped.copy(name, out))


@app.command()
def job(
    recipe: RecipeFile,
    on: Annotated[Literal["slurm", "skypilot", "kubernetes"], typer.Option("--on", help="What places it on machines.")],
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Where to write it; by default the recipe's name with .slurm.sh and such.")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="NAME", help="A container image with sft-recipe in it.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Which GPUs, in the system's own word.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without GPUs.")] = False,
) -> None:
    """Write a job file for a cluster, in which a run that was stopped goes on."""
    from sft_recipes.scale import jobs

    print(jobs.job(recipe, on, out, overrides, image=image, gpu=gpu, cpu=cpu))


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option(help="Write it to a file, .sft-recipe.schema.json for one that `new` finds.")
    ] = None,
) -> None:
    """The recipe's JSON schema, by which editors complete keys and show what they mean."""
    from sft_recipes.recipe import editors

    if out is None:
        print(editors.schema())
        return
    print(editors.write(out))
    print("Editors complete a recipe beside it that begins with")
    print(editors.line(Path(out.name)))


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The other tool's config (YAML or JSON).")],
    out: Annotated[Path | None, typer.Option(help="Where to write the recipe; by default it is shown.")] = None,
    source: Annotated[
        ConvertSource | None, typer.Option("--from", help="The tool that it is for; by default recognized by its keys.")
    ] = None,
) -> None:
    """Convert another tool's config to a recipe.

    Reports every key's outcome on stderr.
    """
    from sft_recipes.convert import conversion
    from sft_recipes.recipe import shipped

    converted = conversion.convert(file, source)
    if out is None:
        print(converted.text, end="")
    else:
        print(shipped.write_new(out, converted.text))
    print(*converted.report(), sep="\n", file=sys.stderr)


@app.command()
def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Ask the hub for an answer, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    debug: Debug = False,
) -> None:
    """Versions, devices, memory and disks: what is missing, and the command that brings it."""
    _quiet(debug)
    from sft_recipes import doctor as looking

    findings = looking.examine(hub=hub)
    good = not any(finding.hinders for finding in findings)
    if as_json:
        print(json.dumps({"good": good, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(finding.line())
    raise typer.Exit(0 if good else 1)


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done; 1 the run failed; 2 the recipe, the data or the command line is wrong; 75 stopped
    on request, and to be resumed."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # terminals that know only ASCII
    try:
        code = app(standalone_mode=False)
    except SFTRecipeError as error:
        from sft_recipes.scale import ranks

        elsewhere = ranks.report(error) or ranks.leaves_it_to_another(error)  # that is where it is shown
        if debug or not elsewhere:
            _complain(traceback.format_exc().rstrip() if debug else str(error))
        code = error.exit_code
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "sft-recipe"
        _complain(f"{command}: {error.format_message()} (see {command} --help)")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `sft-recipe list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # of the machine: a full disk, a file that may not be read
        if debug:
            raise
        print(f"{error.filename or 'sft-recipe'}: {error.strerror or error}", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


def _warn_of_code(trusted: bool) -> None:
    if trusted:
        print("warning: --trust-remote-code: Python code that comes with the model will run", file=sys.stderr)


def _complain(text: str) -> None:
    """What was wrong, which can be what was on the command line: a token that a shell put there, too."""
    from sft_recipes.recipe import secrets

    try:
        print(secrets.redacted(text), file=sys.stderr, flush=True)
    except BrokenPipeError:  # `2>&1 | tee log` got the signal too, and is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _quiet(debug: bool) -> None:
    """Keep the libraries' chatter from between our lines, and their pings from the network."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # On a CPU, torch's threads spin while they wait for each other. With another program on the same cores that is time
    # taken from the one waited for (benchmarks/busy_cores.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "trl", "accelerate", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It writes to stdout, at a level that it sets itself when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


if __name__ == "__main__":
    main()

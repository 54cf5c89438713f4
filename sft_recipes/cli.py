"""The command line. Modules that need torch are imported inside the commands that use them."""

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

UsageError: Any = typer.BadParameter.__base__  # click's class; typer vendors its own copy

app = typer.Typer(
    name="sft-recipe",
    help="Fine-tune causal language models from one YAML file.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of a recipe (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.learning_rate=1e-4.")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Ignore the tokenization cache: neither read nor write it.")]
if TYPE_CHECKING:
    ConvertSource = str
else:  # a tool is added by its table
    TABLES = (Path(__file__).parent / "convert" / "tables").glob("*.yaml")
    ConvertSource = Literal[tuple(sorted(table.stem.replace("_", "-") for table in TABLES))]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run custom Python code of the model.")]
# `main` applies it to all commands.
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the output of libraries.")]


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
        bool, typer.Option("--resume", help="Resume from the latest complete checkpoint, or start from scratch.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="With --resume: accept other library versions and non-critical settings (batch split, logging, "
            "evaluation, export).",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this node, one per device (overrides launch.processes)."),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop after TIME (3h, 90m, 1h30m): save a checkpoint, exit with code 75."),
    ] = None,
    no_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, evaluate and export a model."""
    from sft_recipes import stopping
    from sft_recipes.distributed import ranks
    from sft_recipes.model_dir import read_ahead
    from sft_recipes.recipe import validate

    if force and not resume:
        raise RecipeError("--force: only valid together with --resume. Add --resume, or remove --force.")
    limit = None if stop_after is None else stopping.seconds(stop_after)
    ranks.exit_with_launcher()
    if processes is not None:
        overrides = [*overrides, f"launch.processes={processes}"]
    with stopping.on_request(limit, _resume_command()) as stop:
        # Report a typo before torch is imported, which takes seconds; meanwhile a thread reads the weights ahead.
        accepted = validate.load_valid(recipe, overrides)[0].recipe
        if ranks.is_local_main():
            Thread(target=read_ahead, args=(accepted.model.name, accepted.model.revision), daemon=True).start()
        ranks.set_launcher_env(accepted.launch)
        if ranks.needs_launch(accepted.launch):
            from sft_recipes import run_distributed

            run_distributed.run(
                recipe, overrides, resume=resume, force=force, cached=not no_cache, stop_after=stop_after, debug=debug
            )
        else:
            from sft_recipes.run import run as start

            start(recipe, overrides, resume=resume, force=force, cached=not no_cache, stop=stop)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = [], _debug: Debug = False) -> None:  # noqa: B006
    """Validate recipe and data, reporting all problems at once."""
    from sft_recipes.commands.check import check as start

    findings = start(recipe, overrides)
    for warning in findings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(*findings.lines, f"{recipe}: OK", sep="\n")


@app.command()
def preview(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    number: Annotated[int, typer.Option("-n", min=1, help="Number of random sequences.")] = 3,
    rows: Annotated[
        list[str], typer.Option("--row", help="Show the sequence with this row (number or FILE:LINE).")
    ] = [],  # noqa: B006
    ids: Annotated[bool, typer.Option("--ids", help="Also show token ids.")] = False,
    _debug: Debug = False,
) -> None:
    """Show tokens, loss mask and document boundaries of training sequences."""
    from sft_recipes.commands.check import preview as start

    start(recipe, overrides, number, rows, ids=ids)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory per GPU (24GB, 24GiB); lists changes that fit."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs (overrides launch.processes).")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="GPU model, such as H100; see docs/plan.md for the list.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Predict a run on CPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: memory in GiB, time in hours.")] = False,
    _debug: Debug = False,
) -> None:
    """Predict memory, steps and time without a GPU and without weights.

    Uses the recipe, the model's config and, if available, the data.
    """
    from sft_recipes.commands.plan import plan as start

    with contextlib.redirect_stdout(sys.stderr):  # some libraries print on import, which would break --json
        prediction = start(recipe, overrides, gpu_memory=gpu_memory, gpus=gpus, gpu=gpu, cpu=cpu)
    if as_json:
        print(json.dumps(prediction.as_dict(), indent=2))
    else:
        print("\n".join(prediction.lines()))


@app.command()
def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_OR_RUN", help="A model, an adapter, a run directory, or builtin:tiny.")
    ],
    prompt: Annotated[str, typer.Option(help="The prompt.")],
    input: Annotated[str, typer.Option(help="The Alpaca input field of the prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    trust: Trust = False,
    _debug: Debug = False,
) -> None:
    """Answer a prompt, formatted with the template the model was trained with."""
    from sft_recipes import model_dir

    model_dir.find_model(model)  # report errors before torch is imported, which takes seconds
    _warn_of_code(trust)
    from sft_recipes.commands.generate import generate as start

    print(start(model, prompt, input, max_new_tokens=max_new_tokens, temperature=temperature, trust_remote_code=trust))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_OR_RUN", help="An adapter or a run directory.")],
    out: Annotated[Path, typer.Option(help="Directory for the merged model.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Hub id or directory of the base model. Default: the adapter's own. After QLoRA also original or "
            "dequantized; default: the one with the lower loss."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of one weight file.")] = "5GB",
    trust: Trust = False,
    _debug: Debug = False,
) -> None:
    """Merge a LoRA adapter into its base model and verify it.

    OUT is created only after a separate process has verified that the merged model matches base + adapter.
    """
    from sft_recipes.recipe.parse import expectation, schema_of

    for option, value in (("dtype", dtype), ("max_shard_size", max_shard_size)):
        field = schema_of(("export", option))
        if not re.fullmatch(field.get("pattern", "|".join(field.get("enum", []))), value):
            raise RecipeError(f"--{option.replace('_', '-')}: expected {expectation(field)} (got {value}).")
    from sft_recipes import model_dir

    adapter_dir = model_dir.find_adapter(adapter)
    _warn_of_code(trust)
    from sft_recipes.export.merge import merge as start

    for line in start(adapter_dir, out, base=base, dtype=dtype, max_shard_size=max_shard_size, trust_remote_code=trust):
        print(line)
    print(f"{out}: merged")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run, or several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Output directory. Default: the run directory, or comparison/ for several runs."
        ),
    ] = None,
    table: Annotated[bool, typer.Option("--csv", help="Also write metrics.csv.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Update the report of a running training until it ends, or Ctrl-C.")
    ] = False,
    _debug: Debug = False,
) -> None:
    """Write the report of a run, or a comparison of several.

    HTML and PNG with learning curves, data statistics, sample answers and versions.
    """
    from sft_recipes.report import page

    def print_paths(written: list[Path]) -> None:
        print(*written, sep="\n", flush=True)

    if watch:
        page.follow(runs, out, print_paths, table=table)
    else:
        print_paths(page.report(runs, out, table=table))


@app.command("list")
def list_recipes() -> None:
    """List the bundled recipes: method, model, hardware, measured result."""
    from rich.console import Console
    from rich.table import Table

    from sft_recipes.recipe import bundled

    table = Table("recipe", "method", "model", "hardware", "result", box=None, pad_edge=False, header_style="")
    table.columns[0].no_wrap, table.columns[2].overflow = True, "fold"
    for recipe in bundled.recipes():
        result = recipe.result.partition(" (")[0]  # date and versions are in the recipe's header
        table.add_row(recipe.name, recipe.method, recipe.model, recipe.hardware, result)
    width = None if sys.stdout.isatty() else 1000  # one line per recipe in files and pipes
    Console(highlight=False, markup=False, width=width).print(table)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")],
    out: Annotated[Path | None, typer.Option(help="Output file. Default: NAME.yaml.")] = None,
) -> None:
    """Copy a bundled recipe for editing.

    If its directory or a parent has a schema (see schema), the copy begins with the line that editors read.
    """
    from sft_recipes.recipe import bundled

    print(bundled.copy(name, out))


@app.command()
def job(
    recipe: RecipeFile,
    on: Annotated[Literal["slurm", "skypilot", "kubernetes"], typer.Option("--on", help="Cluster scheduler.")],
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Output file. Default: the recipe's name with .slurm.sh or .yaml.")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="NAME", help="Container image that has sft-recipe.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="GPU type, as the scheduler names it.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Request no GPUs.")] = False,
) -> None:
    """Write a cluster job file that resumes automatically."""
    from sft_recipes.distributed import jobs

    print(jobs.job(recipe, on, out, overrides, image=image, gpu=gpu, cpu=cpu))


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option(help="Output file; `new` finds .sft-recipe.schema.json. Default: print it.")
    ] = None,
) -> None:
    """Write the JSON schema of recipes, for completion in editors."""
    from sft_recipes.recipe import editor_schema

    if out is None:
        print(editor_schema.schema())
        return
    print(editor_schema.write(out))
    print("For completion in editors, begin a recipe in the same directory with")
    print(editor_schema.line(Path(out.name)))


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The other tool's config (YAML or JSON).")],
    out: Annotated[Path | None, typer.Option(help="Output file. Default: print the recipe.")] = None,
    source: Annotated[
        ConvertSource | None,
        typer.Option("--from", help="Tool of the config. Default: detected from its keys."),
    ] = None,
) -> None:
    """Convert another tool's config to a recipe.

    Reports every key's outcome on stderr.
    """
    from sft_recipes.convert import conversion
    from sft_recipes.recipe import bundled

    converted = conversion.convert(file, source)
    if out is None:
        print(converted.text, end="")
    else:
        print(bundled.write_new(out, converted.text))
    print(*converted.report(), sep="\n", file=sys.stderr)


@app.command()
def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also check the connection to the Hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    _debug: Debug = False,
) -> None:
    """Diagnose versions, devices, memory and disks, with a fix for each problem."""
    from sft_recipes.commands.doctor import diagnose

    findings = diagnose(hub=hub)
    ok = not any(finding.blocks_runs for finding in findings)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [vars(finding) for finding in findings]}, indent=2))
    else:
        print(*(finding.line() for finding in findings), sep="\n")
    raise typer.Exit(0 if ok else 1)


def main() -> NoReturn:
    """Run the program. Exit codes: 0 done; 1 the run failed; 2 recipe, data or command line is wrong; 75 stopped on
    request and resumable."""
    debug = "--debug" in sys.argv
    quiet_libraries(debug)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for ASCII-only terminals
    try:
        code = app(standalone_mode=False)
    except SFTRecipeError as error:
        from sft_recipes.distributed import ranks

        elsewhere = ranks.report(error) or ranks.is_reported_elsewhere(error)  # the launcher or another rank prints it
        if debug or not elsewhere:
            _print_error(traceback.format_exc().rstrip() if debug else str(error))
        code = error.exit_code
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "sft-recipe"
        _print_error(f"{command}: {error.format_message()} (see {command} --help)")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `sft-recipe list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # the machine's fault: a full disk, an unreadable file
        if debug:
            raise
        print(f"{error.filename or 'sft-recipe'}: {error.strerror or error}", file=sys.stderr)
        code = 1
    sys.exit(code or 0)


def _resume_command() -> str | None:
    """Return the command that resumes this one; None in ranks that our launcher started, as it prints its own."""
    from sft_recipes.distributed import ranks

    words = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    program = "torchrun ... -m sft_recipes.cli" if "LOCAL_RANK" in os.environ else "sft-recipe"
    return None if ranks.LAUNCHER_PID in os.environ else f"{program} {shlex.join(words)}"


def _warn_of_code(trusted: bool) -> None:
    if trusted:
        print(
            "warning: --trust-remote-code: the model's custom Python code will run. Review it first.", file=sys.stderr
        )


def _print_error(text: str) -> None:
    """Print to stderr without secrets: the text may quote the command line, where a shell may have put a token."""
    from sft_recipes.recipe import secrets

    try:
        print(secrets.redacted(text), file=sys.stderr, flush=True)
    except BrokenPipeError:  # the reader of `2>&1 | tee log` received the same signal and has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def quiet_libraries(debug: bool) -> None:
    """Silence log messages, progress bars and telemetry of libraries."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # On CPUs, torch's threads spin while waiting for each other. If another program shares the cores, spinning takes
    # time from the thread being waited for (benchmarks/busy_cores.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "bitsandbytes", "torch.utils", "trl", "accelerate", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed logs to stdout and sets its level on import.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


if __name__ == "__main__":
    main()

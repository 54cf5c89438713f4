"""Write the report of a run, or a comparison of several: a self-contained report.html and learning_curve.png."""

import csv
import io
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, UndefinedError
from ruamel.yaml import YAML

from sft_recipes import atomic_files, run_dir, stopping
from sft_recipes.errors import OutputError, RecipeError, SFTRecipeError, Stopped, one_line
from sft_recipes.report import curves, run_data, svg_chart
from sft_recipes.report.learning_curve import learning_curve
from sft_recipes.report.run_data import Run

COMPARISON = Path("comparison")  # default output directory for several runs
_PROMPTS = 20  # maximum number of prompts on the page
_LONGEST = 4000  # maximum characters of a prompt or an answer on the page
_PAUSE = 2.0  # seconds between two updates of --watch, and between reloads of the page
_REST = 5  # minimum pause relative to the time to write, because the run may use the same cores


def write(folder: Path) -> None:
    """Write learning_curve.png and report.html into a run directory. Raises OutputError if it is no run."""
    report([folder])


def report(folders: Sequence[Path], out: Path | None = None, *, table: bool = False, live: bool = False) -> list[Path]:
    """Write report.html and learning_curve.png of a run, or of several in comparison; return the files.

    `out` is the output directory (default: the run directory, or COMPARISON for several runs); `table`: also write
    metrics.csv; `live`: the page reloads itself. Raises OutputError if a run cannot be read or `out` cannot be written,
    RecipeError if a run is given twice.
    """
    out, runs = out or (folders[0] if len(folders) == 1 else COMPARISON), None
    try:
        runs = [run_data.load_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
        html, rows = _html(runs, live), _csv(runs) if table else None
        out.mkdir(parents=True, exist_ok=True)
        written = [out / run_dir.CURVE, out / run_dir.REPORT]
        with atomic_files.atomic_file(written[0]) as partial:
            learning_curve({run.name: run.metrics for run in runs}, partial)
        _write(written[1], html)
        if rows is not None:
            written.append(out / "metrics.csv")
            _write(written[2], rows)
        return written
    except SFTRecipeError:
        raise
    except OSError as error:
        reason = (
            "written: {}. Choose another directory with --out" if runs else "read: {}. Make it readable for this user"
        )
        raise OutputError(f"{error.filename or out}: cannot be {reason.format(error.strerror)}.") from None
    except (LookupError, TypeError, ArithmeticError, ValueError, AttributeError, UndefinedError) as error:
        reason = f"{type(error).__name__}: {error}"
        names = ", ".join(map(str, folders))
        raise OutputError(
            f"{names}: unexpected content in the files of the run ({reason}). Restore them as the run wrote them."
        ) from None


def follow(
    folders: Sequence[Path], out: Path | None, on_first: Callable[[list[Path]], None], *, table: bool = False
) -> None:
    """Update the report whenever its runs log something, until all of them have ended, or Ctrl-C or SIGTERM.

    `on_first` is called once, with the files of the first report. Raises as `report` does.
    """
    seen, reported = list[int](), False
    with suppress(Stopped), stopping.on_request(None, None):
        while any(folder.is_dir() and atomic_files.is_held(folder) for folder in folders):
            start, modified = time.monotonic(), _modified(folders)
            if modified != seen and all((folder / run_dir.METRICS).is_file() for folder in folders):
                written, seen = report(folders, out, table=table, live=True), modified
                if not reported:
                    on_first(written)
                reported = True
            time.sleep(max(_PAUSE, _REST * (time.monotonic() - start)))
    written = report(folders, out, table=table)
    if not reported:
        on_first(written)


def _modified(folders: Sequence[Path]) -> list[int]:
    """Return the modification times of the runs' logs in nanoseconds."""
    logs = [folder / name for folder in folders for name in run_dir.LOGS]
    return [log.stat().st_mtime_ns for log in logs if log.is_file()]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of the directories, or their paths if names are not unique."""
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise RecipeError(f"{twice[0]}: given twice. Pass each run once.")
    names = [one_line(path.name) for path in paths]
    return names if len(set(names)) == len(names) else [one_line(str(folder)) for folder in folders]


def _html(runs: Sequence[Run], live: bool) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"clipped": _clipped, "yaml": _yaml}
    template = resources.files("sft_recipes.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    charts, prompts = curves.charts({run.name: run.metrics for run in runs}), run_data.answers(runs)
    return environment.from_string(template).render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        one=runs[0] if len(runs) == 1 else None,
        axes=svg_chart.AXES,
        colors=curves.COLORS,
        charts=charts,
        frames=svg_chart.frames,
        values=[svg_chart.tooltips(chart) for chart in charts],
        prompts=prompts[:_PROMPTS],
        not_shown=max(0, len(prompts) - _PROMPTS),
        run_data=run_data,
        refresh=_PAUSE if live else None,
    )


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"


def _yaml(recipe: object) -> str:
    """Return a resolved recipe as YAML."""
    stream = io.StringIO()
    YAML().dump(recipe, stream)
    return stream.getvalue()


def _csv(runs: Sequence[Run]) -> str:
    """Return metrics.jsonl as CSV; with several runs, the first column is the run's name."""
    rows = [({"run": run.name} if len(runs) > 1 else {}) | line for run in runs for line in run.metrics]
    stream = io.StringIO()
    table = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue()


def _write(file: Path, text: str) -> None:
    # JSON can contain lone surrogates, which UTF-8 cannot encode.
    atomic_files.write_text(file, text.encode("utf-8", "backslashreplace").decode("utf-8"))

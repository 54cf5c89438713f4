"""The report of a run, or of several side by side: report.html, one file that opens offline, and learning_curve.png."""

import csv
import io
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, UndefinedError
from ruamel.yaml import YAML

from sft_recipes import files, stopping
from sft_recipes.errors import OutputError, RecipeError, SFTRecipeError, Stopped, one_line
from sft_recipes.report import chart, facts
from sft_recipes.report.curve import learning_curve, learning_curves
from sft_recipes.report.facts import Run

COMPARISON = Path("comparison")  # where several runs are compared, if nothing else is said
_PROMPTS = 20  # whose answers are on the page
_LONGEST = 4000  # characters of a prompt or an answer there
_PAUSE = 2.0  # seconds between two looks at a run that is followed; the page is loaded anew as often
_REST = 5  # times as long as writing took: a run on the same cores comes first


def write(folder: Path) -> None:
    """Write learning_curve.png and report.html of a run into its directory. Raises OutputError where there is no run."""
    report([folder])


def report(folders: Sequence[Path], out: Path | None = None, *, table: bool = False, live: bool = False) -> list[Path]:
    """Write report.html and learning_curve.png of a run, or of several in comparison; returns the files.

    They are written to `out`, by default to the run's directory, of several to COMPARISON. `table`: metrics.csv too. `live`:
    the page loads itself anew. Raises OutputError where there is no run, its files are not as it wrote them, or `out` cannot
    be written, RecipeError where a run is given twice.
    """
    out = out or (folders[0] if len(folders) == 1 else COMPARISON)
    try:
        runs = _read(folders)
        html, rows = _html(runs, live), _csv(runs) if table else None
        out.mkdir(parents=True, exist_ok=True)
        written = [out / "learning_curve.png", out / "report.html"]
        with files.replaced(written[0]) as partial:
            if len(runs) == 1:
                learning_curve(runs[0].metrics, partial, runs[0].name)
            else:
                learning_curves({run.name: run.metrics for run in runs}, partial)
        _write(written[1], html)
        if rows is not None:
            written.append(out / "metrics.csv")
            _write(written[2], rows)
        return written
    except SFTRecipeError:
        raise
    except OSError as error:
        reason = f"cannot be written: {error.strerror}; choose another --out"
        raise OutputError(f"{error.filename or out}: {reason}") from None
    except (LookupError, TypeError, ArithmeticError, ValueError, AttributeError, UndefinedError) as error:
        reason = f"{type(error).__name__}: {error}"
        of = ", ".join(map(str, folders))
        raise OutputError(f"{of}: its files are not as a run wrote them, so there is no report ({reason})") from None


def _read(folders: Sequence[Path]) -> list[Run]:
    try:
        return [facts.read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    except SFTRecipeError:
        raise
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; make it readable for this user"
        raise OutputError(f"{error.filename}: {reason}") from None


def follow(
    folders: Sequence[Path], out: Path | None, tell: Callable[[list[Path]], None], *, table: bool = False
) -> None:
    """Write the report anew whenever its runs have logged something, until none of them is running, or Ctrl-C, or SIGTERM.
    `tell` hears once where it is. Raises as `report` does."""
    seen, told = list[int](), False
    with suppress(Stopped), stopping.on_request(None, None):
        while any(folder.is_dir() and files.is_held(folder) for folder in folders):
            began, found = time.monotonic(), _changes(folders)
            if found != seen and all((folder / "metrics.jsonl").is_file() for folder in folders):
                written, seen = report(folders, out, table=table, live=True), found
                if not told:
                    tell(written)
                told = True
            time.sleep(max(_PAUSE, _REST * (time.monotonic() - began)))
    written = report(folders, out, table=table)
    if not told:
        tell(written)


def _changes(folders: Sequence[Path]) -> list[int]:
    """When what a report shows of runs was last written, in nanoseconds."""
    logs = [folder / name for folder in folders for name in ("metrics.jsonl", "samples.jsonl")]
    return [log.stat().st_mtime_ns for log in logs if log.is_file()]


def _names(folders: Sequence[Path]) -> list[str]:
    """The directories' names; whole paths where these are the same."""
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise RecipeError(f"{twice[0]}: given twice; a run is compared with others")
    names = [one_line(place.name) for place in places]
    return names if len(set(names)) == len(names) else [one_line(str(folder)) for folder in folders]


def _html(runs: Sequence[Run], live: bool) -> str:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"clipped": _clipped, "yaml": _yaml}
    template = resources.files("sft_recipes.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    charts, asked = facts.charts(runs), facts.answers(runs)
    return environment.from_string(template).render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        one=runs[0] if len(runs) == 1 else None,
        axes=chart.AXES,
        charts=charts,
        values=[each.values() for each in charts],
        asked=asked[:_PROMPTS],
        not_shown=max(0, len(asked) - _PROMPTS),
        facts=facts,
        refresh=_PAUSE if live else None,
    )


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"


def _yaml(recipe: object) -> str:
    """A recipe as one writes it: the resolved one, in the form that it can be run in."""
    stream = io.StringIO()
    YAML().dump(recipe, stream)
    return stream.getvalue()


def _csv(runs: Sequence[Run]) -> str:
    """All of metrics.jsonl, a line a row; of several runs one after the other, their names in front."""
    rows = [({"run": run.name} if len(runs) > 1 else {}) | line for run in runs for line in run.metrics]
    stream = io.StringIO()
    table = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue()


def _write(file: Path, text: str) -> None:
    # JSON can hold halves of characters, which a file cannot.
    files.write_text(file, text.encode("utf-8", "backslashreplace").decode("utf-8"))

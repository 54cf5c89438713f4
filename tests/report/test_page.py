import csv
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes import atomic_files, console
from sft_recipes.errors import OutputError, RecipeError
from sft_recipes.report import page
from tests.commands import sft_recipe, start
from tests.report import runs


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a run."""
    question = {"role": "user", "content": "<b>What?</b>", "input": "{x}"}
    return runs.write(tmp_path / "run", runs.metrics(4), runs.samples("early", "late", message=question))


def html_of(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def test_one_file_with_what_happened(finished: Path) -> None:
    page.write(finished)
    html = html_of(finished)

    for text in (
        "3.0000 → 2.0000", "full fine-tuning", "0.70 GiB", "early", "late", "50,000 tokens",
        "20 (overlong)", "gradient leak", "original: max logit diff", "1.16.0", "0123456789abcdef",
        "sft-recipe run &#39;a b.yaml&#39; --set train.seed=1", "train.seed",
    ):  # fmt: skip
        assert text in html
    assert "&lt;b&gt;What?&lt;/b&gt;\n{x}" in html
    assert "<b>What?" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("<svg") == 3 * 5  # each curve by steps, tokens and time


def test_it_is_whole_without_a_script(finished: Path) -> None:
    page.write(finished)
    [first, *_] = re.findall(r'<path class="solid line c0" d="([^"]+)"', html_of(finished))

    assert first.count("L") == 3  # four records


def test_the_curve_is_a_picture(finished: Path) -> None:
    page.write(finished)

    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "learning_curve.png").stat().st_size > 10_000


HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "{{ 7 * 7 }}{% x %}",
    "\u202egnp.exe \u2066",
    "'\"><svg onload=alert(1)>",
    "]]><!-- --!>",
    "\x00\x1b[31m\u2028",
    "\ud800",
    "&lt;b&gt;",
]


def hostile(folder: Path) -> Path:
    """A run that says these things wherever it can."""
    text = " ".join(HOSTILE)
    message = {"role": text, "content": text, "input": text}
    account = json.loads(json.dumps(runs.ACCOUNT).replace("train.jsonl", "PATH"))
    account["sources"][0] |= {"path": text, "dropped": {text: 3}}
    return runs.write(
        folder, runs.metrics(3), runs.samples(text, text + "!", expected=text, message=message),
        recipe={"model": {"name": text}, text: {text: text}}, data={"train": account, "steps": 3},
        manifest={**runs.MANIFEST, "platform": text, "command": ["x", "run", text], "versions": {text: text}},
        proof={"merged_by": text, "verification": {text: {text: 1.0}}},
    )  # fmt: skip


def test_what_the_data_says_is_text(tmp_path: Path) -> None:
    page.write(hostile(tmp_path / "a run <b> & </title>"))
    html = html_of(tmp_path / "a run <b> & </title>")

    assert html.count("<script") == html.count("</script>") == 2
    assert html.count("</title>") == 1
    assert not re.search("<img|<svg onload|<!--", html)
    assert "{{ 7 * 7 }}{% x %}" in html
    assert "\\ud800" in html


def test_long_texts_are_cut_on_the_page(tmp_path: Path) -> None:
    folder = runs.write(tmp_path / "run", runs.metrics(1), runs.samples("a" * 10_000))
    page.write(folder)

    assert "a" * 4000 + " … (6,000 more characters)" in html_of(folder)


def test_many_prompts_are_counted(tmp_path: Path) -> None:
    asked = [line for n in range(25) for line in runs.samples("x", message={"role": "user", "content": f"number {n}."})]
    folder = runs.write(tmp_path / "run", runs.metrics(1), asked)
    page.write(folder)

    assert "number 19." in html_of(folder)
    assert "number 20." not in html_of(folder)
    assert "5 more prompts are in samples.jsonl" in html_of(folder)


ODD: dict[str, Callable[[Path], Path]] = {
    "nothing but an empty log": lambda f: runs.write(f, [], recipe=None, data=None, manifest=None, proof=None),
    "one step": lambda f: runs.write(f, runs.metrics(1)),
    "no evaluation": lambda f: runs.write(f, runs.metrics(20, evaluations=0)),
    "no number": lambda f: runs.write(
        f, [{"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "peak_memory_gib": 1}]
    ),
    "keys of another version": lambda f: runs.write(
        f, runs.metrics(2), recipe={"model": {"name": "m", "new": [1]}, "x": 1}
    ),
    "no preflight": lambda f: runs.write(f, runs.metrics(2), manifest={"preflight": "skipped"}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_runs(case: str, tmp_path: Path) -> None:
    folder = ODD[case](tmp_path / "run")
    [picture, html, table] = page.report([folder], table=True)

    assert picture.stat().st_size > 10_000
    values = re.search(r'id="values">(.*?)</script>', html.read_text("utf-8"))
    assert values is not None
    json.loads(values[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert table.is_file()


def test_a_run_that_was_not_validated(tmp_path: Path) -> None:
    folder = runs.write(tmp_path / "run", runs.metrics(20, evaluations=0))
    page.write(folder)

    assert "Eval loss" not in html_of(folder)
    assert "Sample answers" not in html_of(folder)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not a run directory \(metrics\.jsonl is missing\)"):
        page.write(tmp_path)


def test_first_and_last_answers(finished: Path) -> None:
    [(before, after)] = console.samples(finished)

    assert (before["answer"], after["answer"]) == ("early", "late")


def test_a_number_without_an_end_is_not_the_runs(tmp_path: Path) -> None:
    lines = [line | {"tokens": float("inf")} for line in runs.metrics(2)]
    with pytest.raises(OutputError, match="unexpected content in the files of the run"):
        page.write(runs.write(tmp_path / "run", lines))


def test_a_run_that_may_not_be_read(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another --out would not help."""

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(atomic_files, "_lock", refuse)
    remedy = "run: cannot be read: Permission denied. Make it readable for this user"
    with pytest.raises(OutputError, match=remedy):
        page.follow([finished], None, print)
    begun = runs.write(finished.parent / "begun" / "run", runs.metrics(2), manifest=None, proof=None)
    with pytest.raises(OutputError, match=remedy):  # it is asked whether it is running
        page.write(begun)
    monkeypatch.setattr(page.run_data, "load_run", refuse)
    with pytest.raises(OutputError, match=remedy):
        page.write(finished)


# --- The table -------------------------------------------------------------------------------------------------------


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_table_of_all_that_was_logged(finished: Path) -> None:
    page.report([finished], table=True)
    rows = rows_of(finished / "metrics.csv")

    assert len(rows) == len(runs.metrics(4))
    for row, line in zip(rows, runs.metrics(4), strict=True):
        assert {name: float(value) for name, value in row.items() if value} == line


def test_a_table_of_several_runs(tmp_path: Path) -> None:
    folders = [runs.write(tmp_path / name, runs.metrics(2)) for name in ("a", "b")]
    page.report(folders, tmp_path / "out", table=True)

    assert [row["run"] for row in rows_of(tmp_path / "out" / "metrics.csv")] == ["a"] * 4 + ["b"] * 4


# --- Several runs ----------------------------------------------------------------------------------------------------


def two(folder: Path) -> list[Path]:
    recipes = [{"model": {"name": "m"}, "train": {"learning_rate": rate}} for rate in (1e-4, 3e-4)]
    return [
        runs.write(folder / name, runs.metrics(steps), runs.samples(f"answer of {name}"), recipe=recipe)
        for name, steps, recipe in zip(("first", "second"), (20, 40), recipes, strict=True)
    ]


def test_runs_side_by_side(tmp_path: Path) -> None:
    written = page.report(two(tmp_path), tmp_path / "out")
    html = html_of(tmp_path / "out")

    assert written == [tmp_path / "out" / "learning_curve.png", tmp_path / "out" / "report.html"]
    for text in ("first, second", "train.learning_rate", "0.0001", "0.0003", "answer of first", "answer of second"):
        assert text in html
    for chart in json.loads(re.search(r'id="values">(.*?)</script>', html)[1]):  # type: ignore[index]
        assert {"first", "second"} <= {series["name"] for series in chart}
    assert not (tmp_path / "first" / "report.html").exists()


def test_they_are_compared_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    two(tmp_path)
    done = sft_recipe("report", "first", "second", "--csv", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        f"comparison/{name}" for name in ("learning_curve.png", "report.html", "metrics.csv")
    ]
    assert all((tmp_path / file).is_file() for file in done.stdout.split())


def test_names_that_are_the_same_are_told_apart(tmp_path: Path) -> None:
    folders = [runs.write(tmp_path / name / "run", runs.metrics(2)) for name in ("a", "b")]
    page.report(folders, tmp_path / "out")

    assert f"{tmp_path}/a/run, {tmp_path}/b/run" in html_of(tmp_path / "out")


def test_the_run_here_has_a_name(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    page.write(Path())

    assert "<title>run</title>" in html_of(finished)


def test_a_run_given_twice(finished: Path) -> None:
    with pytest.raises(RecipeError, match=r"given twice\. Pass each run once\."):
        page.report([finished, finished.parent / "x" / ".." / "run"], finished.parent / "out")


# --- Following -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_PAUSE", 0.02)
    monkeypatch.setattr(page, "_REST", 0)


@pytest.mark.usefixtures("no_pause")
def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    """One that is there, but has logged nothing, then logs one line after the other, each when the page has the last."""
    folder, lines, told, pages = tmp_path / "run", runs.metrics(4), list[Any](), list[str]()
    folder.mkdir()
    begun = threading.Event()

    def run() -> None:
        with atomic_files.locked(folder):
            begun.set()
            time.sleep(0.1)
            for line in lines:
                atomic_files.append(folder / "metrics.jsonl", json.dumps(line) + "\n")
                before, patience = len(pages), time.monotonic() + 60
                while time.monotonic() < patience:
                    if (folder / "report.html").is_file() and html_of(folder) not in pages:
                        pages.append(html_of(folder))
                        break
                    time.sleep(0.01)
                assert len(pages) > before

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    page.follow([folder], None, told.append)
    thread.join()

    assert len(pages) == len(lines)
    assert all("location.reload" in html and 'http-equiv="refresh"' in html for html in pages)
    assert told == [[folder / "learning_curve.png", folder / "report.html"]]
    assert "location.reload" not in html_of(folder)
    assert "not finished: ended after step 4" in html_of(folder)


def test_following_a_run_that_has_ended_writes_it_once(finished: Path) -> None:
    done = sft_recipe("report", str(finished), "--watch")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(finished / "learning_curve.png"), str(finished / "report.html")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_following_and_not_the_page(finished: Path, tmp_path: Path, number: int) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    with atomic_files.locked(finished):
        child = start("report", str(finished), "--watch", out=out, err=err)
        patience = time.monotonic() + 60
        while not (out.is_file() and out.read_text()) and time.monotonic() < patience:
            time.sleep(0.05)
        assert "location.reload" in html_of(finished)
        assert child.pid is not None
        os.kill(child.pid, number)
        child.join()

    assert (child.exitcode, err.read_text()) == (0, "")
    assert "location.reload" not in html_of(finished)


# --- For a figure of one's own ---------------------------------------------------------------------------------------


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    page.report([runs.write(Path("runs", "mine"), runs.metrics(20))], table=True)
    exec(code, {})

    assert Path("mine.pdf").read_bytes().startswith(b"%PDF")

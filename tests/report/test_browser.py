"""The report in a browser: no network requests, no console errors, readable on phones and desktops."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.report import page
from tests.report import runs
from tests.report.browser import PROGRAM, Page, opened
from tests.report.test_page import hostile

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of one run, of two, of one with hostile content, and of one that is live."""
    folder = tmp_path_factory.mktemp("reports")
    long = {"role": "user", "content": f"What is {'x' * 300}?", "input": "שלום 1 2 3\n" * 3}
    samples = [*runs.samples("no", "yes", expected="yes"), *runs.samples("a" * 500, "b c " * 400, message=long)]
    one = runs.write(folder / "one", runs.metrics(3000, every=10), samples)
    other = runs.write(
        folder / "other", runs.metrics(60), samples, recipe={"model": {"name": "m" * 200}, "train": {"seed": 2}}
    )
    bad = hostile(folder / "bad")
    page.report([one])
    page.report([one, other], folder / "both")
    page.report([bad])
    page.report([other], folder / "live", live=True)
    return {name: folder / name / "report.html" for name in ("one", "both", "bad", "live")}


def frames(browser: Page) -> list[dict[str, Any]]:
    """Axis and position of each visible chart."""
    return list(
        browser.value(
            "[...document.querySelectorAll('.frame')].filter(frame => frame.offsetParent).map(frame => "
            "({...frame.dataset, ...frame.getBoundingClientRect().toJSON()}))"
        )
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["one", "both", "bad"])
def test_quiet_offline_and_as_wide_as_the_window(
    name: str, width: int, dark: bool, browser: Page, reports: dict[str, Path], tmp_path: Path
) -> None:
    browser.open(reports[name], width=width, dark=dark)

    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [reports[name].as_uri()]
    assert browser.value("document.title") != "taken"
    assert browser.value("document.documentElement.scrollWidth") == width
    assert len(frames(browser)) == 5
    assert all(frame["left"] > 0 and frame["right"] <= width and frame["width"] > 200 for frame in frames(browser))
    browser.screenshot(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png")  # for inspection by eye


_CONTRAST = """
(() => {
  const light = color => {
    const linear = part => part <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
    const [r, g, b] = color.match(/[\\d.]+/g).map(part => linear(part / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    const own = getComputedStyle(element).backgroundColor;
    return own.startsWith("rgba(0, 0, 0, 0") && element.parentElement ? behind(element.parentElement) : own;
  };
  const found = {};
  for (const element of document.querySelectorAll("h1, h2, p, dt, dd, small, td, th, label, pre, summary, [class]")) {
    const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
    const ratio = (pair[1] + .05) / (pair[0] + .05), name = element.tagName + "." + element.className;
    found[name] = Math.min(found[name] ?? 99, ratio);
  }
  return found;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_stands_out(dark: bool, browser: Page, reports: dict[str, Path]) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2, level AA)."""
    browser.open(reports["one"], dark=dark)
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    found = browser.value(_CONTRAST)

    assert paper == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    assert len(found) > 10
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


def test_the_axis_is_chosen_and_remembered(browser: Page, reports: dict[str, Path]) -> None:
    browser.open(reports["one"])
    assert {frame["axis"] for frame in frames(browser)} == {"0"}

    browser.value("document.querySelector('label[for=tokens]').click()")
    assert {(frame["axis"], frame["end"]) for frame in frames(browser)} == {("1", "3000000")}
    browser.open(reports["one"], at=browser.value("location.hash"))
    assert {frame["axis"] for frame in frames(browser)} == {"1"}


def test_without_scripts_there_are_curves_and_the_choice_of_the_axis(browser: Page, reports: dict[str, Path]) -> None:
    browser.open(reports["one"], scripts=False)
    drawn = browser.value("document.querySelector('.frame.steps path.solid').getBBox().width")
    before = {frame["axis"] for frame in frames(browser)}
    label = browser.value("document.querySelector('label[for=time]').getBoundingClientRect().toJSON()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call(
            "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, x=label["x"] + 5, y=label["y"] + 5
        )

    assert drawn > 900
    assert (before, {frame["axis"] for frame in frames(browser)}) == ({"0"}, {"2"})


def test_a_value_under_the_pointer(browser: Page, reports: dict[str, Path]) -> None:
    browser.open(reports["one"])
    place = frames(browser)[0]
    tip = "document.querySelector('.frame.steps .tip')"
    assert browser.value(f"{tip}.hidden")

    browser.move(place["left"] + place["width"] / 2, place["top"] + 20)
    lines = browser.value(f"{tip}.textContent").split("\n")
    assert lines[0] == "step 1,500 · 1,500,000 tokens · 00:12:30"
    assert lines[1] == f"as logged: {1 + 2 / 1500:.4f}"
    assert [line.split(":")[0] for line in lines[1:]] == ["as logged", "training, smoothed", "eval"]
    browser.move(place["left"] + place["width"] / 2, place["top"] - 300)
    assert browser.value(f"{tip}.hidden")


def test_a_run_that_is_followed_loads_itself_anew(browser: Page, reports: dict[str, Path]) -> None:
    browser.open(reports["live"])
    browser.requests.clear()
    browser.loaded()  # no evaluation here: the page may reload before it answers

    assert set(browser.requests) == {reports["live"].as_uri()}
    assert browser.messages == []

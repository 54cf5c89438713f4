"""What the files of a run say of it, as names and values for a page."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import files
from sft_recipes.errors import OutputError
from sft_recipes.recipe.schema import Data, Lora, Model, Recipe
from sft_recipes.report.chart import Chart, Series
from sft_recipes.report.curve import (
    SMOOTHED_FROM,
    Metrics,
    Position,
    curve,
    positions,
    read_metrics,
    smoothed,
    thinned,
    whole_lines,
)  # fmt: skip

NONE = "–"
# Title, what is logged of training and of validation, and how it is drawn.
_CHARTS: tuple[tuple[str, str | None, str | None, set[str]], ...] = (
    ("Loss per token", "loss", "eval_loss", {"smooth"}),
    ("Learning rate", "learning_rate", None, {"from_zero"}),
    ("Gradient norm", "grad_norm", None, {"smooth", "from_zero"}),
    ("Tokens a second", "tokens_per_second", None, {"smooth", "from_zero"}),
    ("Peak memory so far, GiB", "memory", None, {"from_zero"}),
    ("Share of tokens predicted right", "token_accuracy", "eval_token_accuracy", {"smooth"}),
    ("Share of answers exactly right", None, "eval_exact_match", {"from_zero"}),
)
# Of data.json, in words. What was lost is also said where it is nothing.
_ROWS = {
    "rows_read": "rows read",
    "held_out": "set aside for validation",
    "not_sampled": "not chosen",
    "kept": "rows kept",
    "dropped": "rows dropped",
    "truncated_rows": "rows truncated",
    "split_rows": "rows split",
    "dropped_tokens": "tokens cut",
    "duplicates": "the same as an earlier row",
    "empty_answers": "without an answer",
    "lossy_template": "of which the template leaves out or rewrites text",
    "missing_eos": "without an end that is trained on",
    "train_overlap": "that are training rows too",
    "prompt_overlap": "with the prompt of a training row",
    "tokens": "tokens in sequences",
    "trained_tokens": "tokens trained on",
}
_LOST = ("dropped", "truncated_rows", "dropped_tokens")


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    name: str
    folder: Path
    metrics: Metrics
    samples: list[dict[str, Any]]
    recipe: dict[str, Any]  # as resolved
    data: dict[str, Any]
    manifest: dict[str, Any]
    proof: dict[str, Any]  # what the export was verified with, {} where there is none

    @cached_property
    def where(self) -> list[Position]:
        return positions(self.metrics)


def read(folder: Path, name: str) -> Run:
    """Raises OutputError where there is no run. What a killed run did not come to write is empty."""
    metrics, samples = read_metrics(folder), folder / "samples.jsonl"
    made = [file for name in ("merge.json", "export.json") if (file := folder / "model" / name).is_file()]
    return Run(
        name,
        folder,
        metrics,
        samples=whole_lines(samples) if samples.is_file() else [],
        recipe=_json(folder / "recipe.resolved.json"),
        data=_json(folder / "data.json"),
        manifest=_json(folder / "manifest.json"),
        proof=_json(made[0]) if made else {},
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise OutputError(f"{file}: not an object in JSON: {error}; it is not as the run wrote it") from None


def state(run: Run) -> str:
    """Whether it has come to its end, in words."""
    step, steps = run.metrics[-1]["step"] if run.metrics else 0, run.data.get("steps")
    if "finished" in run.manifest:
        return f"finished {run.manifest['finished'].replace('T', ' ').replace('+00:00', ' UTC')}"
    merges = run.recipe.get("lora") is None or run.recipe.get("export", {}).get("merge", True)
    if step == steps and (run.folder / ("model" if merges else "adapter")).is_dir():
        return "trained and exported"
    at = f"step {step:,} of {steps:,}" if steps else f"step {step:,}"
    if files.is_held(run.folder):
        return f"running: {at}"
    return f"not finished: it ended after {at}, as far as was logged; --resume continues"


def figures(run: Run) -> dict[str, str]:
    """The run in a few figures."""
    recipe, (_, tokens, seconds) = run.recipe, run.where[-1] if run.where else Position(0, 0.0, 0.0)
    parameters = run.manifest.get("parameters")
    memory = [point.value for point in curve(run.metrics, run.where, "memory")]
    found = {
        "Model": recipe.get("model", {}).get("name"),
        "Method": _method(recipe),
        "Parameters trained": f"{parameters['trained']:,} of {parameters['all']:,}" if parameters else None,
        "Steps": f"{run.metrics[-1]['step']:,}" if run.metrics else None,
        "Tokens seen": f"{tokens:,.0f}" if tokens else None,
        "Training loss": _last(run, "loss"),
        "Validation loss": _before_and_after(run, "eval_loss", "{:.4f}", best=min),
        "Perplexity": _before_and_after(run, "eval_perplexity", "{:,.2f}"),
        "Exact match": _before_and_after(run, "eval_exact_match", "{:.1%}", best=max),
        "Time in training steps": str(timedelta(seconds=round(seconds))) if seconds else None,
        "Tokens a second": f"{tokens / seconds:,.0f}" if seconds else None,
        "Peak memory": f"{max(memory):.2f} GiB" if memory else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _method(recipe: Mapping[str, Any]) -> str:
    lora, quantization = recipe.get("lora"), recipe.get("model", {}).get("quantization")
    if not lora:
        return "full fine-tuning"
    name = "QLoRA" if quantization else "DoRA" if lora.get("use_dora") else "LoRA"
    return f"{name}, rank {lora.get('rank')}" + (f", base in {quantization}" if quantization else "")


def _last(run: Run, name: str) -> str | None:
    points = smoothed(curve(run.metrics, run.where, name))
    return f"{points[-1].value:.4f}" if points else None


def _before_and_after(run: Run, name: str, form: str, *, best: Any = None) -> str | None:
    points = curve(run.metrics, run.where, name)
    if not points:
        return None
    said = f"{form.format(points[0].value)} before, {form.format(points[-1].value)} after"
    if points[0].step:  # the run did not begin with an evaluation
        said = form.format(points[-1].value)
    finite = [point for point in points if math.isfinite(point.value)]
    if best and finite:
        peak = best(finite, key=lambda point: point.value)
        if form.format(peak.value) != form.format(points[-1].value):
            said += f"; best {form.format(peak.value)} at step {peak.step:,}"
    return said


def final(runs: Sequence[Run]) -> list["Row"]:
    """The figures of several runs: a row a figure, a column a run."""
    each = [{"State": state(run)} | figures(run) for run in runs]
    names = dict.fromkeys(name for found in each for name in found)
    return [Row(name, [found.get(name, NONE) for found in each]) for name in names]


# --- Curves ----------------------------------------------------------------------------------------------------------


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All curves that there is something to draw of; of several runs in the same pictures, a colour each."""
    return [found for each in _CHARTS if (found := _chart(runs, *each)).series]


def _chart(runs: Sequence[Run], title: str, trained: str | None, evaluated: str | None, how: set[str]) -> Chart:
    series, notes = list[Series](), list[str]()
    for number, run in enumerate(runs):
        alone = len(runs) == 1
        points = curve(run.metrics, run.where, trained) if trained else []
        if points and "smooth" in how and len(points) >= SMOOTHED_FROM:
            if alone:
                series.append(Series("as logged", "faint", number, thinned(points)))
            name = "training, smoothed" if evaluated else "smoothed"
            series.append(Series(name if alone else run.name, "solid", number, thinned(smoothed(points))))
        elif points:
            series.append(Series("training" if alone else run.name, "solid", number, thinned(points)))
        if evaluated and (held_out := curve(run.metrics, run.where, evaluated)):
            name = "validation" if alone else f"{run.name}, validation"
            series.append(Series(name, "dots", number + alone, thinned(held_out)))
            points = [*points, *held_out]
        if lost := sorted(point.step for point in points if not math.isfinite(point.value)):
            of = "" if alone else f"{run.name}: "
            values = "1 value is" if len(lost) == 1 else f"{len(lost):,} values are"
            notes.append(f"{of}{values} not finite (NaN or infinite), the first at step {lost[0]:,}")
    return Chart(title, series, "from_zero" in how, "; ".join(notes))


# --- Recipes ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of a table."""

    name: str
    values: Sequence[str]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys of nested sections, and their values as one writes them."""
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: _value(value)}
    return found


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value, ensure_ascii=False)


def from_defaults(run: Run) -> list[Row]:
    """What the recipe says otherwise than the defaults: key, value, default."""
    lora = Lora() if run.recipe.get("lora") else None
    bare = Recipe(model=Model(name=NONE), data=Data(train=NONE), lora=lora, output_dir=NONE)
    defaults, own = flat(bare.resolved()), flat(run.recipe)
    return [Row(key, (value, defaults.get(key, NONE))) for key, value in own.items() if value != defaults.get(key)]


def differing(runs: Sequence[Run]) -> list[Row]:
    """Keys of the recipes, contents of the data, devices and versions that are not the same in all runs."""
    each = [
        flat(run.recipe)
        | {f"content of {path}": hashed[:12] for path, hashed in run.manifest.get("data", {}).items()}
        | flat({"device": run.manifest.get("device", {}), "versions": run.manifest.get("versions", {})})
        for run in runs
    ]
    keys = dict.fromkeys(key for values in each for key in values)
    rows = [Row(key, [values.get(key, NONE) for values in each]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def commands(run: Run) -> list[str]:
    """The command that was given, where it was one, and the one that runs what was resolved from it once more."""
    given = run.manifest.get("command", [])[1:]
    again = ["run", str(run.folder / "recipe.resolved.json"), "--set", f"output_dir={run.folder}-again"]
    return [f"sft-recipe {shlex.join(words)}" for words in (given, again) if words[:1] == ["run"]]


# --- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The training or the validation rows: in words, and a table of the sources."""

    name: str
    line: str
    sources: list[str]
    table: list[Row]


def data(run: Run) -> list[Rows]:
    """What became of every row and token."""
    accounts = {"Training": run.data.get("train"), "Validation": run.data.get("eval")}
    return [_rows(name, account, run.recipe) for name, account in accounts.items() if account]


def _rows(name: str, account: Mapping[str, Any], recipe: Mapping[str, Any]) -> Rows:
    sources, tokens, trained = account["sources"], account["tokens"], account["trained_tokens"]
    table = []
    for key, words in _ROWS.items():
        counts = [source.get(key, 0) for source in sources]
        if key in _LOST or any(counts):
            table.append(Row(words, [_counted(count) for count in counts]))
    lengths = dict.fromkeys(name for source in sources for name in source.get("token_lengths", {}))
    table += [
        Row(f"tokens of a row, {length}", [_counted(source.get("token_lengths", {}).get(length)) for source in sources])
        for length in lengths
    ]
    most = recipe.get("data", {}).get("max_length")
    share = f" ({trained / tokens:.1%})" if tokens else ""
    line = (
        f"{tokens:,} tokens, {trained:,} of them trained on{share}, in {account['sequences']:,} sequences"
        + (f" of at most {most:,}" if most else "")
        + f"; packing {account['packing']}, {account['packing_efficiency']:.1%} full"
    )
    return Rows(
        name, line, [f"{source['path']} ({source['format']}, {source['template']})" for source in sources], table
    )


def _counted(count: Any) -> str:
    if isinstance(count, dict):  # of dropped rows: why
        return ", ".join(f"{number:,} ({reason})" for reason, number in count.items() if number) or "0"
    return NONE if count is None else f"{count:,}"


# --- Answers ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One of several to the same prompt: when or whose, and whether it is right (None: not known)."""

    label: str
    text: str
    right: bool | None


@dataclass
class Asked:
    """A prompt, and what was answered."""

    messages: list[dict[str, Any]]
    expected: str | None
    answers: list[Answer]


def spoken(message: Mapping[str, Any]) -> str:
    """A message of a prompt as text, with the Alpaca input where there is one, or tool calls."""
    content = message.get("content")
    parts = [content if isinstance(content, str) else None if content is None else _value(content)]
    parts += [message.get("input"), _value(message["tool_calls"]) if message.get("tool_calls") else None]
    return "\n".join(part for part in parts if part)


def answers(runs: Sequence[Run]) -> list[Asked]:
    """Of one run the answers at each evaluation, the same ones in a row together; of several their last ones."""
    asked: dict[str, Asked] = {}
    for run in runs:
        given: dict[str, list[tuple[int, str]]] = {}
        for line in run.samples:
            key = json.dumps([line["messages"], line["expected"]])
            asked.setdefault(key, Asked(line["messages"], line["expected"], []))
            given.setdefault(key, []).append((line["step"], line["answer"]))
        for key, texts in given.items():
            found = _over_time(texts) if len(runs) == 1 else [(run.name, texts[-1][1])]
            expected = asked[key].expected
            right = [None if expected is None else text.strip() == expected.strip() for _, text in found]
            asked[key].answers += [Answer(*each, good) for each, good in zip(found, right, strict=True)]
    return list(asked.values())


def _over_time(texts: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    spans = list[tuple[int, int, str]]()
    for step, text in texts:
        first = spans.pop()[0] if spans and spans[-1][2] == text else step
        spans.append((first, step, text))
    return [
        (f"step {first:,}" if first == last else f"steps {first:,} to {last:,}", text) for first, last, text in spans
    ]


# --- How it was made -------------------------------------------------------------------------------------------------


def preflight(run: Run) -> dict[str, str]:
    """What was found before the first step."""
    found = run.manifest.get("preflight")
    return _readable(found) if isinstance(found, dict) else {}


def verification(run: Run) -> dict[str, str]:
    """What the exported model was found to be, by a process of its own."""
    figures = run.proof.get("figures", {})
    return _readable({key: value for key, value in run.proof.items() if key not in ("files", "figures")} | figures)


def made_with(run: Run) -> dict[str, str]:
    """Times, device, versions."""
    left_out = ("command", "preflight", "parameters", "resumed", "data", "versions")
    found = {key: value for key, value in run.manifest.items() if key not in left_out}
    resumed = [f"from {again['from']}, {again['started']}" for again in run.manifest.get("resumed", [])]
    return _readable(found) | ({"resumed": "; ".join(resumed)} if resumed else {})


def versions(run: Run) -> dict[str, str]:
    return {name: version for name, version in run.manifest.get("versions", {}).items() if version}


def fingerprints(run: Run) -> dict[str, str]:
    """SHA-256 of the data, by path."""
    return dict(run.manifest.get("data", {}))


def _readable(values: Mapping[str, Any]) -> dict[str, str]:
    there = flat({key: value for key, value in values.items() if value is not None})
    return {key.replace(".", ": ").replace("_", " ").replace(" gib", " GiB"): value for key, value in there.items()}

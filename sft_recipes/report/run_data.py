"""Load a run directory as tables and values for the report."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes import atomic_files, run_dir
from sft_recipes.recipe.schema import Data, Lora, Model, Recipe
from sft_recipes.report.curves import curve, positions, smoothed

NONE = "–"
# Labels of the keys of data.json. Those in _ALWAYS_SHOWN are shown even if they are 0.
_ROWS = {
    "rows_read": "rows read",
    "held_out": "rows held out for evaluation",
    "not_sampled": "rows not sampled",
    "kept": "rows kept",
    "dropped": "rows dropped",
    "truncated_rows": "rows truncated",
    "split_rows": "rows split",
    "dropped_tokens": "tokens dropped from kept rows",
    "duplicates": "duplicate rows",
    "empty_answers": "rows with an empty answer",
    "lossy_template": "rows with text that the template drops or rewrites",
    "missing_eos": "rows without an EOS token in the loss",
    "train_overlap": "rows that are also training rows",
    "prompt_overlap": "rows with the prompt of a training row",
    "tokens": "tokens in sequences",
    "trained_tokens": "trained tokens",
}
_ALWAYS_SHOWN = ("dropped", "truncated_rows", "dropped_tokens")


@dataclass(frozen=True)
class Run:
    """The contents of a run directory."""

    name: str
    folder: Path
    metrics: run_dir.Lines
    samples: run_dir.Lines
    recipe: dict[str, Any]  # as resolved
    data: dict[str, Any]
    manifest: dict[str, Any]
    verification: dict[str, Any]  # merge.json or export.json, {} if there is none


def load_run(folder: Path, name: str) -> Run:
    """Load a run; files that are missing, e.g. because it was killed, are empty. Raises OutputError if it is no run."""

    def read(*files: Path) -> dict[str, Any]:
        return next((run_dir.read_json(file) for file in files if file.is_file()), {})

    return Run(
        name,
        folder,
        run_dir.read_metrics(folder),
        run_dir.read_lines(folder / run_dir.SAMPLES),
        recipe=read(folder / run_dir.RECIPE),
        data=read(folder / run_dir.DATA),
        manifest=read(folder / run_dir.MANIFEST),
        verification=read(*(folder / run_dir.MODEL / name for name in run_dir.VERIFICATIONS)),
    )


def state(run: Run) -> str:
    """Describe how far the run has come."""
    step, steps = run.metrics[-1]["step"] if run.metrics else 0, run.data.get("steps")
    if "finished" in run.manifest:
        return f"finished {run.manifest['finished'].replace('T', ' ').replace('+00:00', ' UTC')}"
    merges = run.recipe.get("lora") is None or run.recipe.get("export", {}).get("merge", True)
    if step == steps and (run.folder / (run_dir.MODEL if merges else run_dir.ADAPTER)).is_dir():
        return "trained and exported"
    at = f"step {step:,} of {steps:,}" if steps else f"step {step:,}"
    if atomic_files.is_held(run.folder):
        return f"running: {at}"
    return f"not finished: ended after {at} (last logged step); --resume continues it"


def key_metrics(run: Run) -> dict[str, str]:
    """Return the key metrics of a run by label."""
    recipe, parameters = run.recipe, run.manifest.get("parameters")
    step, tokens, seconds = positions(run.metrics)[-1] if run.metrics else (None, 0.0, 0.0)
    memory = [point.value for point in curve(run.metrics, "peak_memory_gib")]
    values = {
        "Model": recipe.get("model", {}).get("name"),
        "Method": _method(recipe),
        "Trainable parameters": f"{parameters['trainable']:,} of {parameters['total']:,}" if parameters else None,
        "Steps": f"{step:,}" if step is not None else None,
        "Tokens": f"{tokens:,.0f}" if tokens else None,
        "Training loss": _last(run, "loss"),
        "Eval loss": _before_and_after(run, "eval_loss", "{:.4f}", best=min),
        "Perplexity": _before_and_after(run, "eval_perplexity", "{:,.2f}"),
        "Exact match": _before_and_after(run, "eval_exact_match", "{:.1%}", best=max),
        "Time in training steps": str(timedelta(seconds=round(seconds))) if seconds else None,
        "Tokens/s": f"{tokens / seconds:,.0f}" if seconds else None,
        "Peak memory": f"{max(memory):.2f} GiB" if memory else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _method(recipe: Mapping[str, Any]) -> str:
    lora, quantization = recipe.get("lora"), recipe.get("model", {}).get("quantization")
    if not lora:
        return "full fine-tuning"
    name = "QLoRA" if quantization else "DoRA" if lora.get("use_dora") else "LoRA"
    return f"{name}, rank {lora.get('rank')}" + (f", base in {quantization}" if quantization else "")


def _last(run: Run, name: str) -> str | None:
    points = smoothed(curve(run.metrics, name))
    return f"{points[-1].value:.4f}" if points else None


def _before_and_after(run: Run, name: str, form: str, *, best: Any = None) -> str | None:
    points = curve(run.metrics, name)
    if not points:
        return None
    text = f"{form.format(points[0].value)} → {form.format(points[-1].value)}"
    if points[0].step:  # no evaluation before the first step
        text = form.format(points[-1].value)
    finite = [point for point in points if math.isfinite(point.value)]
    if best and finite:
        peak = best(finite, key=lambda point: point.value)
        if form.format(peak.value) != form.format(points[-1].value):
            text += f"; best {form.format(peak.value)} at step {peak.step:,}"
    return text


def comparison(runs: Sequence[Run]) -> list["TableRow"]:
    """Return the key metrics of several runs: one row per metric, one column per run."""
    columns = [{"State": state(run)} | key_metrics(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [TableRow(name, [column.get(name, NONE) for column in columns]) for name in names]


# --- Recipes ---------------------------------------------------------------------------------------------------------


class TableRow(NamedTuple):
    """A line of a table."""

    name: str
    values: Sequence[str]


def _formatted(values: Mapping[str, Any]) -> dict[str, str]:
    """Flatten nested sections to dotted keys, with formatted values."""
    return {key: _value(value) for key, value in run_dir.flatten(values).items()}


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value, ensure_ascii=False)


def from_defaults(run: Run) -> list[TableRow]:
    """Return the recipe keys that differ from their defaults: key, value, default."""
    lora = Lora() if run.recipe.get("lora") else None
    bare = Recipe(model=Model(name=NONE), data=Data(train=NONE), lora=lora, output_dir=NONE)
    defaults, own = _formatted(bare.resolved()), _formatted(run.recipe)
    return [TableRow(key, (value, defaults.get(key, NONE))) for key, value in own.items() if value != defaults.get(key)]


def differing(runs: Sequence[Run]) -> list[TableRow]:
    """Return recipe keys, data hashes, devices and versions that differ between the runs."""
    columns = [
        _formatted(run.recipe)
        | {f"SHA-256 of {path}": sha256[:12] for path, sha256 in fingerprints(run).items()}
        | _formatted({"device": run.manifest.get("device", {}), "versions": run.manifest.get("versions", {})})
        for run in runs
    ]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [TableRow(key, [column.get(key, NONE) for column in columns]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def commands(run: Run) -> list[str]:
    """Return the original command, if it was one, and one that repeats the run with its resolved recipe."""
    given = run.manifest.get("command", [])[1:]
    again = ["run", str(run.folder / run_dir.RECIPE), "--set", f"output_dir={run.folder}-again"]
    return [f"sft-recipe {shlex.join(words)}" for words in (given, again) if words[:1] == ["run"]]


# --- Data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatsTable:
    """Statistics of the training or evaluation data: a summary line and a table of the sources."""

    name: str
    line: str
    sources: list[str]
    table: list[TableRow]


def data(run: Run) -> list[StatsTable]:
    """Return the statistics of the training and the evaluation data."""
    splits = {"Training": run.data.get("train"), "Evaluation": run.data.get("eval")}
    return [_rows(name, stats, run.recipe) for name, stats in splits.items() if stats]


def _rows(name: str, stats: Mapping[str, Any], recipe: Mapping[str, Any]) -> StatsTable:
    sources, tokens, trained = stats["sources"], stats["tokens"], stats["trained_tokens"]
    table = []
    for key, label in _ROWS.items():
        counts = [source.get(key, 0) for source in sources]
        if key in _ALWAYS_SHOWN or any(counts):
            table.append(TableRow(label, [_format_count(count) for count in counts]))
    lengths = [source.get("token_lengths", {}) for source in sources]
    for quantile in dict.fromkeys(name for each in lengths for name in each):
        table.append(TableRow(f"tokens per row, {quantile}", [_format_count(each.get(quantile)) for each in lengths]))
    most = recipe.get("data", {}).get("max_length")
    share = f" ({trained / tokens:.1%})" if tokens else ""
    line = (
        f"{stats['sequences']:,} sequences"
        + (f" of at most {most:,} tokens" if most else "")
        + f", {tokens:,} tokens, {trained:,} trained{share}; packing {stats['packing']}, "
        + f"{stats['packing_efficiency']:.1%} full"
    )
    return StatsTable(
        name, line, [f"{source['path']} ({source['format']}, {source['template']})" for source in sources], table
    )


def _format_count(count: Any) -> str:
    if isinstance(count, dict):  # dropped rows, by reason
        return ", ".join(f"{number:,} ({reason})" for reason, number in count.items() if number) or "0"
    return NONE if count is None else f"{count:,}"


# --- Answers ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """An answer, labeled with its steps or run; `right` is None if no answer is expected."""

    label: str
    text: str
    right: bool | None


@dataclass
class PromptAnswers:
    """A prompt and its answers."""

    messages: list[dict[str, Any]]
    expected: str | None
    answers: list[Answer]


def message_text(message: Mapping[str, Any]) -> str:
    """Return a message of a prompt as text, with its Alpaca input and tool calls, if any."""
    content = message.get("content")
    parts = [content if isinstance(content, str) else None if content is None else _value(content)]
    parts += [message.get("input"), _value(message["tool_calls"]) if message.get("tool_calls") else None]
    return "\n".join(part for part in parts if part)


def answers(runs: Sequence[Run]) -> list[PromptAnswers]:
    """Return the answers of one run at each evaluation, repeated ones merged; or the last answers of several runs."""
    prompts: dict[str, PromptAnswers] = {}
    for run in runs:
        given: dict[str, list[tuple[int, str]]] = {}
        for line in run.samples:
            key = json.dumps([line["messages"], line["expected"]])
            prompts.setdefault(key, PromptAnswers(line["messages"], line["expected"], []))
            given.setdefault(key, []).append((line["step"], line["answer"]))
        for key, texts in given.items():
            labeled = _over_time(texts) if len(runs) == 1 else [(run.name, texts[-1][1])]
            expected = prompts[key].expected
            for label, text in labeled:
                right = None if expected is None else text.strip() == expected.strip()
                prompts[key].answers.append(Answer(label, text, right))
    return list(prompts.values())


def _over_time(texts: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    spans = list[tuple[int, int, str]]()
    for step, text in texts:
        first = spans.pop()[0] if spans and spans[-1][2] == text else step
        spans.append((first, step, text))
    return [
        (f"step {first:,}" if first == last else f"steps {first:,} to {last:,}", text) for first, last, text in spans
    ]


# --- Verification and environment ------------------------------------------------------------------------------------


def preflight(run: Run) -> dict[str, str]:
    """Return the results of the preflight."""
    results = run.manifest.get("preflight")
    return _readable(results) if isinstance(results, dict) else {}


def verification(run: Run) -> dict[str, str]:
    """Return the results of verifying the exported model."""
    metrics = run.verification.get("verification", {})
    return _readable(
        {key: value for key, value in run.verification.items() if key not in ("files", "verification")} | metrics
    )


def environment(run: Run) -> dict[str, str]:
    """Return start and end, device and settings in use."""
    shown_elsewhere = ("command", "preflight", "parameters", "resumed", "data_sha256", "versions")
    values = {key: value for key, value in run.manifest.items() if key not in shown_elsewhere}
    resumed = [f"from {again['from']}, {again['started']}" for again in run.manifest.get("resumed", [])]
    return _readable(values) | ({"resumed": "; ".join(resumed)} if resumed else {})


def versions(run: Run) -> dict[str, str]:
    return {name: version for name, version in run.manifest.get("versions", {}).items() if version}


def fingerprints(run: Run) -> dict[str, str]:
    """Return the SHA-256 of the data by path."""
    return dict(run.manifest.get("data_sha256", {}))


def _readable(values: Mapping[str, Any]) -> dict[str, str]:
    flattened = _formatted({key: value for key, value in values.items() if value is not None})
    return {key.replace(".", ": ").replace("_", " ").replace(" gib", " GiB"): value for key, value in flattened.items()}

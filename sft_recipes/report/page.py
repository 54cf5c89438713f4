"""The report of a run: learning_curve.png and report.html, one file that opens offline."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment

from sft_recipes import files
from sft_recipes.errors import OutputError
from sft_recipes.report.curve import learning_curve, read_metrics
from sft_recipes.report.words import samples

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
  body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
  img { max-width: 100%; background: white; border-radius: 6px; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
  td { white-space: pre-wrap; overflow-wrap: anywhere; }
  pre { overflow-x: auto; background: #8882; padding: .8rem; border-radius: 6px; }
</style>
<h1>{{ title }}</h1>
<table>{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Learning curve</h2>
<img alt="Training and validation loss over the optimizer steps" src="data:image/png;base64,{{ curve }}">
{% if samples %}
<h2>Answers before and after</h2>
<table>
<tr><th>prompt</th><th>before</th><th>after</th></tr>
{% for before, after in samples %}{% set question = before.messages[-1] %}
<tr><td>{{ question.content }}{{ '\n' + question.input if question.input }}</td>
<td>{{ before.answer }}</td><td>{{ after.answer }}</td></tr>
{% endfor %}</table>
{% endif %}
<h2>Data</h2>
<pre>{{ data }}</pre>
<h2>Recipe</h2>
<pre>{{ recipe }}</pre>
<h2>Made with</h2>
<pre>{{ manifest }}</pre>
</html>
"""
_SAMPLES = 20


def write(folder: Path) -> None:
    """Write learning_curve.png and report.html from the run's own files. Raises OutputError where there is no run."""
    try:
        _write(folder)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    except (LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise OutputError(
            f"{folder}: its files are not as a run wrote them, so there is no report ({reason})"
        ) from None


def _write(folder: Path) -> None:
    metrics = read_metrics(folder)
    written = {name: _json(folder / f"{name}.json") for name in ("recipe.resolved", "data", "manifest")}
    facts, answers = _facts(metrics, written), samples(folder)[:_SAMPLES]
    with files.replaced(folder / "learning_curve.png") as partial:
        learning_curve(metrics, partial, folder.name)
    html = (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=folder.name,
            facts=facts,
            curve=base64.b64encode((folder / "learning_curve.png").read_bytes()).decode(),
            samples=answers,
            data=json.dumps(written["data"], indent=2, ensure_ascii=False),
            recipe=json.dumps(written["recipe.resolved"], indent=2, ensure_ascii=False),
            manifest=json.dumps(written["manifest"], indent=2, ensure_ascii=False),
        )
    )
    files.write_text(folder / "report.html", html)


def _facts(metrics: list[dict[str, Any]], files: dict[str, Any]) -> dict[str, str]:
    recipe = files["recipe.resolved"]
    evaluations = [line for line in metrics if "eval_loss" in line]
    exact = [line["eval_exact_match"] for line in metrics if "eval_exact_match" in line]
    trained = [line for line in metrics if "loss" in line]
    found = {
        "Model": recipe.get("model", {}).get("name"),
        "Method": "LoRA" if recipe.get("lora") else "full fine-tuning",
        "Steps": f"{metrics[-1]['step']:,}" if metrics else None,
        "Tokens seen": f"{trained[-1]['tokens']:,.0f}" if trained else None,
        "Validation loss": f"{evaluations[0]['eval_loss']:.4f} before, {evaluations[-1]['eval_loss']:.4f} after"
        if evaluations
        else None,
        "Exact match": f"{exact[0]:.1%} before, {exact[-1]:.1%} after" if exact else None,
        "Peak memory": f"{max(line['memory'] for line in metrics):.2f} GiB" if metrics else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

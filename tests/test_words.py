"""Help texts, the recipe schema and messages use the field's terms: none of the words that were retired comes back."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from sft_recipes import cli
from sft_recipes.recipe import editor_schema

PACKAGE = Path(__file__).parents[1] / "sft_recipes"
# Word (a regular expression, whole words): what to write instead.
RETIRED = {
    r"(de)?tokenis\w*": "tokenize",
    r"(de)?quantis\w*": "quantize",
    r"normalis\w*": "normalize",
    r"optimis\w*": "optimize",
    r"initialis\w*": "initialize",
    r"synchronis\w*": "synchronize",
    r"recognis\w*": "recognize",
    r"colour\w*": "color",
    r"behaviour\w*": "behavior",
    r"neighbour\w*": "neighbor",
    r"licence\w*": "license",
    r"data sets?": "dataset",
    r"misspelt": "misspelled",
    r"learnt": "learned",
    r"shared out|in shares": "sharded",
    r"hand(s|ed|ing)? (them |it )?on": "broadcast",
    r"set aside": "held out for evaluation",
    r"does not come out of|come out even": "is not divisible by",
    r"end tokens?": "EOS token",
    r"anew": "from scratch",
    r"passed over": "skipped",
    r"to the bit|bit for bit": "bitwise identical",
    r"see each other": "attend to each other",
    r"hold(s|ing)? against|held against": "compare with",
    r"proofs?|proven|proves?": "verification",
    r"fresh process": "separate process",
    r"gets? (its|their) names?": "renamed into place",
    r"cannot be had": "unavailable",
    r"is no file|is no directory": "is not a file",
    r"imitate[sd]?": "emulate",
    r"likeliest": "greedy decoding",
    r"ships?|shipped": "bundled",
    r"\d a (second|step|token|row)|(sequences|tokens|rows) a (second|step|row)": "per second, per step, per token, per row",
    r"embedded (base )?model": "built-in model",
    r"comes? apart": "diverges",
    r"settled": "resolved",
    r"mends?|mended": "fix",
    r"rooms?": "space, memory",
    r"figures": "metrics",
    r"undisturbed": "uninterrupted",
    r"cheapest in speed": "smallest slowdown",
    r"not finite": "NaN or Inf",
}
# Names of third parties that contain a retired word.
QUOTED: tuple[str, ...] = ()


def retired(text: str) -> Iterator[str]:
    for name in QUOTED:
        text = text.replace(name, "")
    for word, instead in RETIRED.items():
        for found in re.finditer(rf"(?<![\w.-])(?:{word})(?![\w-])", text, re.IGNORECASE):
            yield f"{found[0]!r} (write: {instead}) in {' '.join(text.split())[:90]!r}"


def help_texts(command: object, name: str) -> Iterator[tuple[str, str]]:
    yield name, command.help or ""  # type: ignore[attr-defined]
    for option in command.params:  # type: ignore[attr-defined]
        yield f"{name} {option.name}", getattr(option, "help", None) or ""
    for inner, below in getattr(command, "commands", {}).items():
        yield from help_texts(below, f"{name} {inner}")


def test_help_texts_use_the_terms_of_the_field() -> None:
    texts = dict(help_texts(typer.main.get_command(cli.app), "sft-recipe"))

    assert len(texts) > 50
    assert [f"{name}: {word}" for name, text in texts.items() for word in retired(text)] == []


def descriptions(schema: object, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(schema, dict):
        if isinstance(text := schema.get("description"), str):
            yield name, text
        for key, below in schema.items():
            yield from descriptions(below, f"{name}.{key}")
    elif isinstance(schema, list):
        for below in schema:
            yield from descriptions(below, name)


def test_the_schema_uses_the_terms_of_the_field() -> None:
    texts = list(descriptions(json.loads(editor_schema.schema())))

    assert len(texts) > 80
    assert [f"{name}: {word}" for name, text in texts for word in retired(text)] == []


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Strings that are sentences: not docstrings, and with a space in them. Values of f-strings become {}."""
    tree = ast.parse(file.read_text("utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))  # docstrings
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = node.value
        else:
            continue
        if " " in text:
            yield node.lineno, text


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_messages_use_the_terms_of_the_field(file: Path) -> None:
    assert [f"{line}: {word}" for line, text in messages(file) for word in retired(text)] == []


def test_retired_words_are_found() -> None:
    assert list(retired("Tokenised in shares, at 3 rows a second")) != []
    assert list(retired("tokenized from scratch, at 3 rows/s")) == []

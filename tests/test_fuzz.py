"""Mutated recipes and data files: `check` has findings, or an error in lines; never a traceback, and nothing is written.

Some hundred of them each time, the same ones. Ten thousand recipes and two thousand data files, others each time:

    FUZZ_RECIPES=10000 FUZZ_DATA=2000 python -m pytest -n 0 tests/test_fuzz.py
"""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from ruamel.yaml import YAML

from sft_recipes import cli
from sft_recipes.commands.check import check
from sft_recipes.errors import SFTRecipeError
from sft_recipes.recipe.bundled import folder as shipped
from sft_recipes.recipe.parse import field_names
from tests.conftest import write_rows

MOST = 4000  # characters of a line


def examples(variable: str, few: int, tests: int = 1) -> settings:
    """A count for one of the `tests` that share it."""
    count = int(os.environ.get(variable, few))
    return settings(
        max_examples=count // tests,
        derandomize=count == few,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with the data that recipes name; the cache cannot be written, so nothing is kept."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_rows(folder / "train.jsonl")
    write_rows(
        folder / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("SFT_RECIPES_CACHE", str(folder / "train.jsonl"))
        yield folder


@pytest.fixture(autouse=True)
def verify_here() -> None:
    """In place of the one that imports torch: nothing is exported here."""


def said_of(recipe: Path) -> list[str]:
    """What `check` says; fails where that is not in lines."""
    before = sorted(recipe.parent.rglob("*"))
    failed, lines = None, list[str]()
    try:
        findings = check(str(recipe))
        lines = [*findings.lines, *findings.warnings]
    except SFTRecipeError as error:
        failed = error
    if failed is not None:
        lines = list(failed.lines)
        assert lines
        assert failed.exit_code == 2
        assert str(failed) == "\n".join(lines)
    assert sorted(recipe.parent.rglob("*")) == before
    for line in lines:
        assert line.strip()
        assert len(line.splitlines()) == 1, line
        assert len(line) <= MOST, line
    return lines


# --- Recipes ---------------------------------------------------------------------------------------------------------

FULL = """\
model: {name: "builtin:tiny", dtype: float32, new_tokens: ["<a>"]}
data:
  train:
    - train.jsonl
    - {path: chat.jsonl, weight: 0.5, columns: {messages: messages}}
  eval: {path: train.jsonl}
  template: chat.jinja
  overlong: drop
lora: &lora
  rank: 4   # of the adapters
  target_modules: [q_proj, 'v_proj']
train: {epochs: 2, learning_rate: 1e-3, micro_batch_size: 2, global_batch_size: 4, mixed_precision: no}
eval:
  every: 0.5
  generate:
    - Hello
    - prompt: "Hi"
      expected: >
        folded
log: {to: []}
trl: {adam_beta2: 0.99}
output_dir: run
"""
ELSEWHERE = re.compile(
    r"(tatsu-lab/alpaca|openai/gsm8k|HuggingFaceTB/smoltalk|builtin:tasks/\w+.jsonl)|(?<=name: )[\w-]+/\S+"
)
# Those that ship with data and models that are here, so that a check of them looks at these too.
TEXTS = [
    FULL,
    "model: {name: 'builtin:tiny'}\ndata: {train: train.jsonl}\noutput_dir: run\n",
    *(
        ELSEWHERE.sub(lambda found: "train.jsonl" if found[1] else "builtin:tiny", file.read_text("utf-8"))
        for file in sorted(shipped().glob("*.yaml"))
    ),
]
TOKENS = [
    *":-{}[],&*!|>%@`'\"#?\n\t \\~", ": ", "- ", "\n  ", "---\n", "...\n", "&a ", "*a", "<<: ", "? ", "|\n",
    "null", "true", "-1", "0", "!!int ", "!!set ", "!!python/name:os ", "!!binary ", "!!timestamp ", "!x ",
    "1e400", "-.inf", ".nan", "0x1F", "0o17",
    "1_000", "2024-01-01", "12:30:45", "9" * 30, "9" * 5000, "\x00", "\x07", "\x85", "\u2028", "\ufeff", "é", "漢",
    "\U0001f600",
    '"\\ud83d"', '"\\0"', "[" * 400, "{a: " * 150, "alpaca", "chat", "messages", "text", "wrapped", "none", "split", "auto",
    "nf4", *field_names(), *(f"{name.rpartition('.')[2]}: " for name in field_names()),
]  # fmt: skip


def mutated(text: str, edits: list[tuple[str, float, float, int, str]]) -> str:
    for kind, at, other, length, token in edits:
        first, second = sorted((int(at * len(text)), int(other * len(text))))
        lines = text.split("\n")
        line = int(at * len(lines))
        if kind == "delete":
            text = text[:first] + text[first + length :]
        elif kind == "insert":
            text = text[:first] + token + text[first:]
        elif kind == "replace":
            text = text[:first] + token + text[first + length :]
        elif kind == "duplicate":
            text = text[: first + length] + text[first:]
        elif kind == "swap":
            a, b = text[first : first + length], text[second : second + length]
            text = text[:first] + b + text[first + length : second] + a + text[second + length :]
        else:
            if kind == "delete line":
                del lines[line]
            elif kind == "duplicate line":
                lines.insert(int(other * len(lines)), lines[line])
            elif kind == "indent line":
                lines[line] = " " * (length % 5) + lines[line].lstrip(" ")
            elif kind == "value":
                lines[line] = lines[line].partition(":")[0] + ": " + token
            text = "\n".join(lines)
    return text


KINDS = ["delete", "insert", "replace", "duplicate", "swap", "delete line", "duplicate line", "indent line", "value"]
share = st.floats(0, 1, exclude_max=True)
edits = st.lists(
    st.tuples(st.sampled_from(KINDS), share, share, st.integers(1, 12), st.sampled_from(TOKENS)), min_size=1, max_size=5
)
words = st.sampled_from([
    "", " ", "x", "train.jsonl", "chat.jsonl", "*.jsonl", "**", "[", "builtin:", "builtin:tiny", "~nobody/x", "a/b",
    "none.csv", "a" * 300, "a\nb", "a\x00b", "\ud83d", "é", "1e-5", "5GB", "0.0MB", "all-linear", "(", "alpaca",
    "chat", "chat.jinja",
    "train", "null", "\u2028", "2024-01-01",
])  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.integers(-3, 40) | st.floats() | st.text(max_size=8)
    | words | words | st.sampled_from([10**400, 1e308, 5e-324, 2**31, 2**63, -0.0])
)  # fmt: skip
keys = words | st.sampled_from([name.rpartition(".")[2] for name in field_names()])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
changes = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "rename", "delete", "nest", "add", "move"]), share, share, keys, values
    ),
    min_size=1,
    max_size=4,
)


def changed(recipe: Any, todo: list[tuple[str, float, float, str, Any]]) -> Any:
    """A recipe with keys set, renamed, deleted, nested, added and moved, wherever they stand."""
    for kind, at, other, key, value in todo:
        inside = list(containers(recipe))
        holder = inside[int(at * len(inside))]
        there = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if kind == "add" and isinstance(holder, dict):
            holder[key] = value
        if not there:
            continue
        which = there[int(other * len(there))]
        if kind == "set":
            holder[which] = value
        elif kind == "nest":
            holder[which] = {key: holder[which]} if len(key) % 2 else [holder[which]]
        elif kind == "delete":
            del holder[which]
        elif kind == "rename" and isinstance(holder, dict):
            holder[key] = holder.pop(which)
        elif kind == "move" and isinstance(recipe, dict):
            recipe[str(which)] = holder[which]
    return recipe


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


@given(text=st.sampled_from(TEXTS), edits=edits)
@examples("FUZZ_RECIPES", 150, tests=2)
def test_recipes_with_other_characters(place: Path, text: str, edits: list[Any]) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text(mutated(text, edits)[:50_000], encoding="utf-8", errors="surrogatepass")

    check_command(recipe, said_of(recipe))


def check_command(recipe: Path, lines: list[str]) -> None:
    """The command line says the same."""
    out, err = io.StringIO(), io.StringIO()
    argv = patch("sys.argv", ["sft-recipe", "check", str(recipe)])
    with redirect_stdout(out), redirect_stderr(err), argv, pytest.raises(SystemExit) as ended:
        cli.main()
    shown = [*out.getvalue().splitlines(), *(line.removeprefix("warning: ") for line in err.getvalue().splitlines())]

    assert ended.value.code in (0, 2)
    assert sorted(shown) == sorted(lines if ended.value.code else [*lines, f"{recipe}: OK"])


@given(text=st.sampled_from(TEXTS), todo=changes)
@examples("FUZZ_RECIPES", 150, tests=2)
def test_recipes_with_other_values(place: Path, text: str, todo: list[Any]) -> None:
    recipe = place / "recipe.yaml"
    whole = changed(YAML(typ="safe", pure=True).load(text), todo)
    recipe.write_text(json.dumps(whole), encoding="utf-8")

    said_of(recipe)


# --- Data ------------------------------------------------------------------------------------------------------------

texts = st.text(max_size=12) | st.sampled_from([
    "", " ", "<|endoftext|>", "</s>", "\ud83d", "a\x00b", "\r\n", "\u2028", "\U0010fffc", "{{ 1 }}", "é" * 600, "word " * 3000,
])  # fmt: skip
atoms = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10**400, 1e308])
names = st.text(max_size=4) | st.sampled_from([
    "instruction", "input", "output", "prompt", "completion", "response", "messages", "conversations", "text", "system",
    "tools", "role", "from", "content", "value", "tool_calls", "function", "arguments", "weight", "name", "type", "",
])  # fmt: skip
nested = st.recursive(
    atoms, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=5
)
alpaca = st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts | st.none()})
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt"]), "content": texts}
)
odd_turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "", "boss"]), "content": texts | nested},
    optional={"tool_calls": st.lists(st.dictionaries(names, atoms, max_size=2), max_size=2), "weight": atoms},
)
last = st.fixed_dictionaries({"role": st.just("assistant"), "content": texts})
chat = st.fixed_dictionaries(
    {"messages": st.builds(lambda first, end: [*first, end], st.lists(turns, max_size=3), last)}
)
odd_chat = st.fixed_dictionaries(
    {"messages": st.lists(turns | odd_turns, max_size=4)}, optional={"system": nested, "tools": nested, "text": nested}
)
plain = st.fixed_dictionaries({"text": texts})
pairs = st.fixed_dictionaries({"prompt": texts, "completion": texts})


def rows_of(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Mostly good rows, and in between some that have other values or are others altogether."""
    odd = kind.flatmap(
        lambda row: st.dictionaries(st.sampled_from([*row]), nested, max_size=2).map(lambda new: row | new)
    )
    good = st.lists(kind, min_size=2, max_size=8)
    return good | good | st.lists(kind | odd | nested, min_size=1, max_size=8)


rows = st.one_of([rows_of(kind) for kind in (alpaca, chat, odd_chat, plain, pairs)])


def as_jsonl(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass")


def as_json(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


def as_csv(rows: list[Any]) -> bytes:
    stream = io.StringIO()
    objects = [row for row in rows if isinstance(row, dict)]
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in objects for name in row)))
    writer.writeheader()
    writer.writerows(objects)
    return stream.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any]) -> bytes:
    """Columns whose values have one type that parquet has; the others as the JSON of their values."""
    objects = [row for row in rows if isinstance(row, dict)]
    columns = {}
    for name in dict.fromkeys(name for row in objects for name in row):
        column = [row.get(name) for row in objects]
        try:
            columns[name] = pyarrow.array(column)
            parquet.write_table(pyarrow.table({name: columns[name]}), io.BytesIO())
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
            columns[name] = pyarrow.array([json.dumps(value) for value in column])
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, compression="none")
    return stream.getvalue()


WRITTEN: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet
}  # fmt: skip
BYTES = [
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud83d",
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"true", b"\xed\xa0\xbd", b"\x1a",
]  # fmt: skip
HARMS = ["cut", "insert", "flip", "delete", "duplicate", "end"]
damage = st.lists(st.tuples(st.sampled_from(HARMS), share, st.integers(1, 20), st.sampled_from(BYTES)), max_size=4)


def damaged(content: bytes, todo: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, at, length, some in todo:
        first = int(at * len(content))
        if kind == "cut":
            content = content[:first]
        elif kind == "insert":
            content = content[:first] + some + content[first:]
        elif kind == "delete":
            content = content[:first] + content[first + length :]
        elif kind == "duplicate":
            content = content[: first + length] + content[first:]
        elif kind == "end":
            content += some
        elif content:
            content = content[:first] + bytes([content[first] ^ (1 << length % 8)]) + content[first + 1 :]
    return content


@given(
    kind=st.sampled_from(list(WRITTEN)),
    zipped=st.sampled_from([False, False, False, True]),
    rows=rows,
    before=st.just([]) | damage,
    after=st.just([]) | damage,
    format=st.sampled_from([None] * 8 + ["alpaca", "prompt_completion", "messages", "text"]),
    template=st.sampled_from([None, None, "alpaca", "chat.jinja"]),
    train_on=st.sampled_from(["completion", "all", "assistant"]),
    packing=st.sampled_from(["bfd", "wrapped", "none"]),
    overlong=st.sampled_from(["drop", "truncate", "split", "error"]),
    eval=st.sampled_from([None, 0.3, {"path": "train.jsonl", "format": "alpaca"}]),
)
@examples("FUZZ_DATA", 60)
def test_data(
    place: Path, kind: str, zipped: bool, rows: list[Any], before: list[Any], after: list[Any], **data: Any
) -> None:
    content = damaged(WRITTEN[kind](rows), before)
    if zipped:
        content = damaged(gzip.compress(content), after)
    file = place / f"data{kind}{'.gz' if zipped else ''}"
    file.write_bytes(content)
    recipe = place / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": {"name": "builtin:tiny"}, "data": {"train": file.name, **data}, "output_dir": "run"})
    )

    try:
        said_of(recipe)
    finally:
        file.unlink()

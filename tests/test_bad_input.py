"""Bad input, as a user gives it: each command line ends in one line that says where, what and what would be right, with
exit code 2, and leaves nothing behind.

In the tables, what stands before and between the `…` of an expected line has to stand there in this order.
"""

import csv
import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sft_recipes import cli
from sft_recipes.recipe import library_names
from sft_recipes.recipe import validate as recipe_check
from tests.conftest import write_rows

TINY = Path(__file__).parents[1] / "sft_recipes" / "builtin" / "tiny"
Change = Callable[[Path], object]  # of a directory


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a good recipe, and 24 rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("train.jsonl"))
    write_recipe(DATA)
    return tmp_path


def write_recipe(data: str, more: str = "") -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("DATA", data) + more, encoding="utf-8")


MODEL = "model: {name: 'builtin:tiny', dtype: float32}\n"
DATA = "{train: train.jsonl, eval: 0.25, max_length: 128}"
RECIPE = f"""\
{MODEL}data: DATA
train: {{max_steps: 1, micro_batch_size: 2, global_batch_size: 4, mixed_precision: no, gradient_checkpointing: false}}
output_dir: run
"""


class Said:
    """What a command line ended in."""

    def __init__(self, code: Any, lines: list[str], written: str) -> None:
        self.code, self.lines, self.written = code, lines, written


@pytest.fixture
def sft_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Calls the command line in this process."""
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # or the name in its help is that of the tests

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["sft-recipe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Said(ended.value.code, said.err.splitlines(), said.out)

    return call


def everything() -> dict[str, bytes | None]:
    """All there is in the working directory."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def check_refused(call: Callable[..., Said], arguments: Sequence[str], expected: str, code: int = 2) -> None:
    before = everything()
    said = call(*arguments)

    assert said.code == code, said.lines
    [line] = said.lines
    at = 0
    for part in expected.split("…"):
        found = line.find(part, at)
        assert found >= at if at else found == 0, line
        at = found + len(part)
    assert "Traceback" not in said.written
    assert everything() == before


def as_sets(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


# --- Recipes: the text of the file -----------------------------------------------------------------------------------

GOOD = RECIPE.replace("DATA", DATA)
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "recipe.yaml:1: a recipe must be a mapping of keys. Run `sft-recipe list`"),
    "only a comment": ("# mine\n", "recipe.yaml:1: a recipe must be a mapping of keys"),
    "a list": ("- model\n", "recipe.yaml:1: a recipe must be a mapping of keys"),
    "a word": ("hello\n", "recipe.yaml:1: a recipe must be a mapping of keys"),
    "a bracket left open": (GOOD + "trl: {adam_beta2: 0.9\n", "recipe.yaml:6: invalid YAML: …expected ',' or '}'"),
    "a tab": (GOOD + "lora:\n\trank: 4\n", "recipe.yaml:6: invalid YAML: …'\\t' that cannot start any token"),
    "two colons": (GOOD + "seed: 1: 2\n", "recipe.yaml:5: invalid YAML: mapping values are not allowed here"),
    "two documents": (GOOD + "---\na: 1\n", "recipe.yaml:5: invalid YAML: expected a single document"),
    "an alias of nothing": (GOOD + "lora: *mine\n", "recipe.yaml:5: invalid YAML: found undefined alias 'mine'"),
    "an alias within itself": (GOOD + "trl: &a {b: *a}\n", "recipe.yaml: an alias (*) refers to itself. Write its value out."),
    "aliases of aliases": (GOOD + BOMB, "recipe.yaml: more than 100,000 values after expanding aliases (*)"),
    "nested too deep": (GOOD + "trl: " + "[" * 3000, "recipe.yaml:1: nesting is too deep. A recipe consists"),
    "Latin-1": (GOOD.encode() + b"# sch\xf6n\n", "recipe.yaml:5: invalid UTF-8 (byte 0xf6). Save the file as UTF-8."),
    "UTF-16": (GOOD.encode("utf-16"), "recipe.yaml:1: invalid UTF-8 (byte 0x…). Save the file as UTF-8."),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00", "recipe.yaml:1: invalid UTF-8"),
    "a null character": (GOOD + "a: \x00\n", "recipe.yaml:5: invalid YAML: the character '\\x00' is not allowed"),
    "YAML 1.1": ("%YAML 1.1\n---\n" + GOOD, "recipe.yaml:1: recipes must be YAML 1.2. Remove the %YAML line."),
    "a key twice": (GOOD + "output_dir: other\n", "recipe.yaml:5: duplicate key 'output_dir' (first at recipe.yaml:4)"),
    "a quoted key twice": (GOOD + "lora: {'rank': 1, rank: 2}\n", "recipe.yaml:5: duplicate key 'lora.rank' (first at"),
    "a section twice": (GOOD + "data: {}\n", "recipe.yaml:5: duplicate key 'data' (first at recipe.yaml:2)"),
    "an empty section": (GOOD + "lora:\n", "recipe.yaml:5: section 'lora' is empty. Write `lora: {}` for its defaults"),
    "a key that is a list": (GOOD + "? [a, b]\n: c\n", "recipe.yaml:5: keys must be text."),
    "a merged key": (GOOD + "lora: {<<: {rank: 3}}\n", "recipe.yaml:5: unknown key 'lora.<<'. …write the keys out."),
    "a Python object": (GOOD + "lora: {rank: !!python/name:os.system x}\n",
        "recipe.yaml:5: lora.rank: YAML tags are not supported (got …). Remove the tag."),
    "a tag of one's own": (GOOD + "trl: !mine {}\n",
        "recipe.yaml:5: trl: YAML tags are not supported (got !mine). Remove the tag."),
    "a tag that is wrong": (GOOD + "eval: {every: !!int x}\n", "recipe.yaml:5: eval.every: expected an integer (got 'x')."),
    "half a character": (GOOD + 'eval: {generate: ["\\ud83d"]}\n', "recipe.yaml:5: eval.generate[0]: invalid Unicode: "),
    "a key with a line break": (GOOD + '"a\\nb": 1\n', "recipe.yaml:5: unknown key 'a\\nb'. Expected one of model, data"),
    "a long key": (GOOD + f"? {'k' * 9000}\n: 1\n", "recipe.yaml:5: unknown key 'kkk… ... …Expected one of model"),
    "no output": (MODEL + "data: {train: train.jsonl}\n", "recipe.yaml: missing required key 'output_dir'. Add it"),
    "no model's name": (GOOD.replace("name: 'builtin:tiny', ", ""), "recipe.yaml:1: missing required key 'model.name'. Add"),
    "no data": (MODEL + "output_dir: run\n", "recipe.yaml: missing required section 'data'. Add it"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_recipe_files(case: str, sft_recipe: Callable[..., Said]) -> None:
    text, expected = TEXTS[case]
    Path("recipe.yaml").write_bytes(text.encode() if isinstance(text, str) else text)

    check_refused(sft_recipe, ["check", "recipe.yaml"], expected)


# --- Recipes: what keys say ------------------------------------------------------------------------------------------

SETS: dict[str, tuple[list[str], str]] = {
    "a typo": (["train.sed=1"], "--set: unknown key 'train.sed'. Did you mean 'train.seed'?"),
    "another tool's word": (["lora.r=8"], "--set: unknown key 'lora.r'. Use 'lora.rank' instead."),
    "a key of another section": (["model.max_length=8"],
        "--set: unknown key 'model.max_length'. Use 'data.max_length' instead."),
    "an unknown section": (["optimizer.lr=1"], "--set: unknown key 'optimizer'. …'train.optimizer'"),
    "a section that is a number": (["train=5"], "--set: train: expected a section (got 5)."),
    "a section that is a list": (["lora=[rank]"], "--set: lora: expected a section or null (got ['rank'])."),
    "a word for a number": (["train.epochs=two"], "--set: train.epochs: expected a number > 0 or null (got 'two')."),
    "text for a number": (["train.seed='5'"], "--set: train.seed: expected an integer >= 0 and < 4294967296 (got '5')."),
    "true for a number": (["lora.rank=true"], "--set: lora.rank: expected an integer > 0 (got true)."),
    "a fraction for a whole number": (["data.max_length=1.5"], "--set: data.max_length: expected an integer >= 2 (got 1.5)."),
    "a number for text": (["model.name=7"], "--set: model.name: expected text (got 7)."),
    "a word for yes or no": (["data.shuffle=yes"], "--set: data.shuffle: expected true or false (got 'yes')."),
    "null where there is no null": (["data.train=null"], "--set: data.train: expected text or a non-empty list (got null)."),
    "an empty text": (["model.name=''"], "--set: model.name: expected text (got an empty string)."),
    "an empty list": (["data.train=[]"], "--set: data.train: expected text or a non-empty list (got [])."),
    "a list in a list": (["data.train=[[a.jsonl]]"], "--set: data.train[0]: expected text or a section (got ['a.jsonl'])."),
    "a source with a typo": (["data.train=[{paht: a}]"], "--set: unknown key 'data.train[0].paht'. Did you mean 'data.train"),
    "a source without a path": (["data.eval={path: ''}"], "--set: data.eval.path: expected text (got an empty string)."),
    "columns that are numbers": (["data.columns={prompt: 5}"], "--set: data.columns.prompt: expected text (got 5)."),
    "a negative number": (["train.weight_decay=-1"], "--set: train.weight_decay: expected a number >= 0 (got -1)."),
    "zero": (["train.learning_rate=0"], "--set: train.learning_rate: expected a number > 0 (got 0)."),
    "no number": (["train.learning_rate=.nan"], "--set: train.learning_rate: expected a number > 0 (got nan)."),
    "infinity": (["train.learning_rate=1e999"], "--set: train.learning_rate: expected a number > 0 (got inf)."),
    "a number of 32 bits and more": (["train.max_steps=4000000000"], "--set: train.max_steps: …< 2147483648 or null"),
    "a number of thousands of digits": ([f"train.seed={'9' * 5000}"], "--set: train.seed: expected an integer (got '999…"),
    "more than a run": (["eval.every=1.5"], "--set: eval.every: expected a number > 0 and <= 1 …(got 1.5)."),
    "a weight beyond reason": (["data.train=[{path: train.jsonl, weight: 1e9}]"],
        "--set: data.train[0].weight: …<= 1000"),
    "a type that is none": (["model.dtype=bf16"],
        "--set: model.dtype: expected one of bfloat16, float16, float32 (got 'bf16')."),
    "a date in words": (["data.date=tomorrow"], "--set: data.date: …such as 2026-12-31 or null (got 'tomorrow')."),
    "a size without a unit": (["export.max_shard_size=5"], "--set: export.max_shard_size: …such as 5GB or 500MB (got 5)."),
    "a tracker that is none": (["log.to=[excel]"], "--set: log.to[0]: expected one of mlflow, tensorboard, …(got 'excel')."),
    "a tracker twice": (["log.to=[wandb, tensorboard, wandb]"], "--set: log.to: wandb is listed 2 times. List it once."),
    "a project without a tracker": (["log.to=[tensorboard]", "log.project=mine"],
        "--set: log.project: used only by mlflow, trackio, wandb, and none of them is in log.to. Add one to log.to, or"),
    "a name that is the recipe's": (["trl.run_name=mine"], "--set: trl.run_name: set by the recipe. Use log.name instead."),
    "an unknown optimizer": (["train.optimizer=adamm"], "--set: train.optimizer: unknown name 'adamm'. Did you mean 'ada"),
    "an unknown schedule": (["train.lr_scheduler=cosin"],
        "--set: train.lr_scheduler: unknown name 'cosin'. Did you mean 'cosine'?"),
    "an unknown field of TRL": (["trl.adam_beta3=1"],
        "--set: trl.adam_beta3: SFTConfig has no field 'adam_beta3'. Did you mean 'trl.adam_beta2'?"),
    "a field of TRL that is a key": (["trl.learning_rate=1"], "--set: trl.learning_rate: set by the recipe. Use train."),
    "a key under trl": (["trl.micro_batch_size=1"],
        "--set: trl.micro_batch_size: …Use train.micro_batch_size instead."),
    "a broken pattern": (["lora.target_modules=q_proj("], "--set: lora.target_modules: invalid regular expression: …"),
    "quantization without lora": (["model.quantization=nf4"], "--set: model.quantization: …(got nf4). Add `lora: {}` for"),
    "two ways to say a batch": (["train.gradient_accumulation_steps=2"],
        "--set: train.gradient_accumulation_steps: …Remove one of the two."),
    "a batch that does not come out": (["train.global_batch_size=5"],
        "--set: train.global_batch_size: 5 is not divisible by micro_batch_size 2. …to 1 or 5, …to 4 or 6."),
    "types that do not go together": (["train.mixed_precision=bf16", "model.dtype=float16"],
        "--set: train.mixed_precision: …(got bf16). Set model.dtype"),
    "the best without validation": (["data.eval=null", "checkpoint.export_best=true"],
        "--set: checkpoint.export_best: …Set data.eval"),
    "a fraction that is text": (["data.eval='0.1'"], "--set: data.eval: …(got '0.1'). Write a fraction as a number, e.g."),
    "columns that no format has": (["data.columns={question: q}"],
        "--set: data.columns: 'question' is not a column of any format (expected"),
    "packing that is none": (["data.packing=none", "data.cross_document_attention=true"],
        "--set: data.cross_document_attention: …or remove this key."),
    "more than the model can take": (["data.max_length=2000"],
        "--set: data.max_length: exceeds the context length of builtin:tiny, 1024 (got 2000). Set data"),
    "processes that do not divide": (["launch.processes=3"],
        "recipe.yaml:3: train.global_batch_size: 4 is not divisible by micro_batch_size 2 x 3 processes. Set global_batch_"),
    "an output that is a file": (["output_dir=train.jsonl"], "--set: output_dir: train.jsonl is a file. Choose another"),
    "an output within a file": (["output_dir=train.jsonl/run"],
        "--set: output_dir: train.jsonl is a file. Choose another"),
    "an output of nobody's": (["output_dir=~nobody-here/run"],
        "--set: output_dir: ~nobody-here/run: could not determine home"),
    "an output with a long name": ([f"output_dir={'a' * 300}"],
        "--set: output_dir: aaa…: file name too long. Choose another directory with"),
    "no key": (["train.seed"], "--set train.seed: expected KEY=VALUE, for example --set train.learning_rate=1e-4."),
    "an empty key": (["train..seed=1"], "--set train..seed=1: expected KEY=VALUE"),
    "a key in a key": (["output_dir.x=1"], "--set output_dir.x=1: 'output_dir' is not a section"),
    "a value that is no YAML": (["lora={rank: 1"], "--set lora={rank: 1: invalid YAML value: …. Quote the value if it is"),
    "a value with a key twice": (["lora={rank: 1, rank: 2}"], "--set: duplicate key 'lora.rank'"),
    "a value nested too deep": (["trl.x=" + "[" * 3000], "--set trl.x=[[…: invalid YAML value"),
    "a template that is not there": (["data.template=mine.jinja"],
        "--set: data.template: cannot read the template file: …(got 'mine.jinja'). Set it to alpaca, chatml, llama3,"),
    "a template that is a directory": (["data.template=."],
        "--set: data.template: cannot read the template file: Is a directory (got '.'). Set it to"),
    "a template for plain text": (["data.template=alpaca", "data.columns={text: output}", "data.format=text"],
        "--set: data.template: plain text takes no template (got alpaca). Remove data.template."),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_values(case: str, sft_recipe: Callable[..., Said]) -> None:
    overrides, expected = SETS[case]

    check_refused(sft_recipe, ["check", "recipe.yaml", *as_sets(overrides)], expected)


def test_a_line_each_of_several_problems(sft_recipe: Callable[..., Said]) -> None:
    Path("recipe.yaml").write_text("a: 1\nb: !c 2\ndata: {train: none.jsonl}\n" + "x: 1\ny: 1\n", encoding="utf-8")
    said = sft_recipe("check", "recipe.yaml")

    assert said.code == 2
    assert [line.split(". ")[0] for line in said.lines] == [
        "recipe.yaml:2: b: YAML tags are not supported (got !c)",
        "recipe.yaml: missing required section 'model'",
        "recipe.yaml: missing required key 'output_dir'",
        "recipe.yaml:1: unknown key 'a'",
        "recipe.yaml:4: unknown key 'x'",
        "recipe.yaml:5: unknown key 'y'",
    ]


def test_no_more_lines_than_can_be_read(sft_recipe: Callable[..., Said]) -> None:
    write_recipe(DATA, "".join(f"key{number}: 1\n" for number in range(2000)))
    said = sft_recipe("check", "recipe.yaml")

    assert len(said.lines) == 51
    assert said.lines[-1] == "recipe.yaml: 1,950 more wrong keys are not listed."


def test_what_yaml_1_2_reads_as_text(sft_recipe: Callable[..., Said]) -> None:
    """Dates and times are text, and so are characters that JSON writes as two halves."""
    write_recipe(DATA, 'eval: {generate: ["\\ud83d\\ude00", 12:30:45]}\n')

    assert sft_recipe("check", "recipe.yaml", "--set", "output_dir=2024-01-01").code == 0


# --- Data ------------------------------------------------------------------------------------------------------------

ROW = {"instruction": "a", "output": "b"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*messages: Any) -> bytes:
    return jsonl({"messages": [USER, ASSISTANT]}, {"messages": list(messages)})


def table(**columns: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "nothing there": ("none.jsonl", None, "none.jsonl: file not found (working directory: /"),
    "a pattern of nothing": ("none-*.jsonl", None, "none-*.jsonl: no file matches this pattern (working directory: /"),
    "no such built-in": ("builtin:none.jsonl", None, "builtin:none.jsonl: unknown built-in dataset. Choose one of builtin:"),
    "a name that is no file's and no hub's": ("my rows", None, "my rows: file not found (working directory: /"),
    "nobody's file": ("~nobody-here/a.jsonl", None,
        "~nobody-here/a.jsonl: could not determine home directory. Use the path"),
    "a long name": ("a" * 300, None, "aaa…: file name too long. Use the path of a file, or a Hub id."),
    "a file of another kind": ("a.txt", b"hello",
        "a.txt: unsupported file type (expected .jsonl, .ndjson, .json, .csv, .tsv, …, .xlsx, optionally .gz)."),
    "an archive": ("a.tar.gz", b"x", "a.tar.gz: unsupported file type (expected .jsonl"),
    "a directory without data": ("folder/", None,
        "folder/: this directory contains no data files (.jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
    "an empty file": ("a.jsonl", b"", "a.jsonl: the file is empty."),
    "blank lines": ("a.jsonl", b"\n\n", "a.jsonl: the source contains no rows."),
    "an empty list": ("a.json", b"[]", "a.json: the source contains no rows."),
    "a header alone": ("a.csv", b"instruction,output\n", "a.csv: the source contains no rows."),
    "a table without rows": ("a.parquet", table(instruction=pyarrow.array([], "string"), output=pyarrow.array([], "string")),
        "a.parquet: the source contains no rows."),
    "a string left open": ("a.jsonl", jsonl(ROW) + b'{"instruction": "a\n', "a.jsonl:2:17: invalid JSON: "),
    "half a line": ("a.jsonl", jsonl(ROW, ROW)[:-9], "a.jsonl:2:…: invalid JSON: "),
    "Python, not JSON": ("a.jsonl", b"{'instruction': 'a'}\n", "a.jsonl:1:2: invalid JSON: expecting property name"),
    "one object a line in .json": ("a.json", jsonl(ROW, ROW),
        "a.json:2:1: invalid JSON: …. Rename a file with one object per line to .jsonl."),
    "one object in .json": ("a.json", json.dumps({"rows": [ROW]}).encode(), "a.json: expected a list of objects (got {'rows'"),
    "a list of texts": ("a.json", json.dumps([ROW, "a"]).encode(), "a.json:row 2: expected an object with columns (got 'a')."),
    "a list for a row": ("a.jsonl", jsonl(ROW, [1]), "a.jsonl:2: expected an object with columns (got [1])."),
    "null for a row": ("a.jsonl", jsonl(ROW, None), "a.jsonl:2: expected an object with columns (got null)."),
    "a number of thousands of digits": ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n",
        "a.jsonl:1: JSON exceeds the parser's limits: numbers of thousands"),
    "brackets in brackets": ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: JSON exceeds the parser's limits: …. Remove"),
    "brackets in brackets in .json": ("a.json", b"[" * 100_000, "a.json: JSON exceeds the parser's limits: …. Remove them."),
    "Latin-1": ("a.jsonl", '{"instruction": "ä"}'.encode("latin-1"), "a.jsonl:1: invalid UTF-8. Save the file as UTF-8."),
    "Latin-1 in .json": ("a.json", '[\n{"instruction": "ä"}]'.encode("latin-1"),
        "a.json:2: invalid UTF-8. Save the file as UTF-8."),
    "Latin-1 in .csv": ("a.csv", "instruction,output\nä,b\n".encode("latin-1"),
        "a.csv:1 or later: invalid UTF-8. Save the file as UTF-8."),
    "UTF-16": ("a.json", json.dumps([ROW]).encode("utf-16"), "a.json:1: invalid UTF-8. Save the file as UTF-8."),
    "half a character": ("a.jsonl", jsonl(ROW) + b'{"instruction": "\\ud83d", "output": "b"}',
        "a.jsonl:2: invalid Unicode: …. Write the file as UTF-8."),
    "a missing column": ("a.jsonl", jsonl(ROW, {"instruction": "a"}),
        "a.jsonl:2: column 'output' is missing (got 'instruction'). If it has another name, set data.columns"),
    "other columns": ("a.jsonl", jsonl({"q": "a", "a": "b"}),
        "a.jsonl:1: unrecognized columns 'q', 'a' (expected …). Map them with data.columns"),
    "no columns": ("a.jsonl", jsonl({}),
        "a.jsonl:1: unrecognized columns none (expected instruction+output, "),
    "columns by the hundred": ("a.jsonl", jsonl({f"c{n}": n for n in range(500)}),
        "a.jsonl:1: …'c19', and 480 more (expected"),
    "a number for text": ("a.jsonl", jsonl(ROW, {"instruction": 1, "output": "b"}),
        "a.jsonl:2: 'instruction' must be text (got 1)."),
    "null for text": ("a.jsonl", jsonl(ROW, {"instruction": "a", "output": None}),
        "a.jsonl:2: 'output' must be text (got null)."),
    "no number for text": ("a.jsonl", b'{"instruction": NaN, "output": "b"}\n',
        "a.jsonl:1: 'instruction' must be text (got nan)."),
    "an object for text": ("a.jsonl", jsonl(ROW, {"instruction": {"de": "a"}, "output": "b"}),
        "a.jsonl:2: 'instruction' must be text (got {'de'"),
    "a list for the input": ("a.jsonl", jsonl({**ROW, "input": ["x"]}), "a.jsonl:1: 'input' must be text (got ['x'])."),
    "too few fields": ("a.csv", b"instruction,output\na,b\nc\n",
        "a.csv:3: number of fields differs from the header (expected 2)."),
    "too many fields": ("a.csv", b"instruction,output\na,b,c\n",
        "a.csv:2: number of fields differs from the header (expected 2)."),
    "a column twice": ("a.csv", b"output,output\na,b\n", "a.csv:1: duplicate column in the header (got 'output', 'output')."),
    "a quote left open": ("a.csv", b'instruction,output\n"a,b\n', "a.csv:2 or later: invalid CSV: unexpected end of data."),
    "a bar for a comma": ("a.csv", b"instruction|output\na|b\n",
        "a.csv:2: unrecognized columns 'instruction|output'"),
    "a key twice": ("a.jsonl", b'{"instruction": "a", "output": "b", "output": "c"}\n',
        "a.jsonl:1: duplicate key 'output' in an object. Remove all but one."),
    "objects over several lines": ("a.jsonl", b'{\n"instruction": "a",\n"output": "b"\n}\n{\n}\n',
        "a.jsonl:5:1: invalid JSON: extra data. Write one object per line (jq -c)."),
    "no workbook": ("a.xlsx", b"instruction,output\n", "a.xlsx: …"),
    "no parquet": ("a.parquet", b"instruction,output\n", "a.parquet: invalid Parquet file: …. Download it again."),
    "half a table": ("a.parquet", table(text=["a" * 99] * 99)[:-200],
        "a.parquet: invalid Parquet file: …. Download it again."),
    "numbers in a table": ("a.parquet", table(instruction=[1], output=[2]),
        "a.parquet:row 1: 'instruction' must be text (got 1)."),
    "null in a table": ("a.parquet", table(text=["a", None]), "a.parquet:row 2: 'text' must be text (got null)."),
    "no gzip": ("a.jsonl.gz", jsonl(ROW), "a.jsonl.gz: cannot read the file: Not a gzipped file…. Download it again."),
    "half a gzip": ("a.jsonl.gz", gzip.compress(jsonl(*[ROW] * 9))[:-9],
        "a.jsonl.gz: cannot read the file: Compressed file ended…. Download it again."),
    "an empty gzip": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: the source contains no rows."),
    "no messages": ("a.jsonl", jsonl({"messages": []}), "a.jsonl:1: 'messages' must be a non-empty list of messages (got []"),
    "text for messages": ("a.jsonl", jsonl({"messages": "hello"}),
        "a.jsonl:1: 'messages' must be a non-empty list of messages (got 'hello')."),
    "messages in a .csv": ("a.csv", b"messages\n[]\n", "a.csv:2: 'messages' must be a non-empty list of messages (got '[]')."),
    "text for a message": ("a.jsonl", chat("hello"), "a.jsonl:2: message 1 must have 'role' and 'content' (got 'hello')."),
    "no content": ("a.jsonl", chat(USER, {"role": "assistant"}),
        "a.jsonl:2: message 2 must have a text 'role' and 'content' (got"),
    "null for content": ("a.jsonl", chat(USER, {"role": "assistant", "content": None}),
        "a.jsonl:2: message 2 must have a text 'role' and"),
    "a picture for content": ("a.jsonl", chat({"role": "user", "content": [{"type": "image"}]}),
        "a.jsonl:2: message 1 has a part that is not text"),
    "null for a part": ("a.jsonl", chat({"role": "user", "content": [{"type": "text", "text": None}]}),
        "a.jsonl:2: message 1 must have a text"),
    "a role that is none": ("a.jsonl", chat({"role": "boss", "content": "a"}),
        "a.jsonl:2: message 1 has an unknown role 'boss' (expected system"),
    "half a weight": ("a.jsonl", chat(USER, {**ASSISTANT, "weight": 0.5}),
        "a.jsonl:2: message 2: 'weight' must be 0 or 1, true or false (got 0.5)."),
    "an answer without an end": ("a.jsonl", chat(ASSISTANT, USER),
        "a.jsonl:2: the last message must have the role assistant (got 'user')."),
    "tool calls that are a number": ("a.jsonl", chat(USER, {**ASSISTANT, "tool_calls": 3}),
        "a.jsonl:2: message 2: 'tool_calls' must be a list"),
    "tools that are no list": ("a.jsonl", jsonl({"messages": [USER, ASSISTANT], "tools": "x"}),
        "a.jsonl:1: 'tools' must be a list of functions (got 'x')."),
    "images": ("a.jsonl", jsonl({"messages": [USER, ASSISTANT], "images": ["a.jpg"]}),
        "a.jsonl:1: column 'images' has content, but runs train on text only. Remove the column"),
    "answers to avoid": ("a.jsonl", jsonl({"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "c", "label": False}), "a.jsonl:2: label false marks an answer to avoid (KTO)"),
    "preference pairs": ("a.jsonl", jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "a.jsonl:1: 'chosen' and 'rejected' are preference pairs, …: see docs/dpo.md."),
    "columns of two formats": ("a.jsonl", jsonl({"prompt": "a", "response": "b", "messages": [USER, ASSISTANT]}),
        "a.jsonl:1: the columns are those of 2 formats (got messages and prompt_completion). Set data.format"),
    "a call that is not JSON": ("a.jsonl", chat(USER, {"role": "function_call", "content": "add"}),
        "a.jsonl:2: message 2: the content of role 'function_call' must be JSON of {name, arguments} (got 'add')."),
    "history that is text": ("a.jsonl", jsonl({"instruction": "a", "output": "b", "history": "c"}),
        "a.jsonl:1: 'history' must be a list of [instruction, answer] pairs (got 'c')."),
    "an answer to nothing": ("a.jsonl", jsonl({"message_id": "b", "parent_id": "a", "role": "assistant", "text": "c"}),
        "a.jsonl:1: the message 'a', which 'parent_id' names, is missing."),
    "two system prompts": (
        "a.jsonl", jsonl({"messages": [{"role": "system", "content": "x"}, USER, ASSISTANT], "system": "y"}),
        "a.jsonl:1: both the column 'system' and …. Keep only one."),
    "a special token in a chat": ("a.jsonl", chat({"role": "user", "content": "<|end|>"}, ASSISTANT),
        "a.jsonl:2: text contains the special token '<|end|>'. Remove it"),
    "a very long row": ("a.jsonl", jsonl(ROW, {"instruction": "word " * 9000, "output": "b"}),
        "recipe.yaml:2: data.max_length: 1 of …longest: a.jsonl:2). Set data.overlong to split."),
    "one row for two": ("a.jsonl", jsonl(ROW),
        "recipe.yaml:2: data.eval: no training rows are left (got 0.25 of 1 rows). Set data.eval: null, or add rows."),
    "nothing to train on": ("a.jsonl", jsonl({"text": ""}, {"text": ""}),
        "recipe.yaml:2: data.train: no trained tokens in the dataset (all labels are masked). Check"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_data(case: str, sft_recipe: Callable[..., Said]) -> None:
    path, content, expected = FILES[case]
    if path.endswith("/"):
        Path(path).mkdir()
    if content is not None:
        Path(path).write_bytes(content)
    template = ", template: chat.jinja" if "messages" in str(content) else ""
    Path("chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8"
    )
    write_recipe(f"{{train: {json.dumps(path)}, eval: 0.25, max_length: 128{template}}}")

    check_refused(sft_recipe, ["check", "recipe.yaml"], expected)


def test_what_a_file_may_have(sft_recipe: Callable[..., Said]) -> None:
    """A byte order mark, blank lines, braces, long fields, names of special tokens where they stay text."""
    Path("a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + jsonl(ROW) + b"\n" + jsonl({"instruction": "{x} <|end|>", "output": ""})
    )
    stream = io.StringIO()
    csv.writer(stream).writerows([["instruction", "output"], ["a\nb", "c" * 200_000], ["a", "b"]])
    Path("b.csv").write_text("\ufeff" + stream.getvalue(), encoding="utf-8")
    write_recipe("{train: [a.jsonl, b.csv], eval: null, max_length: 128, overlong: drop}")

    assert sft_recipe("check", "recipe.yaml").code == 0


def test_prompts_that_are_no_rows_are_found_by_check(sft_recipe: Callable[..., Said]) -> None:
    check_refused(
        sft_recipe, ["check", "recipe.yaml", "--set", "eval.generate=none.jsonl"], "none.jsonl: file not found (working"
    )


def test_renamed_columns_that_are_not_there(sft_recipe: Callable[..., Said]) -> None:
    check_refused(
        sft_recipe,
        ["check", "recipe.yaml", "--set", "data.columns={instruction: question}"],
        "train.jsonl:1: column 'question' is missing, which data.columns maps to 'instruction' (got 'instruction'",
    )


# --- Tokenizers and models -------------------------------------------------------------------------------------------


def copied(change: Change, source: Path = TINY) -> Path:
    shutil.copytree(source, "model")
    change(Path("model"))
    return Path("model")


def written(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def removed(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def changed(name: str, **values: Any) -> Change:
    """A JSON file with other values; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8")) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def template(text: str) -> Change:
    return written("chat_template.jinja", text)


SETTINGS, CONFIG, WEIGHTS, INDEX = (
    "tokenizer_config.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
WORDS = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "post_processor": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "<|end|>": 1}, "unk_token": "<unk>"},
}
# By `check`, which does not need torch.
TOKENIZERS: dict[str, tuple[Change, str]] = {
    "none": (removed("tokenizer.json"), "--set: model.name: model has no tokenizer (tokenizer.json). Copy it"),
    "empty": (written("tokenizer.json", ""), "model/tokenizer.json: invalid tokenizer: …. Download it again."),
    "no JSON": (written("tokenizer.json", "{"), "model/tokenizer.json: invalid tokenizer: …. Download it again."),
    "a list": (written("tokenizer.json", "[]"), "model/tokenizer.json: invalid tokenizer: …. Download it again."),
    "cut off": (cut("tokenizer.json"), "model/tokenizer.json: invalid tokenizer: …. Download it again."),
    "a pointer of git LFS": (written("tokenizer.json", "version https://git-lfs\n"),
        "model/tokenizer.json: invalid tokenizer: …"),
    "without unknown words": (written("tokenizer.json", json.dumps(WORDS)),
        "--set: model.name: model: the tokenizer cannot encode"),
    "settings cut off": (cut(SETTINGS), "model/tokenizer_config.json: invalid JSON: …. Download it again."),
    "settings that are a list": (written(SETTINGS, "[1]"), "model/tokenizer_config.json: expected an object (got list)."),
    "settings in Latin-1": (written(SETTINGS, b'{"a": "\xe4"}'),
        "model/tokenizer_config.json: invalid UTF-8. Download it again."),
    "no end": (changed(SETTINGS, eos_token=None), "--set: model.name: model: the tokenizer has no EOS token…. Set eos_token"),
    "an end that is a number": (changed(SETTINGS, eos_token=2), "--set: model.name: model: the tokenizer has no EOS token"),
    "no settings": (removed(SETTINGS), "--set: model.name: model: the tokenizer has no EOS token…. Set eos_token in its"),
}  # fmt: skip
TEMPLATES: dict[str, tuple[Change, str]] = {
    "none": (both(),
        "--set: model.name: model: the tokenizer has no chat template. Set data.template to "
        "alpaca, chatml, llama3, or the path of a .jinja file."),
    "a number": (changed(SETTINGS, chat_template=5),
        "--set: model.name: model: the tokenizer has no chat template"),
    "none called default": (changed(SETTINGS, chat_template=[{"name": "rag", "template": "x"}]),
        "--set: model.name: model: the tokenizer has no chat template"),
    "left open": (template("{% for m in messages %}"),
        "recipe.yaml:2: data.template: the chat template of the tokenizer: invalid Jinja template: …. Fix it"),
    "an unknown filter": (template("{{ messages | upside_down }}"),
        "recipe.yaml:2: data.template: the chat template of the tokenizer: invalid…upside_down…(line 1)"),
    "a number too long": (template("{{ " + "9" * 5000 + " }}"),
        "chat.jsonl:1: the chat template rejects these messages: Exceeds the limit (4300 digits)"),
    "refuses": (template("{{ raise_exception('no') }}"),
        "chat.jsonl:1: the chat template rejects these messages: no. This affects all 24 rows."),
    "divides by zero": (template("{{ 1 // 0 }}"), "chat.jsonl:1: the chat template rejects these messages: integer division"),
    "asks for what is not there": (template("{{ messages.x.y }}"),
        "chat.jsonl:1: the chat template rejects these messages: …no attribute"),
    "loops for long": (template("{% for i in range(10**9) %}x{% endfor %}"),
        "recipe.yaml:2: data.template: …the template violates the sandbox: Range too big. …. Use another template"),
    "without content": (template("hello"), "chat.jsonl:1: the chat template drops the answer…. This affects all 24 rows."),
    "empty": (template(""), "chat.jsonl:1: the chat template drops the answer, so nothing would be trained."),
    "in Latin-1": (written("chat_template.jinja", b"\xe4"), "model/chat_template.jinja: invalid UTF-8. Download it again."),
}  # fmt: skip
MODELS: dict[str, tuple[Change, str]] = {
    "no config": (removed(CONFIG), "--set: model.name: model is not a model directory (config.json is missing)."),
    "a config that is no JSON": (written(CONFIG, "{"), "model/config.json: invalid JSON: …. Download it again."),
    "a config that is a list": (written(CONFIG, "[]"),
        "model/config.json: not a model config ('model_type' is missing). Download"),
    "a config in Latin-1": (written(CONFIG, b"\xe4"), "model/config.json: invalid JSON: …. Download it again."),
    "a config without a type": (changed(CONFIG, model_type=None),
        "model/config.json: not a model config ('model_type' is missing). Download"),
    "a config that is a directory": (both(removed(CONFIG), lambda folder: (folder / CONFIG).mkdir()),
        "model/config.json: …. Download it again."),
    "no weights": (removed(WEIGHTS),
        "--set: model.name: model has no safetensors weights. Add model.safetensors, or shards"),
    "pickles": (both(removed(WEIGHTS), written("pytorch_model.bin", "x")),
        "--set: model.name: model has no safetensors…. Convert it with"),
    "an index of what is not there": (
        both(removed(WEIGHTS), written("a.safetensors", "x"), written(INDEX, '{"weight_map": {"x": "b.safetensors"}}')),
        "--set: model.name: model/model.safetensors.index.json lists missing files (b.safetensors). Download"),
    "an index that is no JSON": (both(removed(WEIGHTS), written("a.safetensors", "x"), written(INDEX, "{")),
        "--set: model.name: model/model.safetensors.index.json lists no weight files. Download the files again."),
    "an adapter": (both(removed(CONFIG), written("adapter_config.json", "{}")),
        "--set: model.name: …. It contains an adapter: merge it"),
}  # fmt: skip
NAMES = {
    "/no/such/model": "--set: model.name: /no/such/model: directory not found (working directory: /",
    "./model": "--set: model.name: ./model: directory not found (working directory: /",
    "my model": "--set: model.name: my model: directory not found (working directory: /",
    "~nobody-here/model": "--set: model.name: ~nobody-here/model: could not determine home directory. Use the directory",
    "a" * 300: "--set: model.name: aaa…: file name too long. Use the directory of a model, or a Hub id.",
    "train.jsonl": "--set: model.name: train.jsonl is a file. Use the directory of a model, or a Hub id.",
    "builtin:huge": "--set: model.name: builtin:huge: unknown built-in model. Use builtin:tiny.",
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case: str, sft_recipe: Callable[..., Said]) -> None:
    change, expected = TOKENIZERS[case]

    check_refused(sft_recipe, ["check", "recipe.yaml", *as_sets([f"model.name={copied(change)}"])], expected)


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(case: str, sft_recipe: Callable[..., Said]) -> None:
    change, expected = TEMPLATES[case]
    write_rows(Path("chat.jsonl"), [{"messages": [USER, ASSISTANT]}] * 24)
    write_recipe("{train: chat.jsonl, template: chat}")

    check_refused(sft_recipe, ["check", "recipe.yaml", *as_sets([f"model.name={copied(change)}"])], expected)


@pytest.mark.parametrize("case", MODELS)
def test_model_directories(case: str, sft_recipe: Callable[..., Said]) -> None:
    change, expected = MODELS[case]

    check_refused(sft_recipe, ["check", "recipe.yaml", *as_sets([f"model.name={copied(change)}"])], expected)


@pytest.mark.parametrize("name", NAMES)
def test_model_names(name: str, sft_recipe: Callable[..., Said]) -> None:
    check_refused(sft_recipe, ["check", "recipe.yaml", *as_sets([f"model.name={name}"])], NAMES[name])


# By `run`: what is found once the libraries have it, before the first step.
RUNS: dict[str, tuple[Change, list[str], str]] = {
    "weights cut off": (cut(WEIGHTS), [],
        "--set: model.name: model: its weights cannot be loaded: …. Download the files again."),
    "weights that are a page": (written(WEIGHTS, "<html>"), [],
        "--set: model.name: model: its weights cannot be loaded: …. Download"),
    "a weight missing": (lambda folder: without(folder / WEIGHTS, "model.layers.0.mlp.up_proj.weight"), [],
        "--set: model.name: model: its files lack 1 of the weights in its config…. Download the files again."),
    "weights of another shape": (changed(CONFIG, intermediate_size=10), [],
        "--set: model.name: model: its weights cannot be loaded: …. Download the files again."),
    "a vocabulary of another size": (changed(CONFIG, vocab_size=10), [],
        "--set: model.name: model: its weights cannot be loaded: …. Download the files again."),
    "an unknown type": (changed(CONFIG, model_type="lamma"), [],
        "--set: model.name: model: its config cannot be loaded: …`lamma`"),
    "no causal model": (changed(CONFIG, model_type="vit"), [], "--set: model.name: model: its weights cannot be loaded"),
    "an unknown activation": (changed(CONFIG, hidden_act="no"), [],
        "--set: model.name: model: its weights …'no'. Download the files again."),
    "a width that is text": (changed(CONFIG, hidden_size="x"), [],
        "--set: model.name: model: its …cannot be loaded: …'hidden_size'"),
    "heads that do not come out": (changed(CONFIG, num_attention_heads=7), [],
        "--set: model.name: model: its …not a multiple of"),
    "code of its own": (changed(CONFIG, model_type="mine", auto_map={"AutoConfig": "a.B"}), [],
        "--set: model.name: model requires custom Python code. Review the code, then set model.trust_remote"),
    "a tokenizer cut off": (cut("tokenizer.json"), [],
        "--set: model.name: model: its tokenizer cannot be loaded: …. Download the files"),
    "a tokenizer without an end": (changed(SETTINGS, eos_token=None), [],
        "--set: model.name: model: the tokenizer has no EOS token"),
    "targets of another model": (both(), ["lora.target_modules=[foo]"],
        "--set: lora.target_modules: no layer is named 'foo'. Layers of this model: "),
    "one target of another model": (both(), ["lora.target_modules=[q_proj, foo]"],
        "--set: lora.target_modules: no layer is named"),
    "a pattern of nothing": (both(), ["lora.target_modules=foo.*"],
        "--set: lora.target_modules: Target modules foo.* not found"),
    "a layer to save that is none": (both(), ["lora.modules_to_save=[foo]"],
        "--set: lora.modules_to_save: no layer is named 'foo'"),
    "an adapter on the head": (both(), ["lora.target_modules=[lm_head]"],
        "--set: lora.target_modules: …modules_to_save: [lm_head]"),
    "a schedule without its settings": (both(), ["train.lr_scheduler=cosine_with_min_lr"],
        "--set: train.lr_scheduler: cosine_with_min_lr (configured by trl.lr_scheduler_kwargs"),
    "an optimizer to be installed": (both(), ["train.optimizer=galore_adamw"],
        "--set: train.optimizer: galore_adamw: You need to install"),
    "a field of TRL of another type": (both(), ["trl.dataloader_num_workers=x"],
        "--set: trl: cannot set up SFTTrainer: "),
    "a flash attention on a CPU": (both(), ["model.attention=flex_attention"],
        "--set: model.attention: flex_attention …. Set sdpa"),
    "answers longer than the model": (both(), ["eval.generate=[a]", "eval.max_new_tokens=1020"],
        "--set: eval.max_new_tokens: with a prompt of …(got 1020). Set eval.max_new_tokens to"),
    "an output that cannot be made": (both(), ["output_dir=/proc/run"], "--set: output_dir: /proc/run cannot be created"),
}  # fmt: skip


def without(file: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("case", RUNS)
def test_runs(case: str, sft_recipe: Callable[..., Said]) -> None:
    change, overrides, expected = RUNS[case]

    check_refused(sft_recipe, ["run", "recipe.yaml", *as_sets([f"model.name={copied(change)}", *overrides])], expected)


# --- Adapters, and models to talk to ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter of the embedded model, with its tokenizer."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


ADAPTER, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def tensors(change: Callable[[str, Any], tuple[str, Any]]) -> Change:
    """An adapter's file with each tensor (by name) changed."""

    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        pairs = (change(*pair) for pair in load_file(folder / TENSORS).items())
        save_file({name: tensor.contiguous() for name, tensor in pairs}, folder / TENSORS)

    return rewrite


def of_half_the_rank(name: str, tensor: Any) -> tuple[str, Any]:
    return name, tensor[:2] if "lora_A" in name else tensor[:, :2]


# Of an adapter, what `merge` and `generate` say.
ADAPTERS: dict[str, tuple[Change, str]] = {
    "a config that is no JSON": (written(ADAPTER, "{"),
        "model: invalid adapter_config.json: …. Copy or download it again."),
    "a config that is a list": (written(ADAPTER, "[]"),
        "model: invalid adapter_config.json: …. Copy or download it again."),
    "a config in Latin-1": (written(ADAPTER, b'{"a": "\xe4"}'),
        "model: invalid adapter_config.json: …. Copy or download it again."),
    "a config without a kind": (changed(ADAPTER, peft_type=None),
        "model: invalid adapter_config.json: …. Copy or download it again."),
    "a kind that is none": (changed(ADAPTER, peft_type="MAGIC"),
        "model: invalid adapter_config.json: …MAGIC…. Copy or download it again."),
    "no base": (changed(ADAPTER, base_model_name_or_path=None),
        "model: adapter_config.json does not name a base. Pass the base with --base"),
    "a base that is a number": (changed(ADAPTER, base_model_name_or_path=5),
        "model: adapter_config.json does not name a base. Pass the base"),
    "a base that has gone": (changed(ADAPTER, base_model_name_or_path="/no/such"),
        "/no/such: the adapter's base cannot be loaded: directory not found…. Pass the base with --base"),
    "a base on the hub, offline": (changed(ADAPTER, base_model_name_or_path="nobody/nothing"),
        "nobody/nothing: the adapter's base cannot be loaded: …. Pass the base with --base (of sft-recipe merge)."),
    "no tensors' file": (removed(TENSORS),
        "model: adapter_model.safetensors is missing. Copy or download the adapter's files again."),
    "a pickle": (both(removed(TENSORS), written("adapter_model.bin", "x")),
        "model: adapter_model.safetensors is missing. Its adapter_model.bin is a pickle…. Save it again with PEFT."),
    "cut off": (cut(TENSORS),
        "model/adapter_model.safetensors: not a complete safetensors file (…). Copy or download it again."),
    "empty": (written(TENSORS, ""),
        "model/adapter_model.safetensors: not a complete safetensors file (…). Copy or download it again."),
    "a page": (written(TENSORS, "<html>not found</html>"),
        "model/adapter_model.safetensors: not a complete safetensors file (…). Copy or download it again."),
    "of another rank": (tensors(of_half_the_rank),
        "model: adapter_config.json requires rank 4 for …lora_A.weight (got 2). Copy or download its files again."),
    "a rank of nothing": (changed(ADAPTER, r=0), "model: does not fit the base…: `r` should be a positive integer"),
    "of layers that are not there": (tensors(lambda name, tensor: (name.replace("layers.0", "layers.9"), tensor)),
        "model: 2 tensors that adapter_config.json requires are missing, such as …. Copy or download its files again."),
    "of another width": (tensors(lambda name, t: (name, t.repeat(1, 2)) if "_A" in name else (name, t)),
        "model: does not fit the base"),
    "not finite": (tensors(lambda name, tensor: (name, tensor * float("nan"))),
        "model: cannot be merged: …would have NaN or Inf"),
    "targets of another model": (changed(ADAPTER, target_modules=["foo"]),
        "model: does not fit the base…: Target modules {'foo'} not"),
    "a broken tokenizer": (written("tokenizer.json", "{"),
        "model: its tokenizer cannot be loaded: …. Copy or download its files again."),
    "a broken generation config": (written("generation_config.json", "{"),
        "model: invalid generation_config.json: …. Copy or download it again."),
}  # fmt: skip
# The same said by `generate`, where it finds it by other means; None: it answers all the same.
BY_GENERATE: dict[str, str | None] = {
    "of another rank": "model: does not fit the base",
    "of layers that are not there": "model: … tensors that adapter_config.json requires are missing, such as ….",
    "not finite": None,
}  # fmt: skip
TALKED_TO: dict[str, tuple[Change, list[str], str]] = {
    "no config": (removed(CONFIG), [],
        "model: no model found. Pass a model or adapter directory, or a finished run."),
    "a config that is no JSON": (written(CONFIG, "{"), [], "model: its tokenizer cannot be loaded: …not a valid JSON"),
    "weights cut off": (cut(WEIGHTS), [], "model: its weights cannot be loaded: …. Download the files again."),
    "no weights": (removed(WEIGHTS), [], "model: its weights cannot be loaded: …model.safetensors"),
    "no tokenizer": (removed("tokenizer.json", SETTINGS), [], "model: its tokenizer cannot be loaded: "),
    "a template that refuses": (template("{{ raise_exception('no') }}"), [],
        "model: the chat template rejects these messages: no"),
    "a broken template": (template("{% for"), [], "model: its chat template: invalid Jinja template: "),
    "a broken generation config": (written("generation_config.json", "{"), [],
        "model: invalid generation_config.json: "),
    "code of its own": (changed(CONFIG, model_type="mine", auto_map={"AutoConfig": "a.B"}), [],
        "model requires custom Python code. Review the code, then pass --trust-remote-code."),
    "a broken account of a run": (written("data.json", "{"), [],
        "model/data.json: cannot be read: …. Remove it to use the model"),
    "a prompt too long": (both(), ["--prompt", "x " * 2000],
        "model: the prompt is longer than the context length 1024 (got 4001). Shorten it."),
    "a prompt that is no Unicode": (both(), ["--prompt", "a\udce4"],
        "--prompt and --input: not valid Unicode. Pass UTF-8 text."),
    "hardly any temperature": (both(), ["--temperature", "1e-320"], "model: cannot answer this prompt: "),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, good_adapter: Path, sft_recipe: Callable[..., Said]) -> None:
    change, expected = ADAPTERS[case]
    copied(change, good_adapter)

    check_refused(sft_recipe, ["merge", "model", "--out", "merged"], expected)
    by_generate = BY_GENERATE.get(case, expected)
    if by_generate is not None:
        check_refused(sft_recipe, ["generate", "model", "--prompt", "x"], by_generate)


@pytest.mark.parametrize("case", TALKED_TO)
def test_models_to_talk_to(case: str, sft_recipe: Callable[..., Said]) -> None:
    change, options, expected = TALKED_TO[case]
    copied(change)

    check_refused(sft_recipe, ["generate", "model", "--prompt", "x", "--max-new-tokens", "2", *options], expected)


# --- Command lines ---------------------------------------------------------------------------------------------------

COMMANDS = {
    "rnu": "sft-recipe: No such command 'rnu'. Did you mean 'run'? (see sft-recipe --help)",
    "run": "sft-recipe run: Missing argument 'RECIPE'. (see sft-recipe run --help)",
    "check recipe.yaml --sett a=1":
        "sft-recipe check: No such option: --sett (Possible options: --set) (see sft-recipe check --help)",
    "check recipe.yaml --set": "sft-recipe: Option '--set' requires an argument. (see sft-recipe --help)",
    "check recipe.yaml other.yaml": "sft-recipe check: Got unexpected extra argument(s) (other.yaml) (see",
    "check none.yaml": "none.yaml: file not found. Run `sft-recipe list` to see the bundled recipes.",
    "run none.yaml": "none.yaml: file not found. Run `sft-recipe list` to see the bundled recipes.",
    "check .": ".: cannot read the file: Is a directory. Pass the path of a recipe (YAML).",
    "check train.jsonl/recipe.yaml": "train.jsonl/recipe.yaml: cannot read the file: Not a directory. Pass the path",
    f"check {'a' * 300}": "aaa…: cannot read the file: File name too long. Pass the path of a recipe (YAML).",
    "check train.jsonl": "train.jsonl:2: invalid YAML: expected '<document start>'",
    "preview recipe.yaml -n 0": "sft-recipe preview: Invalid value for '-n': …greater than or equal to 1 (see",
    "preview recipe.yaml -n two": "sft-recipe preview: Invalid value for '-n': …a valid integer",
    "preview recipe.yaml --row 25": "--row 25: not in any training sequence. The row does not exist in train.jsonl, was",
    "preview recipe.yaml --row 0": "--row 0: not in any training sequence. The row does not exist in train.jsonl",
    "preview recipe.yaml --row none:1":
        "--row none:1: there is no training row at this location. Give a row number, or FILE:LINE (",
    f"preview recipe.yaml --row {'9' * 5000}": "--row 999…: there is no training row at this location. Give a row number",
    "preview recipe.yaml --set model.name=a/b": "--set: model.name: the tokenizer of a/b is unavailable: ",
    "new nothing": "unknown recipe 'nothing'. Choose one of gemma3_1b_full, ",
    "new ../recipe": "unknown recipe '../recipe'. Choose one of gemma3_1b_full, ",
    "new quickstart --out recipe.yaml": "recipe.yaml: already exists. Choose another name with --out.",
    "new quickstart --out .": ".: already exists. Choose another name with --out.",
    "new quickstart --out train.jsonl/a.yaml": "train.jsonl/a.yaml: cannot be written: …. Choose another name with --out.",
    f"new quickstart --out {'a' * 300}": "aaa…: cannot be written: File name too long. Choose another name with --out.",
    "report none": "none: not a run directory (metrics.jsonl is missing)",
    "report recipe.yaml": "recipe.yaml: not a run directory (metrics.jsonl is missing)",
    "report none --watch": "none: not a run directory (metrics.jsonl is missing)",
    "report none ./none": "none: given twice. Pass each run once.",
    "generate builtin:tiny": "sft-recipe generate: Missing option '--prompt'. (see sft-recipe generate --help)",
    "generate none --prompt x": "none: no model found. Pass a model or adapter directory, or a finished run.",
    "generate recipe.yaml --prompt x": "recipe.yaml: no model found. Pass a model or adapter directory",
    "generate builtin:huge --prompt x": "model.name: builtin:huge: unknown built-in model. Use builtin:tiny.",
    f"generate {'a' * 300} --prompt x": "aaa…: no model found. Pass a model or adapter directory",
    "generate builtin:tiny --prompt x --max-new-tokens 0": "sft-recipe generate: Invalid value for '--max-new-tokens': …(see",
    "generate builtin:tiny --prompt x --temperature nan": "sft-recipe generate: Invalid value for '--temperature': …(see",
    "merge none --out merged":
        "none: no adapter found. Pass a directory with adapter_config.json, or a run that trained an adapter.",
    "merge builtin:tiny --out merged": "builtin:tiny: no adapter found. Pass a directory with adapter_config.json",
    "merge none": "sft-recipe merge: Missing option '--out'. (see sft-recipe merge --help)",
    "merge none --out merged --dtype int4": "--dtype: expected one of bfloat16, float16, float32 (got int4).",
    "merge none --out merged --max-shard-size 5": "--max-shard-size: …such as 5GB or 500MB (got 5).",
    "merge none --out merged --max-shard-size 0GB": "--max-shard-size: expected text such as 5GB or 500MB (got 0GB).",
}  # fmt: skip
MERGES = {
    "--out recipe.yaml": "recipe.yaml: already exists. Choose another --out, or remove it.",
    "--out model": "model: already exists. Choose another --out, or remove it.",
    "--out recipe.yaml/merged": "recipe.yaml/merged: cannot be created: recipe.yaml is a file. Choose another --out.",
    f"--out {'a' * 300}": "aaa…: cannot be created: file name too long. Choose another --out.",
    "--out merged --base /no/such": "--base: /no/such: directory not found (working directory: /",
    "--out merged --base recipe.yaml": "--base: recipe.yaml is a file. Use the directory of a model, or a Hub id.",
    "--out merged --base builtin:huge": "--base: builtin:huge: unknown built-in model. Use builtin:tiny.",
    "--out merged --base dequantized":
        "--base dequantized: model has no record of a quantized base. Merge",
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines(line: str, sft_recipe: Callable[..., Said]) -> None:
    check_refused(sft_recipe, line.split(), COMMANDS[line])


@pytest.mark.parametrize("options", MERGES)
def test_merges(options: str, good_adapter: Path, sft_recipe: Callable[..., Said]) -> None:
    copied(both(), good_adapter)

    check_refused(sft_recipe, ["merge", "model", *options.split()], MERGES[options])


REPORTS = {
    "nonsense\n": "mine/metrics.jsonl: not valid JSON Lines: ",
    "[1]\n": "mine/metrics.jsonl: not valid JSON Lines: ",
    "{}\n": "mine/metrics.jsonl: a line has no 'step'. Restore the file as the run wrote it.",
}  # fmt: skip


@pytest.mark.parametrize("metrics", REPORTS)
def test_reports(metrics: str, sft_recipe: Callable[..., Said]) -> None:
    Path("mine").mkdir()
    Path("mine/metrics.jsonl").write_text(metrics, encoding="utf-8")

    check_refused(sft_recipe, ["report", "mine"], REPORTS[metrics])


def test_reports_that_cannot_be_written(sft_recipe: Callable[..., Said]) -> None:
    Path("mine").mkdir()
    Path("mine/metrics.jsonl").write_text("", encoding="utf-8")

    check_refused(
        sft_recipe, ["report", "mine", "--out", "recipe.yaml"],
        "recipe.yaml: cannot be written: File exists. Choose another directory with --out.",
    )  # fmt: skip


RUN_FILES = {
    "recipe.resolved.json": ("{", "mine/recipe.resolved.json: not a JSON object: …. Restore the file as the run wrote it."),
    "data.json": ("[1, 2]", "mine/data.json: not a JSON object: "),
    "manifest.json": ("no", "mine/manifest.json: not a JSON object: "),
    "samples.jsonl": ('{"step": 1}\n', "mine: unexpected content in the files of the run (KeyError: "),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
def test_reports_of_files_that_are_not_a_run_s(name: str, sft_recipe: Callable[..., Said]) -> None:
    Path("mine").mkdir()
    Path("mine/metrics.jsonl").write_text("", encoding="utf-8")
    text, expected = RUN_FILES[name]
    Path("mine", name).write_text(text, encoding="utf-8")

    check_refused(sft_recipe, ["report", "mine"], expected)


# --- The environment -------------------------------------------------------------------------------------------------

PACKAGES = {
    "torchao": ("train.optimizer=adamw_8bit_sr", "--set: train.optimizer: …Run pip install 'sft-recipes[torchao]'."),
    "wandb": ("log.to=[wandb]", "--set: log.to: wandb is not installed. Run pip install 'sft-recipes[wandb]'."),
    "tensorboard": ("log.to=[tensorboard]",
        "--set: log.to: tensorboard is not installed. Run pip install 'sft-recipes[tensorboard]'."),
    "trackio": ("log.to=[trackio]", "--set: log.to: trackio is not installed. Run pip install 'sft-recipes[trackio]'."),
    "mlflow": ("log.to=[mlflow]", "--set: log.to: mlflow is not installed. Run pip install 'sft-recipes[mlflow]'."),
    "flash_attn": ("model.attention=flash_attention_2", "--set: model.attention: …Run pip install 'sft-recipes[flash]'."),
    "flash_attn_3": ("model.attention=flash_attention_3", "--set: model.attention: …not installed. Build it from source"),
}  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_that_are_missing(
    package: str, sft_recipe: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    override, expected = PACKAGES[package]
    monkeypatch.setattr(recipe_check, "installed", lambda name: name != package and library_names.installed(name))

    check_refused(sft_recipe, ["check", "recipe.yaml", "--set", override], expected)


@pytest.mark.parametrize("name", ["model.name", "data.train"])
def test_the_hub_out_of_reach(name: str, sft_recipe: Callable[..., Said]) -> None:
    where = (
        "--set: model.name: nobody/nothing: its tokenizer cannot be loaded: "
        if name == "model.name"
        else "nobody/nothing: no"
    )

    check_refused(sft_recipe, ["run", "recipe.yaml", "--set", f"{name}=nobody/nothing"], where)


@pytest.mark.parametrize("cache", ["train.jsonl", "train.jsonl/cache", "/proc/cache", "a" * 300])
def test_a_cache_that_cannot_be_written_is_done_without(
    cache: str, sft_recipe: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_RECIPES_CACHE", cache)
    before = everything()

    assert sft_recipe("check", "recipe.yaml").code == 0
    assert everything() == before


def test_no_room_for_temporary_files_either(sft_recipe: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> str:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setenv("SFT_RECIPES_CACHE", "train.jsonl")

    check_refused(
        sft_recipe,
        ["check", "recipe.yaml"],
        "cannot write the tokenized data: …No space left…. Set TMPDIR or SFT_RECIPES_CACHE to a directory with free space.",
        code=1,
    )


def test_a_fault_of_the_machine_is_a_line(sft_recipe: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/root/secret")

    monkeypatch.setattr("sft_recipes.commands.check.check", refuse)

    check_refused(sft_recipe, ["check", "recipe.yaml"], "/root/secret: Permission denied", code=1)


def test_a_terminal_that_knows_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", ["sft-recipe", "check", "größe.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    stream.flush()

    assert ended.value.code == 2
    assert stream.buffer.getvalue().startswith(b"gr\\xf6\\xdfe.yaml: file not found.")  # type: ignore[attr-defined]


def test_an_output_directory_in_use(sft_recipe: Callable[..., Said]) -> None:
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine", encoding="utf-8")

    check_refused(
        sft_recipe,
        ["run", "recipe.yaml"],
        "recipe.yaml:4: output_dir: run is not empty (contains notes.txt). Choose another directory with --set",
    )


def test_an_output_directory_that_was_there_stays_there(sft_recipe: Callable[..., Said]) -> None:
    Path("run").mkdir()
    for override in ("model.name=/no/such/model", "lora.target_modules=[foo]"):
        assert sft_recipe("run", "recipe.yaml", "--set", override).code == 2

    assert list(Path("run").iterdir()) == []


def test_parents_that_were_made_are_removed(sft_recipe: Callable[..., Said]) -> None:
    assert sft_recipe("run", "recipe.yaml", *as_sets(["lora.target_modules=[foo]", "output_dir=a/b/c"])).code == 2

    assert not Path("a").exists()


def test_no_room_on_the_disk(sft_recipe: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    check_refused(
        sft_recipe,
        ["run", "recipe.yaml"],
        "recipe.yaml:4: output_dir: not enough free space in run for checkpoints and",
    )

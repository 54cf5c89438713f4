"""The command line, run as a program."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_recipes import __version__, cli, model_dir
from sft_recipes.errors import RecipeError
from tests.commands import sft_recipe
from tests.conftest import WriteRecipe, write_rows

HEAVY = ("torch", "transformers", "trl", "peft", "datasets")
COMMANDS = ("run", "check", "generate", "merge", "report", "list", "new", "job", "schema", "doctor")


def test_help_names_every_command() -> None:
    done = sft_recipe("--help")

    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
    assert sft_recipe().stdout == done.stdout
    assert sft_recipe("--version").stdout == f"sft-recipe {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = sft_recipe(command, "--help")

    assert done.returncode == 0
    assert f"Usage: sft-recipe {command}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "x.yaml", "--rsume"], "No such option: --rsume"),
        (["run", "none.yaml"], "none.yaml: file not found. Run `sft-recipe list` to see the bundled recipes."),
        (["check", "none.yaml"], "none.yaml: file not found."),
        (["new", "nothing"], "unknown recipe 'nothing'"),
        (["report", "none"], "none: not a run directory"),
        (["generate", "none", "--prompt", "x"], "none: no model found"),
        (["merge", "none", "--out", "x"], "none: no adapter found"),
        (
            ["merge", "none", "--out", "x", "--dtype", "int4"],
            "--dtype: expected one of bfloat16, float16, float32 (got int4).",
        ),
    ],
)
def test_wrong_command_lines_are_one_line_and_exit_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = sft_recipe(*arguments, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_check_needs_no_torch(write_recipe: WriteRecipe) -> None:
    code = f"""
import sys
from sft_recipes import cli
sys.argv = ["sft-recipe", "check", {str(write_recipe())!r}]
try:
    cli.main()
except SystemExit as done:
    assert done.code == 0, done.code
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_check_counts_rows_tokens_and_steps(write_recipe: WriteRecipe) -> None:
    done = sft_recipe("check", str(write_recipe(model={"dtype": "bfloat16"})))

    assert done.returncode == 0
    assert "18 rows; format alpaca, template alpaca; " in done.stdout
    assert "schedule: 3 steps, 1 of warmup; 4 sequences per step; 3 steps per epoch, 1 epoch; about " in done.stdout
    assert done.stdout.endswith("recipe.yaml: OK\n")
    assert "warning: " in done.stderr
    assert "lose updates to rounding" in done.stderr


@pytest.mark.parametrize("files", ["vocabulary", "tokenizer.model", "tekken.json"])
def test_check_says_of_other_tokenizers_what_run_says(write_recipe: WriteRecipe, tmp_path: Path, files: str) -> None:
    """transformers converts them, if it can: check does so in another process."""
    tiny, folder = model_dir.BUILTIN / "tiny", tmp_path / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("tokenizer.json"))
    if files == "vocabulary":
        bpe = json.loads((tiny / "tokenizer.json").read_text("utf-8"))["model"]
        (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
        (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in bpe["merges"]))
        settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        (folder / "tokenizer_config.json").unlink()
        (folder / files).write_text("{}")
    recipe = write_recipe(model={"name": str(folder)})
    checked, ran = sft_recipe("check", str(recipe)), sft_recipe("run", str(recipe), "--set", "train.max_steps=1")

    assert checked.returncode == ran.returncode == (0 if files == "vocabulary" else 2), ran.stderr
    if files == "vocabulary":
        counts = [re.findall(r"[\d,]+ sequences, [\d,]+ tokens", done.stdout) for done in (checked, ran)]
        assert counts[0] == counts[1]
        assert len(counts[0]) == 2
    else:
        assert "its tokenizer cannot be loaded" in checked.stderr
        assert checked.stderr.splitlines()[-1] == ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("sequences", "max_steps", "said"),
    [
        (18, 3, "5 steps per epoch, 0.6 epochs; about {} tokens per step, {} trained"),
        (18, 12, "5 steps per epoch, 2.4 epochs; about {} tokens per step, {} trained"),
    ],
)
def test_check_says_epochs_and_tokens_a_step(
    write_recipe: WriteRecipe, sequences: int, max_steps: int, said: str
) -> None:
    recipe = write_recipe(data={"packing": "none", "overlong": "drop"}, train={"max_steps": max_steps})
    done = sft_recipe("check", str(recipe))
    tokens, trained = re.findall(
        r"^train: [\d,]+ sequences, ([\d,]+) tokens, ([\d,]+) trained", done.stdout, re.MULTILINE
    )[0]
    a_step = [round(int(number.replace(",", "")) * 4 / sequences) for number in (tokens, trained)]

    assert said.format(*(f"{number:,}" for number in a_step)) in done.stdout


def test_check_warns_of_data_that_teaches_something_else(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    done = sft_recipe("check", str(recipe), "--set", f"data.eval={tmp_path / 'train.jsonl'}")

    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert line.startswith("warning: --set: data.eval: 24 of 24 evaluation rows are also training rows (first: ")


def test_check_looks_for_room(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_recipes.commands.check import check

    full = {"lora": None, "export": {"dtype": "float32"}}  # 3 checkpoints of 12 bytes a weight, a model of 4
    recipe = str(write_recipe(**full))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=30e6))
    with pytest.raises(RecipeError) as caught:
        check(recipe)
    [line] = caught.value.lines
    assert f"output_dir: not enough free space in {tmp_path} for checkpoints and models (35." in line
    assert "choose another disk with --set output_dir=DIR" in line

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=40e6))
    check(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e6))
    check(recipe, ["lora.rank=2"])  # the size of the model is known, that of the adapter not yet


def test_check_finds_every_problem_at_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}, {"output": 1}])
    done = sft_recipe("check", str(write_recipe(train={"sed": 1, "lr_scheduler": "cosin"})))

    assert done.returncode == 2
    assert [line.split(": ", 1)[1] for line in done.stderr.splitlines()] == [
        "unknown key 'train.sed'. Did you mean 'train.seed'?",
        "train.lr_scheduler: unknown name 'cosin'. Did you mean 'cosine'?",
        "column 'output' is missing (got 'instruction'). If it has another name, set data.columns: {output: YOUR_COLUMN}.",
        "column 'instruction' is missing (got 'output'). "
        "If it has another name, set data.columns: {instruction: YOUR_COLUMN}.",
    ]


def test_check_of_a_model_on_the_hub_that_cannot_be_reached(write_recipe: WriteRecipe) -> None:
    done = sft_recipe("check", str(write_recipe(model={"name": "nobody/nothing"})))

    assert done.returncode == 0
    assert "24 rows" in done.stdout
    assert "tokens and steps not counted: the tokenizer of nobody/nothing is unavailable" in done.stdout


def test_check_of_data_on_the_hub_looks_at_the_rest(write_recipe: WriteRecipe) -> None:
    done = sft_recipe("check", str(write_recipe(data={"train": "nobody/nothing"})))

    assert done.returncode == 0
    assert "nobody/nothing: loaded from the Hub when the run starts" in done.stdout


def test_list_and_new(tmp_path: Path) -> None:
    listed = sft_recipe("list").stdout.splitlines()
    assert listed[0].split() == ["recipe", "method", "model", "hardware", "result"]
    assert len(listed) == 17  # one line per recipe in a pipe
    [line] = [line for line in listed if line.startswith("llama8b_qlora ")]
    assert line.split(maxsplit=3)[:3] == ["llama8b_qlora", "QLoRA", "meta-llama/Llama-3.1-8B"]
    assert line.rstrip().endswith(" not measured")
    assert any("LoRA" in line and "from 0.0% to 94.0%" in line for line in listed)

    done = sft_recipe("new", "quickstart", "--out", "mine.yaml", cwd=tmp_path)
    assert done.stdout == "mine.yaml\n"
    assert sft_recipe("check", "mine.yaml", cwd=tmp_path).returncode == 0


def test_schema_for_editors(tmp_path: Path) -> None:
    done = sft_recipe("schema", "--out", ".sft-recipe.schema.json", cwd=tmp_path)
    path, said, line = done.stdout.splitlines()
    assert path == ".sft-recipe.schema.json"
    assert said == "For completion in editors, begin a recipe in the same directory with"
    assert (tmp_path / path).read_text("utf-8") == sft_recipe("schema").stdout

    sft_recipe("new", "quickstart", cwd=tmp_path)
    assert (tmp_path / "quickstart.yaml").read_text("utf-8").splitlines()[0] == line
    assert sft_recipe("check", "quickstart.yaml", cwd=tmp_path).returncode == 0

    wrong = sft_recipe("schema", "--out", "quickstart.yaml", cwd=tmp_path)
    assert wrong.returncode == 2
    assert (
        wrong.stderr == "quickstart.yaml: already exists and is not a recipe schema. Choose another name with --out.\n"
    )


def test_schema_is_a_schema_of_the_shipped_recipes() -> None:
    import jsonschema
    from ruamel.yaml import YAML

    schema = json.loads(sft_recipe("schema").stdout)
    for file in (Path(__file__).parents[1] / "recipes").glob("*.yaml"):
        jsonschema.validate(YAML(typ="safe", pure=True).load(file.read_text("utf-8")), schema)


def test_run_generate_report_merge(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The commands in sequence on one run; the first as the installed program."""
    command = [Path(sys.executable).with_name("sft-recipe"), "run", write_recipe(lora={"rank": 2})]
    done = subprocess.run([*command, "--set", "export.merge=false"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "step 3/3" in done.stdout
    assert "\ngenerate  sft-recipe generate" in done.stdout

    run = tmp_path / "run"
    assert not (run / "model").exists()
    (run / "report.html").unlink()
    assert sft_recipe("report", str(run)).returncode == 0
    assert (run / "report.html").is_file()

    from_adapter = sft_recipe("generate", str(run), "--prompt", "Say it.", "--max-new-tokens", "5")
    merged = sft_recipe("merge", str(run), "--out", str(tmp_path / "merged"), "--dtype", "float32")
    from_model = sft_recipe("generate", str(tmp_path / "merged"), "--prompt", "Say it.", "--max-new-tokens", "5")
    assert (merged.returncode, from_adapter.returncode, from_model.returncode) == (0, 0, 0), merged.stderr
    assert from_adapter.stdout == from_model.stdout != ""

    again = sft_recipe("merge", str(run), "--out", str(tmp_path / "merged"))
    assert again.returncode == 2
    assert "already exists. Choose another --out" in again.stderr


def test_errors_go_to_stderr_without_a_traceback_unless_asked(write_recipe: WriteRecipe) -> None:
    recipe = str(write_recipe(data={"train": "none.jsonl"}))
    plain, debug = sft_recipe("run", recipe), sft_recipe("run", recipe, "--debug")

    assert plain.stderr.splitlines() == [f"none.jsonl: file not found (working directory: {Path.cwd()})."]
    assert "Traceback" in debug.stderr
    assert plain.returncode == 2


def test_no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    cli.quiet_libraries(debug=True)

    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"

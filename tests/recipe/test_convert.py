"""Which tool a config is of, what is said of its keys, and how the recipe is written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipes.errors import RecipeError
from sft_recipes.recipe import load
from sft_recipes.recipe.convert import conversion
from sft_recipes.recipe.convert.conversion import TOOLS
from sft_recipes.recipe.convert.draft import Draft, Lacking, Needless, To, follow, interval, listed, number
from sft_recipes.recipe.load import field_names
from sft_recipes.recipe.schema import Recipe
from sft_recipes.recipe.upstream import OWNED, sft_config_fields
from tests.commands import sft_recipe

AXOLOTL = """\
base_model: org/model
sequence_len: 1024
micro_batch_size: 2
num_epochs: 2
learning_rate: 2e-5
wandb_project:
no_such_key: {inner: 1}
datasets:
  - {path: org/data, type: alpaca}
"""


def convert(folder: Path, text: str, **options: Any) -> tuple[conversion.Converted, Recipe]:
    """A conversion, and the recipe as it is read from its text."""
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    converted = conversion.convert(folder / "config.yaml", **options)
    (folder / "recipe.yaml").write_text(converted.text, encoding="utf-8")
    return converted, load.load(folder / "recipe.yaml").recipe


# --- Draft -------------------------------------------------------------------------------------------------------------


def test_keys_are_dotted_and_none_is_another() -> None:
    config = {"a": {"b": 1, "c": {}}, "a.b": 2, 1: 3, "1": 4, "list": [{"x": 5}, [6]], "plain": [7, 8]}

    assert Draft("Tool", config).keys == {
        "a.b": 1, "a.c": {}, "'a.b'": 2, "1": 3, "'1'": 4, "list[0].x": 5, "list[1]": [6], "plain": [7, 8],
    }  # fmt: skip


def test_what_is_empty_is_said_to_be() -> None:
    draft = Draft("Tool", {"a": None, "b": "", "c": [], "d": {}, "e": 0, "f": False})

    assert {key for key, fate in draft.fates.items() if fate.kind == "empty"} == {"a", "b", "c", "d"}
    assert draft.left() == ["e", "f"]


def test_a_value_that_a_recipe_does_not_take_is_not_carried() -> None:
    draft = Draft("Tool", {"length": "long", "field": 1})
    draft.carry("length", "data.max_length", "long")
    draft.carry("field", "trl.learning_rate", 1)

    assert draft.entries == {}
    assert draft.fates["length"].kind == "lacking"
    assert "a whole number of at least 2" in draft.fates["length"].words
    assert draft.fates["field"].kind == "lacking"


def test_two_keys_that_say_different_things_are_not_both_carried() -> None:
    draft = Draft("Tool", {"a": 2, "b": 3, "c": 2})
    for key in ("a", "b", "c"):
        draft.carry(key, "train.micro_batch_size", draft.get(key))

    assert draft.entries["train.micro_batch_size"].value == 2
    assert [draft.fates[key].kind for key in "abc"] == ["default", "lacking", "default"]
    assert "is from a already" in draft.fates["b"].words


def test_one_key_can_say_two_things() -> None:
    draft = Draft("Tool", {"precision": "half"})
    draft.carry("precision", "model.dtype", "float16")
    draft.carry("precision", "train.mixed_precision", "bf16")

    assert draft.fates["precision"].kind == "becomes"
    assert draft.fates["precision"].words == "model.dtype: float16; train.mixed_precision: bf16"


def test_rules() -> None:
    draft = Draft(
        "Tool", {"to": "b", "off": False, "odd": "z", "why": 1, "section": {"x": 1, "y": {"z": 0}}, "else": 1}
    )
    words = {"b": "sdpa"}
    follow(draft, {
        "to": To("model.attention", words), "odd": To("model.attention", words), "off": To("trl.tf32", off=(False,)),
        "why": Needless("because"), "section.*": Lacking("do this"), "section.y.*": Lacking("do that"),
    })  # fmt: skip

    assert {key: fate.kind for key, fate in draft.fates.items()} == {
        "to": "becomes", "odd": "lacking", "off": "needless", "why": "needless", "section.x": "lacking",
        "section.y.z": "needless",
    }  # fmt: skip
    assert draft.left() == ["else"]


def test_values() -> None:
    assert [number(value) for value in ("2e-5", 3.0, "3", "x", True, None)] == [2e-5, 3, 3, "x", True, None]
    assert [listed(value) for value in ("a, b,", ["a"], None)] == [["a", "b"], ["a"], None]
    assert [interval(value) for value in (500.0, 0.1, 0, "no", True)] == [500, 0.1, None, "no", True]


# --- Tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_tables_lead_to_keys_that_there_are(tool: Any) -> None:
    keys = [rule.key for rule in tool.KEYS.values() if isinstance(rule, To)] + [*tool.NEEDS, *tool.DEFAULTS]
    said = [key for group in tool.GROUPS for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", group.__doc__.partition(":")[2])]

    assert len(keys) > 10
    for key in keys:
        assert key in field_names() or key.removeprefix("trl.") in sft_config_fields() - OWNED.keys(), key
    assert {key.partition(".")[0] for key in said} <= {*field_names(), "model", "dataset", "optimizer", "tokenizer",
                                                       "checkpointer", "metric_logger"}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_defaults_are_taken_by_recipes(tool: Any) -> None:
    draft = Draft("Tool", {"key": 1})
    for to, value in tool.DEFAULTS.items():
        draft.carry("key", to, value)

    assert set(draft.entries) == set(tool.DEFAULTS), draft.fates


# --- Which tool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{}", "is no config of"),
        ("[a, b]", "no keys"),
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2", "not valid YAML: found duplicate key"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: &a {b: *a}", "stands within"),
        (
            "a: &a {x: 1, y: 1}\n"
            + "".join(f"b{n}: &b{n} {{x: *b{n - 1}, y: *b{n - 1}}}\n" for n in range(1, 25)).replace("*b0", "*a"),
            "more than 10,000 keys",
        ),
        ("compute_environment: LOCAL_MACHINE\nnum_processes: 8", r"by its keys \(compute_environment, num_processes\)"),
        ("model: {name: x}\ndata: {train: x}\noutput_dir: x", "is a recipe already"),
        ("base_model: x\nsequence_len: 1\nrl: dpo", "rl: dpo is preference training"),
        ("base_model: x\nsequence_len: 1\npretraining_dataset: x", "pretraining_dataset"),
        ("model_name_or_path: x\nstage: dpo\nfinetuning_type: lora", "stage: dpo is not sft"),
        ("model_name_or_path: x\nfinetuning_type: lora\ntemplate: llama3\nexport_dir: x", "does not train"),
        ("model_name_or_path: x\ndataset_name: y\nbeta: 0.1", "beta is of DPO, KTO or GRPO"),
        (
            "model: {_component_: a.b}\noptimizer: {}\ndataset: {}\na0: aaaa\n"
            + "".join(f"a{n}: {f'${{a{n - 1}}}' * 10}\n" for n in range(1, 10)),
            "longer than 100,000 characters",
        ),
        (
            "base_model: x\nsequence_len: 8\nlr_scheduler_kwargs: {x: !!binary aGk=}",
            ": trl.lr_scheduler_kwargs.x: the tag",
        ),
        ("model: {_component_: a.b}\nquantizer: {_component_: a.c}", "quantizer is of quantisation"),
        ("model: {_component_: a.b}\nloss: {_component_: a.DPOLoss}\noptimizer: {}\ndataset: {}", "DPOLoss"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(RecipeError) as caught:
        conversion.convert(file)

    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"{file}:")
    assert re.search(wanted, caught.value.lines[0]), caught.value.lines[0]


def test_the_tool_can_be_named(tmp_path: Path) -> None:
    text = "learning_rate: 1e-4\nmodel_name_or_path: org/model"

    with pytest.raises(RecipeError, match="--from"):
        convert(tmp_path, text.partition("\n")[0])
    converted, recipe = convert(tmp_path, text, source="trl")
    assert converted.tool == "trl sft"
    assert recipe.train.learning_rate == 1e-4
    assert recipe.data.train == "FILL_IN"
    assert any(line.startswith("data.train: fill it in") for line in converted.remarks)


# --- The recipe and the account ----------------------------------------------------------------------------------------


def test_the_recipe_says_where_each_value_is_from(tmp_path: Path) -> None:
    text = convert(tmp_path, AXOLOTL)[0].text

    assert re.search(r"\n  max_length: 1024 +# sequence_len\n", text)
    assert re.search(r"\n  overlong: drop +# Axolotl's default\n", text)
    assert text.endswith("# Not in this recipe:\n#   no_such_key.inner: 1 -> look it up in Axolotl's documentation\n")


def test_every_key_is_in_the_account(tmp_path: Path) -> None:
    account = "\n".join(convert(tmp_path, AXOLOTL)[0].account())

    assert account.startswith(f"{tmp_path / 'config.yaml'}: Axolotl, 9 keys\n")
    assert "\n  sequence_len: 1024 -> data.max_length: 1024\n" in account
    assert "\nthe default of a recipe (2)\n  micro_batch_size: 2 -> train.micro_batch_size: 2\n" in account
    assert "\nempty (1)\n  wandb_project\n" in account
    assert "\nunknown: no key that is known here (1)\n  no_such_key.inner: 1" in account


def test_the_recipe_keeps_what_there_is_to_say_about_it(tmp_path: Path) -> None:
    text = convert(tmp_path, AXOLOTL.partition("datasets")[0])[0].text

    assert text.endswith("\n\n# About this recipe:\n#   data.train: fill it in: datasets is not in the file\n")


def test_what_check_would_say_is_said(tmp_path: Path) -> None:
    remarks = convert(tmp_path, AXOLOTL + "fsdp: [full_shard]\noptimizer: adamw_bnb_8bit\n")[0].remarks

    assert any(remark.startswith("train.optimizer: adamw_bnb_8bit is of bitsandbytes") for remark in remarks)


def test_tokens_are_not_shown(tmp_path: Path) -> None:
    converted, _ = convert(tmp_path, AXOLOTL + "comet_api_key: abc123def\nhub_token: ghi456jkl\n")

    assert "abc123def" not in converted.text + "\n".join(converted.account())
    assert "ghi456jkl" not in converted.text + "\n".join(converted.account())


def test_yaml_1_1_is_read_as_those_tools_read_it(tmp_path: Path) -> None:
    _, recipe = convert(tmp_path, AXOLOTL + "sample_packing: yes\ngradient_checkpointing: off\n")

    assert recipe.data.packing == "bfd"
    assert recipe.train.gradient_checkpointing is False
    assert recipe.train.learning_rate == 2e-5


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "axolotl.yml").write_text(AXOLOTL, encoding="utf-8")
    shown = sft_recipe("convert", "axolotl.yml", cwd=tmp_path)
    written = sft_recipe("convert", "axolotl.yml", "--out", "new/recipe.yaml", cwd=tmp_path)
    again = sft_recipe("convert", "axolotl.yml", "--out", "new/recipe.yaml", cwd=tmp_path)
    missing = sft_recipe("convert", "nothing.yml", cwd=tmp_path)

    assert shown.returncode == written.returncode == 0
    assert shown.stdout == (tmp_path / "new" / "recipe.yaml").read_text("utf-8")
    assert shown.stderr == written.stderr
    assert shown.stderr.startswith("axolotl.yml: Axolotl, 9 keys\n")
    assert written.stdout == "new/recipe.yaml\n"
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "new/recipe.yaml exists; choose another name with --out\n"
    assert missing.returncode == 2
    assert missing.stderr.startswith(
        "nothing.yml: cannot be read: No such file or directory; expected a config of trl sft"
    )


# --- Any config --------------------------------------------------------------------------------------------------------

SCALARS = st.sampled_from(
    [None, True, False, 0, 1, 3, -1, 0.1, 2.5, float("inf"), "", "x", "no", "auto", "epoch", "lora", "1e-4", "a,b"]
)
SOME = st.sampled_from(["a", "path", "type"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SOME, inner, max_size=2))


def names(tool: Any) -> list[str]:
    """Keys that a tool's module knows, with all that its functions look at, and some that nobody knows."""
    grouped = [key for group in tool.GROUPS for key in re.findall(r"[a-z_0-9.]+", group.__doc__)]
    return sorted({key.removesuffix(".*").rstrip(".") for key in (*tool.KEYS, *grouped, "strange", "x y", "a.b", "1")})


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in flat.items():
        at = config
        *sections, name = key.split(".")
        for section in sections:
            at = at[section] if isinstance(at.get(section), dict) else at.setdefault(f"{section}_", {})
        at[name] = value
    return config


@pytest.mark.parametrize("source", TOOLS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_key_of_any_config_goes_without_a_word(
    source: Any, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tool = TOOLS[source]
    flat = data.draw(st.dictionaries(st.sampled_from(names(tool)), VALUES, max_size=25))
    config = nested(flat) | (
        {"optimizer": {"lr": 1}, "dataset": {"source": "x"}} if source == "torchtune" else {"do_train": True}
    )
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(json.dumps(config).replace("Infinity", ".inf"), encoding="utf-8")
    if tool.refusal(Draft(tool.NAME, config)):
        return

    account = conversion.convert(file, source)

    assert set(account.fates) == set(Draft(tool.NAME, config).keys)
    for key in account.fates:
        assert any(key in line for line in account.account())

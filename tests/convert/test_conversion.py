"""Which tool a config is of, what is said of its keys, and how the recipe is written."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sft_recipes.convert import conversion, rules
from sft_recipes.convert.draft import Draft, Entry, Outcome
from sft_recipes.convert.rules import (
    _EXPRESSIONS,
    CONVERTERS,
    TESTS,
    Converter,
    Rule,
    Table,
    as_list,
    interval,
    items,
    names,
    number,
    rules_of,
    table,
)
from sft_recipes.errors import RecipeError
from sft_recipes.recipe import parse
from sft_recipes.recipe.library_names import OWNED, sft_config_fields
from sft_recipes.recipe.parse import field_names
from sft_recipes.recipe.schema import Recipe, WeightedSource
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
    return converted, parse.load(folder / "recipe.yaml").recipe


# --- Draft -------------------------------------------------------------------------------------------------------------


def test_keys_are_dotted_and_none_is_another() -> None:
    config = {"a": {"b": 1, "c": {}}, "a.b": 2, 1: 3, "1": 4, "list": [{"x": 5}, [6]], "plain": [7, 8]}

    assert Draft("Tool", config).keys == {
        "a.b": 1, "a.c": {}, "'a.b'": 2, "1": 3, "'1'": 4, "list[0].x": 5, "list[1]": [6], "plain": [7, 8],
    }  # fmt: skip


def test_what_is_empty_is_said_to_be() -> None:
    draft = Draft("Tool", {"a": None, "b": "", "c": [], "d": {}, "e": 0, "f": False})

    assert {key for key, outcome in draft.outcomes.items() if outcome.kind == "empty"} == {"a", "b", "c", "d"}
    assert draft.left() == ["e", "f"]


def test_a_value_that_a_recipe_does_not_take_is_not_carried() -> None:
    draft = Draft("Tool", {"length": "long", "field": 1})
    draft.carry("length", "data.max_length", "long")
    draft.carry("field", "trl.learning_rate", 1)

    assert draft.entries == {}
    assert draft.outcomes["length"].kind == "unsupported"
    assert "an integer >= 2" in draft.outcomes["length"].note
    assert draft.outcomes["field"].kind == "unsupported"


def test_two_keys_that_say_different_things_are_not_both_carried() -> None:
    draft = Draft("Tool", {"a": 2, "b": 3, "c": 2})
    for key in ("a", "b", "c"):
        draft.carry(key, "train.micro_batch_size", draft.get(key))

    assert draft.entries["train.micro_batch_size"].value == 2
    assert [draft.outcomes[key].kind for key in "abc"] == ["default", "unsupported", "default"]
    assert "is from a already" in draft.outcomes["b"].note


def test_one_key_can_say_two_things() -> None:
    draft = Draft("Tool", {"precision": "half"})
    draft.carry("precision", "model.dtype", "float16")
    draft.carry("precision", "train.mixed_precision", "bf16")

    assert draft.outcomes["precision"].kind == "becomes"
    assert draft.outcomes["precision"].note == "model.dtype: float16; train.mixed_precision: bf16"


def converter(config: dict[str, Any], text: str) -> Converter:
    """A tool whose rules are given as the tables have them, run on a config."""
    read = YAML(typ="safe").load(text)
    parts = {part: rules_of(rules) for part, rules in read.get("parts", {}).items()}
    made = Converter(Draft("Tool", config), Table("Tool", rules_of(read["rules"]), parts=parts))
    made.run()
    return made


def test_rules() -> None:
    config = {"to": "b", "off": False, "odd": "z", "why": 1, "section": {"x": 1, "y": {"z": 0}}, "else": 1}
    rules = """
    rules:
      to odd: {to: model.attention, values: {b: sdpa}}
      off: {to: trl.tf32, off: [false]}
      why: {not_needed: because}
      section.*: {unsupported: do this}
      section.y.*: {unsupported: do that}
    """
    draft = converter(config, rules).draft

    assert {key: outcome.kind for key, outcome in draft.outcomes.items()} == {
        "to": "becomes", "odd": "unsupported", "off": "not_needed", "why": "not_needed", "section.x": "unsupported",
        "section.y.z": "not_needed",
    }  # fmt: skip
    assert draft.left() == ["else"]


@pytest.mark.parametrize(
    ("when", "applies"),
    [
        ("4", True), ("[3, 4]", True), ("5", False), ("given", True), ("missing", False), ("on", True), ("whole", True),
        ("negative", False), ("{not: 4}", False), ("{not: missing}", True), ("{matches: '^4$'}", True),
        ("{other: 1}", True), ("{other: 1, none: given}", False), ("{none|other: on}", True),
        ("{=train.seed: 7}", True), ("{=train.epochs: missing}", True),
    ],
)  # fmt: skip
def test_conditions(when: str, applies: bool) -> None:
    rules = f"rules: {{seed: train.seed, key: [{{when: {when}, not_needed: first}}, {{not_needed: second}}]}}"
    draft = converter({"seed": 7, "key": 4, "other": 1}, rules).draft

    assert draft.outcomes["key"].note == ("first" if applies else "second")


def test_the_first_rule_that_applies_is_taken_and_its_note_filled_in() -> None:
    rules = (
        "rules: {key: [{when: {matches: z}, not_needed: no}, {to: train.max_steps, convert: number, note: of $value}]}"
    )
    draft = converter({"key": "40"}, rules).draft

    assert draft.entries["train.max_steps"] == Entry(40, "key; of 40")
    assert draft.outcomes["key"] == Outcome("becomes", "train.max_steps: 40; of 40")


def test_rules_run_in_the_order_of_the_table() -> None:
    config = {"second": 3, "first": 2}

    assert converter(config, "rules: {first: train.seed, second: train.seed}").draft.entries["train.seed"].value == 2


def test_empty_keys_need_a_rule_that_says_so() -> None:
    rules = "rules: {a: {to: train.seed}, b: {empty: true, assume: {data.max_length: 64}, comment: $key is null}}"
    draft = converter({"a": None, "b": None}, rules).draft

    assert draft.entries == {"data.max_length": Entry(64, "b is null")}
    assert draft.outcomes["a"].kind == "empty"


def test_sources_are_read_by_the_rules_of_a_part_and_may_have_to_agree() -> None:
    rules = """
    rules: {rows: {each: source, to: data.train, only: from, agree: {data.template: {carry: true, about: two templates}}}}
    parts: {source: {from: .path, style: {to: {.format: alpaca, .data.template: $value}}, column: .columns.output}}
    """
    one = converter({"rows": [{"from": "a", "style": "alpaca", "column": "text", "odd": 1}]}, rules).draft
    two = converter({"rows": [{"from": "a", "style": "alpaca"}, {"from": "b", "style": "chat"}]}, rules).draft

    assert one.entries["data.train"].value == [{"path": "a", "format": "alpaca", "columns": {"output": "text"}}]
    assert one.entries["data.template"] == Entry("alpaca", "rows[0].style")
    assert one.left() == ["rows[0].odd"]
    assert "data.template" not in two.entries
    assert two.notes == ["two templates"]


def test_values() -> None:
    assert [number(value) for value in ("2e-5", 3.0, "3", "x", True, None)] == [2e-5, 3, 3, "x", True, None]
    assert [as_list(value) for value in ("a, b,", ["a"], None)] == [["a", "b"], ["a"], None]
    assert [interval(value) for value in (500.0, 0.1, 0, "no", True)] == [500, 0.1, None, "no", True]


# --- Tables ------------------------------------------------------------------------------------------------------------


def every_rule(tool: Table) -> Iterator[tuple[str, Rule]]:
    """The keys of a tool, and all that can happen to each."""
    sections = [tool.rules, *tool.parts.values()]
    todo = [(key, rule) for section in sections for key, alternatives in section.items() for rule in alternatives]
    todo += [(rule.keys, rule) for rule in (*tool.guards, *tool.refuse, *tool.notes)]
    while todo:
        key, rule = todo.pop()
        yield key, rule
        todo += [(key, also) for also in rule.also]


@pytest.mark.parametrize("tool", [table(name) for name in names()], ids=names())
def test_tables_lead_to_keys_that_there_are(tool: Table) -> None:
    keys = {key for _, rule in every_rule(tool) for key in rule.targets()} | {*tool.required, *tool.defaults}

    assert len(keys) > 20
    for key in keys:
        if key.startswith("."):
            field, _, column = key[1:].partition(".")
            assert field in (*WeightedSource.model_fields, "data"), key
            assert bool(column) == (field in ("columns", "data")), key
            assert field != "data" or key[1:] in field_names(), key
        else:
            assert key in field_names() or key.removeprefix("trl.") in sft_config_fields() - OWNED.keys(), key


@pytest.mark.parametrize("tool", [table(name) for name in names()], ids=names())
def test_tables_use_words_that_there_are(tool: Table) -> None:
    """And each rule says what happens to its key: a key without an outcome would be called unknown."""
    for key, rule in every_rule(tool):
        assert rule.convert == "" or rule.convert in CONVERTERS, key
        for expression in filter(None, (rule.if_, rule.value, rule.catalog)):
            _EXPRESSIONS.compile_expression(expression)
        assert rule.each == "" or rule.each in tool.parts, key
        assert rule.to or rule.values or rule.not_needed or rule.unsupported or rule.assume or rule.about, key
        for test in rule.when.values() if isinstance(rule.when, dict) else [rule.when]:
            assert not isinstance(test, str) or test in TESTS or " " not in test, key


@pytest.mark.parametrize("tool", [table(name) for name in names()], ids=names())
def test_constants_and_defaults_are_taken_by_recipes(tool: Table) -> None:
    constants = [
        (to, value) for _, rule in every_rule(tool) if isinstance(rule.to, dict) for to, value in rule.to.items()
    ]
    constants += [
        (rule.to, value)
        for _, rule in every_rule(tool)
        if isinstance(rule.to, str) and isinstance(rule.values, dict)
        for value in rule.values.values()
    ]
    defaults = [
        (to, value["value"] if isinstance(value, dict) and "value" in value else value)
        for to, value in tool.defaults.items()
    ]

    for to, value in [*constants, *defaults]:
        if not to.startswith(".") and "$" not in str(value):
            draft = Draft("Tool", {"key": 1})
            draft.carry("key", to.removesuffix("+"), items(value) if to.endswith("+") else value)
            assert draft.entries, (to, value, draft.outcomes)


OUMI = """
name: Oumi
signs: model training
required: {model.name: model.model_name, data.train: data.train.datasets, output_dir: training.output_dir}
defaults: {data.eval: null}
rules:
  model.model_name: model.name
  training.output_dir: output_dir
  data.train.datasets: {each: dataset, to: data.train}
  training.max_steps: {to: train.max_steps, value: number(value) * (training.epochs or 1), unsupported: set train.max_steps}
  include: [schedule]
parts:
  dataset: {dataset_name: .path, sample_count: .max_samples}
"""


def test_a_tool_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(rules.FOLDER, tmp_path / "tables")
    (tmp_path / "tables" / "oumi.yaml").write_text(OUMI, encoding="utf-8")
    monkeypatch.setattr(rules, "FOLDER", tmp_path / "tables")
    config = {
        "model": {"model_name": "org/model"},
        "data": {"train": {"datasets": [{"dataset_name": "org/rows", "sample_count": 9}]}},
        "training": {"output_dir": "out", "max_steps": 5, "epochs": 2, "strange": 1},
    }
    converted, recipe = convert(tmp_path, json.dumps(config))
    rules.table.cache_clear()

    assert "oumi" in names()
    assert converted.tool == "Oumi"
    assert (recipe.model.name, recipe.output_dir, recipe.train.max_steps) == ("org/model", "out", 10)
    assert recipe.data.train[0].model_dump(exclude_defaults=True) == {"path": "org/rows", "max_samples": 9}  # type: ignore[union-attr]
    assert converted.outcomes["training.strange"].kind == "unknown"


# --- Which tool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{}", "contains no keys"),
        ("[a, b]", "contains no keys"),
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2", "not valid YAML: found duplicate key"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ("a: &a {b: *a}", "contains itself"),
        (
            "a: &a {x: 1, y: 1}\n"
            + "".join(f"b{n}: &b{n} {{x: *b{n - 1}, y: *b{n - 1}}}\n" for n in range(1, 25)).replace("*b0", "*a"),
            "more than 10,000 keys",
        ),
        ("compute_environment: LOCAL_MACHINE\nnum_processes: 8", r"got keys compute_environment, num_processes\)"),
        ("model: {name: x}\ndata: {train: x}\noutput_dir: x", "is already a recipe"),
        ("model: {model_name: x}\ndata: {train: {datasets: []}}\ntraining: {}", r"got keys model, data, training\)"),
        ("base_model: x\nsequence_len: 1\nrl: dpo", "rl: dpo is preference training"),
        ("base_model: x\nsequence_len: 1\npretraining_dataset: x", "pretraining_dataset"),
        ("model_name_or_path: x\nstage: dpo\nfinetuning_type: lora", "stage: dpo is not sft"),
        ("model_name_or_path: x\nfinetuning_type: lora\ntemplate: llama3\nexport_dir: x", "does not train"),
        ("model_name_or_path: x\ndataset_name: y\nbeta: 0.1", "beta is a key of DPO, KTO or GRPO"),
        (
            "model: {_component_: a.b}\noptimizer: {}\ndataset: {}\na0: aaaa\n"
            + "".join(f"a{n}: {f'${{a{n - 1}}}' * 10}\n" for n in range(1, 10)),
            "longer than 100,000 characters",
        ),
        (
            "base_model: x\nsequence_len: 8\nlr_scheduler_kwargs: {x: !!binary aGk=}",
            ": trl.lr_scheduler_kwargs.x: YAML tags",
        ),
        ("model: {_component_: a.b}\nquantizer: {_component_: a.c}", "quantizer is for quantization"),
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
    assert any(line.startswith("data.train: fill it in") for line in converted.notes)


# --- The recipe and the account ----------------------------------------------------------------------------------------


def test_the_recipe_says_where_each_value_is_from(tmp_path: Path) -> None:
    text = convert(tmp_path, AXOLOTL)[0].text

    assert re.search(r"\n  max_length: 1024 +# sequence_len\n", text)
    assert re.search(r"\n  overlong: drop +# Axolotl's default\n", text)
    assert text.endswith("# Not in this recipe:\n#   no_such_key.inner: 1 -> see the documentation of Axolotl\n")


def test_every_key_is_in_the_account(tmp_path: Path) -> None:
    account = "\n".join(convert(tmp_path, AXOLOTL)[0].report())

    assert account.startswith(f"{tmp_path / 'config.yaml'}: Axolotl, 9 keys\n")
    assert "\n  sequence_len: 1024 -> data.max_length: 1024\n" in account
    assert "\ndefault of a recipe (2)\n  micro_batch_size: 2 -> train.micro_batch_size: 2\n" in account
    assert "\nempty (1)\n  wandb_project\n" in account
    assert "\nunknown key (1)\n  no_such_key.inner: 1" in account


def test_the_recipe_keeps_what_there_is_to_say_about_it(tmp_path: Path) -> None:
    text = convert(tmp_path, AXOLOTL.partition("datasets")[0])[0].text

    assert text.endswith("\n\n# About this recipe:\n#   data.train: fill it in (datasets is missing in the file)\n")


def test_what_check_would_say_is_said(tmp_path: Path) -> None:
    notes = convert(tmp_path, AXOLOTL + "fsdp: [full_shard]\noptimizer: adamw_bnb_8bit\n")[0].notes

    assert any(note.startswith("train.optimizer: bitsandbytes optimizers do not support") for note in notes)


def test_tokens_are_not_shown(tmp_path: Path) -> None:
    converted, _ = convert(tmp_path, AXOLOTL + "comet_api_key: abc123def\nhub_token: ghi456jkl\n")

    assert "abc123def" not in converted.text + "\n".join(converted.report())
    assert "ghi456jkl" not in converted.text + "\n".join(converted.report())


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
    assert again.stderr == "new/recipe.yaml: already exists. Choose another name with --out.\n"
    assert missing.returncode == 2
    assert missing.stderr.startswith(
        "nothing.yml: cannot be read (No such file or directory). Pass a config of Axolotl, LLaMA-Factory, "
        "torchtune or trl sft.\n"
    )


# --- Any config --------------------------------------------------------------------------------------------------------

SCALARS = st.sampled_from(
    [None, True, False, 0, 1, 3, -1, 0.1, 2.5, float("inf"), "", "x", "no", "auto", "epoch", "lora", "1e-4", "a,b"]
)
SOME = st.sampled_from(["a", "path", "type"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SOME, inner, max_size=2))


def known_keys(tool: Table) -> list[str]:
    """Keys that a tool's table knows, and some that nobody knows."""
    return sorted({key.removesuffix(".*") for key in (*tool.rules, "strange", "x y", "a.b", "1")})


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in flat.items():
        at = config
        *sections, name = key.split(".")
        for section in sections:
            at = at[section] if isinstance(at.get(section), dict) else at.setdefault(f"{section}_", {})
        at[name] = value
    return config


@pytest.mark.parametrize("source", names())
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_key_of_any_config_goes_without_a_word(
    source: Any, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tool = table(source)
    flat = data.draw(st.dictionaries(st.sampled_from(known_keys(tool)), VALUES, max_size=25))
    config = nested(flat) | (
        {"optimizer": {"lr": 1}, "dataset": {"source": "x"}} if source == "torchtune" else {"do_train": True}
    )
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(json.dumps(config).replace("Infinity", ".inf"), encoding="utf-8")
    if Converter(Draft(tool.name, config), tool).refusal():
        return

    account = conversion.convert(file, source)

    assert set(account.outcomes) == set(Draft(tool.name, config).keys)
    for key in account.outcomes:
        assert any(key in line for line in account.report())

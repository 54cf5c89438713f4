from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipes.commands import check
from sft_recipes.data import prepare, tokenization
from sft_recipes.data.encoder import Encoder
from sft_recipes.data.eval_prompts import eval_prompts
from sft_recipes.data.prepare import Prepared
from sft_recipes.data.sequences import IGNORED
from sft_recipes.data.templates import Rendered, alpaca_prompt
from sft_recipes.errors import DataError, ModelError
from sft_recipes.recipe import parse
from sft_recipes.recipe.schema import Data, Model, Recipe, Train
from tests.conftest import ROWS, WriteRecipe, write_rows
from tests.data import tokenizers


def prepared(recipe: Path, *overrides: str, kind: str = "bytes+bos") -> Prepared:
    return prepare.prepare(parse.load(recipe, ["data.max_length=200", *overrides]).recipe, tokenizers.make(kind))


def problem(recipe: Path, *overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        prepared(recipe, *overrides)
    return str(caught.value)


def table(data: Prepared) -> list[dict[str, Any]]:
    return data.train.table().to_pylist()


def trained_text(row: dict[str, Any]) -> str:
    return tokenizers.make("bytes+bos").backend.decode(
        [i for i in row["labels"] if i != IGNORED], skip_special_tokens=True
    )


def words(data: Prepared) -> list[str]:
    """Return the trained answers in order."""
    return [f"word {w}" for row in table(data) for w in trained_text(row).split("word ")[1:]]


def test_one_sequence_a_row_without_packing(write_recipe: WriteRecipe) -> None:
    data = prepared(write_recipe(), "data.packing=none", "data.shuffle=false", "data.eval=null")

    assert words(data) == [row["output"] for row in ROWS]
    assert len(data.train) == 24
    assert data.eval is None
    bos = tokenizers.make("bytes+bos").backend.token_to_id("<s>")
    assert all(row["input_ids"][0] == bos and row["seq_lengths"] == [len(row["input_ids"])] for row in table(data))


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("together", ["true", "false"])
def test_the_document_that_a_token_meets(write_recipe: WriteRecipe, packing: str, together: str) -> None:
    if packing == "none" and together == "true":
        return
    data = prepared(write_recipe(), f"data.packing={packing}", f"data.cross_document_attention={together}")
    lengths = [length for row in table(data) for length in row["seq_lengths"]]
    assert data.train.mean_document() == pytest.approx(sum(n * n for n in lengths) / sum(lengths))


def test_labels_are_not_shifted_and_their_first_is_not_trained(write_recipe: WriteRecipe) -> None:
    for row in table(prepared(write_recipe(), "data.train_on=all")):
        starts = {sum(row["seq_lengths"][:i]) for i in range(len(row["seq_lengths"]))}
        expected = [IGNORED if i in starts else token for i, token in enumerate(row["input_ids"])]
        assert row["labels"] == expected


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_packed_sequences_hold_every_token_once(write_recipe: WriteRecipe, packing: str) -> None:
    alone = prepared(write_recipe(), "data.packing=none", "data.eval=null")
    packed = prepared(write_recipe(), f"data.packing={packing}", "data.eval=null")

    everything = sorted(token for row in table(alone) for token in row["input_ids"])
    assert sorted(token for row in table(packed) for token in row["input_ids"]) == everything
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 200 for row in table(packed))
    assert packed.train.stats.tokens == len(everything)
    assert len(packed.train) < len(alone.train)


def test_wrapped_with_cross_document_attention_is_one_stream(write_recipe: WriteRecipe) -> None:
    data = prepared(
        write_recipe(),
        "data.packing=wrapped",
        "data.cross_document_attention=true",
        "data.train_on=all",
        "data.eval=null",
    )
    rows = table(data)
    whole = prepared(write_recipe(), "data.packing=none", "data.train_on=all", "data.eval=null")
    stream = [token for row in table(whole) for token in row["input_ids"]]

    assert [token for row in rows for token in row["input_ids"]] == stream
    assert all(len(row["input_ids"]) == 200 for row in rows[:-1])
    assert all(row["seq_lengths"] == [len(row["input_ids"])] for row in rows)
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)


def test_shuffling_is_seeded(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    in_order = words(prepared(recipe, "data.packing=none", "data.shuffle=false", "data.eval=null"))
    one, again, other = (
        words(prepared(recipe, "data.packing=none", "data.eval=null", f"train.seed={s}")) for s in (1, 1, 2)
    )

    assert one == again
    assert one != other
    assert one != in_order
    assert sorted(one) == sorted(in_order)


def test_a_fraction_is_held_out_for_evaluation(write_recipe: WriteRecipe) -> None:
    data = prepared(write_recipe(), "data.eval=0.25", "data.packing=none")
    assert data.eval is not None

    held_out = [trained_text(row) for row in data.eval.table().to_pylist()]
    assert len(held_out) == 6
    assert not set(held_out) & set(words(data))
    assert len(words(data)) == 18


def test_validation_from_a_file(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "eval.jsonl", ROWS[:3])
    data = prepared(write_recipe(), f"data.eval={file}", "data.packing=none")
    assert data.eval is not None

    assert len(data.eval) == 3
    assert len(data.train) == 24


def test_at_most_so_many_samples(write_recipe: WriteRecipe) -> None:
    data = prepared(write_recipe(), "data.max_train_samples=5", "data.max_eval_samples=2", "data.packing=none")
    first = prepared(
        write_recipe(), "data.max_train_samples=5", "data.shuffle=false", "data.eval=null", "data.packing=none"
    )

    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (5, 2)
    assert words(first) == [row["output"] for row in ROWS[:5]]


def test_weights_repeat_rows(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    twice = write_rows(tmp_path / "twice.jsonl", ROWS[:4])
    half = write_rows(tmp_path / "half.jsonl", ROWS[4:8])
    data = prepared(
        write_recipe(),
        f"data.train=[{{path: {twice}, weight: 2}}, {{path: {half}, weight: 0.5}}]",
        "data.eval=null",
        "data.packing=none",
    )
    seen = words(data)

    assert all(seen.count(row["output"]) == 2 for row in ROWS[:4])
    assert sum(seen.count(row["output"]) for row in ROWS[4:8]) == 2
    assert [source.rows for source in data.train.stats.sources] == [8, 2]


def test_columns_and_format_of_the_recipe(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [{"q": f"Say {n}.", "a": f"word {n}", "text": "x"} for n in range(4)]
    write_rows(tmp_path / "train.jsonl", rows)
    columns = "data.columns={prompt: q, completion: a}"

    assert sorted(words(prepared(write_recipe(), columns, "data.eval=null"))) == [f"word {n}" for n in range(4)]
    data = prepared(write_recipe(), "data.format=text", "data.eval=null")
    assert data.chat_template is None
    assert data.train.stats.sources[0].template == "text"


def test_overlong_rows_are_an_error_that_says_what_would_fit(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"instruction": "x " * 300, "output": "y"}])
    said = problem(write_recipe(), "data.eval=null")

    assert "data.max_length: 1 of 25 rows exceed 200 tokens" in said
    assert "(p50 " in said
    assert ", max " in said
    assert f"longest: {tmp_path / 'train.jsonl'}:25)" in said
    assert "or data.overlong to drop, truncate or split." in said


def test_only_settings_that_work_are_recommended_for_overlong_rows(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The max_length fits the evaluation rows and the model; drop and truncate leave trained tokens."""
    longer, longest = ({"instruction": "Go.", "output": "y " * times} for times in (300, 400))
    write_rows(tmp_path / "train.jsonl", [*ROWS, longer])
    held_out = f"data.eval={write_rows(tmp_path / 'eval.jsonl', [longest])}"
    said = problem(write_recipe(), held_out)
    sufficient = int(said.partition("Set data.max_length to at least ")[2].partition(",")[0])
    prepared(write_recipe(), held_out, f"data.max_length={sufficient}")
    with pytest.raises(DataError, match=f"Set data.max_length to at least {sufficient},"):
        prepared(write_recipe(), held_out, f"data.max_length={sufficient - 1}")

    write_rows(tmp_path / "train.jsonl", [{"instruction": "x " * 300, "output": "y"}])
    assert problem(write_recipe(), "data.eval=null").endswith(", or data.overlong to split.")
    write_rows(tmp_path / "train.jsonl", [{"instruction": "Go.", "output": "y " * 9000}])
    assert problem(write_recipe(), "data.eval=null").endswith("). Set data.overlong to truncate or split.")


def test_overlong_rows_dropped_truncated_or_split_are_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"instruction": "Go.", "output": "y " * 500}])
    accounts = {}
    for overlong in ("drop", "truncate", "split"):
        data = prepared(write_recipe(), "data.eval=null", f"data.overlong={overlong}", "data.packing=none")
        accounts[overlong] = data.train.stats.sources[0]
        assert max(len(row["input_ids"]) for row in table(data)) <= 200
    length = accounts["drop"].token_lengths["max"]

    assert accounts["drop"].dropped == {"overlong": 1}
    assert accounts["drop"].kept == 24
    assert accounts["truncate"].truncated_rows == 1
    assert accounts["truncate"].dropped_tokens == length - 200
    assert accounts["split"].split_rows == 1
    assert accounts["split"].tokens == accounts["drop"].tokens + length


def test_a_row_cut_down_to_its_prompt_is_dropped_and_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [*ROWS, {"instruction": "x " * 300, "output": "y"}])
    account = prepared(write_recipe(), "data.eval=null", "data.overlong=truncate").train.stats.sources[0]

    assert account.dropped == {"no trained token": 1}
    assert account.kept == 24
    assert account.truncated_rows == 0


def test_nothing_trained_at_all_is_an_error(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"instruction": "x " * 300, "output": "y"}] * 3)

    assert "no trained tokens in the dataset" in problem(write_recipe(), "data.eval=null", "data.overlong=truncate")


def test_every_bad_row_at_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\nbroken\n{"instruction": "a"}\n' + "[]\n" * 30
    )
    lines = problem(write_recipe()).splitlines()

    assert "train.jsonl:2:1: invalid JSON" in lines[0]
    assert "train.jsonl:3: column 'output' is missing" in lines[1]
    assert "train.jsonl:4: expected an object" in lines[2]
    assert lines[2].endswith(" This affects 30 of 33 rows.")
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines[3:]] == ["5", "6"]


def test_rows_of_no_known_format(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"frage": "a", "antwort": "b"}] * 3)

    said = problem(write_recipe())
    assert "unrecognized columns 'frage', 'antwort'" in said
    assert "data.columns" in said
    assert len(said.splitlines()) == 1


def test_sources_of_two_formats_need_one_template(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "word 1"}]}] * 3
    file = write_rows(tmp_path / "chats.jsonl", chats)
    both = f"data.train=[{tmp_path / 'train.jsonl'}, {file}]"

    assert "need one template (got alpaca and messages). Set data.template." in problem(write_recipe(), both)
    assert (
        len(prepared(write_recipe(), both, "data.template=alpaca", "data.eval=null", "data.packing=none").train) == 27
    )


def test_a_template_that_writes_bos_as_text_has_it_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    data = prepared(write_recipe(), f"data.template={tmp_path / 'chat.jinja'}", "data.packing=none")
    bos = tokenizers.make("bytes+bos").backend.token_to_id("<s>")

    assert all(row["input_ids"].count(bos) == 1 for row in table(data))


@pytest.mark.parametrize("order", [1, -1])
def test_the_exported_template_whatever_the_order_of_sources(
    write_recipe: WriteRecipe, tmp_path: Path, order: int
) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": "hello"}] * 3)
    listed = [str(text), str(tmp_path / "train.jsonl")][::order]
    data = prepared(write_recipe(), f"data.train={listed}", "data.eval=null")

    assert data.chat_template is not None
    assert data.prompt is not None


def test_a_first_row_with_special_text_or_a_newline_is_like_any_other(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    odd = {"instruction": "What is </s>?", "output": "\nThe end."}
    write_rows(tmp_path / "train.jsonl", [odd, *ROWS])
    data = prepared(write_recipe(), "data.eval=null")

    assert data.prompt is not None
    assert data.prompt.messages == [{"role": "user", "content": "Hello"}]


def test_sources_that_are_left_empty(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    listed = f"data.train=[{{path: {one}, weight: 0.3}}, {tmp_path / 'train.jsonl'}]"
    account = prepared(write_recipe(), listed, "data.eval=null").train.stats

    assert [source.rows for source in account.sources] == [0, 24]
    assert "no training rows are left" in problem(
        write_recipe(), f"data.train=[{{path: {one}, weight: 0.3}}]", "data.eval=null"
    )


def test_an_empty_text_is_dropped_and_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "hello fox"}, {"text": ""}])
    [source] = prepared(write_recipe(), "data.eval=null").train.stats.sources

    assert (source.kept, source.dropped, source.empty_answers) == (1, {"no trained token": 1}, 1)


def test_columns_that_no_source_has_use_for(write_recipe: WriteRecipe) -> None:
    assert "'prompt' is not a column of the format of any source (got alpaca)" in problem(
        write_recipe(), "data.columns={prompt: q}"
    )


def test_every_source_that_cannot_be_read_at_once(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    lines = problem(write_recipe(), f"data.train=[{tmp_path / 'train.jsonl'}, {empty}, none.jsonl]").splitlines()

    assert [line.split(": ")[1].split(" (")[0] for line in lines] == [
        "the file is empty.",
        "file not found",
    ]


def test_too_few_rows_to_hold_some_out(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS[:1])

    assert "no training rows are left" in problem(write_recipe())


def test_a_template_that_is_missing(write_recipe: WriteRecipe) -> None:
    with pytest.raises(ModelError, match=r"model\.name: builtin:tiny: the tokenizer has no chat template"):
        prepared(write_recipe(), "data.template=chat")
    assert "cannot read the template file" in problem(write_recipe(), "data.template=none.jinja")


def test_a_template_for_plain_text(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "hello"}] * 5)

    assert "plain text takes no template" in problem(write_recipe(), "data.template=alpaca")


@pytest.mark.parametrize("packing", ["none", "bfd", "wrapped", "wrapped crossing"])
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_the_statistics_add_up(write_recipe: WriteRecipe, packing: str, train_on: str) -> None:
    crossing = f"data.cross_document_attention={str('crossing' in packing).lower()}"
    data = prepared(write_recipe(), f"data.packing={packing.split()[0]}", crossing, f"data.train_on={train_on}")
    rows = table(data)
    account = data.as_dict()["train"]

    assert account["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert account["trained_tokens"] == sum(label != IGNORED for row in rows for label in row["labels"])
    assert account["sequences"] == len(rows)
    assert account["packing_efficiency"] == pytest.approx(account["tokens"] / (len(rows) * 200), abs=1e-4)
    [source] = account["sources"]
    assert source["rows"] == source["kept"] == 18
    assert source["dropped_tokens"] == 0
    if packing == "bfd":
        assert source["token_lengths"]["max"] == max(length for row in rows for length in row["seq_lengths"])
    assert any("18 rows; format alpaca, template alpaca; " in line for line in data.lines())


def test_stops_are_the_tokens_that_end_the_documents(write_recipe: WriteRecipe) -> None:
    assert prepared(write_recipe()).stops == [tokenizers.make("bytes+bos").backend.token_to_id("</s>")]
    assert prepared(write_recipe(), "data.template=chat", kind="chat").stops == [
        tokenizers.make("chat").backend.token_to_id("<|im_end|>")
    ]


def test_duplicates_and_empty_answers_are_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    again = write_rows(tmp_path / "again.jsonl", [ROWS[0], {"instruction": "x", "output": " "}, ROWS[1], ROWS[1]])
    sources = f"data.train=[{{path: {tmp_path / 'train.jsonl'}, weight: 2}}, {again}]"
    accounts = prepared(write_recipe(), sources, "data.eval=null").train.stats.sources

    assert [source.duplicates for source in accounts] == [0, 3]
    assert [source.empty_answers for source in accounts] == [0, 1]
    assert "3 identical to an earlier row, 1 with an empty answer" in accounts[1].line()


def test_every_row_that_was_read_is_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    half = write_rows(tmp_path / "half.jsonl", [{**row, "input": "x"} for row in ROWS])
    sources = f"data.train=[{tmp_path / 'train.jsonl'}, {{path: {half}, weight: 0.5}}]"
    data = prepared(write_recipe(), sources, "data.eval=0.25", "data.max_train_samples=20", "data.max_eval_samples=5")

    assert data.eval is not None
    train, validation = (each.stats.sources for each in (data.train, data.eval))
    assert [each.rows_read for each in train] == [24, 24]
    assert all(each.rows_read == each.held_out + each.not_sampled + each.rows for each in train + validation)
    assert sum(each.held_out for each in train) == sum(each.rows_read for each in validation) == 12
    assert sum(each.rows for each in train) == 20
    assert sum(each.not_sampled for each in validation) == 7
    assert f"{train[1].held_out} held out for evaluation, {train[1].not_sampled} not sampled" in train[1].line()


def test_text_that_a_template_drops_is_counted(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages if m.role != 'developer' %}{{ m.content }}</s>{% endfor %}", "utf-8"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    told = [{"role": "developer", "content": "Be brief."}, *turns]
    write_rows(tmp_path / "train.jsonl", [{"messages": turns}, {"messages": told}])
    data = prepared(write_recipe(), f"data.template={tmp_path / 't.jinja'}", "data.eval=null")

    stats = data.as_dict()["train"]["sources"][0]
    assert (stats["lossy_template"], stats["lossy_keys"]) == (1, {"content": 1})
    assert "1 with text dropped or rewritten by the template (content)" in data.lines()[0]


def test_tokens_of_a_piece_without_a_trained_token_are_counted_as_dropped(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """If a prompt exceeds max_length, its first pieces have no trained token; the row is kept."""
    write_rows(tmp_path / "train.jsonl", [{"instruction": "x " * 300, "output": "y"}, *ROWS])
    data = prepared(write_recipe(), "data.eval=null", "data.overlong=split")
    [source] = data.train.stats.sources

    assert source.kept == source.rows == 25
    longest = source.token_lengths["max"]
    assert source.dropped_tokens == longest * 3 // 4  # the last of four pieces contains the answer
    assert source.tokens == sum(len(row["input_ids"]) for row in table(data))


def test_a_second_time_it_comes_from_the_cache(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe()
    first = prepared(recipe)

    def refuse(*_: object) -> None:
        raise AssertionError("tokenized again")

    # Single rows are encoded without `batches`, such as the prompt to verify the chat template.
    monkeypatch.setattr(tokenization.Work, "batches", refuse)
    assert table(prepared(recipe)) == table(first)
    assert table(prepared(recipe, "train.seed=3", "data.packing=none")) != table(first)
    for other in ("data.train_on=all", "data.template=chat"):
        with pytest.raises(AssertionError, match="tokenized again"):
            prepared(recipe, other, kind="chat")
    with pytest.raises(AssertionError, match="tokenized again"):
        prepared(recipe, kind="bytes")
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare.prepare(parse.load(recipe).recipe, tokenizers.make("bytes+bos"), cached=False)


def test_changed_rows_are_tokenized_again(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, file = write_recipe(), tmp_path / "train.jsonl"
    prepared(recipe)
    file.write_text(file.read_text("utf-8").replace("word 3", "word 4"), "utf-8")  # same length, within the same second

    assert "word 3" not in words(prepared(recipe, "data.eval=null", "data.packing=none"))


def test_a_sample_where_there_is_too_little_time(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS * 100)
    recipe = parse.load(write_recipe(), ["data.max_length=200", "data.eval=null"]).recipe
    data = prepare.prepare(recipe, tokenizers.make("bytes+bos"), seconds=0)

    assert data.share == 500 / 2400
    short = parse.load(tmp_path / "recipe.yaml", ["data.max_length=9", "data.eval=null"]).recipe
    expected = (
        r"500 of 500 rows exceed 9 tokens \(.*; counted in the first 500 of about 2,400 rows of .*\)\. "
        r"Set data.max_length to at least \d+ \(rows that were not counted may be longer\), or data.overlong to split\."
    )
    with pytest.raises(DataError, match=expected):
        prepare.prepare(short, tokenizers.make("bytes+bos"), seconds=0, cached=False)
    assert data.train.stats.sources[0].rows == 500
    assert "500 rows from the first 500 of about 2,400;" in data.lines()[0]
    whole = prepare.prepare(recipe, tokenizers.make("bytes+bos"))  # the sample was not cached
    assert whole.share == 1
    assert whole.train.stats.sources[0].rows == 2400
    train = [{"path": str(tmp_path / "train.jsonl"), "max_samples": 1000, "weight": 2}, str(tmp_path / "train.jsonl")]
    two = parse.load(write_recipe(data={"train": train}), ["data.max_length=200", "data.eval=null"]).recipe
    sample = prepare.prepare(two, tokenizers.make("bytes+bos"), seconds=0, cached=False)
    assert sample.scale(None) == pytest.approx((2 * 1000 + 2400) / (2 * 500 + 500))
    assert sample.scale(3000) == 3000 / 1500


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    packing=st.sampled_from(["bfd", "wrapped", "none"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_every_token_of_every_kept_row_once(lengths: list[int], packing: str, seed: int) -> None:
    """With rows of any length, packed any way and split if they do not fit."""
    with TemporaryDirectory() as folder:
        rows = [{"instruction": str(n), "output": " ".join(["fox"] * length)} for n, length in enumerate(lengths)]
        file = write_rows(Path(folder) / "rows.jsonl", rows)
        data = {
            "train": str(file),
            "eval": None,
            "max_length": 120,
            "packing": packing,
            "overlong": "split",
            "train_on": "all",
        }
        recipe = Recipe(model=Model(name="builtin:tiny"), data=Data(**data), train=Train(seed=seed), output_dir="x")
        packed = prepare.prepare(recipe, tokenizers.make("bytes+bos"), cached=False).train
        encoder = Encoder(tokenizers.make("bytes+bos"))
        texts = [alpaca_prompt(row["instruction"]) + row["output"] for row in rows]
        alone = [encoder.encode([Rendered("", text, [], writes_specials=False)]).ids.tolist() for text in texts]

    counted = Counter(token for row in packed.table().to_pylist() for token in row["input_ids"])
    assert counted == Counter(token for ids in alone for token in ids)


def test_instruction_and_input_joined(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m.content }}]</s>{% endfor %}")
    joined = [{"instruction": "a\nb", "output": "c"}, {"instruction": "d", "output": "e"}]
    apart = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "input": "", "output": "e"}]
    for template in ("alpaca", str(tmp_path / "chat.jinja")):
        tables = []
        for rows, separator in ((joined, None), (apart, "\n")):
            write_rows(tmp_path / "train.jsonl", rows)
            recipe = write_recipe(data={"template": template, "input_separator": separator})
            tables.append(prepared(recipe, "data.eval=null").train.table())
        assert tables[0].equals(tables[1])
    prompts = eval_prompts(parse.load(recipe, [f"eval.generate={tmp_path / 'train.jsonl'}"]).recipe)
    assert [prompt.messages for prompt in prompts] == [[{"role": "user", "content": text}] for text in ("a\nb", "d")]


@pytest.mark.parametrize("shuffle", [True, False])
def test_at_most_so_many_rows_of_a_source(write_recipe: WriteRecipe, tmp_path: Path, shuffle: bool) -> None:
    other = write_rows(tmp_path / "other.jsonl", ROWS)
    sources = f"[{{path: {other}, max_samples: 6, weight: 2}}, {tmp_path / 'train.jsonl'}]"
    data = prepared(
        write_recipe(),
        f"data.train={sources}",
        "data.eval=0.5",
        f"data.shuffle={str(shuffle).lower()}",
        "data.packing=none",
    )
    limited, whole = data.train.stats.sources
    assert data.eval is not None
    evaluated = data.eval.stats.sources[0].rows
    rows = np.concatenate([each.chosen[0].rows for each in (data.train, data.eval)])

    assert (limited.rows_read, limited.held_out, limited.not_sampled) == (24, evaluated, 18)
    assert limited.rows == 2 * (6 - evaluated)
    assert whole.rows + whole.held_out == 24
    assert (sorted(set(rows.tolist())) == list(range(6))) == (not shuffle)
    assert len(set(rows.tolist())) == 6


def test_columns_that_are_not_used_are_listed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Per source, with the number of rows in which they have content; from the cache, too."""
    rows = [row | {"id": number, "note": "x" if number < 3 else ""} for number, row in enumerate(ROWS)]
    write_rows(tmp_path / "train.jsonl", rows)
    held_out = write_rows(tmp_path / "eval.jsonl", [ROWS[0] | {"instruction": "Say it.", "lang": "en"}])
    recipe = write_recipe()
    for _ in ("tokenized", "cached"):
        data = prepared(recipe, f"data.eval={held_out}")
        train, evaluation = (data.as_dict()[name]["sources"][0] for name in ("train", "eval"))
        assert train["unused_columns"] == {"id": 24, "note": 3}
        assert evaluation["unused_columns"] == {"lang": 1}
        assert "; columns not used: id (24 rows), note (3 rows);" in data.lines()[0]


NOT_THIS = {"role": "assistant", "content": "not this"}


@pytest.mark.parametrize(
    "answer",
    [
        NOT_THIS | {"weight": 0},
        NOT_THIS | {"train": False},
        NOT_THIS | {"training": False},
        NOT_THIS | {"loss": False},
        NOT_THIS | {"masked": True},
        NOT_THIS | {"train_detail": [{"begin_offset": 0, "end_offset": 7, "train": False}]},
    ],
)
@pytest.mark.parametrize("template", ["chatml", "llama3", "alpaca"])
def test_what_a_message_says_is_not_trained(
    answer: dict[str, Any], template: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Say b."}, answer, {"role": "user", "content": "Say b."}]
    write_rows(tmp_path / "train.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "b"}]}])
    recipe = parse.load(
        write_recipe(data={"eval": None}), [f"data.template={template}", "data.train_on=assistant"]
    ).recipe
    tokenizer, _ = check.tokenizer_of(recipe.model)
    assert tokenizer is not None
    row = prepare.prepare(recipe, tokenizer).train[0]
    trained = [label for label in row["labels"] if label != IGNORED]
    text = tokenizer.backend.decode(trained, skip_special_tokens=False)

    assert "not" not in text
    assert "this" not in text
    assert text.count("b") == 1
    assert "not this" in tokenizer.backend.decode(row["input_ids"])


@pytest.mark.parametrize("overlong", ["drop", "split"])
def test_turns_that_are_documents_of_their_own_are_counted_as_one_row(
    write_recipe: WriteRecipe, tmp_path: Path, overlong: str
) -> None:
    """The template removes earlier thoughts. The second turn of the second row is too long."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{% if loop.last %}{{ m.thought }}{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "utf-8",
    )
    turns = [
        {"role": role, "content": text, "thought": "x"} if role == "assistant" else {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    long = [*turns[:2], {"role": "user", "content": "c"}, {**turns[3], "content": "fox " * 90}]
    write_rows(tmp_path / "train.jsonl", [{"messages": turns}, {"messages": long}])
    more = (f"data.template={tmp_path / 't.jinja'}", "data.eval=null", "data.train_on=assistant", "data.packing=none")
    data = prepared(write_recipe(), *more, "data.max_length=60", f"data.overlong={overlong}")

    stats = data.as_dict()["train"]["sources"][0]
    assert (stats["rows"], stats["kept"], stats["dropped"], stats["lossy_template"]) == (2, 2, {}, 0)
    assert stats["split_rows"] == (1 if overlong == "split" else 0)
    assert (stats["dropped_tokens"] > 60) == (overlong == "drop")
    assert (len(data.train) == 3) == (overlong == "drop")
    trained = ["".join(decoded(row)) for row in data.train.table().to_pylist()]
    assert sorted(trained)[:3] == sorted(["xb</s>", "xb</s>", "xd</s>"]) if overlong == "drop" else "xd</s>" in trained


def decoded(row: dict[str, list[int]]) -> str:
    """The trained text of a sequence."""
    backend = tokenizers.make("bytes+bos").backend
    return str(backend.decode([label for label in row["labels"] if label != -100], skip_special_tokens=False))


@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_an_end_that_a_flag_leaves_out_is_not_missing(train_on: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True}] * 2
    turns[-1] = {"role": "assistant", "content": "not this", "train": False}
    write_rows(tmp_path / "train.jsonl", [{"messages": turns}])
    recipe = parse.load(write_recipe(data={"eval": None}), ["data.template=chatml", f"data.train_on={train_on}"]).recipe
    tokenizer, _ = check.tokenizer_of(recipe.model)
    assert tokenizer is not None
    data = prepare.prepare(recipe, tokenizer)

    assert data.train.stats.sources[0].missing_eos == 0
    assert [line for line in data.warnings if "EOS" in line] == []


def test_every_answer_of_a_completion_is_trained(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """As in TRL: a tool call, and the answer after its result."""
    completion = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "two"},
    ]
    write_rows(tmp_path / "train.jsonl", [{"prompt": [{"role": "user", "content": "q"}], "completion": completion}])
    recipe = parse.load(write_recipe(data={"eval": None}), ["data.template=chatml"]).recipe
    tokenizer, _ = check.tokenizer_of(recipe.model)
    assert tokenizer is not None
    row = prepare.prepare(recipe, tokenizer).train[0]
    text = tokenizer.backend.decode([label for label in row["labels"] if label != IGNORED])

    assert "one" in text
    assert "two" in text
    assert "more" not in text


def test_the_first_row_may_be_dropped(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Also if the chat template rejects it, and the exported template is compared with another row."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}</s>"
        "{% endfor %}",
        "utf-8",
    )
    rows = [{"prompt": f"{word}?", "completion": "yes"} for word in ("bad", "good", "fine", "well")]
    write_rows(tmp_path / "train.jsonl", rows)
    more = (f"data.template={tmp_path / 't.jinja'}", "data.on_bad_row=drop", "data.eval=null")
    data = prepared(write_recipe(), *more)

    assert data.train.stats.sources[0].bad_rows == 1
    assert data.prompt is not None
    assert data.prompt.messages[0]["content"] == "good?"

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors

from sft_recipes.data import encoder, templates
from sft_recipes.data.chat import Chat
from sft_recipes.data.encoder import Documents, Encoder, LightTokenizer, _digests, range_sums
from sft_recipes.data.formats.base import Example
from sft_recipes.data.formats.registry import to_example
from sft_recipes.data.templates import Alpaca, Rendered
from sft_recipes.errors import DataError, ModelError
from tests.data import tokenizers

texts = st.text(st.characters(codec="utf-8"), max_size=40)


def alpaca_row(instruction: str, output: str, input: str = "") -> Example:
    return to_example({"instruction": instruction, "input": input, "output": output}, "alpaca", {}, "rows:1")


@dataclass
class Document:
    ids: np.ndarray
    trained: np.ndarray
    stop: int


def alone(documents: Documents) -> Document:
    assert len(documents) == 1
    return Document(*documents[0], int(documents.stops[0]))


def encode(kind: str, rendered: Rendered) -> Document:
    return alone(Encoder(tokenizers.make(kind)).encode([rendered]))


def as_text(kind: str) -> Tokenizer:
    """The tokenizer, encoding special tokens as plain text."""
    backend = Tokenizer.from_str(tokenizers.make(kind).backend.to_str())
    backend.encode_special_tokens = True
    return backend


@pytest.mark.parametrize("kind", tokenizers.KINDS)
@given(instruction=texts, output=texts, input=texts)
@settings(max_examples=30)
def test_ids_are_those_of_the_whole_text_with_bos_and_eos_once(
    kind: str, instruction: str, output: str, input: str
) -> None:
    tokenizer = tokenizers.make(kind)
    document = encode(kind, Alpaca()(alpaca_row(instruction, output, input)))

    plain = as_text(kind)
    whole = plain.encode(templates.alpaca_prompt(instruction, input) + output, add_special_tokens=False).ids
    bos = [plain.token_to_id("<s>")] if "+bos" in kind else []
    assert document.ids.tolist() == [*bos, *whole, plain.token_to_id(tokenizer.specials["eos_token"])]
    assert document.stop == document.ids[-1]
    assert document.trained[-1]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_the_answer_and_the_end_are_trained_on(kind: str) -> None:
    document = encode(kind, Alpaca()(alpaca_row("Name a color.", "red fox 12")))

    backend = tokenizers.make(kind).backend
    assert backend.decode(document.ids[document.trained].tolist(), skip_special_tokens=True).strip() == "red fox 12"
    assert backend.decode(document.ids[~document.trained].tolist()).endswith("### Response:\n")


def test_everything_is_trained_on() -> None:
    document = encode("bytes+bos", Alpaca("all")(alpaca_row("Name a color.", "red")))

    assert document.trained.all()


def test_an_empty_answer_is_its_end() -> None:
    document = encode("bytes+bos", Alpaca()(alpaca_row("Say nothing.", "")))

    assert document.ids[document.trained].tolist() == [document.stop]


def test_a_token_across_the_border_belongs_to_the_answer() -> None:
    """The prompt ends and the answer starts with a newline, and the tokenizer has one token for both."""
    backend = Tokenizer(models.BPE({"f": 0, "\n": 1, "j": 2, "\n\n": 3, "</s>": 4}, [("\n", "\n")]))
    backend.add_special_tokens(["</s>"])
    encoding = Encoder(encoder.LightTokenizer(backend, {"eos_token": "</s>"}))

    document = alone(encoding.encode([Rendered("", "f\n\nj", [(2, 4)], writes_specials=False)]))

    assert document.ids.tolist() == [0, 3, 2, 4]
    assert document.trained.tolist() == [False, True, True, True]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_text_that_looks_like_a_special_token_stays_text(kind: str) -> None:
    tokenizer = tokenizers.make(kind)
    for token in tokenizer.special_texts:
        document = encode(kind, Alpaca()(alpaca_row(f"What is {token}?", f"It is {token}")))

        special = [i for i in document.ids.tolist() if tokenizer.backend.id_to_token(i) in tokenizer.special_texts]
        assert len(special) == ("+bos" in kind) + 1


def chat(train_on: str) -> Chat:
    tokenizer = tokenizers.make("chat")
    assert tokenizer.chat_template is not None
    return Chat(tokenizer.chat_template, train_on, tokenizer.specials, tokenizer.special_texts)


TURNS = Example(
    "rows:1",
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "quick"},
        {"role": "user", "content": "the dogs?"},
        {"role": "assistant", "content": "lazy"},
    ],
)


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("completion", "lazy<|im_end|>\n"),
        ("assistant", "quick<|im_end|>\nlazy<|im_end|>\n"),
    ],
)
def test_turns_are_trained_on_with_their_end(train_on: str, trained: str) -> None:
    document = encode("chat", chat(train_on)(TURNS))

    backend = tokenizers.make("chat").backend
    assert backend.decode(document.ids[document.trained].tolist(), skip_special_tokens=False) == trained
    assert document.stop == backend.token_to_id("<|im_end|>")


def test_a_chat_is_the_whole_rendered_text() -> None:
    rendered = chat("all")(TURNS)
    document = encode("chat", rendered)

    assert document.ids.tolist() == tokenizers.make("chat").backend.encode(rendered.text).ids
    assert document.trained.all()


def test_a_template_that_does_not_close_the_turn_gets_an_end() -> None:
    tokenizer = tokenizers.make("bytes+bos")
    source = templates.BOS + "{% for m in messages %}{{ m.content }} {% endfor %}"
    bare = Chat(source, "completion", tokenizer.specials, ())
    document = encode("bytes+bos", bare(alpaca_row("the fox", "jumps")))

    assert tokenizer.backend.decode(document.ids.tolist(), skip_special_tokens=False) == "<s>the fox jumps </s>"
    assert document.trained[-1]
    assert not document.trained[0]


def test_a_batch_keeps_its_order() -> None:
    rows = [alpaca_row(f"Say {n}.", str(n)) for n in range(7)]
    rendered = [Alpaca()(row) if n % 2 else chat("completion")(row) for n, row in enumerate(rows)]
    documents = Encoder(tokenizers.make("chat")).encode(rendered)

    one_by_one = [encode("chat", one) for one in rendered]
    assert [documents[n][0].tolist() for n in range(7)] == [document.ids.tolist() for document in one_by_one]
    assert [documents[n][1].tolist() for n in range(7)] == [document.trained.tolist() for document in one_by_one]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
@given(parts=st.lists(st.tuples(st.text("ab \n漢👍", max_size=8), st.booleans()), min_size=1, max_size=5))
@settings(max_examples=60)
def test_the_loss_mask_is_every_token_with_a_trained_character(kind: str, parts: list[tuple[str, bool]]) -> None:
    text, trained = "", list[tuple[int, int]]()
    for part, in_loss in parts:
        trained += [(len(text), len(text) + len(part))] if in_loss and part else []
        text += part
    document = encode(kind, Rendered("", text + "!", trained, writes_specials=False))

    backend = as_text(kind)
    if backend.post_processor is not None:
        state = backend.post_processor.__getstate__().replace(b'"trim_offsets":true', b'"trim_offsets":false')
        backend.post_processor.__setstate__(state)
    encoding = backend.encode(text + "!", add_special_tokens=False)
    expected = [any(a < end and start < b for a, b in trained) for start, end in encoding.offsets]
    bos = int("+bos" in kind)
    expected = [bool(trained) and trained[0][0] == 0] * bos + expected  # BOS belongs to what begins the text
    assert document.trained.tolist() == [*expected, False]


@given(values=st.lists(st.integers(0, 2**64 - 1), max_size=30), data=st.data())
def test_sums_over_ranges(values: list[int], data: st.DataObject) -> None:
    """In any order, empty ones and those of the last value included; modulo 2**64."""
    edge = st.integers(0, len(values))
    ranges = [sorted(pair) for pair in data.draw(st.lists(st.tuples(edge, edge), max_size=8))]
    start, end = (np.array([pair[side] for pair in ranges], dtype=np.int64) for side in (0, 1))

    found = range_sums(np.array(values, dtype=np.uint64), start, end, np.uint64)

    assert found.tolist() == [sum(values[a:b]) % 2**64 for a, b in ranges]


def test_a_normalizer_that_changes_the_text() -> None:
    """Its tokens have different bytes than the row, even if their number is the same."""
    spec = tokenizers.make("bytes")
    backend = Tokenizer.from_str(spec.backend.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Replace("aa", "b"), normalizers.Replace("c", "dd")])
    encoder = Encoder(LightTokenizer(backend, spec.specials))

    document = alone(encoder.encode([Rendered("", "aax c", [(2, 5)], writes_specials=False)]))

    assert backend.decode(document.ids.tolist(), skip_special_tokens=False) == "bx dd</s>"
    assert backend.decode(document.ids[document.trained].tolist(), skip_special_tokens=False) == "x dd</s>"


def test_indentation_is_trained_on_where_a_tokenizer_trims_offsets() -> None:
    spec = tokenizers.make("bytes")
    backend = Tokenizer.from_str(spec.backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    document = alone(Encoder(LightTokenizer(backend, spec.specials)).encode([Alpaca()(alpaca_row("Go.", "    fox"))]))

    assert backend.decode(document.ids[document.trained].tolist()) == "    fox"


def test_another_end_than_the_end_token() -> None:
    """If the tokenizer appends [SEP], documents end with EOS instead."""
    spec = tokenizers.make("bytes+bos")
    backend = Tokenizer.from_str(spec.backend.to_str())
    backend.add_special_tokens(["[SEP]"])
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("<s> $A [SEP]", special_tokens=ends)
    document = alone(Encoder(LightTokenizer(backend, spec.specials)).encode([Alpaca()(alpaca_row("Go.", "fox"))]))

    assert backend.decode(document.ids.tolist(), skip_special_tokens=False).endswith("fox</s>")
    assert backend.decode(document.ids[document.trained].tolist(), skip_special_tokens=False) == "fox</s>"


def test_of_several_chat_templates_the_default() -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]

    assert encoder.only_template(named) == encoder.only_template({"default": "b", "tool_use": "a"}) == "b"
    assert encoder.only_template("c") == "c"
    assert encoder.only_template(None) is encoder.only_template({"tool_use": "a"}) is None


def test_empty_answers_and_equal_documents_are_known() -> None:
    rows = [alpaca_row("a", "b"), alpaca_row("a", " \n"), alpaca_row("a", "b")]
    documents = Encoder(tokenizers.make("bytes")).encode([Alpaca()(row) for row in rows])

    assert documents.empty.tolist() == [False, True, False]
    assert documents.digests[0] == documents.digests[2] != documents.digests[1]


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(DataError, match=r"rows:1: invalid Unicode: '\\ud800' is half of a surrogate pair"):
        encode("bytes", Alpaca()(alpaca_row("a \ud800 b", "c")))
    rows = [Alpaca()(alpaca_row(text, "c")) for text in ("\ud800", "good", "\udfff")]
    with pytest.raises(DataError) as caught:
        Encoder(tokenizers.make("bytes")).encode(rows)
    assert len(caught.value.lines) == 2


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = tokenizers.make("bytes")
    with pytest.raises(ModelError, match="no EOS token"):
        Encoder(encoder.LightTokenizer(tokenizer.backend, {}))
    with pytest.raises(ModelError, match=r"not in its vocabulary \(got '<none>'"):
        Encoder(encoder.LightTokenizer(tokenizer.backend, {"eos_token": "<none>"}))


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_a_directory_gives_the_tokenizer_that_transformers_gives(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from sft_recipes.data.encoder import from_transformers

    folder = tokenizers.save(kind, tmp_path / "model")
    ours = encoder.from_directory(folder)
    assert ours is not None
    theirs = from_transformers(AutoTokenizer.from_pretrained(folder))

    assert ours.chat_template == theirs.chat_template
    assert {k: v for k, v in ours.specials.items() if k in theirs.specials} == dict(theirs.specials)
    rendered = Alpaca()(alpaca_row("the fox", "äöü 漢字"))
    ids = [Encoder(tokenizer).encode([rendered]).ids.tolist() for tokenizer in (ours, theirs)]
    assert ids[0] == ids[1]


def test_new_tokens_are_single(tmp_path: Path) -> None:
    folder = tokenizers.save("bytes", tmp_path / "model")
    tokenizer = encoder.from_directory(folder, ["<think>"])
    assert tokenizer is not None

    document = alone(Encoder(tokenizer).encode([Rendered("", "a<think>b", [(0, 9)], writes_specials=False)]))

    assert len(document.ids) == 4


def test_a_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="invalid tokenizer"):
        encoder.from_directory(tmp_path)


def test_a_tokenizer_that_transformers_makes_anew_is_known(tmp_path: Path) -> None:
    tokenizers.make("metaspace+bos").backend.save(str(tmp_path / "tokenizer.json"))
    for name, rebuilt in (("LlamaTokenizer", "LlamaTokenizer"), ("PreTrainedTokenizerFast", ""), (None, "")):
        config = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "<unk>", "tokenizer_class": name}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        found = encoder.from_directory(tmp_path)
        assert found is not None
        assert found.rebuilt == rebuilt
        assert found.specials["sep_token"] == "<unk>"
    tokenizers.make("bytes+bos").backend.save(str(tmp_path / "tokenizer.json"))
    for more, rebuilt in (({}, ""), ({"add_prefix_space": True}, "GPT2Tokenizer")):
        config = {"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer", **more}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        found = encoder.from_directory(tmp_path)
        assert found is not None
        assert found.rebuilt == rebuilt


def test_the_digest_of_a_prompt_is_that_of_the_document_it_would_be() -> None:
    """For documents that begin with an answer, consist of one, or have none."""
    rows = [[5, 6, 7], [5, 6, 8, 9], [5, 6], [7], [4, 4, 4]]
    trained = [[False, False, True], [False, False, True, False], [True, True], [False], [False, False, False]]
    offsets = np.cumsum([0, *map(len, rows)])
    ids = np.array([token for row in rows for token in row], dtype=np.int32)

    def digests(mask: list[list[bool]]) -> tuple[list[int], list[int]]:
        found = _digests(ids, np.array([one for row in mask for one in row]), offsets)
        return found[0].tolist(), found[1].tolist()

    whole, prompts = digests(trained)
    assert len(set(whole)) == 5
    assert prompts == [whole[2], whole[2], 0, whole[3], whole[4]]
    assert digests([[True] * len(row) for row in rows]) == (whole, [0] * 5)

"""What servers read in model/, tested without a server."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sft_recipes.data.templates import alpaca_prompt
from sft_recipes.export import save_model
from tests.conftest import minimal, run, write_rows

ROOT = Path(__file__).parents[2]
TINY = ROOT / "sft_recipes" / "builtin" / "tiny"
PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
MESSAGES = [{"role": "user", "content": "What is the opposite of empty?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ of a short run: adapters, merged into the built-in model."""
    folder = tmp_path_factory.mktemp("layout")
    write_rows(folder / "train.jsonl")
    recipe = minimal(folder) | {"lora": {"rank": 4}}
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return run(folder / "recipe.json")[0] / "model"


def content(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


def test_the_files(model: Path) -> None:
    assert {path.name for path in model.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merge.json",
    }  # fmt: skip


def test_all_files_have_the_same_permissions(model: Path) -> None:
    """A server often runs as another user."""
    assert {file.stat().st_mode & 0o777 for file in model.iterdir()} == {model.stat().st_mode & 0o666}


def test_the_config_names_the_architecture_and_the_type(model: Path) -> None:
    config = content(model / "config.json")

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert "quantization_config" not in config
    assert "auto_map" not in config


def test_the_weights_have_the_names_and_type_of_the_base(model: Path) -> None:
    with safe_open(model / "model.safetensors", "pt") as file, safe_open(TINY / "model.safetensors", "pt") as base:
        assert set(file.keys()) == set(base.keys())
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        rows = file.get_tensor("model.embed_tokens.weight").shape[0]

    assert rows == content(model / "config.json")["vocab_size"]


def test_special_token_ids_agree_in_all_files(model: Path) -> None:
    tokens = {token["content"]: token for token in content(model / "tokenizer.json")["added_tokens"]}
    tokenizer, config = content(model / "tokenizer_config.json"), content(model / "config.json")
    generation = content(model / "generation_config.json")

    for name in ("bos", "eos", "pad"):
        token = tokens[tokenizer[f"{name}_token"]]
        assert token["special"]
        assert token["id"] == config[f"{name}_token_id"] == generation[f"{name}_token_id"]
    assert generation["pad_token_id"] != generation["eos_token_id"]


def test_the_tokenizer_has_a_class_that_transformers_4_knows(model: Path) -> None:
    assert content(model / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_chat_template_is_a_file_of_its_own(model: Path) -> None:
    """transformers 5 writes it nowhere else; vLLM 0.32 and llama.cpp's converter read it there."""
    written = (model / "chat_template.jinja").read_text("utf-8")

    assert written == AutoTokenizer.from_pretrained(model).chat_template
    assert "chat_template" not in content(model / "tokenizer_config.json")


@pytest.mark.parametrize("input", ["", "thick bus"])
def test_servers_that_render_and_tokenize_get_the_prompt_of_training(model: Path, input: str) -> None:
    """The template by Jinja, the tokens by tokenizer.json, both without transformers; `input` as a template argument."""
    names = content(model / "tokenizer_config.json")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((model / "chat_template.jinja").read_text("utf-8"))
    arguments = {"input": input} if input else {}
    text = template.render(
        messages=MESSAGES, add_generation_prompt=True,
        bos_token=names["bos_token"], eos_token=names["eos_token"], **arguments,
    )  # fmt: skip
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids

    assert text == names["bos_token"] + alpaca_prompt(MESSAGES[0]["content"], input)
    assert ids == AutoTokenizer.from_pretrained(model).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False, **arguments
    )


LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("rope", "as_before"),
    [
        ({"rope_type": "default"}, {}),
        (LLAMA_3, {"rope_scaling": LLAMA_3}),
        (PARTIAL, {"partial_rotary_factor": 0.5}),
    ],
    ids=["default", "llama3", "partial"],
)
def test_the_rotary_embedding_is_written_in_the_keys_of_transformers_4(
    tmp_path: Path, rope: dict[str, Any], as_before: dict[str, Any]
) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, rope_parameters={**rope, "rope_theta": 500000.0},
    )  # fmt: skip
    original = LlamaForCausalLM(config).eval()
    save_model.save_model(
        original, AutoTokenizer.from_pretrained(TINY), tmp_path / "m", dtype="float32", max_shard_size="5GB", stops=[1]
    )
    written = content(tmp_path / "m" / "config.json")

    assert written["rope_theta"] == 500000.0
    assert {key: written[key] for key in ("rope_scaling", "partial_rotary_factor") if key in written} == as_before
    assert written["rope_parameters"] == {**rope, "rope_theta": 500000.0}
    assert AutoConfig.from_pretrained(tmp_path / "m").rope_parameters == config.rope_parameters
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = torch.arange(5, 200)[None]
    assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)


def test_the_code_of_the_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(model.parent)
    with contextlib.chdir(tmp_path):
        exec(code, {})

    assert capsys.readouterr().out.strip()


def test_the_prompts_of_the_page() -> None:
    """The request has what the chat template reads, and Ollama's template is Alpaca's."""
    [request] = re.findall(r"-d '(\{.*?\})'\n", PAGE, re.DOTALL)
    [ollama] = re.findall(r'TEMPLATE """(.*?)"""', PAGE, re.DOTALL)

    assert list(json.loads(request)["chat_template_kwargs"]) == ["input"]
    assert ollama == alpaca_prompt("{{ .Prompt }}")

"""Small tokenizers of every kind, trained on a few sentences."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sft_recipes.data.encoder import LightTokenizer
from sft_recipes.data.templates import alpaca_prompt

TEXT = [
    alpaca_prompt("Name three colors.", "red green"),
    "the quick brown fox\n\njumps over 12 lazy dogs",
    "äöü 漢字 {x}",
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = ("bytes", "bytes+bos", "bytes bos=eos", "bytes+bos+eos", "prepend+bos", "metaspace+bos", "chat")


@cache
def make(kind: str) -> LightTokenizer:
    """A tokenizer: byte-level BPE, or SentencePiece-like with `prepend` or `metaspace` for the leading space."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "bytes bos=eos":
        special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if kind == "chat":
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    names = list(dict.fromkeys([*special.values(), *(["<|im_start|>"] if kind == "chat" else [])]))
    byte_level = kind.startswith("bytes") or kind == "chat"
    tokenizer = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None if byte_level else "<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        names += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        if kind.startswith("prepend"):
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=\\s)|(?=▁)"), "isolated")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    # Line by line, so that no token spans lines, except an empty line, which is one token as in large models.
    lines = [line for text in TEXT for line in text.split("\n")] + ["\n\n"]
    tokenizer.train_from_iterator(
        lines * 3,
        trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=alphabet, show_progress=False),
    )
    if not byte_level:  # byte tokens are text, not special
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    if "+bos" in kind:
        pattern = "<s> $A </s>" if "+eos" in kind else "<s> $A"
        ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(pattern, special_tokens=ends)
    return LightTokenizer(tokenizer, special, CHAT if kind == "chat" else None)


def save(kind: str, folder: Path) -> Path:
    """The tokenizer as a directory that transformers loads."""
    tokenizer = make(kind)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.specials}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

"""Generate answers to prompts with the template of training."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.data import sandbox
from sft_recipes.data.chat import Chat, as_chat
from sft_recipes.data.encoder import Encoder, from_transformers

_BATCH = 16
ChatPrompt = tuple[list[dict[str, Any]], list[Any] | None]  # messages, tools


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[ChatPrompt], *, raw: bool = False, parse: bool = False
) -> list[list[int]]:
    """Return the token ids of each prompt up to the answer: in the chat template, or as plain text (`raw` or no template).

    `parse`: special tokens in plain text are parsed. Raises RecipeError if the template, which may be anyone's, does something
    forbidden.
    """
    template, light = tokenizer.chat_template, from_transformers(tokenizer)
    if raw or not isinstance(template, str):
        texts = ["\n\n".join(message["content"] for message in as_chat(messages)) for messages, _ in prompts]
        rows = [tokenizer(t, add_special_tokens=False, split_special_tokens=not parse)["input_ids"] for t in texts]
        bos = Encoder(light).bos  # as in training, without the EOS token
        return [list(ids) if parse and ids[: len(bos)] == bos else [*bos, *ids] for ids in rows]
    if "message['input']" not in template:  # only the Alpaca template has an input field
        prompts = [(as_chat(messages), tools) for messages, tools in prompts]
    chat = Chat(template, "all", light.specials, (), name=f"{tokenizer.name_or_path}: its chat template")
    texts = sandbox.limited(chat.name, _render_all, chat, prompts, str(tokenizer.name_or_path))
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _render_all(chat: Chat, prompts: Sequence[ChatPrompt], place: str) -> list[str]:
    texts = []
    for messages, tools in prompts:
        sandbox.restart_clock()
        texts.append(chat.prompt(messages, place, tools))
    return texts


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    temperature: float = 0.0,
) -> list[str]:
    """Generate one answer per prompt, up to a stop token: greedy decoding, or sampling if `temperature` > 0.

    Prompts are padded on the left, so that each answer starts right after its prompt.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=list(stops), pad_token_id=tokenizer.pad_token_id, **sampling
    )
    was_training = model.training
    model.eval()
    answers = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        device = model.get_input_embeddings().weight.device
        output = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, use_cache=True
        )
        answers += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    model.train(was_training)
    return answers

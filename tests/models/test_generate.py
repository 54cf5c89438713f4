from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes.data.templates import BOS, alpaca_chat_template, alpaca_prompt
from sft_recipes.models.generate import ChatPrompt, answer, prompt_ids

TINY = Path(__file__).parents[2] / "sft_recipes" / "builtin" / "tiny"


def test_prompts_in_the_template_or_as_they_stand() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompt: ChatPrompt = ([{"role": "user", "content": "Do it.", "input": "This."}], None)
    plain = tokenizer("Do it.\n\nThis.")["input_ids"]

    assert prompt_ids(tokenizer, [prompt]) == [plain]  # there is no template
    tokenizer.chat_template = BOS + alpaca_chat_template()
    in_template = tokenizer(alpaca_prompt("Do it.", "This."))["input_ids"]
    assert prompt_ids(tokenizer, [prompt, prompt]) == [in_template, in_template]
    assert prompt_ids(tokenizer, [prompt], raw=True) == [plain]
    [begin, *_] = plain
    rendered = [([{"role": "user", "content": "<|begin|>Do it.<|end|>"}], None)]
    assert prompt_ids(tokenizer, rendered, raw=True)[0].count(begin) == 1
    [ids] = prompt_ids(tokenizer, rendered, raw=True, parse=True)
    assert (ids.count(begin), ids[0], ids[-1]) == (1, begin, tokenizer.eos_token_id)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompt_ids(tokenizer, [prompt]) == [plain]
    tokenizer.chat_template = "{{ tools[0].name }}"
    [ids] = prompt_ids(tokenizer, [(prompt[0], [{"name": "Do it."}])])
    assert ids == tokenizer("Do it.", add_special_tokens=False)["input_ids"]


def test_a_batch_answers_as_each_prompt_alone() -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        AutoTokenizer.from_pretrained(TINY),
    )
    prompts = [
        tokenizer(text)["input_ids"]
        for text in ("Q: opposite of hot?\nA:", "up", "Task: count\nText: dog cat\nResult:")
    ]
    alone = [answer(model, tokenizer, [prompt], max_new_tokens=8, stops=[1])[0] for prompt in prompts]

    assert answer(model, tokenizer, prompts * 7, max_new_tokens=8, stops=[1]) == alone * 7
    assert alone[0].split()[0] == "cold"  # the base knows


def test_an_answer_ends_at_any_stop_and_the_mode_is_kept() -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        AutoTokenizer.from_pretrained(TINY),
    )
    prompt = tokenizer("Q: opposite of hot?\nA:")["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    model.train()

    assert answer(model, tokenizer, [prompt], max_new_tokens=8, stops=[1, newline]) == [" cold\n"]
    assert model.training


def test_sampling_is_not_greedy() -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        AutoTokenizer.from_pretrained(TINY),
    )
    torch.manual_seed(0)
    answers = answer(
        model, tokenizer, [tokenizer("the")["input_ids"]] * 8, max_new_tokens=8, stops=[1], temperature=2.0
    )

    assert len(set(answers)) > 1

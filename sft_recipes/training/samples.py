"""Answers to the same prompts at each evaluation: samples.jsonl, and how many are exactly right."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import atomic_files
from sft_recipes.data.eval_prompts import EvalPrompt
from sft_recipes.data.prepare import Prepared
from sft_recipes.recipe.schema import Recipe
from sft_recipes.training.generate import answer, prompt_ids


class Samples:
    """Answers the questions and writes them down. An answer is right if it equals what is expected, outer spaces aside."""

    def __init__(
        self,
        questions: list[EvalPrompt],
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        data: Prepared,
        file: Path,
        warn: Callable[[str], None] | None,
        shows: Sequence[Callable[[int, list[dict[str, Any]]], None]] = (),
    ) -> None:
        """`warn` hears of answers that cannot be written; without it none are, as in all processes but one. `shows` take
        the step and a row an answer: step, prompt, answer, expected."""
        self.questions, self.tokenizer, self.file, self.warn = questions, tokenizer, file, warn
        self.shows = shows
        self.stops, self.max_new_tokens = data.stops, recipe.eval.max_new_tokens
        raw = data.chat_template is None  # plain text was trained on, so plain text is continued
        self.prompts = [prompt_ids(tokenizer, question.messages, raw=raw) for question in questions]

    def take(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """Answer all questions now; {"eval_exact_match": share} where answers are expected, else {}."""
        answers = answer(model, self.tokenizer, self.prompts, max_new_tokens=self.max_new_tokens, stops=self.stops)
        answered = list(zip(self.questions, answers, strict=True))
        lines = [{"step": step, "messages": q.messages, "answer": a, "expected": q.expected} for q, a in answered]
        if self.warn is not None:
            try:
                atomic_files.append(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            except OSError as error:
                self.warn(f"{self.file}: the answers of step {step} are not recorded: {error}")
        rows = [{"step": step, "prompt": q.text, "answer": a, "expected": q.expected} for q, a in answered]
        for show in self.shows:
            show(step, rows)
        known = [(q.expected, a) for q, a in answered if q.expected is not None]
        if not known:
            return {}
        return {"eval_exact_match": sum(given.strip() == expected.strip() for expected, given in known) / len(known)}


class SampleWithoutValidation(TrainerCallback):
    """Answers the prompts where there are no validation rows to answer them with."""

    def __init__(self, trainer: Any, every: int | None) -> None:
        self.trainer, self.every = trainer, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # not where the run is resumed
            self._take()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every is not None and state.global_step % self.every == 0
        if due or state.global_step >= state.max_steps:
            self._take()

    def _take(self) -> None:
        if metrics := self.trainer.generate_samples():
            self.trainer.log(metrics)

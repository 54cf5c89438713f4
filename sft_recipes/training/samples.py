"""Answer the eval.generate prompts at each evaluation, record samples.jsonl and compute the exact match."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes import atomic_files
from sft_recipes.data.eval_prompts import EvalPrompt
from sft_recipes.data.prepare import Prepared
from sft_recipes.models.generate import answer, prompt_ids
from sft_recipes.recipe.schema import Recipe


class Samples:
    """The prompts of eval.generate and where their answers are recorded."""

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
        """Prepare the prompts. Without `warn` (all ranks except rank 0) nothing is written. `shows` receive the step and one
        dict per answer: step, prompt, answer, expected.
        """
        self.questions, self.tokenizer, self.file, self.warn = questions, tokenizer, file, warn
        self.shows = shows
        self.stops, self.max_new_tokens = data.stops, recipe.eval.max_new_tokens
        raw = data.chat_template is None  # trained on plain text, so prompts are plain text too
        self.prompts = prompt_ids(tokenizer, [question.messages for question in questions], raw=raw)

    def take(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """Answer all prompts. Returns {"eval_exact_match": share} (outer whitespace ignored), {} if none is expected."""
        answers = answer(model, self.tokenizer, self.prompts, max_new_tokens=self.max_new_tokens, stops=self.stops)
        answered = list(zip(self.questions, answers, strict=True))
        lines = [{"step": step, "messages": q.messages, "answer": a, "expected": q.expected} for q, a in answered]
        if self.warn is not None:
            try:
                atomic_files.append(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            except OSError as error:
                self.warn(f"{self.file}: cannot write the answers of step {step}: {error}")
        rows = [{"step": step, "prompt": q.text, "answer": a, "expected": q.expected} for q, a in answered]
        for show in self.shows:
            show(step, rows)
        pairs = [(q.expected, a) for q, a in answered if q.expected is not None]
        if not pairs:
            return {}
        return {"eval_exact_match": sum(given.strip() == expected.strip() for expected, given in pairs) / len(pairs)}


class SampleWithoutValidation(TrainerCallback):
    """Callback that answers the prompts every `every` steps if there is no evaluation data to trigger it."""

    def __init__(self, trainer: Any, every: int | None) -> None:
        self.trainer, self.every = trainer, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # not on resume
            self._take()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.every is not None and state.global_step % self.every == 0
        if due or state.global_step >= state.max_steps:
            self._take()

    def _take(self) -> None:
        if metrics := self.trainer.generate_samples():
            self.trainer.log(metrics)

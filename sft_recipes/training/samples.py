"""Answer the eval.generate prompts at each evaluation, record samples.jsonl and compute the exact match."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sft_recipes.data.eval_prompts import EvalPrompt
from sft_recipes.data.prepare import Prepared
from sft_recipes.models.generate import answer, prompt_ids
from sft_recipes.recipe.schema import Recipe
from sft_recipes.run_dir import append_lines


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
        tables: Sequence[Callable[[int, list[dict[str, Any]]], None]],
    ) -> None:
        """Prepare the prompts. Without `warn` (all ranks except rank 0) nothing is written. `tables` of the trackers receive
        the step and one dict per answer: step, prompt, answer, expected.
        """
        self.questions, self.tokenizer, self.file, self.warn, self.tables = questions, tokenizer, file, warn, tables
        self.stops, self.max_new_tokens = data.stops, recipe.eval.max_new_tokens
        raw = data.chat_template is None  # trained on plain text, so prompts are plain text too
        prompts = [(question.messages, question.tools) for question in questions]
        self.prompts = prompt_ids(tokenizer, prompts, raw=raw, parse=recipe.data.special_tokens == "parse")

    def take(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """Answer all prompts. Returns {"eval_exact_match": share} (outer whitespace ignored), {} if none is expected."""
        answers = answer(model, self.tokenizer, self.prompts, max_new_tokens=self.max_new_tokens, stops=self.stops)
        answered = list(zip(self.questions, answers, strict=True))
        lines = [{"step": step, "messages": q.messages, "answer": a, "expected": q.expected} for q, a in answered]
        if self.warn is not None:
            try:
                append_lines(self.file, lines)
            except OSError as error:
                self.warn(f"{self.file}: cannot write the answers of step {step}: {error}")
        rows = [{"step": step, "prompt": q.text, "answer": a, "expected": q.expected} for q, a in answered]
        for table in self.tables:
            table(step, rows)
        pairs = [(q.expected, a) for q, a in answered if q.expected is not None]
        if not pairs:
            return {}
        return {"eval_exact_match": sum(given.strip() == expected.strip() for expected, given in pairs) / len(pairs)}

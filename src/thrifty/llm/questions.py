"""Questions with choices from a JSONL file: which completion of a prompt a model finds the likeliest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import DataError
from thrifty.llm.loading import Batch, Example, collate, completion_losses, encode, rows_of

__all__ = ["Question", "QuestionBatch", "accuracy", "has_questions", "question_batches", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A prompt and its possible completions, the right one among them."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # place of the right one


@dataclass(frozen=True)
class QuestionBatch(Batch):
    """The choices of some questions, one a row, each question's right one first."""

    sizes: tuple[int, ...]  # choices of each question

    def to(self, device: torch.device | str) -> QuestionBatch:
        """Return the batch on a device."""
        return QuestionBatch(self.ids.to(device), self.attention.to(device), self.learned.to(device), self.sizes)


def has_questions(path: str | Path) -> bool:
    """Return whether the first line of a JSONL file has choices (False too where there is no such file)."""
    try:
        with Path(path).open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        found = json.loads(first)
    except (OSError, ValueError):
        return False
    return isinstance(found, Mapping) and "choices" in found


def read_questions(path: str | Path) -> list[Question]:
    """Return the questions of a JSONL file: {"prompt", "choices", "answer"} on each line, answer counting from 0.

    A choice is what follows the prompt, a leading blank included. Raises DataError that names the bad lines.
    """
    return rows_of(path, _question, "prompt, choices and answer", "questions")


def _question(line: Any) -> Question:
    if not isinstance(line, Mapping):
        raise TypeError("no JSON object")
    prompt, choices, answer = (line.get(key) for key in ("prompt", "choices", "answer"))
    wrong = []
    if not isinstance(prompt, str) or not prompt:
        wrong.append("prompt must be text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        wrong.append("choices must be two texts or more")
    elif isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        wrong.append(f"answer must be the place of the right choice, 0..{len(choices) - 1}")
    if wrong:
        raise TypeError(", ".join(wrong))
    return Question(str(prompt), tuple(choices or ()), int(answer or 0))


def question_batches(
    questions: Sequence[Question], tokenizer: Any, max_tokens: int, size: int = 4, pad: int = 0, chat: bool = False
) -> Iterator[QuestionBatch]:
    """Yield the questions, `size` in a batch, for `accuracy`. chat, and what is raised: see `encode`."""
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        rows = [Example(c, q.prompt) for q in part for c in _right_first(q)]
        made = collate(encode(rows, tokenizer, max_tokens, end=False, chat=chat), pad)
        yield QuestionBatch(made.ids, made.attention, made.learned, tuple(len(q.choices) for q in part))


def _right_first(q: Question) -> list[str]:
    return [q.choices[q.answer], *q.choices[: q.answer], *q.choices[q.answer + 1 :]]


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Return for each question whether the right choice has the highest summed log-likelihood, (questions,), 0 or 1.

    Two choices that are equally likely share the point. For `thrifty.llm.inner_loop.scan`.
    """
    if not isinstance(batch, QuestionBatch):
        raise DataError("accuracy is of questions with choices; make the batches with question_batches")
    totals = -completion_losses(model, batch) * batch.learned.sum(1)
    found = []
    for of in torch.split(totals.double(), list(batch.sizes)):
        best = of == of.max()
        found.append(best[0].double() / best.sum())
    return torch.stack(found)

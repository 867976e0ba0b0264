"""Questions with four choices in one row each: the prompt is read once, and the choices behind it do not see one another.

A row of `Choices` is prompt, choice 0, choice 1 ...; a 4-D attention mask lets a choice see the prompt and itself, and its
positions go on from the prompt. The log-probabilities are those of one row per choice (`packing_error` says how nearly), for about a
third of the tokens. Text rows are plain sequences. `score` serves both, for thrifty.llm.inner_loop.scan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import small_text
import torch
from gallop_tasks import TASKS, Item, splits
from torch import Tensor

from thrifty.llm.families import parts_of
from thrifty.llm.loading import Batch, Encoded, collate

WAYS = 4
GLOSS = re.compile(r"[^(]+ \((noun|verb|adjective|adverb)\): ")


@dataclass(frozen=True)
class Choices(Batch):
    """Rows of a prompt and its choices; attention is (b, 1, t, t) bool here."""

    positions: Tensor  # (b, t)
    source: Tensor  # (b, t) the position whose state predicts this token
    choice: Tensor  # (b, t) which choice a token belongs to

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of a model's forward."""
        return {"input_ids": self.ids, "attention_mask": self.attention, "position_ids": self.positions}


def pack(items: Sequence[Item], tokenizer: Any) -> Choices:
    """Return one batch of questions."""
    prompts = [tokenizer(i.prompt)["input_ids"] for i in items]
    answers = [[tokenizer(c, add_special_tokens=False)["input_ids"] for c in i.choices] for i in items]
    longest = max(len(p) + sum(map(len, a)) for p, a in zip(prompts, answers))
    shape = (len(items), longest)
    ids, positions, source, choice = (torch.zeros(shape, dtype=torch.long) for _ in range(4))
    learned = torch.zeros(shape, dtype=torch.bool)
    allowed = torch.eye(longest, dtype=torch.bool).repeat(len(items), 1, 1)
    for row, (prompt, rest) in enumerate(zip(prompts, answers)):
        n = len(prompt)
        ids[row, :n], positions[row, :n] = torch.tensor(prompt), torch.arange(n)
        allowed[row, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        at = n
        for number, answer in enumerate(rest):
            here = slice(at, at + len(answer))
            ids[row, here], positions[row, here] = torch.tensor(answer), torch.arange(n, n + len(answer))
            source[row, here] = torch.tensor([n - 1, *range(at, at + len(answer) - 1)])
            choice[row, here], learned[row, here] = number, True
            allowed[row, here, :n] = True
            allowed[row, here, here] = torch.ones(len(answer), len(answer), dtype=torch.bool).tril()
            at += len(answer)
    return Choices(ids, allowed[:, None], learned, positions, source, choice)


def packed(items: Sequence[Item], tokenizer: Any, size: int) -> tuple[list[Item], list[Choices]]:
    """Return the questions from short to long, and their batches."""
    order = sorted(items, key=lambda i: len(i.prompt) + sum(map(len, i.choices)))
    return order, [pack(order[i : i + size], tokenizer) for i in range(0, len(order), size)]


def questions(per_task: dict[str, int], split: str) -> list[Item]:
    """Return the questions of one split, all tasks; splits of the same `per_task` have no question in common."""
    return [item for task in TASKS for item in splits(task, per_task, 0)[split]]


def task_of(item: Item) -> str:
    """Return the task that a question is from."""
    return "numbers" if item.prompt.startswith("Write") else "arithmetic" if " plus " in item.prompt else "kinds"


def text_rows(tokenizer: Any, splits: Sequence[str], n: int, length: int) -> list[Encoded]:
    """Return n sequences of `length` tokens: half docstrings of the Python library, half glosses of WordNet.

    A sequence is a run of paragraphs of small_text; the runs are spread evenly over the named splits.
    """
    text = small_text.splits(packages=())
    paragraphs = [p for split in splits for p in getattr(text, split)]
    kinds = [p for p in paragraphs if not GLOSS.match(p)], [p for p in paragraphs if GLOSS.match(p)]
    return [row for kind in kinds for row in runs(tokenizer, kind, n // 2, length)]


def runs(tokenizer: Any, paragraphs: Sequence[str], n: int, length: int) -> list[Encoded]:
    """Return n sequences of `length` tokens, each of paragraphs in a row, with equal gaps between them."""
    found, step = [], max(1, len(paragraphs) // n)
    for first in range(0, n * step, step):
        ids: list[int] = []
        for paragraph in paragraphs[first : first + step]:
            ids += tokenizer(paragraph + "\n\n", add_special_tokens=False)["input_ids"]
            if len(ids) >= length:
                break
        found.append(Encoded(tuple(ids[:length])))
    return found


def text_batches(rows: Sequence[Encoded], size: int) -> list[Batch]:
    """Return batches of text."""
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def score(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return log p of every choice in turn, (4 b,), for questions; the mean log p of a token, (b,), for text."""
    if not isinstance(batch, Choices):
        states, goal = hidden(model, batch)[:, :-1], batch.ids[:, 1:]
        found = log_p(model, states.flatten(0, 1), torch.arange(goal.numel()), goal.flatten(), temperature).view_as(goal)
        return (found * batch.learned[:, 1:]).sum(1) / batch.learned[:, 1:].sum(1)
    row, column = batch.learned.nonzero(as_tuple=True)
    places, which = torch.unique(row * batch.ids.shape[1] + batch.source[row, column], return_inverse=True)
    found = log_p(model, hidden(model, batch).flatten(0, 1)[places], which, batch.ids[row, column], temperature)
    return torch.zeros(WAYS * len(batch)).index_add(0, WAYS * row + batch.choice[row, column], found)


def hidden(model: Any, batch: Batch) -> Tensor:
    """Return the states behind the final norm."""
    found: Tensor = parts_of(model).trunk(**batch.inputs(), use_cache=False).last_hidden_state
    return found


def log_p(model: Any, states: Tensor, which: Tensor, goal: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log p of token goal[i] by state which[i], (n,), float32."""
    logits = parts_of(model).logits(states, normed=True)
    total = torch.cat([(part.float() / temperature).logsumexp(-1) for part in logits.split(32)])
    return logits[which, goal].float() / temperature - total[which]


def measures(items: Sequence[Item], scores: Tensor) -> dict[str, Tensor]:
    """Return, of scores (>= 4 n,), chosen (n,): 0/1, the right choice is the likeliest; and right (n,): its log p among the four."""
    table = scores[: WAYS * len(items)].double().view(-1, WAYS)
    right = torch.tensor([i.choices.index(i.answer) for i in items])
    return {"chosen": (table.argmax(1) == right).double(), "right": table.log_softmax(1).gather(1, right[:, None])[:, 0]}


def packing_error(model: Any, tokenizer: Any, items: Sequence[Item]) -> float:
    """Return the largest difference in log p to one plain row per choice."""
    plain = []
    for item in items:
        for answer in item.choices:
            prompt, rest = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (item.prompt, answer))
            batch = collate([Encoded((*prompt, *rest), len(prompt))])
            states = hidden(model, batch)[0, len(prompt) - 1 : -1]
            plain.append(float(log_p(model, states, torch.arange(len(rest)), torch.tensor(rest)).sum()))
    return float((score(model, pack(items, tokenizer)) - torch.tensor(plain)).abs().max())

"""What makes an entry worth tuning: one function a score, from weights and gradients; the highest are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thrifty.errors import KnobError, close_to

__all__ = ["SCORES", "Score", "score_of"]


@dataclass(frozen=True)
class Score:
    """A score, element by element, in float32.

    of: (weight, gradient, eps) -> score, all of one shape; the gradient is what `needs` says.
    """

    of: Callable[[Tensor, Tensor, float], Tensor]
    needs: str = "nothing"  # "mean": mean gradient of the examples; "square": mean of their squared gradients
    source: str = ""


def _random(weight: Tensor, gradient: Tensor, eps: float) -> Tensor:
    """Return the random numbers that the selection drew in place of gradients."""
    return gradient


# Source: spec notes on GaLLoP (arXiv 2510.19778) and the methods it is compared with.
SCORES: dict[str, Score] = {
    "gallop": Score(lambda w, g, eps: g.abs() / (w.abs() + eps), "mean", "|g| / (|w| + eps), arXiv 2510.19778"),
    "saft": Score(lambda w, g, eps: g.abs(), "mean", "|g|, SAFT"),
    "snip": Score(lambda w, g, eps: (g * w).abs(), "mean", "|g w|, SNIP"),
    "fisher": Score(lambda w, g, eps: g, "square", "mean g², the diagonal of the empirical Fisher information"),
    "lowest": Score(lambda w, g, eps: -w.abs(), "nothing", "-|w|, PaFi"),
    "highest": Score(lambda w, g, eps: w.abs(), "nothing", "|w|"),
    "random": Score(_random, "random", "uniform numbers from the seed"),
}


def score_of(name: str) -> Score:
    """Return a score of SCORES. Raises KnobError with the near matches."""
    if name not in SCORES:
        raise KnobError(f"score is '{name}'; {close_to(str(name), SCORES)}")
    return SCORES[name]


def evaluate(score: Score, weight: Tensor, gradient: Tensor, eps: float) -> Tensor:
    """Return the scores of a slice of a tensor: float32, whatever the weights are stored in; shape of `weight`."""
    return score.of(weight.to(torch.float32), gradient.to(torch.float32), eps)

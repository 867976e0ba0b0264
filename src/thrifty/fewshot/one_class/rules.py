"""The rules that turn similarities into a one-class decision: each gives a margin, positive for the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from thrifty.errors import close_to
from thrifty.fewshot.preprocess import Array, InputError, OptionError, unit


@dataclass(frozen=True)
class Knobs:
    """The numbers that rules read."""

    threshold: float | None = None  # FT, ANP+FT: cosine; EOE: of its own score. None: not calibrated
    weight: float = 0.5  # ANP+FT: share of the adaptive part, in [0, 1]
    temperature: float = 0.01  # softmax, EOE: cosines are divided by it
    beta: float = 0.25  # EOE: weight of the likeliest negative


@dataclass(frozen=True)
class Evidence:
    """The similarities of n images: with the target (n,), with K negatives (n, K), with their prototype (n,)."""

    score: Array
    negatives: Array
    prototype: Array


def evidence(x_nd: Array, target_d: Array, negatives_kd: Array, normalise: bool = True) -> Evidence:
    """Return the similarities of unit images (n, d) with a unit target (d,) and unit negatives (K, d).

    normalise: scale the average of the negatives to unit length. The raw average is shorter than one whenever negatives
    differ, which lowers the threshold of ANP by that factor and lets almost everything pass (specs/fewshot.md 3b.4).
    """
    prototype = negative_prototype(negatives_kd, normalise)
    return Evidence(x_nd @ target_d, x_nd @ negatives_kd.T, x_nd @ prototype)


def negative_prototype(negatives_kd: Array, normalise: bool = True) -> Array:
    """Return the average negative (d,), scaled to unit length or raw; zeros without negatives.

    >>> negative_prototype(np.eye(2)).round(3)
    array([0.707, 0.707])
    >>> negative_prototype(np.eye(2), normalise=False)
    array([0.5, 0.5])
    """
    if not len(negatives_kd):
        return np.zeros(negatives_kd.shape[1])
    mean: Array = negatives_kd.mean(axis=0)
    return unit(mean) if normalise else mean


def fixed_threshold(e: Evidence, k: Knobs) -> Array:
    """FT: the same threshold for every task."""
    result: Array = e.score - _calibrated(k)
    return result


def max_negative(e: Evidence, k: Knobs) -> Array:
    """The threshold is the similarity with the nearest negative."""
    result: Array = e.score - e.negatives.max(axis=1)
    return result


def average_negative_prototype(e: Evidence, k: Knobs) -> Array:
    """ANP: the threshold is the similarity with the average of the negatives: the sign of x.(t - n)."""
    return e.score - e.prototype


def blend(e: Evidence, k: Knobs) -> Array:
    """ANP+FT: weight * (similarity with the prototype) + (1 - weight) * (fixed threshold)."""
    result: Array = e.score - (k.weight * e.prototype + (1.0 - k.weight) * _calibrated(k))
    return result


def softmax_half(e: Evidence, k: Knobs) -> Array:
    """Softmax over target and negatives gives the target more than one half: a soft maximum as threshold.

    With very many negatives (all nouns of WordNet) this is NegLabel's decision (Jiang et al. 2024, arXiv:2403.20078) at
    one half.
    """
    top = e.negatives.max(axis=1)
    spread = np.exp((e.negatives - top[:, None]) / k.temperature).sum(axis=1)
    result: Array = e.score - (top + k.temperature * np.log(spread))
    return result


def envisioned_outliers(e: Evidence, k: Knobs) -> Array:
    """EOE's score, softmax of the target minus beta times the largest softmax of a negative, minus a threshold.

    Source: Cao et al. 2024, Envisioning Outlier Exposure (arXiv:2406.00806), beta 0.25, with one target class.
    """
    logits = np.column_stack([e.score, e.negatives]) / k.temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = weights / weights.sum(axis=1, keepdims=True)
    result: Array = shares[:, 0] - k.beta * shares[:, 1:].max(axis=1) - _calibrated(k)
    return result


RULES: dict[str, Callable[[Evidence, Knobs], Array]] = {
    "FT": fixed_threshold,
    "max-negative": max_negative,
    "ANP": average_negative_prototype,
    "ANP+FT": blend,
    "softmax": softmax_half,
    "EOE": envisioned_outliers,
}
NEED_NEGATIVES = frozenset(RULES) - {"FT"}
NEED_THRESHOLD = frozenset({"FT", "ANP+FT", "EOE"})


def margin(method: str, e: Evidence, knobs: Knobs | None = None) -> Array:
    """Return the margin (n,) of one of RULES; positive means target, a tie means not."""
    check_method(method)
    if method in NEED_NEGATIVES and not e.negatives.shape[1]:
        raise InputError(f"'{method}' compares with negatives and there are none; give some, or use method='FT'")
    return RULES[method](e, knobs or Knobs())


def check_method(method: object) -> None:
    """Raise OptionError unless the method is one of RULES."""
    if not isinstance(method, str) or method not in RULES:
        raise OptionError(f"method is {method!r}; {close_to(str(method), RULES)}")


def _calibrated(k: Knobs) -> float:
    if k.threshold is None:
        raise OptionError(
            "this method needs a threshold, which depends on the encoder and the prompt template: "
            "find it with thrifty.fewshot.one_class.calibrate on tasks of other classes, or use method='ANP'"
        )
    return k.threshold

"""How good a one-class decision is: macro F1, balanced accuracy, AUROC, and the best that a fixed threshold could
do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from thrifty.errors import need
from thrifty.fewshot.episodes import Interval, mean_interval
from thrifty.fewshot.preprocess import Array, InputError

Bools = npt.NDArray[np.bool_]


def macro_f1(positive: npt.ArrayLike, decision: npt.ArrayLike) -> Array:
    """Return the mean of the F1 of the positives and of the negatives, in [0, 1]; F1 of an empty class is 0.

    positive: (n,) truth. decision: (..., n). Returns (...).

    >>> float(macro_f1([True, False], [True, True]).round(3))
    0.333
    """
    truth, said = _pair(positive, decision)
    both = (said & truth).sum(axis=-1).astype(np.float64)
    neither = (~said & ~truth).sum(axis=-1).astype(np.float64)
    yes, no = 2 * both, 2 * neither
    wrong = (said != truth).sum(axis=-1)
    result: Array = 0.5 * (yes / np.maximum(yes + wrong, 1) + no / np.maximum(no + wrong, 1))
    return result


def balanced_accuracy(positive: npt.ArrayLike, decision: npt.ArrayLike) -> Array:
    """Return the mean of the shares of positives and of negatives that were found; decision: (..., n).

    >>> float(balanced_accuracy([True, False], [True, True]))
    0.5
    """
    truth, said = _pair(positive, decision)
    result: Array = 0.5 * (said[..., truth].mean(axis=-1) + (~said[..., ~truth]).mean(axis=-1))
    return result


def auroc(positive: npt.ArrayLike, margins: npt.ArrayLike) -> float:
    """Return the chance that a positive has a larger margin than a negative, ties counted half.

    >>> auroc([True, False, False], [0.5, 0.5, 0.1])
    0.75
    """
    truth = _truth(positive)
    m = np.asarray(margins, np.float64)
    yes, no = m[truth], np.sort(m[~truth])
    below, upto = np.searchsorted(no, yes, "left"), np.searchsorted(no, yes, "right")
    return float((below + upto).mean() / (2 * len(no)))


def best_threshold(positive: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[float, float]:
    """Return the threshold with the highest macro F1 of score > threshold, and that macro F1: the oracle of a task.

    >>> best_threshold([True, False, False], [0.5, 0.4, 0.1])
    (0.45, 1.0)
    """
    s = np.asarray(scores, np.float64)
    levels = np.unique(s)
    cuts = np.concatenate([[levels[0] - 1.0], (levels[1:] + levels[:-1]) / 2, [levels[-1]]])
    found = macro_f1(positive, s > cuts[:, None])
    best = int(found.argmax())
    return float(cuts[best]), float(found[best])


def grouped_interval(values: npt.ArrayLike, groups: Sequence[Hashable] | None = None) -> Interval:
    """Return the mean of values (T,) with a 95 % interval that allows for tasks of a group resembling each other.

    Tasks that share pictures or a branch of the taxonomy are not independent. The variance of the mean is that of the
    group sums (the cluster-robust, or sandwich, estimator, with G / (G - 1)); the factor is Student's t with G - 1
    degrees of freedom. Without groups: `episodes.mean_interval`.

    >>> print(grouped_interval([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"]))
    0.5000 ± 6.3531 (95 %, 4 episodes)
    """
    v = np.asarray(values, np.float64)
    if groups is None:
        return mean_interval(v)
    if v.ndim != 1 or not len(v) or len(groups) != len(v):
        raise InputError(f"{v.shape} values and {len(groups)} groups: there must be one group for each value")
    _, index = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    count = int(index.max()) + 1
    if count == 1:
        return Interval(float(v.mean()), float("inf"), len(v))
    sums = np.bincount(index, v - v.mean())
    error = np.sqrt(count / (count - 1) * (sums**2).sum()) / len(v)
    quantile = float(need("scipy.stats", extra="fewshot").t.ppf(0.975, count - 1))
    return Interval(float(v.mean()), quantile * float(error), len(v))


def _truth(positive: npt.ArrayLike) -> Bools:
    truth = np.asarray(positive)
    if truth.ndim != 1 or truth.dtype != np.bool_ or truth.all() or not truth.any():
        raise InputError("the truth must be booleans (n,) with both positives and negatives")
    return truth


def _pair(positive: npt.ArrayLike, decision: npt.ArrayLike) -> tuple[Bools, Bools]:
    truth, said = _truth(positive), np.asarray(decision)
    if said.dtype != np.bool_ or said.shape[-1:] != truth.shape:
        raise InputError(f"decisions are {said.dtype} {said.shape}; they must be booleans (..., {len(truth)})")
    return truth, said

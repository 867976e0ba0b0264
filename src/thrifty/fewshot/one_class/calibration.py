"""The numbers that one-class rules cannot know from a label: the fixed threshold, the blend, the scale of
probabilities.

They depend on the encoder pair and on the prompt template, and are found on tasks of classes that are not tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.one_class.estimator import OneClass
from thrifty.fewshot.one_class.evaluation import EmbeddedTask
from thrifty.fewshot.one_class.metrics import macro_f1
from thrifty.fewshot.preprocess import Array, InputError, OptionError

LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Calibration:
    """What calibration found, and on what.

    `knobs` are keywords for OneClass: `OneClass.of(target, negatives, **found.knobs)`.
    """

    method: str
    threshold: float | None
    weight: float
    scale: float
    macro_f1: float  # mean over the calibration tasks, at these knobs
    tasks: int
    pictures: int
    classes: frozenset[str]  # targets and pictures: test on others (`check_disjoint`)
    grid: tuple[float, ...]  # thresholds tried
    curve: tuple[float, ...]  # their mean macro F1

    @property
    def knobs(self) -> dict[str, object]:
        """Keywords for OneClass."""
        return {"method": self.method, "threshold": self.threshold, "weight": self.weight, "scale": self.scale}


def calibrate(
    tasks: Sequence[EmbeddedTask], method: str = "ANP+FT", *, grid: npt.ArrayLike | None = None,
    weight: float | None = 0.5, normalise: bool = True,
) -> Calibration:  # fmt: skip
    """Return the fixed threshold with the highest mean macro F1 over tasks, and what else the method needs.

    FT's threshold is what "FT" and "ANP+FT" share. grid: thresholds to try, default 201 between the 0.1 and 99.9
    percentiles of the scores; the lowest of equally good ones is taken. weight: of the blend; None chooses it on the
    same tasks from 0, 0.1, ..., 1. The scale of probabilities maximises the likelihood of the truth (the decision is
    not moved).

    Source: specs/fewshot.md 3b (the paper calibrates on ImageNet; the criterion is ours). The weight of the blend is
    ours.
    """
    kept = list(tasks)
    if not kept:
        raise InputError("no tasks to calibrate on")
    base = OneClass(method, threshold=0.0, normalise=normalise, weight=0.5 if weight is None else weight)
    score_method = "EOE" if method == "EOE" else "FT"
    statistics = [_margins(t, score_method, normalise, threshold=0.0) for t in kept]
    tried = _grid(statistics, grid)
    curve = np.mean([macro_f1(t.positive, s > tried[:, None]) for t, s in zip(kept, statistics, strict=True)], axis=0)
    threshold = float(tried[int(curve.argmax())])
    chosen = base.weight
    if weight is None and method == "ANP+FT":
        chosen = _best_weight(kept, threshold, normalise)
    knobs = {"threshold": threshold, "weight": chosen}
    margins = [_margins(t, method, normalise, **knobs) for t in kept]
    reached = float(np.mean([macro_f1(t.positive, m > 0) for t, m in zip(kept, margins, strict=True)]))
    scale = probability_scale(np.concatenate(margins), np.concatenate([t.positive for t in kept]))
    return Calibration(
        method, threshold, chosen, scale, reached, len(kept), sum(len(t.positive) for t in kept),
        frozenset().union(*({t.name, *t.classes} for t in kept)), tuple(tried.tolist()), tuple(curve.tolist()),
    )  # fmt: skip


def probability_scale(margins: Array, positive: npt.NDArray[np.bool_]) -> float:
    """Return the s > 0 that maximises the likelihood of the truth under logistic(s * margin), by bisection.

    The likelihood is concave in s. Separable margins have no maximum: then the largest margin gets an exponent of 700;
    margins on the wrong side on average get the smallest scale.

    >>> m = np.array([-2.0, -1.0, 1.0, 2.0, -0.5])
    >>> round(probability_scale(m, np.array([False, False, True, True, True])), 3)
    1.872
    """
    largest = float(np.abs(margins).max())
    if largest == 0:
        return 1.0
    signed = np.where(positive, margins, -margins)

    def slope(s: float) -> float:
        return float((signed * 0.5 * (1.0 - np.tanh(0.5 * s * signed))).sum())

    low, high = np.log(1e-6 / largest), np.log(LARGEST_EXPONENT / largest)
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(float(np.exp(middle))) > 0 else (low, middle)
    return float(np.exp(0.5 * (low + high)))


def _margins(task: EmbeddedTask, method: str, normalise: bool, **knobs: float) -> Array:
    fitted = OneClass.of(task.target, task.negatives, method=method, normalise=normalise, **knobs)
    return fitted.decision_function(task.images)


def _grid(statistics: Sequence[Array], grid: npt.ArrayLike | None) -> Array:
    if grid is None:
        together = np.concatenate(statistics)
        low, high = np.quantile(together, [0.001, 0.999])
        return np.linspace(float(low), float(high), 201, dtype=np.float64)
    tried = np.asarray(grid, np.float64)
    if tried.ndim != 1 or not len(tried) or not np.isfinite(tried).all():
        raise OptionError(f"grid has shape {tried.shape}; it must be a list of finite thresholds")
    return np.sort(tried)


def _best_weight(tasks: Sequence[EmbeddedTask], threshold: float, normalise: bool) -> float:
    weights = [round(0.1 * i, 1) for i in range(11)]
    reached = [
        np.mean([
            macro_f1(t.positive, _margins(t, "ANP+FT", normalise, threshold=threshold, weight=w) > 0) for t in tasks
        ])
        for w in weights
    ]  # fmt: skip
    return weights[int(np.argmax(reached))]

"""One-class tasks as arrays, and what every rule makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thrifty.fewshot.episodes import Interval
from thrifty.fewshot.one_class.estimator import OneClass
from thrifty.fewshot.one_class.metrics import (
    Bools,
    auroc,
    balanced_accuracy,
    best_threshold,
    grouped_interval,
    macro_f1,
)
from thrifty.fewshot.preprocess import Array, InputError, unit

METRICS = ("macro_f1", "balanced_accuracy", "auroc")
ORACLE = "oracle threshold"


@dataclass(frozen=True, eq=False)
class EmbeddedTask:
    """One question, embedded: which of these pictures show the target, of which the label is known?

    Raises InputError for shapes that do not fit, or without a positive and a negative picture.
    """

    name: str  # of the target
    level: str  # how far the negative pictures lie from the target
    target: Array  # (d,) text embedding of the label
    negatives: Array  # (K, d) text embeddings of what the target may be confused with
    images: Array  # (n, d)
    positive: Bools  # (n,) the truth
    group: str = ""  # tasks of one group are not independent: same branch, same pictures
    classes: frozenset[str] = field(default_factory=frozenset)  # whose pictures these are, for `check_disjoint`

    def __post_init__(self) -> None:
        d = self.target.shape
        fits = len(d) == 1 and self.negatives.shape[1:] == d and self.images.shape[1:] == d
        if not fits or self.positive.shape != self.images.shape[:1]:
            raise InputError(
                f"task '{self.name}': target {d}, negatives {self.negatives.shape}, images {self.images.shape}, truth "
                f"{self.positive.shape}; they must be (d,), (K, d), (n, d), (n,)"
            )
        if self.positive.all() or not self.positive.any():
            raise InputError(f"task '{self.name}' needs both positive and negative pictures")

    @property
    def scores(self) -> Array:
        """The similarity (n,) of every picture with the label."""
        result: Array = unit(np.asarray(self.images, np.float64)) @ unit(np.asarray(self.target, np.float64))
        return result


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Values (T,) of every metric for every method on the same T tasks."""

    names: tuple[str, ...]
    levels: tuple[str, ...]
    groups: tuple[str, ...]
    values: dict[str, dict[str, Array]]  # metric -> method -> (T,)
    positive_rate: float  # of all pictures; macro F1 depends on it
    pictures: int

    @classmethod
    def join(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Return the tasks of several evaluations of the same methods (the folds of a cross-fit) as one."""
        if not parts or any(p.methods != parts[0].methods for p in parts):
            raise InputError("only evaluations of the same methods can be joined")
        pictures = sum(p.pictures for p in parts)
        return cls(
            tuple(n for p in parts for n in p.names),
            tuple(n for p in parts for n in p.levels),
            tuple(n for p in parts for n in p.groups),
            {k: {m: np.concatenate([p.values[k][m] for p in parts]) for m in parts[0].methods} for k in METRICS},
            sum(p.positive_rate * p.pictures for p in parts) / pictures,
            pictures,
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, the oracle last."""
        return tuple(self.values["macro_f1"])

    def mean(self, method: str, level: str | None = None, metric: str = "macro_f1") -> Interval:
        """Return the mean over the tasks of a level (None: all) with its 95 % interval over groups."""
        return self._interval(self.values[metric][method], level)

    def difference(self, first: str, second: str, level: str | None = None, metric: str = "macro_f1") -> Interval:
        """Return the mean of first - second over the same tasks, with its 95 % interval over groups."""
        found = self.values[metric]
        return self._interval(found[first] - found[second], level)

    def _interval(self, values: Array, level: str | None) -> Interval:
        keep = np.array([level is None or name == level for name in self.levels])
        if not keep.any():
            raise InputError(f"no task of level {level!r}; levels are {', '.join(sorted(set(self.levels)))}")
        return grouped_interval(values[keep], [g for g, k in zip(self.groups, keep, strict=True) if k])

    def to_json(self) -> dict[str, Any]:
        """Return means and half widths by level, metric and method, and the counts."""
        levels = list(dict.fromkeys(self.levels))
        kept: dict[str, Any] = {}
        for level in levels:
            kept[level] = {"tasks": sum(name == level for name in self.levels)}
            for metric, methods in self.values.items():
                found = {m: self.mean(m, level, metric) for m in methods}
                kept[level][metric] = {m: [round(i.mean, 4), round(i.half_width, 4)] for m, i in found.items()}
        return {"positive_rate": self.positive_rate, "pictures": self.pictures, "levels": kept}


def evaluate(
    tasks: Iterable[EmbeddedTask], methods: Mapping[str, OneClass], progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Return what every method scores on every task; all see the same pictures and the same negatives.

    methods: name -> an unfitted OneClass. progress: called with the number of tasks done. The oracle (the best constant
    threshold on x.t, chosen with the truth of the task) is added as an upper bound for decisions by a constant
    threshold; a threshold that depends on the picture may beat it. Its AUROC is that of x.t.
    """
    kept = list(tasks)
    if not kept:
        raise InputError("no tasks to evaluate")
    values: dict[str, dict[str, list[float]]] = {metric: {m: [] for m in (*methods, ORACLE)} for metric in METRICS}
    for done, task in enumerate(kept, start=1):
        for name, (decision, margins) in _answers(task, methods).items():
            values["macro_f1"][name].append(float(macro_f1(task.positive, decision)))
            values["balanced_accuracy"][name].append(float(balanced_accuracy(task.positive, decision)))
            values["auroc"][name].append(auroc(task.positive, margins))
        if progress is not None:
            progress(done)
    pictures = sum(len(t.positive) for t in kept)
    return Evaluation(
        tuple(t.name for t in kept),
        tuple(t.level for t in kept),
        tuple(t.group or t.name for t in kept),
        {metric: {m: np.array(v) for m, v in by.items()} for metric, by in values.items()},
        sum(int(t.positive.sum()) for t in kept) / pictures,
        pictures,
    )


def _answers(task: EmbeddedTask, methods: Mapping[str, OneClass]) -> dict[str, tuple[Bools, Array]]:
    found: dict[str, tuple[Bools, Array]] = {}
    for name, method in methods.items():
        fitted = OneClass.of(task.target, task.negatives, **method.get_params())
        margins = fitted.decision_function(task.images)
        found[name] = (margins > 0, margins)
    scores = task.scores
    found[ORACLE] = (scores > best_threshold(task.positive, scores)[0], scores)
    return found


def check_disjoint(fitted: Sequence[EmbeddedTask] | Iterable[str], tested: Sequence[EmbeddedTask]) -> None:
    """Raise InputError when classes of the first (calibration tasks, or names) appear in the tested tasks.

    Compared are targets and the classes whose pictures are shown.
    """
    first: set[str] = set()
    for item in fitted:
        first |= {item} if isinstance(item, str) else {item.name, *item.classes}
    shared = sorted(first & set().union(*({t.name, *t.classes} for t in tested)))
    if shared:
        raise InputError(
            f"{len(shared)} class(es) are in calibration and in test: {', '.join(shared[:10])}; split the classes first"
        )

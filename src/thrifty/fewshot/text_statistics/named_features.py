"""Features of classes that have a text each, their statistics, and splits of them by class."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.classifier import Labels
from thrifty.fewshot.preprocess import Array, InputError, OptionError

Texts = Mapping[Any, npt.ArrayLike]  # label -> text embedding (d_t,)


@dataclass(frozen=True)
class Selection:
    """A line of the selection log: what was chosen, on which data, and how good it looked there."""

    what: str
    chosen: str
    on: str
    score: float | None  # of the chosen one, in the unit that `what` names; None: nothing was compared
    tried: int  # candidates

    def __str__(self) -> str:
        if self.score is None:
            return f"{self.what}: {self.chosen} (from {self.on})"
        return f"{self.what}: {self.chosen} (of {self.tried}, on {self.on}; {self.score:.4g})"


@dataclass(frozen=True, eq=False)
class NamedFeatures:
    """Feature rows, their labels, and one text embedding per class.

    features: (n, d). labels: (n,). texts: label -> (d_t,); it may hold more classes than `labels`.
    Raises InputError, with every fault found, for shapes that do not match, NaN, or a label without text.

    >>> NamedFeatures(np.eye(2), ["cat", "dog"], {"cat": [0.0], "dog": [1.0]}).classes
    array(['cat', 'dog'], dtype='<U3')
    """

    features: npt.NDArray[Any]
    labels: Labels
    texts: Texts

    def __post_init__(self) -> None:
        x, y = np.asarray(self.features), np.asarray(self.labels)
        faults = []
        if x.ndim != 2 or not x.size:
            faults.append(f"features have shape {x.shape}; they must be (n, d), not empty")
        elif not np.isfinite(x).all():
            faults.append("features have NaN or infinite values")
        if y.shape != x.shape[:1]:
            faults.append(f"labels have shape {y.shape}; they must be ({len(x)},), one per feature row")
        if faults:
            raise InputError("; ".join(faults))
        object.__setattr__(self, "features", x)
        object.__setattr__(self, "labels", y)
        embeddings(self.texts, self.classes)

    @property
    def classes(self) -> Labels:
        """The labels that have samples, sorted (C,)."""
        found: Labels = np.unique(self.labels)
        return found

    @property
    def text_rows(self) -> Array:
        """The text embeddings of `classes` (C, d_t)."""
        return embeddings(self.texts, self.classes)

    def only(self, classes: npt.ArrayLike) -> NamedFeatures:
        """Return the samples of some classes, with their texts."""
        wanted = np.unique(np.asarray(classes))
        keep = np.isin(self.labels, wanted)
        return NamedFeatures(self.features[keep], self.labels[keep], {c: self.texts[c] for c in wanted.tolist()})


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """What one class's features look like: mean, spread, count; classes in sorted order."""

    classes: Labels  # (C,)
    counts: npt.NDArray[np.int64]  # (C,)
    means: Array  # (C, d)
    spreads: Array  # (C, d) standard deviations, or (C, d, d) covariances; NaN where a class has one sample
    within: Array  # (d,) pooled within-class variance, n - C degrees of freedom


def class_statistics(x_nd: Array, y_n: Labels, full: bool = False) -> ClassStatistics:
    """Return the mean and the spread (ddof = 1) of each class.

    x_nd: (n, d). y_n: (n,). full: covariances instead of standard deviations.

    >>> class_statistics(np.array([[0.0], [2.0], [5.0]]), np.array([0, 0, 1])).means.tolist()
    [[1.0], [5.0]]
    """
    classes, index, counts = np.unique(y_n, return_inverse=True, return_counts=True)
    d = x_nd.shape[1]
    means = np.zeros((len(classes), d))
    np.add.at(means, index, x_nd)
    means /= counts[:, None]
    rests = x_nd - means[index]
    freedom = np.maximum(counts - 1, 1)
    if full:
        spreads = np.stack([rests[index == c].T @ rests[index == c] / freedom[c] for c in range(len(classes))])
    else:
        sums = np.zeros((len(classes), d))
        np.add.at(sums, index, rests**2)
        spreads = np.sqrt(sums / freedom[:, None])
    spreads[counts < 2] = np.nan
    within = (rests**2).sum(axis=0) / max(len(x_nd) - len(classes), 1)
    return ClassStatistics(classes, counts.astype(np.int64), means, spreads, within)


def embeddings(texts: Texts, classes: Labels) -> Array:
    """Return the text embeddings of `classes` as (C, d_t); raise InputError naming those that are missing or odd."""
    missing = [c for c in classes.tolist() if c not in texts]
    if missing:
        raise InputError(f"{len(missing)} class(es) have no text embedding: {', '.join(map(repr, missing[:20]))}")
    rows = [np.asarray(texts[c], np.float64) for c in classes.tolist()]
    width = rows[0].shape
    odd = [c for c, r in zip(classes.tolist(), rows, strict=True) if r.shape != width or not np.isfinite(r).all()]
    if len(width) != 1 or odd:
        shown = ", ".join(map(repr, odd[:20])) or repr(classes.tolist()[0])
        raise InputError(f"text embeddings must be finite vectors of one length; not so: {shown}")
    return np.stack(rows)


def split_classes(
    classes: Sequence[Hashable] | Labels,
    shares: Sequence[float],
    rng: np.random.Generator,
    groups: Mapping[Any, Hashable] | None = None,
) -> list[Labels]:
    """Return disjoint sets of classes, at random, about `shares` of them each.

    shares: positive, adding up to one, e.g. (0.6, 0.2, 0.2) for base, validation and test classes. groups: class ->
    group; the classes of a group stay together, so that near siblings never stand on both sides of a split.

    >>> [len(part) for part in split_classes(range(10), (0.6, 0.2, 0.2), np.random.default_rng(0))]
    [6, 2, 2]
    """
    names = np.unique(np.asarray(classes))
    if not len(shares) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise OptionError(f"shares is {tuple(shares)}; it must be positive numbers adding up to 1")
    groups_of = [c if groups is None else groups[c] for c in names.tolist()]
    order = sorted(set(groups_of), key=str)
    rng.shuffle(order)
    size = {g: groups_of.count(g) for g in order}
    ends = np.round(np.cumsum(shares) * len(names))
    place, seen, part = {}, 0, 0
    for group in order:
        # the part that holds the middle of the group
        while part < len(ends) - 1 and seen + size[group] / 2 > ends[part]:
            part += 1
        place[group] = part
        seen += size[group]
    where = np.array([place[g] for g in groups_of])
    found = [names[where == i] for i in range(len(shares))]
    if not all(len(part) for part in found):
        raise OptionError(f"{len(order)} groups cannot be split by {tuple(shares)}: a part would be empty")
    return found

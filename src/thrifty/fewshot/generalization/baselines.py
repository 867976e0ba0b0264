"""What the forecast is compared with: leave-one-out, and a line through the Davies-Bouldin index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.generalization.moments import Ints, blocks, inverse_root
from thrifty.fewshot.preprocess import Array, InputError, OptionError


def _by_class(support: npt.ArrayLike, labels: npt.ArrayLike) -> list[Array]:
    x_nd, y_n = np.asarray(support, np.float64), np.asarray(labels)
    x_nd = x_nd - x_nd.mean(axis=0)
    found = [x_nd[y_n == c] for c in np.unique(y_n)]
    if len(found) < 2 or min(len(x) for x in found) < 2:
        raise InputError("leave-one-out needs two classes, and two shots of each")
    return found


def leave_one_out(support: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the error of nearest class mean when one shot of *every* class is held out at a time.

    support: (n, d), labels: (n,). It estimates the error with one shot less, so it is pessimistic for few shots.
    Classes with fewer shots than the largest sit out, whole, in the last folds. Mean over classes of their errors.

    >>> leave_one_out([[0.0], [1.0], [5.0], [6.0]], [0, 0, 1, 1])
    0.0
    """
    classes = _by_class(support, labels)
    wrong = [[] for _ in classes]  # type: list[list[bool]]
    for i in range(max(len(x) for x in classes)):
        means = np.stack([(np.delete(x, i, axis=0) if i < len(x) else x).mean(axis=0) for x in classes])
        for c, x in enumerate(classes):
            if i < len(x):
                wrong[c].append(int(((means - x[i]) ** 2).sum(axis=1).argmin()) != c)
    return float(np.mean([np.mean(w) for w in wrong]))


def leave_one_shot_out(support: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the error when a single shot is held out at a time and the other classes keep all of theirs.

    Far too pessimistic for few shots: the held-out class has moved away, the others have not. For comparison only.
    """
    classes = _by_class(support, labels)
    means = np.stack([x.mean(axis=0) for x in classes])
    errors = []
    for c, x in enumerate(classes):
        away = ((x[:, None] - means) ** 2).sum(axis=2)
        away[:, c] = (((x - means[c]) * len(x) / (len(x) - 1)) ** 2).sum(axis=1)
        errors.append((away.argmin(axis=1) != c).mean())
    return float(np.mean(errors))


def leave_one_out_episodes(features: npt.ArrayLike, support: Ints) -> Array:
    """Return `leave_one_out` (E,) of many supports of equal shots; features: (n, d), support: (E, C, k) rows."""
    table = np.asarray(features)
    shots = support.shape[2]
    if shots < 2:
        raise InputError("leave-one-out needs two shots of every class")
    found = []
    for rows in blocks(support, table.shape[1]):
        x = table[rows].astype(np.float64)
        x -= x.mean(axis=(1, 2), keepdims=True)
        means = (x.sum(axis=2, keepdims=True) - x) / (shots - 1)  # (e, C, k, d): without shot i
        tests, means = x.transpose(0, 2, 1, 3), means.transpose(0, 2, 1, 3)
        scores = tests @ means.transpose(0, 1, 3, 2) - 0.5 * (means * means).sum(axis=3)[:, :, None]
        right = scores.argmax(axis=3) == np.arange(support.shape[1])
        found.append(1.0 - right.mean(axis=(1, 2)))
    return np.concatenate(found)


def davies_bouldin(support: npt.ArrayLike, labels: npt.ArrayLike, space: str = "full") -> float:
    """Return the Davies-Bouldin index: mean over classes of the worst (S_i + S_j) / |m_i - m_j|.

    S: mean distance of the shots to their class mean. space: "full", or "frame" (projected on the span of the
    means). inf where two means are equal. Source: Davies and Bouldin 1979.
    """
    if space not in ("full", "frame"):
        raise OptionError(f"space is {space!r}; it must be 'full' or 'frame'")
    classes = _by_class(support, labels)
    means = np.stack([x.mean(axis=0) for x in classes])
    centred = means - means.mean(axis=0)
    rests = [x - m for x, m in zip(classes, means, strict=True)]
    if space == "frame":
        root = inverse_root((centred @ centred.T)[None])[0][0]
        rests = [r @ centred.T @ root for r in rests]
    spread = np.array([np.linalg.norm(r, axis=1).mean() for r in rests])
    gaps = np.linalg.norm(means[:, None] - means, axis=2)
    np.fill_diagonal(gaps, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num((spread[:, None] + spread) / gaps, nan=np.inf, posinf=np.inf)
    return float(ratios.max(axis=1).mean())


@dataclass(frozen=True)
class Line:
    """A straight line from an index to an error, fitted on validation episodes."""

    slope: float
    intercept: float

    @classmethod
    def through(cls, index: npt.ArrayLike, error: npt.ArrayLike) -> Line:
        """Fit by least squares; index and error: (E,), finite. A constant index gives the mean error."""
        x, y = np.asarray(index, np.float64), np.asarray(error, np.float64)
        if x.shape != y.shape or not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise InputError("index and error must be finite and of equal length")
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0 else 0.0
        return cls(slope, float(y.mean()) - slope * float(x.mean()))

    def __call__(self, index: Any) -> Any:
        """Return the error at an index, kept in [0, 1]."""
        return np.clip(self.slope * np.asarray(index) + self.intercept, 0.0, 1.0)

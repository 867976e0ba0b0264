"""Maps from text to a vector of class statistics: z-scored on the base classes, ridge regression or a perceptron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from thrifty.fewshot.preprocess import Array, OptionError
from thrifty.fewshot.text_statistics.named_features import Selection

Progress = Callable[[int, int], None]  # steps done, steps in all
Predict = Callable[[Array], Array]  # z-scored texts (C, d_t) -> z-scored targets (C, m)


class Method(Protocol):
    """How to learn a map; the arrays are z-scored by the training classes."""

    def learn(
        self, t: Array, y: Array, t_held: Array, y_held: Array, rng: np.random.Generator, progress: Progress | None
    ) -> tuple[Predict, Selection]:
        """Return the map learned on t (C, d_t), y (C, m); only the choice of an epoch may look at what is held out."""
        ...


@dataclass(frozen=True)
class Ridge:
    """Linear map with an L2 penalty, in closed form; the penalty by leave-one-class-out on the base classes.

    W = (T'T + penalty I)^-1 T'Y on z-scored data. The leave-one-out errors are exact: residual / (1 - leverage).
    """

    penalties: tuple[float, ...] = tuple(float(p) for p in 10.0 ** np.arange(-1, 5.01, 0.25))

    def __post_init__(self) -> None:
        if not self.penalties or not all(0 < p < np.inf for p in self.penalties):
            raise OptionError(f"Ridge.penalties is {self.penalties}; it must be positive numbers, at least one")

    def learn(
        self, t: Array, y: Array, t_held: Array, y_held: Array, rng: np.random.Generator, progress: Progress | None
    ) -> tuple[Predict, Selection]:
        """Return the map and the choice of the penalty; what is held out is not looked at."""
        u, s, vt = np.linalg.svd(t, full_matrices=False)
        projected = u.T @ y
        errors = []
        for penalty in self.penalties:
            shrunk = s**2 / (s**2 + penalty)
            # the constant is fitted too (by the z-score): 1 / n of every leverage
            leverage = (u**2 * shrunk).sum(axis=1) + 1.0 / len(t)
            left = (y - u @ (shrunk[:, None] * projected)) / np.maximum(1.0 - leverage, 1e-12)[:, None]
            errors.append(float((left**2).mean()))
        best = int(np.argmin(errors))
        weights = vt.T @ ((s / (s**2 + self.penalties[best]))[:, None] * projected)
        chosen = Selection(
            "ridge penalty, squared error of a class left out / variance", f"{self.penalties[best]:.4g}",
            f"{len(t)} base classes, leave one out", errors[best], len(errors),
        )  # fmt: skip
        return LinearMap(weights), chosen


@dataclass(frozen=True, eq=False)
class LinearMap:
    """t @ weights; z-scored on both sides."""

    weights: Array  # (d_t, m)

    def __call__(self, t: Array) -> Array:
        """Return z-scored targets (C, m) for z-scored texts (C, d_t)."""
        found: Array = t @ self.weights
        return found


@dataclass(frozen=True, eq=False)
class TextMap:
    """A learned map with its z-scores: text embedding (C, d_t) -> statistics (C, m)."""

    text_mean: Array
    text_scale: Array
    mean: Array  # (m,) of the training classes: the constant guess
    scale: Array
    predict: Predict

    def __call__(self, t: Array) -> Array:
        """Return the predicted statistics (C, m), in their own units."""
        return self.predict((t - self.text_mean) / self.text_scale) * self.scale + self.mean


def learn_map(
    method: Method, t: Array, y: Array, t_held: Array, y_held: Array,
    rng: np.random.Generator, progress: Progress | None = None,
) -> tuple[TextMap, Selection]:  # fmt: skip
    """Return the map from texts to targets learned on base classes, and the log of its choice.

    t: (C, d_t). y: (C, m). t_held, y_held: the same of held-out classes. All z-scores are those of t and y.
    """
    t_mean, t_scale = _z(t)
    y_mean, y_scale = _z(y)
    predict, chosen = method.learn(
        (t - t_mean) / t_scale, (y - y_mean) / y_scale, (t_held - t_mean) / t_scale, (y_held - y_mean) / y_scale,
        rng, progress,
    )  # fmt: skip
    return TextMap(t_mean, t_scale, y_mean, y_scale, predict), chosen


def _z(rows: Array) -> tuple[Array, Array]:
    """Return mean and scale of each column; a constant column has scale 1."""
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    flat = scale <= 1e-12 * (1e-300 + np.abs(rows).max(axis=0))
    return mean, np.where(flat, 1.0, scale)

"""The perceptron of the paper in NumPy: Linear, batch norm, GELU, dropout, Linear; AdamW; the best epoch is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import need
from thrifty.fewshot.classifier import positive
from thrifty.fewshot.preprocess import Array, OptionError
from thrifty.fewshot.text_statistics.named_features import Selection
from thrifty.fewshot.text_statistics.regressors import Progress

Real = npt.NDArray[Any]
Weights = dict[str, Real]
EPS = 1e-5  # of batch norm
MOMENTUM = 0.1  # of its running statistics
BETAS = (0.9, 0.999)  # of AdamW
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Perceptron:
    """Two layers: Linear(d_t, E), batch norm, GELU, dropout, Linear(E, m), E = expansion * m; squared error.

    One training item per class. The weights kept are those of the epoch with the least error on the held-out
    classes. Defaults are those of the paper's code (arXiv:2311.14544).
    """

    expansion: float = 4.0  # hidden width over the number of targets
    epochs: int = 50
    batch: int = 128  # classes per step
    rate: float = 1e-3  # constant
    decay: float = 1e-2  # AdamW weight decay
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("expansion", "epochs", "batch", "rate"):
            positive(f"Perceptron.{name}", getattr(self, name))
        if self.batch < 2:
            raise OptionError(f"Perceptron.batch is {self.batch}; batch norm needs at least 2 classes")
        if not 0 <= self.dropout < 1 or not 0 <= self.decay < np.inf:
            raise OptionError(f"Perceptron.dropout is {self.dropout}, decay {self.decay}; dropout must be in [0, 1), "
                              "decay at least 0")  # fmt: skip

    def learn(
        self, t: Array, y: Array, t_held: Array, y_held: Array, rng: np.random.Generator, progress: Progress | None
    ) -> tuple[PerceptronMap, Selection]:
        """Return the map of the best epoch; t_held and y_held choose the epoch and nothing else."""
        hidden = max(1, round(self.expansion * y.shape[1]))
        t, y = t.astype(np.float32), y.astype(np.float32)
        weights = initial(t.shape[1], hidden, y.shape[1], rng)
        state = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
        running = {"mean": np.zeros(hidden, np.float32), "var": np.ones(hidden, np.float32)}
        best, best_epoch, best_map, step = np.inf, 0, None, 0
        for epoch in range(self.epochs):
            for rows in batches(len(t), self.batch, rng):
                kept = (rng.random((len(rows), hidden), np.float32) >= self.dropout) / np.float32(1 - self.dropout)
                _, gradients, seen = loss_and_gradients(weights, t[rows], y[rows], kept)
                follow(running, seen, len(rows))
                step += 1
                self._update(weights, gradients, state, step)
            now = PerceptronMap(weights, running)
            loss = float(((now(t_held) - y_held) ** 2).mean())
            if loss < best:
                best, best_epoch, best_map = loss, epoch + 1, now.copy()
            if progress is not None:
                progress(epoch + 1, self.epochs)
        if best_map is None:
            raise OptionError(f"the perceptron's held-out error is not finite at rate {self.rate}; lower the rate")
        return best_map, Selection(
            "epoch, squared error / variance", str(best_epoch), f"{len(t_held)} validation classes", best, self.epochs
        )

    def _update(self, weights: Weights, gradients: Weights, state: dict[str, tuple[Real, Real]], step: int) -> None:
        """AdamW, in place (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""
        for name, g in gradients.items():
            w, (m, v) = weights[name], state[name]
            w *= np.float32(1 - self.rate * self.decay)
            m += np.float32(1 - BETAS[0]) * (g - m)
            v += np.float32(1 - BETAS[1]) * (g * g - v)
            size = np.float32(self.rate / (1 - BETAS[0] ** step))
            w -= size * m / (np.sqrt(v) / np.float32(np.sqrt(1 - BETAS[1] ** step)) + np.float32(ADAM_EPS))


@dataclass(frozen=True, eq=False)
class PerceptronMap:
    """A trained perceptron in its inference form."""

    weights: Weights
    running: Weights  # "mean" and "var" of batch norm

    def __call__(self, t: Array) -> Array:
        """Return the outputs (C, m) for texts (C, d_t), both z-scored."""
        w, r = self.weights, self.running
        pre = t.astype(np.float32) @ w["in"] + w["in_bias"]
        normal = (pre - r["mean"]) / np.sqrt(r["var"] + np.float32(EPS))
        out = gelu(normal * w["gain"] + w["shift"])[0] @ w["out"] + w["out_bias"]
        found: Array = out.astype(np.float64)
        return found

    def copy(self) -> PerceptronMap:
        """Return a map that shares no array with this one."""
        return PerceptronMap(
            {k: v.copy() for k, v in self.weights.items()}, {k: v.copy() for k, v in self.running.items()}
        )


def initial(inputs: int, hidden: int, outputs: int, rng: np.random.Generator) -> Weights:
    """Return weights uniform in +-1/sqrt(fan in), gains one, shifts zero; float32."""

    def uniform(fan_in: int, *shape: int) -> Real:
        bound = 1.0 / np.sqrt(fan_in)
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return {
        "in": uniform(inputs, inputs, hidden), "in_bias": uniform(inputs, hidden),
        "gain": np.ones(hidden, np.float32), "shift": np.zeros(hidden, np.float32),
        "out": uniform(hidden, hidden, outputs), "out_bias": uniform(hidden, outputs),
    }  # fmt: skip


def loss_and_gradients(w: Weights, t: Real, y: Real, kept: Real) -> tuple[float, Weights, Weights]:
    """Return the mean squared error, its gradients, and the batch's mean and variance before batch norm.

    t: (B, d_t). y: (B, m). kept: (B, E) dropout factors, 0 or 1 / (1 - p).
    """
    pre = t @ w["in"] + w["in_bias"]
    mean, var = pre.mean(axis=0), pre.var(axis=0)
    inverse = 1.0 / np.sqrt(var + pre.dtype.type(EPS))
    normal = (pre - mean) * inverse
    active, slope = gelu(normal * w["gain"] + w["shift"])
    dropped = active * kept
    error = dropped @ w["out"] + w["out_bias"] - y
    d_out = error * pre.dtype.type(2.0 / error.size)
    d_scaled = (d_out @ w["out"].T) * kept * slope
    d_normal = d_scaled * w["gain"]
    d_pre = inverse * (d_normal - d_normal.mean(axis=0) - normal * (d_normal * normal).mean(axis=0))
    gradients = {
        "in": t.T @ d_pre, "in_bias": d_pre.sum(axis=0),
        "gain": (d_scaled * normal).sum(axis=0), "shift": d_scaled.sum(axis=0),
        "out": dropped.T @ d_out, "out_bias": d_out.sum(axis=0),
    }  # fmt: skip
    return float((error**2).mean()), gradients, {"mean": mean, "var": var}


def gelu(x: Real) -> tuple[Real, Real]:
    """Return x Phi(x) and its derivative, the exact form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    phi = (0.5 + 0.5 * need("scipy.special", extra="fewshot").erf(x / np.sqrt(2.0))).astype(x.dtype)
    density = (np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)).astype(x.dtype)
    return x * phi, phi + x * density


def follow(running: Weights, seen: Weights, count: int) -> None:
    """Move the running statistics toward those of a batch, in place; the variance without bias."""
    running["mean"] += np.float32(MOMENTUM) * (seen["mean"] - running["mean"])
    running["var"] += np.float32(MOMENTUM) * (seen["var"] * np.float32(count / (count - 1)) - running["var"])


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of one epoch in random order; a last row alone joins the batch before it."""
    order = rng.permutation(count)
    starts = [i for i in range(0, count, size) if count - i > 1 or i == 0]
    for i, start in enumerate(starts):
        yield order[start : starts[i + 1] if i + 1 < len(starts) else count]

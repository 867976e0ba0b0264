"""Kernels of a candidate pool: how good each candidate is, and how alike two are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError, close_to
from thrifty.llm.d5p4 import compiled

SIMILARITIES = ("rbf", "cosine")
FORMS = ("additive", "multiplicative")
QUALITIES = ("entropy", "masked_entropy", "self_certainty")
JITTER = 1e-6
LEAST = -1e4  # log-probabilities beneath count as this
_PIECE = 2**18  # numbers that are taken at once, so that they stay in the processor's cache


def quality(
    log_p: Tensor, kind: str = "entropy", masked: Tensor | None = None, points: bool = False,
    precision: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Return the raw quality (n,) of candidates from their log-probabilities (n, t, v), float64, higher is better.

    "entropy": minus the mean entropy over positions. Decided positions have none, so a candidate that has decided more
    looks better; "masked_entropy" takes the mean over the masked positions (n, t) only. "self_certainty": mean over
    positions and tokens of -log p.
    points: decided positions are point masses (as `Subs` makes them), so that only the masked ones are read. precision:
    of the sums over the vocabulary; float32 on the CPU runs compiled where numba is installed. Raises KnobError.
    """
    if kind not in QUALITIES:
        raise KnobError(f"quality is '{kind}'; {close_to(kind, QUALITIES)}")
    if masked is None and (points or kind == "masked_entropy"):
        raise KnobError(f"quality '{kind}' needs to know which positions are masked")
    n, t, v = log_p.shape
    read = torch.ones(n, t, dtype=torch.bool, device=log_p.device)
    if masked is not None and (points or kind == "masked_entropy"):
        read = masked
    found = torch.zeros(n, t, dtype=torch.float64, device=log_p.device)
    if kind == "self_certainty":
        found.fill_(-LEAST * (v - 1) / v)  # of a point mass
    found[read] = -_positions(log_p, read, kind, precision)
    return found.sum(1) / read.sum(1).clamp_min(1) if kind == "masked_entropy" else found.mean(1)


def _positions(log_p: Tensor, read: Tensor, kind: str, precision: torch.dtype) -> Tensor:
    """Return the entropy at the positions to be read, or for self-certainty their mean log p, in order; float64."""
    certain = kind == "self_certainty"
    if log_p.device.type == "cpu" and precision == torch.float32 and compiled.available():
        blocks = zip(log_p.detach(), read, strict=True)
        sums = compiled.mean_log if certain else compiled.entropies
        parts = [sums(b.float().contiguous().numpy(), r.nonzero()[:, 0].numpy()) for b, r in blocks if bool(r.any())]
        return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts])).double()
    found = []
    step = max(1, (_PIECE if log_p.device.type == "cpu" else 2**26) // log_p.shape[2])
    for rows, places in zip(*(torch.split(i, step) for i in read.nonzero(as_tuple=True)), strict=True):
        part = log_p[rows, places].to(precision).clamp_min_(LEAST)
        found.append((part.mean(1) if certain else -torch.exp(part).mul_(part).sum(1)).double())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=log_p.device)


def normalised(raw: Tensor) -> Tensor:
    """Return qualities (n,) brought to [0, 1] over the whole pool; all 0 where they are equal.

    >>> normalised(torch.tensor([-3.0, -1.0, -2.0])).tolist()
    [0.0, 1.0, 0.5]
    """
    if not torch.isfinite(raw).all():
        raise DataError(f"{int((~torch.isfinite(raw)).sum())} qualities are not finite; check the model's outputs")
    low, high = raw.min(), raw.max()
    return (raw - low) / (high - low).clamp_min(1e-12)


def gram(states: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return the cosines (n, n) of flattened states (n, ...), float64, computed in pieces; ones on the diagonal.

    precision: of the products within a piece; states in float64 stay so. Raises DataError where states are not finite.
    """
    return shared_gram(states, len(states), lambda part: part, precision)


def shared_gram(
    states: Tensor, n: int, gather: Callable[[Tensor], Tensor], precision: torch.dtype = torch.float32
) -> Tensor:
    """Return the cosines (n, n) of n states of which this process has some (m, ...); gather: (m, p) -> all (n, p).

    What the states of a piece have in common is taken out before they are multiplied, so that an error of float32 is in
    proportion to their differences: candidates differ by little. Raises DataError where states are not finite.
    """
    flat = states.reshape(len(states), -1)
    kind = torch.float64 if torch.float64 in (precision, flat.dtype) else precision
    found = torch.zeros(n, n, dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, max(1, _PIECE // n), dim=1):
        whole = gather(part).to(kind)
        centre = whole.mean(0)
        apart = whole - centre
        along = (apart @ centre).double()
        found += (apart @ apart.T).double() + (along[:, None] + along + centre.double().square().sum())
    if not torch.isfinite(found).all():
        if kind != torch.float64:  # of great states, squares may leave float32
            return shared_gram(states, n, gather, torch.float64)
        raise DataError("hidden states are not finite; check the model")
    length = found.diagonal().clamp_min(1e-300).sqrt()
    found = found / (length[:, None] * length)
    found = (found + found.T) / 2
    return found.fill_diagonal_(1.0)


def similarity(cosines: Tensor, kind: str = "rbf", gamma: float = 1.0) -> Tensor:
    """Return the similarity (n, n) from cosines (n, n). rbf: exp(-gamma |x_i - x_j|^2) of the unit vectors."""
    if kind not in SIMILARITIES:
        raise KnobError(f"similarity is '{kind}'; {close_to(kind, SIMILARITIES)}")
    if kind == "cosine":
        return cosines
    if not gamma > 0:
        raise KnobError(f"gamma is {gamma}; it must be positive")
    return torch.exp(-gamma * (2.0 - 2.0 * cosines).clamp_min(0.0))


def kernel(q: Tensor, s: Tensor, form: str = "additive", beta: float = 1.0) -> Tensor:
    """Return the kernel (n, n) of a pool with qualities q (n,) in [0, 1] and similarity s (n, n).

    "additive" (D5P4+): beta s + diag(q); a negative beta means s alone; more beta is more diversity. "multiplicative"
    (D5P4x): D s D + 1e-6 I with D = diag(exp(beta (q - max q))); more beta is more quality; up to 1e-5 s + 1e-6 I.

    Source: D5P4 (2026) and its released code.
    """
    if form not in FORMS:
        raise KnobError(f"form is '{form}'; {close_to(form, FORMS)}")
    if s.shape != (len(q), len(q)):
        raise DataError(f"{len(q)} qualities and a similarity of shape {tuple(s.shape)}")
    q, s = q.double(), s.double()
    eye = torch.eye(len(q), dtype=torch.float64, device=q.device)
    if form == "additive":
        return s if beta < 0 else beta * s + torch.diag(q)
    if beta <= 1e-5:
        return s + JITTER * eye
    d = torch.exp(beta * (q - q.max()))
    return d[:, None] * s * d + JITTER * eye

"""Kernels of a candidate pool: how good each candidate is, and how alike two are."""

from __future__ import annotations

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError, close_to

SIMILARITIES = ("rbf", "cosine")
FORMS = ("additive", "multiplicative")
QUALITIES = ("entropy", "masked_entropy", "self_certainty")
JITTER = 1e-6
_CHUNK = 2**24  # numbers of the flattened states that are in float64 at once


def quality(log_p: Tensor, kind: str = "entropy", masked: Tensor | None = None) -> Tensor:
    """Return the raw quality (n,) of candidates from their log-probabilities (n, t, v), float64, higher is better.

    "entropy": minus the mean entropy over positions. Decided positions have none, so a candidate that has decided more
    looks better; "masked_entropy" takes the mean over the masked positions (n, t) only. "self_certainty": mean over
    positions and tokens of -log p.
    """
    if kind not in QUALITIES:
        raise KnobError(f"quality is '{kind}'; {close_to(kind, QUALITIES)}")
    found = log_p.double()
    if kind == "self_certainty":
        return -found.clamp_min(-1e4).mean(dim=(1, 2))
    entropy = -(found.exp() * found.clamp_min(-1e4)).sum(-1)
    if kind == "entropy":
        return -entropy.mean(1)
    if masked is None:
        raise KnobError("quality 'masked_entropy' needs to know which positions are masked")
    return -(entropy * masked).sum(1) / masked.sum(1).clamp_min(1)


def normalised(raw: Tensor) -> Tensor:
    """Return qualities (n,) brought to [0, 1] over the whole pool; all 0 where they are equal.

    >>> normalised(torch.tensor([-3.0, -1.0, -2.0])).tolist()
    [0.0, 1.0, 0.5]
    """
    if not torch.isfinite(raw).all():
        raise DataError(f"{int((~torch.isfinite(raw)).sum())} qualities are not finite; check the model's outputs")
    low, high = raw.min(), raw.max()
    return (raw - low) / (high - low).clamp_min(1e-12)


def gram(states: Tensor) -> Tensor:
    """Return the cosines (n, n) of flattened states (n, ...), float64, computed in pieces; ones on the diagonal."""
    flat = states.reshape(len(states), -1)
    if not torch.isfinite(flat).all():
        raise DataError("hidden states are not finite; check the model")
    piece = max(1, _CHUNK // len(flat))
    found = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for start in range(0, flat.shape[1], piece):
        part = flat[:, start : start + piece].double()
        found += part @ part.T
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

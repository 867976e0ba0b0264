"""Scalar products of all pairs of rows, with half of the multiplications of a plain product, and a quick gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 16  # elements from which a matrix of features is multiplied in panels of rows, on the CPU
PANEL = 32  # rows of a panel
FAR = 0.75  # share of the mean in the squared lengths from which rows are centred before distances are computed


class _Gram(torch.autograd.Function):
    """h @ h.T: little more than half of the products going forward, and one product instead of two going back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        """Return the scalar products; only the rows are kept for the gradient."""
        ctx.save_for_backward(h)
        return _panels(h) if _large(h) else h @ h.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient of the rows."""
        (h,) = ctx.saved_tensors
        return product(grad + grad.T, h)


def gram(h: Tensor) -> Tensor:
    """Return the scalar products of the rows of h: (n, d), as (n, n).

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[5.0, 11.0], [11.0, 25.0]]
    """
    products: Tensor = _Gram.apply(h)  # type: ignore[no-untyped-call]
    return products


def gram_for_distances(h: Tensor) -> Tensor:
    """Return scalar products of the rows of h: (n, d), as (n, n), whose differences lose little to cancellation.

    They are those of the rows less their mean, whose distances are the same. Centring reads and writes all features, so
    large ones on the CPU are left where they are, unless their mean makes up more than FAR of the squared lengths.
    """
    if _large(h):
        products = gram(h)
        with torch.no_grad():
            near = bool(products.mean() * len(h) <= FAR * products.trace())  # n |mean|^2; NaN is not near
        if near:
            return products
    return gram(h - h.detach().mean(0))


def _large(h: Tensor) -> bool:
    return h.device.type == "cpu" and h.numel() >= LARGE


def _panels(h: Tensor) -> Tensor:
    """Return h @ h.T, exactly symmetric: every panel of rows times the rows up to its end; the rest is mirrored."""
    products = h.new_zeros(len(h), len(h))
    for start in range(0, len(h), PANEL):
        end = min(start + PANEL, len(h))
        products[start:end, :end] = product(h[start:end], h[:end].T)
    return products.tril() + products.tril(-1).T


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b: (n, m) and (m, d), as (n, d); no gradient flows through it.

    Large float32 matrices on the CPU go to oneDNN, which was quicker than MKL, behind `a @ b`, on an AMD processor (see
    docs/objectives.md). It is quick for rows or columns without gaps only: others stay with `a @ b`.
    """
    if _quick(a, b):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return found
    return a @ b


def _quick(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN multiplies these, and without its reference kernel."""
    both = (a, b)
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() for t in both)
    large = max(a.numel(), b.numel()) >= LARGE
    dense = a.is_contiguous() and (b.is_contiguous() or b.T.is_contiguous())
    return ONEDNN and plain and large and dense


def _has_onednn() -> bool:
    """Whether this torch has oneDNN and its product, which is not a public function: tried once, on a small case."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    row = torch.ones(1, 2, device="cpu")
    try:
        return float(torch.ops.mkldnn._linear_pointwise(row, row, None, "none", [], "")) == 2.0
    except (AttributeError, RuntimeError, TypeError):
        return False


ONEDNN = _has_onednn()

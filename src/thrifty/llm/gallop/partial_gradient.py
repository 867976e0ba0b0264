"""Weight gradients of linear layers at some entries only: what is not chosen is not computed.

For y = x W^T the gradient at (r, c) is the product of column r of dy and column c of x over all tokens. Three ways:

    dense    the whole matrix, one matrix product, of which the chosen entries are taken
    rows     the product for the rows that hold chosen entries, of which the chosen entries are taken
    entries  each chosen entry by itself: torch.sparse.sampled_addmm, float32, on the CPU

The operations are those of `tokens * (rows * columns)`, `tokens * (chosen rows * columns)`, `tokens * chosen`; `way_of`
picks the cheapest by measured constants. The last two differ from the first by the rounding of sums.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WAYS", "PartialGradient", "way_of"]

WAYS = ("auto", "dense", "rows", "entries")
# Cost in dense products of the same number format: a fixed share, and a factor of the density or the share of rows.
# Fitted by hand to a trial on one core with bfloat16 instructions; experiments/gallop_cost times the ways again.
# On another machine they are a guess.
_ENTRIES = {torch.float32: (0.06, 4.0), torch.bfloat16: (0.3, 14.0)}
_ROWS = {torch.float32: (0.02, 1.05), torch.bfloat16: (0.1, 1.05)}
# The memory of `entries`: both factors once more, transposed, float32.


def way_of(device: torch.device, dtype: torch.dtype, density: float, row_share: float) -> str:
    """Return the cheapest way for a weight of which `density` of the entries and `row_share` of the rows are chosen.

    >>> cpu = torch.device("cpu")
    >>> way_of(cpu, torch.float32, density=0.01, row_share=1.0), way_of(cpu, torch.float32, 1.0, 1.0)
    ('entries', 'dense')
    """
    kind = dtype if dtype in _ROWS else torch.float32
    costs = {"dense": 1.0, "rows": _ROWS[kind][0] + _ROWS[kind][1] * row_share}
    if device.type == "cpu":
        costs["entries"] = _ENTRIES[kind][0] + _ENTRIES[kind][1] * density
    return min(costs, key=costs.__getitem__)


class PartialGradient:
    """Makes one linear layer add the gradient of its chosen entries to a vector during the backward pass.

    layer: nn.Linear, or GPT-2's Conv1D (transposed); its weight must not require a gradient meanwhile.
    index: (k,) ascending flat indices of the weight. out: (k,) float32, to which the gradient is added.
    """

    def __init__(self, layer: nn.Module, transposed: bool, index: Tensor, out: Tensor, way: str) -> None:
        self.layer, self.transposed, self.out, self.way = layer, transposed, out, way
        weight = layer.weight
        assert isinstance(weight, Tensor)
        n_rows, self.columns = weight.shape
        kind = index.dtype
        rows = torch.div(index, self.columns, rounding_mode="floor")
        if way == "rows":
            self.rows, place = torch.unique(rows, return_inverse=True)
            self.index = (place * self.columns + index % self.columns).to(kind)
        else:
            self.ends = torch.zeros(n_rows + 1, dtype=kind, device=index.device)
            self.ends[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
            self.index = (index % self.columns).to(kind)
            self.grid = _grid(self.ends, self.index, out, (n_rows, self.columns))
        anchor = torch.zeros((), device=weight.device, requires_grad=True)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = _Linear.apply(x, weight, getattr(layer, "bias", None), anchor, self)  # type: ignore[no-untyped-call]
            return y

        layer.forward = forward

    def remove(self) -> None:
        """Give the layer its own forward back."""
        del self.layer.forward

    def flat_index(self) -> Tensor:
        """Return the ascending flat indices of the chosen entries, (k,)."""
        kind = self.index.dtype
        if self.way == "rows":
            place = torch.div(self.index, self.columns, rounding_mode="floor")
            rows = self.rows[place]
        else:
            rows = torch.repeat_interleave(self.ends.diff())
        flat: Tensor = (rows * self.columns + self.index % self.columns).to(kind)
        return flat

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient at the chosen entries, for dy (..., out) and x (..., in)."""
        left, right = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.transposed:
            left, right = right, left
        if self.way == "rows":
            part = left.index_select(1, self.rows).t() @ right
            self.out += part.view(-1).index_select(0, self.index)
            return
        torch.sparse.sampled_addmm(self.grid, left.t().float(), right.float(), out=self.grid)

    @property
    def bytes_kept(self) -> int:
        """Bytes of the indices."""
        kept: int = self.index.nbytes + (self.rows.nbytes if self.way == "rows" else self.ends.nbytes)
        return kept


def _grid(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a sparse matrix in CSR form over the memory of its arguments: writing to it writes to `values`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse matrices a beta
        return torch.sparse_csr_tensor(ends, columns, values, shape, check_invariants=False)


class _Linear(torch.autograd.Function):
    """The layer's own product; backward hands its factors to a PartialGradient instead of multiplying them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, to: PartialGradient
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.to, ctx.needs_x = to, x.requires_grad
        return nn.functional.linear(x, weight.t() if to.transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.to.add(dy, x)
        if not ctx.needs_x:
            return None, None, None, None, None
        there = weight.to(dy.dtype)  # under autocast they differ
        return dy @ (there.t() if ctx.to.transposed else there), None, None, None, None

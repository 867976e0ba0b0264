"""float32 masters of chosen entries, kept in the weight itself as far as it can hold them.

A float32 weight is its own master. A bfloat16 weight holds the master rounded to bfloat16; the 16 bits between it and
the master are kept beside it, 2 bytes an entry. Reading gives back what was written, but for masters exactly half way
between two bfloat16 numbers, which may come back one float32 step smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["read_masters", "rest_for", "write_masters"]


def rest_for(weight: Tensor, count: int) -> Tensor | None:
    """Return what must be kept beside a weight for the masters of `count` of its entries, (count,); None: nothing."""
    return None if weight.dtype == torch.float32 else torch.zeros(count, dtype=torch.int16, device=weight.device)


def read_masters(weight: Tensor, index: Tensor, rest: Tensor | None) -> Tensor:
    """Return the masters of the entries at `index`, (k,) float32, a new tensor.

    index: (k,) flat indices; rest: (k,) of `rest_for`.
    """
    stored = weight.detach().view(-1).index_select(0, index)
    if rest is None:
        return stored
    bits = (stored.view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)
    return bits.view(torch.float32)


def write_masters(weight: Tensor, index: Tensor, rest: Tensor | None, values: Tensor) -> None:
    """Set the masters, values (k,) float32, and with them the entries of the weight."""
    stored = values.to(weight.dtype)
    weight.detach().view(-1).index_copy_(0, index.to(torch.int64), stored)
    if rest is not None:
        exact = stored.view(torch.int16).to(torch.int32) << 16
        rest.copy_((values.view(torch.int32) - exact).clamp_(-(1 << 15), (1 << 15) - 1))

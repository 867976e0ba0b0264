"""The k largest of numbers that do not fit in one tensor: exact radix select over a stream.

The bit patterns of float32, put into the right order, are counted by their top 11 bits, then the next 11 inside the
bucket that holds the k-th largest, then the last 10; after that its pattern is known exactly. Memory: 2048 counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Stream", "ordered_bits", "threshold", "top_k"]

# Yields (name, flat index of the first score, scores (n,) float32); the same at every call.
Stream = Callable[[], Iterable[tuple[str, int, Tensor]]]
_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of each pass, from the top
_SIGN = 1 << 31


def ordered_bits(scores: Tensor) -> Tensor:
    """Return whole numbers, int64 in [0, 2^32), in the order of the scores (float32, no NaN); -0 equals 0.

    >>> ordered_bits(torch.tensor([-2.0, -0.0, 0.0, 1e-40, 3.0])).diff().sign().tolist()
    [1, 0, 1, 1]
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits & (_SIGN - 1), bits + _SIGN)


def threshold(stream: Stream, k: int) -> tuple[int, int]:
    """Return (t, ties): the ordered bits of the k-th largest score, and how many scores equal to it are among the k.

    1 <= k <= the number of scores.
    """
    prefix, left = 0, k
    for shift, width in _DIGITS:
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for _, _, scores in stream():
            bits = ordered_bits(scores)
            inside = bits[(bits >> (shift + width)) == prefix] if shift + width < 32 else bits
            counts += torch.bincount((inside >> shift) & ((1 << width) - 1), minlength=1 << width).cpu()
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, left))
        left -= int(from_top[place - 1]) if place else 0
        prefix = (prefix << width) | ((1 << width) - 1 - place)
    return prefix, left


def top_k(stream: Stream, k: int) -> dict[str, Tensor]:
    """Return the flat indices of the k largest scores by name, ascending, int64; of equal ones the first in the stream.

    A name without any is absent. k = 0 gives an empty dictionary.
    """
    if k < 1:
        return {}
    found: dict[str, list[Tensor]] = {}
    for name, indices in _chosen(stream, *threshold(stream, k)):
        found.setdefault(name, []).append(indices)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _chosen(stream: Stream, limit: int, ties: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the indices above the limit, and the first `ties` at it."""
    for name, start, scores in stream():
        bits = ordered_bits(scores)
        keep = bits > limit
        if ties:
            equal = (bits == limit).nonzero().flatten()[:ties]
            keep[equal] = True
            ties -= len(equal)
        indices = keep.nonzero().flatten()
        if len(indices):
            yield name, indices.cpu() + start

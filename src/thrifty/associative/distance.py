"""Distances between integer vectors, exact: how far queries are from anchors and codewords."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

METRICS = ("l2", "l1")  # squared Euclidean; sum of absolute differences, which needs no multiplier
EXACT_BITS = 53  # of float64: sums of products below this are exact in any order
AT_A_TIME = 1 << 22  # elements of a difference held at once


def distances(x_nd: Array, m_md: Array, metric: str, bits: int) -> Array:
    """Return int64 distances (n, m) between non-negative integers of `bits` bits.

    x_nd: (n, d), m_md: (m, d). "l2" is the squared Euclidean distance, "l1" the sum of absolute differences.

    >>> distances(np.array([[1, 2]]), np.array([[4, 6], [1, 2]]), "l2", 8)
    array([[25,  0]])
    """
    if metric == "l2" and 2 * bits + int(x_nd.shape[1]).bit_length() + 2 <= EXACT_BITS:
        x, m = x_nd.astype(np.float64), m_md.astype(np.float64)
        found = (x * x).sum(axis=1)[:, None] - 2.0 * (x @ m.T) + (m * m).sum(axis=1)
        exact: Array = found.astype(np.int64)
        return exact
    x, m = x_nd.astype(np.int64), m_md.astype(np.int64)
    result = np.empty((len(x), len(m)), np.int64)
    step = max(1, AT_A_TIME // max(1, m.size))
    for start in range(0, len(x), step):
        gap = x[start : start + step, None, :] - m
        result[start : start + step] = (np.abs(gap) if metric == "l1" else gap * gap).sum(axis=2)
    return result


def distance_bits(bits: int, length: int, metric: str) -> int:
    """Return the width of the largest distance between vectors of `length` numbers of `bits` bits.

    >>> distance_bits(8, 4, "l2"), distance_bits(8, 4, "l1")
    (18, 10)
    """
    top = (1 << bits) - 1
    return (length * (top * top if metric == "l2" else top)).bit_length()

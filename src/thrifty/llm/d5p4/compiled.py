"""Greedy MAP from every start, and sums over a vocabulary, compiled by numba; the same choices as without it.

The greedy search does the operations of the torch path one for one, in its order and without fused multiply-adds, so
that ties fall alike. The entropy reads each log-probability once; its exp is a polynomial, which becomes vector code.
"""

# numba's functions have no types that mypy could check
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,attr-defined"

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import MissingExtra, need

REORDER = {"reassoc", "nsz", "contract"}  # sums over the vocabulary may run in any order


@cache
def available() -> bool:
    """Return whether numba is installed."""
    try:
        need("numba", extra="speed")
    except MissingExtra:
        return False
    return True


def greedy(
    kernel: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], begin: npt.NDArray[np.int64], k: int, floor: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the candidates (s, k) that each of s starts takes, in order, and their conditional variances (s, k).

    kernel: (n, n), symmetric and C-contiguous; groups: (n,), the group of each candidate; begin: (s,), where to start.
    """
    chosen = np.empty((len(begin), k), np.int64)
    own = np.empty((len(begin), k))
    _greedy()(kernel, groups, begin, floor, chosen, own)
    return chosen, own


def entropies(log_p: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the entropies (m,) in nats of some rows of log-probabilities (t, v); beneath -87 one counts nothing."""
    found = np.empty(len(rows), np.float32)
    _sums()[0](log_p, rows, found)
    return found


def mean_log(log_p: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the mean (m,) of some rows of log-probabilities (t, v); beneath -1e4 one counts as that."""
    found = np.empty(len(rows), np.float32)
    _sums()[1](log_p, rows, found)
    return found


@cache
def _greedy() -> Any:
    numba = need("numba", extra="speed")

    @numba.njit(nogil=True, cache=True, error_model="numpy")
    def greedy(kernel, groups, begin, floor, chosen, own):
        n, k = kernel.shape[0], chosen.shape[1]
        basis, inverse, variance = np.empty((k, n)), np.empty(k), np.empty(n)
        for s in range(begin.shape[0]):
            for j in range(n):
                variance[j] = kernel[j, j]
            pick = begin[s]
            for step in range(k):
                if step:
                    pick = 0
                    for j in range(1, n):
                        if variance[j] > variance[pick]:
                            pick = j
                value = variance[pick]
                chosen[s, step], own[s, step] = pick, value
                group = groups[pick]
                for j in range(n):
                    if groups[j] == group:
                        variance[j] = -np.inf
                inverse[step] = 1.0 / max(value, floor)
                row = basis[step]
                for j in range(n):
                    row[j] = kernel[pick, j]
                for m in range(step):
                    before, share = basis[m], basis[m, pick] * inverse[m]
                    for j in range(n):
                        row[j] -= before[j] * share
                for j in range(n):
                    variance[j] -= row[j] * row[j] * inverse[step]

    return greedy


@cache
def _sums() -> Any:
    numba = need("numba", extra="speed")
    f = np.float32
    least, half, one, nothing, floor = f(-87.0), f(0.5), f(1.0), f(0.0), f(-1e4)
    log2e, high, low = (
        f(1.4426950408889634),
        f(0.693359375),
        f(2.12194440e-4),
    )  # ln 2 = high - low, high exact in 12 bits
    c6, c5, c4, c3, c2, c1 = (f(1 / n) for n in (5040, 720, 120, 24, 6, 2))

    @numba.njit(fastmath=REORDER, nogil=True, cache=True, error_model="numpy")
    def entropies(log_p, rows, found):
        for i in range(rows.shape[0]):
            row, total = log_p[rows[i]], nothing
            for j in range(row.shape[0]):
                x = least if row[j] < least else row[j]  # NaN stays
                power = np.floor(x * log2e + half)
                r = (x - power * high) + power * low  # |r| at most ln(2) / 2
                e = (((((c6 * r + c5) * r + c4) * r + c3) * r + c2) * r + c1) * r * r + r + one
                e *= np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
                total -= nothing if row[j] < least else e * x
            found[i] = total

    @numba.njit(fastmath=REORDER, nogil=True, cache=True, error_model="numpy")
    def mean_log(log_p, rows, found):
        for i in range(rows.shape[0]):
            row, total = log_p[rows[i]], nothing
            for j in range(row.shape[0]):
                total += floor if row[j] < floor else row[j]
            found[i] = total / np.float32(row.shape[0])

    return entropies, mean_log

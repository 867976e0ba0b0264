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
    kernel: npt.NDArray[np.float64], w: int, begin: npt.NDArray[np.int64], k: int, floor: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the candidates (s, k) that each of s starts takes, in order, and their conditional variances (s, k).

    kernel: (n, n), symmetric and C-contiguous; w: candidates of a group, which follow each other; begin: (s,), where to
    start.
    """
    chosen = np.empty((len(begin), k), np.int64)
    own = np.empty((len(begin), k))
    _greedy()(kernel, w, begin, floor, chosen, own)
    return chosen, own


def usable(kernel: npt.NDArray[np.float64]) -> bool:
    """Return whether a matrix (n, n) is finite and symmetric to the last bit."""
    return bool(_usable()(kernel))


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
    def greedy(kernel, w, begin, floor, chosen, own):
        n, k = kernel.shape[0], chosen.shape[1]
        basis, shares, inverse = np.empty((k, n)), np.empty(k), np.empty(k)
        variance = np.empty(n)
        bits = variance.view(np.int64)
        for s in range(begin.shape[0]):
            for j in range(n):
                variance[j] = kernel[j, j] + 0.0  # no negative zero, which is another integer
            for step in range(k):
                pick = begin[s]
                if step:
                    most = np.int64(np.iinfo(np.int64).min)  # of integers in the order of the numbers: quick to compare
                    for j in range(n):
                        most = max(most, bits[j] ^ ((bits[j] >> 63) & np.int64(0x7FFFFFFFFFFFFFFF)))
                    pick = np.int64(n)
                    for j in range(n):
                        same = most == bits[j] ^ ((bits[j] >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))
                        pick = min(pick, np.int64(j) if same else np.int64(n))
                value = variance[pick]
                chosen[s, step], own[s, step] = pick, value
                if step == k - 1:
                    break
                scale = 1.0 / max(value, floor)
                inverse[step] = scale
                for m in range(step):
                    shares[m] = basis[m, pick] * inverse[m]
                for j in range(pick - pick % w, pick - pick % w + w):
                    variance[j] = -np.inf
                row, held = basis[step], kernel[pick]
                for j in range(n):
                    row[j] = held[j]
                for m in range(0, step - 2, 3):  # three at a time, in the same order
                    a, b, c, x, y, z = basis[m], basis[m + 1], basis[m + 2], shares[m], shares[m + 1], shares[m + 2]
                    for j in range(n):
                        row[j] = ((row[j] - a[j] * x) - b[j] * y) - c[j] * z
                for m in range(step - step % 3, step):
                    before, share = basis[m], shares[m]
                    for j in range(n):
                        row[j] -= before[j] * share
                for j in range(n):
                    variance[j] -= row[j] * row[j] * scale

    return greedy


@cache
def _usable() -> Any:
    numba = need("numba", extra="speed")

    @numba.njit(nogil=True, cache=True, error_model="numpy")
    def usable(kernel):
        odd = 0
        for i in range(kernel.shape[0]):
            row, column = kernel[i], kernel[:, i]
            for j in range(i + 1):
                odd += row[j] - column[j] != 0.0  # NaN where one is not finite
        return odd == 0

    return usable


@cache
def _sums() -> Any:
    numba = need("numba", extra="speed")
    f = np.float32
    least, half, one, nothing, floor = f(-87.0), f(0.5), f(1.0), f(0.0), f(-1e4)
    log2e, high, low = f(1.4426950408889634), f(0.693359375), f(2.12194440e-4)  # ln 2 = high - low
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

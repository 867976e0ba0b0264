"""Nearest class mean on many episodes, compiled by numba: the means, then every query, each feature row read once.

Pairs (episode, class) are taken in the order of the class, so that the rows of one class stay in the processor's cache;
two queries meet five means at a time, so that every number loaded is used several times.
"""

# numba's functions have no types that mypy could check
# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,attr-defined"

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import MissingExtra, need

if TYPE_CHECKING:
    from thrifty.fewshot.episodes import Episodes

BLOCK = 5  # means that one pass over a row meets: most episodes have five ways
MEANS_BYTES = 64 * 2**20  # of means kept at once
WORTH = 2000  # pairs below which compiling takes longer than it saves
REORDER = {"reassoc", "nsz", "contract"}  # sums may run in any order; infinities keep their meaning


def available() -> bool:
    """Return whether numba is installed."""
    try:
        need("numba", extra="speed")
    except MissingExtra:
        return False
    return True


def right_shares(table: npt.NDArray[Any], episodes: Episodes) -> npt.NDArray[np.float64]:
    """Return the share (E,) of right answers of even episodes; table: (n, d) float32 or float64, C-contiguous."""
    means, score = _kernels()
    count, ways, queries = episodes.query.shape
    width = -(-ways // BLOCK) * BLOCK
    step = max(1, MEANS_BYTES // (width * table.shape[1] * table.itemsize))
    centres = np.zeros((min(step, count), width, table.shape[1]), table.dtype)
    bias = np.full(centres.shape[:2], np.inf, table.dtype)  # infinite where a place only fills the block
    found = np.empty(count)
    for start in range(0, count, step):
        part = episodes[start : start + step]
        pairs = len(part) * ways
        order = np.argsort(part.classes.ravel(), kind="stable")
        right = np.zeros(pairs, np.int64)
        means(table, order, part.support.reshape(pairs, -1), ways, centres, bias)
        score(table, order, part.query.reshape(pairs, queries), ways, centres, bias, right)
        found[start : start + step] = right.reshape(-1, ways).sum(axis=1) / (ways * queries)
    return found


def swapped(sizes: npt.NDArray[np.int64], others: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Return (R, most): what the first swaps of a Fisher-Yates shuffle leave in the first places of each row.

    sizes: (R,); others: (reach, R), the place that swap i exchanges with place i. Places beyond a row's size hold -1.
    """
    found = np.full((len(sizes), most), -1, np.int64)
    _swaps()(sizes, others, found)
    return found


@cache
def _swaps() -> Any:
    numba = need("numba", extra="speed")

    @numba.njit(nogil=True, cache=True, parallel=True)
    def swaps(sizes, others, found):
        for r in numba.prange(sizes.shape[0]):
            values = np.empty(others.shape[0], np.int64)
            for i in range(others.shape[0]):
                place = others[i, r]
                there, here = place, i
                for j in range(i):
                    if others[j, r] == place:
                        there = values[j]
                    if others[j, r] == i:
                        here = values[j]
                values[i] = here
                if i < sizes[r]:
                    found[r, i] = there

    return swaps


@cache
def _kernels() -> Any:
    numba = need("numba", extra="speed")
    jit = numba.njit(fastmath=REORDER, nogil=True, cache=True)
    spread = numba.njit(fastmath=REORDER, nogil=True, cache=True, parallel=True)

    @jit
    def dots(first, second, centres, found):
        a = b = c = d = e = first.dtype.type(0)
        f = g = h = i = k = first.dtype.type(0)
        t, u, v, w, z = centres[0], centres[1], centres[2], centres[3], centres[4]
        for j in range(first.shape[0]):
            x, y = first[j], second[j]
            a += x * t[j]
            b += x * u[j]
            c += x * v[j]
            d += x * w[j]
            e += x * z[j]
            f += y * t[j]
            g += y * u[j]
            h += y * v[j]
            i += y * w[j]
            k += y * z[j]
        found[0, 0], found[0, 1], found[0, 2], found[0, 3], found[0, 4] = a, b, c, d, e
        found[1, 0], found[1, 1], found[1, 2], found[1, 3], found[1, 4] = f, g, h, i, k

    @spread
    def means(table, order, support, ways, centres, bias):
        share = table.dtype.type(1) / table.dtype.type(support.shape[1])
        for p in numba.prange(order.shape[0]):
            pair = order[p]
            into = centres[pair // ways, pair % ways]
            first = table[support[pair, 0]]
            for j in range(into.shape[0]):
                into[j] = first[j]
            for k in range(1, support.shape[1]):
                row = table[support[pair, k]]
                for j in range(into.shape[0]):
                    into[j] += row[j]
            square = table.dtype.type(0)
            for j in range(into.shape[0]):
                into[j] *= share
                square += into[j] * into[j]
            bias[pair // ways, pair % ways] = square / 2

    @spread
    def score(table, order, query, ways, centres, bias, right):
        queries = query.shape[1]
        for p in numba.prange(order.shape[0]):
            pair = order[p]
            episode, truth = pair // ways, pair % ways
            found = np.empty((2, BLOCK), table.dtype)
            count = 0
            for q in range(0, queries, 2):
                both = min(q + 2, queries) - q
                first, second = table[query[pair, q]], table[query[pair, q + both - 1]]
                top0 = top1 = -np.inf
                best0 = best1 = 0
                for block in range(0, bias.shape[1], BLOCK):
                    dots(first, second, centres[episode, block : block + BLOCK], found)
                    for w in range(BLOCK):
                        against = bias[episode, block + w]
                        if found[0, w] - against > top0:
                            top0, best0 = found[0, w] - against, block + w
                        if found[1, w] - against > top1:
                            top1, best1 = found[1, w] - against, block + w
                count += best0 == truth
                if both == 2:
                    count += best1 == truth
            right[pair] = count

    return means, score

"""Majority votes: what a learner returns for queries, and who wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import KnobError

Array = npt.NDArray[Any]

NOBODY = -1  # the winner when no class is valid, or the margin is too small


@dataclass(frozen=True, eq=False)
class Ballot:
    """The votes of n queries for C classes."""

    votes: Array  # (n, C) int64; scores of log2 probability in units of 2^-8 where cells are counts
    ties: Array  # (n, C) int64: what decides between equal votes, less is better; zeros where nothing does
    valid: Array  # (C,) bool: the classes that have examples; the others never win

    def over_views(self, views: int) -> Ballot:
        """Return the ballot of n / views queries, of which each has that many views, one after the other."""
        if views < 1 or len(self.votes) % views:
            raise KnobError(f"{len(self.votes)} queries are no groups of {views} views")
        shape = (len(self.votes) // views, views, self.votes.shape[1])
        return Ballot(self.votes.reshape(shape).sum(axis=1), self.ties.reshape(shape).sum(axis=1), self.valid)

    def margins(self) -> Array:
        """Return by how many votes the first class leads the second (n,); 0 with fewer than two valid classes."""
        if self.valid.sum() < 2:
            return np.zeros(len(self.votes), np.int64)
        top = np.partition(self.votes[:, self.valid], -2, axis=1)[:, -2:]
        result: Array = top[:, 1] - top[:, 0]
        return result

    def winners(self, margin: int = 0) -> Array:
        """Return the class of each query (n,) int32: most votes, then least `ties`, then the lowest number.

        NOBODY where no class is valid, or where two are and the lead is less than `margin` votes.

        >>> equal = Ballot(np.array([[2, 2, 0]]), np.array([[9, 4, 0]]), np.array([True, True, False]))
        >>> equal.winners(), equal.winners(margin=1)
        (array([1], dtype=int32), array([-1], dtype=int32))
        """
        if not self.valid.any():
            return np.full(len(self.votes), NOBODY, np.int32)
        lowest = np.iinfo(np.int64).min
        votes = np.where(self.valid, self.votes, lowest)
        best = votes == votes.max(axis=1, keepdims=True)
        found = np.where(best, self.ties, np.iinfo(np.int64).max).argmin(axis=1)
        # a tie value at the limit of int64 cannot occur: distances are below 2^60
        if self.valid.sum() > 1 and margin > 0:
            found = np.where(self.margins() >= margin, found, NOBODY)
        winners: Array = found.astype(np.int32)
        return winners


def bounds(features: int, parts: int) -> tuple[int, ...]:
    """Return where the sub-vectors begin, and the end: part p is [p d / P, (p + 1) d / P), rounded down.

    >>> bounds(10, 4)
    (0, 2, 5, 7, 10)
    """
    return tuple(p * features // parts for p in range(parts + 1))


def longest(features: int, parts: int) -> int:
    """Return the length of the longest sub-vector."""
    return -(-features // parts)

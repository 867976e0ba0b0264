"""Groups of similar layers: agglomerative clustering of the distances 1 - CKA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from thrifty.compress.layer_groups.cka import Matrix, Progress, similarities
from thrifty.compress.layer_groups.hidden import Batch
from thrifty.errors import DataError, KnobError

LINKAGES = ("average", "complete", "single")
DEFAULT_COUNT = 4  # as many as DPHuBERT matches layers; the number SKILL uses was not readable


@dataclass(frozen=True)
class Merge:
    """Two clusters that became one. Clusters 0..L are the representations, L + 1 + i is made by merge i."""

    left: int
    right: int
    height: float  # the distance at which they merged
    size: int


@dataclass(frozen=True)
class Groups:
    """A partition of the representations 0..L of a model, with the tree that it was cut from."""

    groups: tuple[tuple[int, ...], ...]  # ordered by their first member
    similarity: Matrix
    merges: tuple[Merge, ...]  # the whole tree, down to one cluster
    linkage: str
    contiguous: bool
    frames: int = 0

    def inside(self, index: int) -> float | None:
        """Return the smallest CKA between two members of a group; None for a group of one."""
        members = self.groups[index]
        return min((float(self.similarity[a, b]) for a in members for b in members if a < b), default=None)


def group(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int | None = None,
    distance: float | None = None,
    linkage: str = "average",
    contiguous: bool = False,
    method: str = "exact",
    progress: Progress | None = None,
) -> Groups:
    """Measure the similarities of a model's layers on batches and cut their tree; see `similarities` and `cluster`.

    Source: Zampierin et al. 2024, SKILL (arXiv:2402.16830). Linkage and number of groups are not in what could be read
    of it: both are options here.
    """
    found = similarities(model, batches, method, progress)
    return cluster(found.matrix, count, distance, linkage, contiguous, found.frames)


def cluster(
    similarity: Matrix,
    count: int | None = None,
    distance: float | None = None,
    linkage: str = "average",
    contiguous: bool = False,
    frames: int = 0,
) -> Groups:
    """Cut the tree of the distances 1 - similarity into `count` groups, or where merges exceed `distance`.

    Without either: 4 groups, or as many as there are representations. contiguous: merge neighbours only. Raises
    KnobError for options out of range, DataError for a matrix that is not square, symmetric and finite.

    >>> near = np.array([[1.0, 0.2, 0.1], [0.2, 1.0, 0.9], [0.1, 0.9, 1.0]])
    >>> cluster(near, count=2).groups
    ((0,), (1, 2))
    """
    _refuse(similarity, count, distance, linkage)
    size = len(similarity)
    if count is None and distance is None:
        count = min(DEFAULT_COUNT, size)
    away = 1.0 - np.asarray(similarity, dtype=np.float64)
    members: dict[int, tuple[int, ...]] = {i: (i,) for i in range(size)}
    merges: list[Merge] = []
    cut: list[tuple[int, ...]] | None = None
    while True:
        pair = _nearest(members, away, linkage, contiguous) if len(members) > 1 else None
        enough = len(members) == count if count is not None else pair is None or pair[0] > float(distance or 0.0)
        if cut is None and enough:
            cut = sorted(members.values())
        if pair is None:
            break
        height, a, b = pair
        joined = tuple(sorted(members.pop(a) + members.pop(b)))
        members[size + len(merges)] = joined
        merges.append(Merge(a, b, height, len(joined)))
    return Groups(
        tuple(cut or sorted(members.values())), np.asarray(similarity), tuple(merges), linkage, contiguous, frames
    )


def _nearest(
    members: dict[int, tuple[int, ...]], away: Matrix, linkage: str, contiguous: bool
) -> tuple[float, int, int]:
    """Return the smallest distance and its two clusters; ties go to the ones with the first members."""
    ordered = sorted(members.items(), key=lambda item: item[1])
    combine: Any = {"average": np.mean, "complete": np.max, "single": np.min}[linkage]
    choices = []
    for i, (a, left) in enumerate(ordered):
        for b, right in ordered[i + 1 :]:
            if contiguous and left[-1] + 1 != right[0]:
                continue
            choices.append((float(combine(away[np.ix_(left, right)])), left, right, a, b))
    height, _, _, a, b = min(choices)
    return height, a, b


def _refuse(similarity: Matrix, count: int | None, distance: float | None, linkage: str) -> None:
    shape = np.shape(similarity)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise DataError(f"similarities need a square matrix, but the shape is {shape}")
    if not np.isfinite(similarity).all() or not np.allclose(similarity, np.transpose(similarity)):
        raise DataError("the matrix of similarities is not symmetric and finite")
    bad = []
    if count is not None and distance is not None:
        bad.append("give a count or a distance, not both")
    if count is not None and not 1 <= count <= shape[0]:
        bad.append(f"count is {count}; it must be 1..{shape[0]}")
    if distance is not None and not (np.isfinite(distance) and distance >= 0):
        bad.append(f"distance is {distance}; it must be at least 0")
    if linkage not in LINKAGES:
        bad.append(f"linkage is '{linkage}'; it must be one of {', '.join(LINKAGES)}")
    if bad:
        raise KnobError("; ".join(bad))

"""Episodes: many small tasks drawn from labelled features, and nearest class mean on all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import need
from thrifty.fewshot import compiled
from thrifty.fewshot.preprocess import Array, InputError, OptionError

Ints = npt.NDArray[np.int64]
CHUNK_BYTES = 4 * 2**20  # of gathered features at once: stays in the processor's cache
NORMAL_97_5 = 1.959963984540054


@dataclass(frozen=True)
class Episodes:
    """E tasks as rows of a feature table; -1 fills the places that an episode does not have."""

    classes: Ints  # (E, C) index of each class among the sorted labels
    support: Ints  # (E, C, K) rows
    query: Ints  # (E, C, Q) rows

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, part: slice) -> Episodes:
        """Return some of the episodes."""
        return Episodes(self.classes[part], self.support[part], self.query[part])

    @property
    def even(self) -> bool:
        """Whether every episode has the same ways, shots and queries per class."""
        return not any((rows < 0).any() for rows in (self.classes, self.support, self.query))

    def arrays(self, features: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], Ints, npt.NDArray[Any], Ints]]:
        """Yield (support (n, d), labels (n,), queries (q, d), labels (q,)) of each episode; labels are 0..C-1."""
        for support, query in zip(self.support, self.query, strict=True):
            s_class, s_place = np.nonzero(support >= 0)
            q_class, q_place = np.nonzero(query >= 0)
            yield features[support[s_class, s_place]], s_class, features[query[q_class, q_place]], q_class


@dataclass(frozen=True)
class Interval:
    """A mean over episodes and the half width of its 95 % interval."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half_width:.4f} (95 %, {self.count} episodes)"


def mean_interval(values: npt.ArrayLike) -> Interval:
    """Return the mean of values (E,) with its 95 % interval: Student's t below 30 values, else normal.

    One value has an infinite interval.

    >>> print(mean_interval([0.5] * 40))
    0.5000 ± 0.0000 (95 %, 40 episodes)
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not len(v):
        raise InputError(f"an interval needs a list of numbers; the shape is {v.shape}")
    if len(v) == 1:
        return Interval(float(v[0]), float("inf"), 1)
    width = NORMAL_97_5 if len(v) >= 30 else float(need("scipy.stats", extra="fewshot").t.ppf(0.975, len(v) - 1))
    return Interval(float(v.mean()), width * float(v.std(ddof=1)) / len(v) ** 0.5, len(v))


def uniform(
    labels: npt.ArrayLike, ways: int, shots: int, queries: int, count: int, rng: np.random.Generator
) -> Episodes:
    """Return `count` episodes of `ways` classes, `shots` supports and `queries` queries of each.

    labels: (n,). Classes, then samples, are drawn without replacement, each set equally likely.
    Raises InputError when a class is too small, or there are fewer classes than ways.

    >>> uniform([0, 0, 0, 1, 1, 1], 2, 1, 2, 4, np.random.default_rng(0)).query.shape
    (4, 2, 2)
    """
    pool = _Pool(labels)
    _check(ways=ways, shots=shots, queries=queries, count=count)
    pool.refuse_small(shots + queries)
    classes = pool.draw_classes(np.full(count, ways), rng)
    rows = pool.draw_rows(classes, shots + queries, rng)
    return Episodes(classes, rows[:, :, :shots], rows[:, :, shots:])


def dirichlet(
    labels: npt.ArrayLike, ways: int, shots: int, queries: int, count: int, rng: np.random.Generator,
    concentration: float = 2.0,
) -> Episodes:  # fmt: skip
    """Return episodes whose queries are unbalanced: shares from a symmetric Dirichlet law.

    queries: of the whole episode. Counts are the shares times `queries`, rounded so that they add up; what a class
    does not have goes to the class with the largest share that has. A class may get no query.

    Source: Veilleux et al. 2021, Realistic evaluation of transductive few-shot learning (arXiv:2204.11181),
    concentration 2.
    """
    pool = _Pool(labels)
    _check(ways=ways, shots=shots, queries=queries, count=count)
    if not 0 < concentration < np.inf:
        raise OptionError(f"concentration is {concentration}; it must be positive")
    pool.refuse_small(shots + 1)
    classes = pool.draw_classes(np.full(count, ways), rng)
    room = pool.sizes[classes] - shots
    if (room.sum(axis=1) < queries).any():
        raise InputError(f"{queries} queries: some {ways} classes have only {room.sum(axis=1).min()} samples to spare")
    numbers = apportion(rng.dirichlet(np.full(ways, concentration), count), queries, room)
    rows = pool.draw_rows(classes, shots + int(numbers.max()), rng)
    return Episodes(classes, rows[:, :, :shots], _first(rows[:, :, shots:], numbers))


def meta_dataset(
    labels: npt.ArrayLike, count: int, rng: np.random.Generator,
    *, most_ways: int = 50, most_support: int = 500, most_queries: int = 10,
) -> Episodes:  # fmt: skip
    """Return episodes of varying ways and shots, unbalanced, in the manner of Meta-Dataset.

    Ways uniform in 5..min(most_ways, classes). Queries per class: min(most_queries, half of the smallest class of
    the episode). Support size: min(most_support, sum over classes of ceil(b min(100, size - queries))), b uniform in
    (0, 1]. Shots in proportion to size times exp(U(log 0.5, log 2)), at least one, at most what is left.

    Source: Triantafillou et al. 2020, Meta-Dataset (arXiv:1903.03096), appendix; no class hierarchy is used.
    """
    pool = _Pool(labels)
    _check(count=count, most_support=most_support, most_queries=most_queries)
    if len(pool.sizes) < 5 or most_ways < 5:
        raise InputError(f"episodes have at least 5 ways; there are {len(pool.sizes)} classes, most_ways {most_ways}")
    pool.refuse_small(2)
    ways = rng.integers(5, min(most_ways, len(pool.sizes)) + 1, count)
    classes = pool.draw_classes(ways, rng)
    real = classes >= 0
    sizes = np.where(real, pool.sizes[classes], 0)
    smallest = np.where(real, sizes, np.iinfo(np.int64).max).min(axis=1)
    queries = np.minimum(most_queries, smallest // 2)
    left = np.where(real, sizes - queries[:, None], 0)
    share = 1.0 - rng.random(count)  # in (0, 1]
    total = np.minimum(most_support, np.ceil(share[:, None] * np.minimum(100, left)).sum(axis=1))
    weights = sizes * np.exp(rng.uniform(np.log(0.5), np.log(2.0), sizes.shape))
    weights = weights / weights.sum(axis=1, keepdims=True)
    spare = np.maximum(total - ways, 0)
    shots = np.where(real, np.minimum((weights * spare[:, None]).astype(np.int64) + 1, left), 0)
    rows = pool.draw_rows(classes, int(shots.max() + queries.max()), rng)
    support = _first(rows[:, :, : shots.max()], shots)
    places = shots[:, :, None] + np.arange(queries.max())  # queries follow the shots
    query = np.take_along_axis(rows, np.minimum(places, rows.shape[2] - 1), axis=2)
    return Episodes(classes, support, _first(query, np.where(real, queries[:, None], 0)))


def accuracies(features: npt.ArrayLike, episodes: Episodes) -> Array:
    """Return the accuracy (E,) of nearest class mean (Euclidean) on each episode, all computed together.

    features: (n, d), float32 or float64, already preprocessed. Accuracy is the share of all the episode's queries
    that are right. Memory is bounded, whatever the number of episodes. Many even episodes run compiled, on all
    cores, where numba is installed (`pip install 'thrifty[speed]'`); the labels are the same but for ties within
    rounding.

    >>> x, y = np.eye(4)[[0, 0, 1, 1]], [0, 0, 1, 1]
    >>> accuracies(x, uniform(y, 2, 1, 1, 3, np.random.default_rng(0)))
    array([1., 1., 1.])
    """
    table = _table(features)
    classes, shots, queries = (*episodes.support.shape[1:], episodes.query.shape[2])
    if len(episodes) * classes >= compiled.WORTH and episodes.even and compiled.available():
        return compiled.right_shares(table, episodes)
    per_episode = classes * (shots + queries) * table.shape[1] * table.itemsize
    step = max(1, int(CHUNK_BYTES / per_episode))
    right = _right_even if episodes.even else _right_ragged
    parts = [right(table, episodes[i : i + step]) for i in range(0, len(episodes), step)]
    return np.concatenate(parts) if parts else np.zeros(0)


def evaluate(estimator: Any, features: npt.ArrayLike, episodes: Episodes) -> Array:
    """Return the accuracy (E,) of any scikit-learn classifier, fitted anew on each episode.

    Slower than `accuracies`, which does nearest class mean only; needed for everything else.
    """
    clone = need("sklearn.base", extra="fewshot").clone
    table = np.asarray(features)
    found = []
    for x, y, queries, truth in episodes.arrays(table):
        found.append(float((clone(estimator).fit(x, y).predict(queries) == truth).mean()))
    return np.array(found)


def apportion(shares: Array, total: int, room: Ints) -> Ints:
    """Return whole numbers (E, C) near shares * total that add up to total, none above its room.

    shares: (E, C) adding up to one; room: (E, C), at least total together.

    >>> apportion(np.array([[0.5, 0.3, 0.2]]), 5, np.array([[1, 9, 9]]))
    array([[1, 3, 1]])
    """
    exact = shares * total
    numbers = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - numbers), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    numbers += rank < (total - numbers.sum(axis=1))[:, None]
    numbers = np.minimum(numbers, room)
    while (missing := total - numbers.sum(axis=1)).any():
        best = np.where(numbers < room, shares, -1.0).argmax(axis=1)
        need_one = np.flatnonzero(missing > 0)
        numbers[need_one, best[need_one]] += 1
    return numbers


def _check(**numbers: int) -> None:
    bad = [f"{name} is {value}" for name, value in numbers.items() if value < 1]
    if bad:
        raise OptionError(f"{'; '.join(bad)}: each must be at least 1")


class _Pool:
    """The rows of each class, side by side."""

    def __init__(self, labels: npt.ArrayLike) -> None:
        y_n = np.asarray(labels)
        if y_n.ndim != 1 or not len(y_n):
            raise InputError(f"labels have shape {y_n.shape}; they must be (n,), one per feature row")
        self.names, index = np.unique(y_n, return_inverse=True)
        self.order = np.argsort(index, kind="stable")
        self.sizes = np.bincount(index).astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])

    def refuse_small(self, least: int) -> None:
        small = [f"{n} ({s})" for n, s in zip(self.names, self.sizes, strict=True) if s < least]
        if small:
            raise InputError(f"{len(small)} class(es) have fewer than {least} samples: {', '.join(small[:20])}")

    def draw_classes(self, ways: Ints, rng: np.random.Generator) -> Ints:
        """Return (E, C) class indices, distinct in a row; -1 beyond each row's ways."""
        if ways.max(initial=0) > len(self.sizes):
            raise InputError(f"{ways.max()} ways, but there are {len(self.sizes)} classes")
        drawn = without_replacement(np.full(len(ways), len(self.sizes)), int(ways.max(initial=0)), rng)
        return _first(drawn, ways)

    def draw_rows(self, classes: Ints, most: int, rng: np.random.Generator) -> Ints:
        """Return (E, C, most) rows of each class in random order; -1 beyond its size, or where the class is -1."""
        sizes = np.where(classes >= 0, self.sizes[classes], 0)
        drawn = without_replacement(sizes.reshape(-1), most, rng).reshape(*classes.shape, most)
        rows = self.order[self.starts[classes][:, :, None] + np.maximum(drawn, 0)]
        return np.where(drawn >= 0, rows, -1)


def without_replacement(sizes: Ints, most: int, rng: np.random.Generator) -> Ints:
    """Return (R, most): in row r, distinct numbers below sizes[r] in random order, -1 when they run out.

    The first swaps of a Fisher-Yates shuffle, for all rows at once; only swapped places are remembered.
    """
    reach = min(most, int(sizes.max(initial=0)))
    others = np.empty((reach, len(sizes)), np.int64)  # the place that swap i exchanges with place i
    for i in range(reach):
        others[i] = rng.integers(i, np.maximum(sizes, i + 1))
    if others.size >= compiled.WORTH * 20 and compiled.available():
        return compiled.swapped(sizes, others, most)
    return _swapped(sizes, others, most)


def _swapped(sizes: Ints, others: Ints, most: int) -> Ints:
    """Return what the swaps leave in the first places, for all rows together."""
    count = len(sizes)
    values = np.zeros_like(others)  # what swap i wrote to its place
    result = np.full((most, count), -1, np.int64)

    def at(place: Ints, upto: int) -> Ints:
        found = place.copy()
        for j in range(upto):
            np.copyto(found, values[j], where=others[j] == place)
        return found

    for i, other in enumerate(others):
        here = np.full(count, i, np.int64)
        result[i] = np.where(i < sizes, at(other, i), -1)
        values[i] = at(here, i)
    return np.ascontiguousarray(result.T)


def _first(rows: Ints, numbers: Ints) -> Ints:
    """Return rows (..., K) with -1 beyond the first `numbers` (...) of each, cut to the longest."""
    most = int(numbers.max(initial=0))
    return np.where(np.arange(most) < numbers[..., None], rows[..., :most], -1)


def _table(features: npt.ArrayLike) -> npt.NDArray[Any]:
    table = np.asarray(features)
    if table.ndim != 2:
        raise InputError(f"features have shape {table.shape}; they must be (n, d)")
    if table.dtype not in (np.float32, np.float64):
        table = table.astype(np.float64)
    if not np.isfinite(table).all():
        raise InputError("features have NaN or infinite values")
    return np.ascontiguousarray(table - table.mean(axis=0, dtype=np.float64).astype(table.dtype))


def _right_even(table: npt.NDArray[Any], part: Episodes) -> Array:
    e, ways, shots = part.support.shape
    shape = (e, ways * part.query.shape[2], table.shape[1])
    means = table.take(part.support.reshape(e * ways, shots).T.ravel(), axis=0).reshape(shots, e * ways, -1).sum(axis=0)
    means = (means / shots).reshape(e, ways, -1).astype(table.dtype, copy=False)
    queries = table.take(part.query.ravel(), axis=0).reshape(shape)
    scores = queries @ means.transpose(0, 2, 1)
    scores -= 0.5 * (means * means).sum(axis=2)[:, None, :]
    winner = scores.argmax(axis=2).reshape(e, ways, -1)
    result: Array = (winner == np.arange(ways)[:, None]).mean(axis=(1, 2))
    return result


def _right_ragged(table: npt.NDArray[Any], part: Episodes) -> Array:
    e, ways, _ = part.support.shape
    held, asked = part.support >= 0, part.query >= 0
    shots = held.sum(axis=2)
    sums = np.where(held[..., None], table[part.support], 0.0).sum(axis=2)
    means = (sums / np.maximum(shots, 1)[..., None]).astype(table.dtype, copy=False)
    queries = table[part.query].reshape(e, -1, table.shape[1])
    scores = queries @ means.transpose(0, 2, 1) - 0.5 * (means * means).sum(axis=2)[:, None, :]
    scores = np.where((shots > 0)[:, None, :], scores, -np.inf)
    winner = scores.argmax(axis=2).reshape(part.query.shape)
    right = (winner == np.arange(ways)[:, None]) & asked
    result: Array = right.sum(axis=(1, 2)) / np.maximum(asked.sum(axis=(1, 2)), 1)
    return result

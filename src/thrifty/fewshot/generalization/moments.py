"""The second moments of supports: all that the forecast needs, and free of the feature dimension afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thrifty.fewshot.preprocess import Array, InputError

Ints = npt.NDArray[np.integer]
CHUNK_BYTES = 64 * 2**20  # of gathered features at once
_SMALL = 1e-12  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True)
class Moments:
    """Moments of E supports of C classes each, in the frame that the class means span.

    The frame has C coordinates, of which C - 1 at most are filled: W = G^(-1/2) M, with M (C, d) the centred means
    and G = M M^T. It is unique, so that rotating, moving or reordering features or classes changes nothing; nearest
    means and distances between means are the same in it as in full space (spec 1b.3, by another basis).
    """

    gram: Array  # (E, C, C) inner products of the centred class means
    traces: Array  # (E, C) trace of each class covariance, all d dimensions (ddof 1); nan for a single shot
    counts: Array  # (E, C) shots
    scatter: Array  # (E, C, C, C) sum over shots of r r^T, r the shot minus its class mean, in the frame
    rank: Array  # (E,) dimension of the span of the centred means
    squares: Array  # (E,) trace of (pooled covariance)^2, estimated; nan where no class has two shots
    dimension: int

    def __len__(self) -> int:
        return len(self.gram)


def moments_of_support(x_nd: Array, index: Ints) -> Moments:
    """Return the moments of one support; x_nd: (n, d), index: (n,) classes 0..C-1, each at least once."""
    x = np.asarray(x_nd, np.float64)
    x = x - x.mean(axis=0)
    counts = np.bincount(index)
    member = np.eye(len(counts))[index]
    means = member.T @ x / counts[:, None]
    rest = x - means[index]
    centred = means - means.mean(axis=0)
    gram = centred @ centred.T
    root, rank = inverse_root(gram[None])
    projected = rest @ centred.T @ root[0]
    scatter = np.einsum("nc,ni,nj->cij", member, projected, projected)
    with np.errstate(invalid="ignore", divide="ignore"):
        traces = member.T @ (rest * rest).sum(axis=1) / np.where(counts > 1, counts - 1, np.nan)
    inner = rest @ rest.T if len(x) <= x.shape[1] else rest.T @ rest
    squares = squared_covariance(inner[None], len(x) - len(counts))
    return Moments(gram[None], traces[None], counts[None].astype(float), scatter[None], rank, squares, x.shape[1])


def moments_of_episodes(features: npt.ArrayLike, support: Ints) -> Moments:
    """Return the moments of E supports of equal shots; features: (n, d), support: (E, C, k) rows of features."""
    table = np.asarray(features)
    parts = [_block(table, rows) for rows in blocks(support, table.shape[1])]
    if not parts:
        raise InputError("support has no episodes")
    names = ("gram", "traces", "counts", "scatter", "rank", "squares")
    joined = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names}
    return Moments(**joined, dimension=table.shape[1])


def blocks(support: Ints, dimension: int) -> Iterator[Ints]:
    """Yield groups of episodes whose features fit in CHUNK_BYTES; support: (E, C, k)."""
    _, ways, shots = support.shape
    step = max(1, int(CHUNK_BYTES / (4 * 8 * ways * shots * dimension)))
    for start in range(0, len(support), step):
        yield support[start : start + step]


def _block(table: npt.NDArray[np.floating], rows: Ints) -> Moments:
    e, c, k = rows.shape
    x = table[rows].astype(np.float64)
    x -= x.mean(axis=(1, 2), keepdims=True)
    means = x.mean(axis=2)
    rest = (x - means[:, :, None]).reshape(e, c * k, -1)
    centred = means - means.mean(axis=1, keepdims=True)
    gram = centred @ centred.transpose(0, 2, 1)
    root, rank = inverse_root(gram)
    projected = (rest @ centred.transpose(0, 2, 1) @ root).reshape(e, c, k, c)
    scatter = projected.transpose(0, 1, 3, 2) @ projected
    traces = (rest * rest).sum(axis=2).reshape(e, c, k).sum(axis=2) / (k - 1 if k > 1 else np.nan)
    turned = rest.transpose(0, 2, 1)
    squares = squared_covariance(rest @ turned if c * k <= x.shape[-1] else turned @ rest, c * (k - 1))
    counts = np.full((e, c), float(k))
    return Moments(gram, traces, counts, scatter, rank, squares, x.shape[-1])


def inverse_root(gram: Array) -> tuple[Array, Array]:
    """Return the symmetric G^(-1/2) (E, C, C), zero where G is, and the rank (E,)."""
    values, vectors = np.linalg.eigh(gram)
    keep = values > _SMALL * values[:, -1:].clip(min=0.0)
    inverse = np.where(keep, 1.0 / np.sqrt(np.where(keep, values, 1.0)), 0.0)
    root: Array = (vectors * inverse[:, None, :]) @ vectors.transpose(0, 2, 1)
    return root, keep.sum(axis=1).astype(float)


def square_root(gram: Array) -> Array:
    """Return the symmetric square root (..., C, C) of positive parts; negative eigenvalues count as zero."""
    values, vectors = np.linalg.eigh(gram)
    root: Array = (vectors * np.sqrt(values.clip(min=0.0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return root


def squared_covariance(inner: Array, freedom: int) -> Array:
    """Return an unbiased estimate (E,) of trace(S^2), S the covariance shared by all classes, for Gaussian rests.

    inner: (E, n, n) inner products of the rests, or (E, d, d) their scatter matrix: both have the traces needed.
    For W ~ Wishart(f, S): E tr W^2 = f (f + 1) tr S^2 + f (tr S)^2 and E (tr W)^2 = f^2 (tr S)^2 + 2 f tr S^2.
    nan below two degrees of freedom.
    """
    if freedom < 2:
        return np.full(len(inner), np.nan)
    total = np.trace(inner, axis1=1, axis2=2)
    square = (inner * inner).sum(axis=(1, 2))
    found = (square - total**2 / freedom) / (freedom**2 + freedom - 2)
    result: Array = np.maximum(found, 1e-12 * (total / freedom) ** 2)  # rounding may take it below zero
    return result

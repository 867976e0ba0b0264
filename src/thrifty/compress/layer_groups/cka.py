"""Linear CKA between the layers of a model, accumulated over batches in float64.

Source: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited (arXiv:1905.00414); the minibatch
form from Nguyen, Raghu, Kornblith 2021 (arXiv:2010.15327), with the unbiased HSIC of Song et al. 2012.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thrifty.compress.layer_groups.families import stack_of
from thrifty.compress.layer_groups.hidden import Batch, each_batch
from thrifty.errors import DataError, KnobError

Matrix = NDArray[np.float64]
Progress = Callable[[int, int, str], None]
METHODS = ("exact", "minibatch")
MOST_BYTES = 4 * 2**30


@dataclass
class LinearCKA:
    """Exact linear CKA of any number of frames in memory that does not grow with them.

    CKA(a, b) = ||Xb' Xa||^2 / (||Xa' Xa|| ||Xb' Xb||) on column-centred X, Frobenius norms. Cross products are kept
    centred at the running means: adding a batch of n frames to m gives C + Xa' Xb + (m n / (m + n)) da db', where
    Xa, Xb are centred at the batch's own means and da, db are the differences of the means.

    >>> cka = LinearCKA()
    >>> cka.update([torch.tensor([[1.0, 0], [0, 1], [-1, -1]]), torch.tensor([[1.0], [0], [-1]])])
    >>> cka.matrix().round(6).tolist()
    [[1.0, 0.790569], [0.790569, 1.0]]
    """

    frames: int = 0
    means: list[Tensor] = field(default_factory=list)
    products: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def update(self, states: Sequence[Tensor]) -> None:
        """Add frames; states: one (n, D_l) per layer, the same frames in the same order."""
        count = refuse_ragged(states)
        if not self.frames:
            self._start(states)
        values = [s.double() for s in states]
        means = [v.mean(dim=0) for v in values]
        centred = [v - m for v, m in zip(values, means, strict=True)]
        away = [m - old for m, old in zip(means, self.means, strict=True)]
        total = self.frames + count
        share = self.frames * count / total
        for (a, b), product in self.products.items():
            product += centred[a].T @ centred[b] + share * torch.outer(away[a], away[b])
        for old, delta in zip(self.means, away, strict=True):
            old += delta * (count / total)
        self.frames = total

    def matrix(self) -> Matrix:
        """Return CKA of all pairs, symmetric, ones on the diagonal.

        Raises DataError when there are fewer than two frames or a layer does not vary.
        """
        _refuse_few(self.frames, 2)
        size = len(self.means)
        squares = np.zeros((size, size))
        for (a, b), product in self.products.items():
            squares[a, b] = squares[b, a] = float(product.square().sum())
        return _normalised(squares, square_root=True)

    def _start(self, states: Sequence[Tensor]) -> None:
        widths = [s.shape[1] for s in states]
        pairs = [(a, b) for a in range(len(widths)) for b in range(a, len(widths))]
        if (size := 8 * sum(widths[a] * widths[b] for a, b in pairs)) > MOST_BYTES:
            what = f"{len(widths)} representations {max(widths)} wide"
            raise KnobError(f"exact CKA of {what} needs {size / 2**30:.1f} GiB; use method='minibatch'")
        self.means = [torch.zeros(w, dtype=torch.float64) for w in widths]
        self.products = {(a, b): torch.zeros(widths[a], widths[b], dtype=torch.float64) for a, b in pairs}


@dataclass
class MinibatchCKA:
    """Linear CKA from sums of unbiased HSIC over batches, in memory of the square of one batch.

    An estimate: unbiased in numerator and denominators for frames drawn independently; the frames of one clip are not.
    """

    frames: int = 0
    sums: Matrix = field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, states: Sequence[Tensor]) -> None:
        """Add a batch of at least four frames; states: one (n, D_l) per layer."""
        count = refuse_ragged(states)
        _refuse_few(count, 4)
        grams = [_without_diagonal(s.double()) for s in states]
        ends = [g.sum(dim=1) for g in grams]
        found = np.zeros((len(grams), len(grams)))
        for a, (gram, end) in enumerate(zip(grams, ends, strict=True)):
            for b in range(a, len(grams)):
                trace = (gram * grams[b]).sum()
                corner = end.sum() * ends[b].sum() / ((count - 1) * (count - 2))
                cross = 2 * (end @ ends[b]) / (count - 2)
                found[a, b] = found[b, a] = float(trace + corner - cross) / (count * (count - 3))
        self.sums = found if not self.frames else self.sums + found
        self.frames += count

    def matrix(self) -> Matrix:
        """Return CKA of all pairs; see LinearCKA.matrix. Estimates below 0 or above 1 are moved to the limit."""
        _refuse_few(self.frames, 4)
        return np.clip(_normalised(self.sums, square_root=False), 0.0, 1.0)


@dataclass(frozen=True)
class Similarity:
    """How alike the representations of a model are."""

    matrix: Matrix  # (L + 1, L + 1), linear CKA, 0..1
    frames: int
    method: str


def similarities(
    model: nn.Module, batches: Iterable[Batch], method: str = "exact", progress: Progress | None = None
) -> Similarity:
    """Return the linear CKA between all representations of a model: the input of layer 1 and each layer's output.

    batches: keyword arguments of the trunk, each {"input_values" or "input_features" or "input_ids": (batch, ...)} with
    an "attention_mask" where there is padding, or a "frame_mask" (batch, steps). Masked frames are left out.
    Raises UnsupportedModel, DataError, KnobError.
    """
    if method not in METHODS:
        raise KnobError(f"method is '{method}'; it must be one of {', '.join(METHODS)}")
    stack = stack_of(model)
    total = len(batches) if isinstance(batches, Sequence) else 0
    cka: LinearCKA | MinibatchCKA = LinearCKA() if method == "exact" else MinibatchCKA()
    for done, (states, mask) in enumerate(each_batch(stack, batches), 1):
        cka.update([state[mask] for state in states])
        if progress:
            progress(done, total, f"{cka.frames} frames")
    return Similarity(cka.matrix(), cka.frames, method)


def refuse_ragged(states: Sequence[Tensor]) -> int:
    """Return the number of frames; raise DataError when the layers do not have the same, or are not (n, D)."""
    shapes = [tuple(s.shape) for s in states]
    if any(len(s) != 2 for s in shapes) or len({s[0] for s in shapes}) != 1:
        raise DataError(f"each layer needs the same frames as one (n, D) matrix, but the shapes are {shapes}")
    return int(shapes[0][0])


def _without_diagonal(x: Tensor) -> Tensor:
    gram = x @ x.T
    return gram - torch.diag(gram.diagonal())


def _normalised(products: Matrix, square_root: bool) -> Matrix:
    own = np.sqrt(np.diag(products)) if square_root else np.maximum(np.diag(products), 0.0)
    if flat := [int(i) for i in np.flatnonzero(own <= 0)]:
        raise DataError(f"representations {flat} are the same in every frame; CKA is not defined for them")
    scale = np.outer(own, own) if square_root else np.sqrt(np.outer(own, own))
    found = np.asarray(products / scale, dtype=np.float64)
    np.fill_diagonal(found, 1.0)  # up to rounding it is
    return found


def _refuse_few(frames: int, least: int) -> None:
    if frames < least:
        raise DataError(f"{frames} frame(s) are too few; at least {least} are needed")

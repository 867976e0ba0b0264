"""The confusion matrix of a whole set, and the intersection over union that is read from it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError, NoMatch, close_to
from thrifty.fewshot.segmentation.pictures import IGNORE

Floats = npt.NDArray[np.float64]


class Confusion:
    """Counts of pixels by true and predicted class, summed over all pictures before anything is divided.

    IoU of class m = counts[m, m] / (row m + column m - counts[m, m]). A class that is in neither truth nor prediction
    has no IoU (NaN) and is left out of the mean; one that is predicted but nowhere true has 0 and counts. All in
    percent.

    >>> c = Confusion(("background", "leaf"))
    >>> c.add(np.array([[0, 1], [0, 1]]), np.zeros((2, 2), int))
    >>> c.iou().tolist(), c.miou()
    ([50.0, 0.0], 25.0)
    """

    def __init__(self, classes: tuple[str, ...], counts: npt.NDArray[np.int64] | None = None) -> None:
        m = len(classes)
        self.classes = tuple(classes)
        self.counts = np.zeros((m, m), np.int64) if counts is None else np.array(counts, np.int64)  # [true, predicted]
        if not 1 <= m <= IGNORE or self.counts.shape != (m, m):
            raise DataError(f"{m} classes and counts {self.counts.shape}; there may be 1..{IGNORE} classes")

    def add(self, truth: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer]) -> None:
        """Count the pixels of one or more masks of the same shape; truth IGNORE counts for nothing."""
        m = len(self.classes)
        if truth.shape != predicted.shape:
            raise DataError(f"truth has shape {truth.shape}, prediction {predicted.shape}; they must be the same")
        seen = truth != IGNORE
        t, p = truth[seen].astype(np.int64), predicted[seen].astype(np.int64)
        if t.size and not (min(t.min(), p.min()) >= 0 and max(t.max(), p.max()) < m):
            raise DataError(f"true classes {t.min()}..{t.max()}, predicted {p.min()}..{p.max()}; there are {m} classes")
        self.counts += np.bincount(t * m + p, minlength=m * m).reshape(m, m)

    def __add__(self, other: Confusion) -> Confusion:
        """Return the counts of both."""
        if self.classes != other.classes:
            raise DataError("only counts of the same classes can be added")
        return Confusion(self.classes, self.counts + other.counts)

    def iou(self) -> Floats:
        """Return the IoU of each class in percent (M,); NaN for a class in neither truth nor prediction."""
        both = np.diag(self.counts).astype(np.float64)
        either = self.counts.sum(0) + self.counts.sum(1) - both
        with np.errstate(invalid="ignore", divide="ignore"):
            result: Floats = np.where(either > 0, 100 * both / np.maximum(either, 1), np.nan)
        return result

    def miou(self, leave_out: Iterable[str] = ()) -> float:
        """Return the mean IoU in percent of the classes that occur.

        leave_out: names that do not count in the mean (their pixels stay in the unions of the others), such as the
        three of Cityscapes' "reduced" score. Raises NoMatch for a name that is no class, DataError where nothing was
        counted.
        """
        out = set(leave_out)
        strange = sorted(out - set(self.classes))
        if strange:
            raise NoMatch(f"no class '{strange[0]}'; {close_to(strange[0], self.classes)}")
        values = self.iou()[[name not in out for name in self.classes]]
        if np.isnan(values).all():
            raise DataError("no pixel of any of these classes was counted; there is no mean IoU")
        return float(np.nanmean(values))

    def accuracy(self) -> float:
        """Return the share of pixels that are right, in percent."""
        return 100 * float(np.trace(self.counts)) / max(int(self.counts.sum()), 1)

    def __repr__(self) -> str:
        worth = f"mIoU {self.miou():.2f} %" if self.counts.any() else "empty"
        return f"Confusion({len(self.classes)} classes, {int(self.counts.sum())} pixels, {worth})"

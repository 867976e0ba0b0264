"""Learners of every kind, and random streams of requests for them with classes that appear late."""

from __future__ import annotations

import numpy as np

from thrifty.associative import Anchors, Codes

LEARN, CLASSIFY, NEW_CLASS, RESET = range(4)


def book(seed, words, features, bits=8):
    return np.random.default_rng(seed).integers(0, 1 << bits, (words, features)).astype(np.uint8)


CASES = {
    "sums": Anchors(9, 5, parts=3, anchors=2),
    "sums l1 bytes": Anchors(14, 5, parts=2, anchors=3, metric="l1", fraction=0, n_max=200),
    "sums fill up": Anchors(7, 4, parts=7, anchors=1, fraction=8, n_max=9, tie="lowest"),
    "sums wide": Anchors(12, 4, parts=1, anchors=3, fraction=7),
    "nearest": Anchors(12, 4, parts=3, anchors=3, policy="nearest", n_max=20),
    "nearest means": Anchors(
        10,
        3,
        parts=3,
        anchors=2,
        policy="nearest",
        form="mean",
        fraction=6,
        rounding="stochastic",
        metric="l1",
        n_max=1 << 17,
    ),
    "means": Anchors(11, 4, parts=4, anchors=2, form="mean", fraction=7),
    "means floor": Anchors(10, 4, parts=3, anchors=1, form="mean", fraction=3, rounding="floor", bits=5),
    "means stochastic": Anchors(9, 3, parts=2, anchors=2, form="mean", fraction=7, rounding="stochastic", seed=5),
    "means long": Anchors(8, 4, parts=2, anchors=2, form="mean", fraction=14, metric="l1"),
    "bits": Codes(book(1, 9, 11), classes=9, parts=4),
    "bits l1": Codes(book(2, 5, 8, 4), classes=4, parts=3, bits=4, metric="l1"),
    "counts": Codes(book(3, 6, 10), classes=5, parts=3, cells="counts"),
}


def stream(k, n, seed=0, chances=(0.5, 0.455, 0.035, 0.01)):
    """Return (what, labels, levels): noisy classes that come one after the other, some labels out of range."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, k.top + 1, (k.classes, k.features))
    open_now = 1 + np.arange(n) * (k.classes + 1) // n  # classes that may come by now, one too many at the end
    labels = rng.integers(0, open_now)
    levels = centres[np.minimum(labels, k.classes - 1)] + np.rint(k.top / 6 * rng.standard_normal((n, k.features)))
    what = rng.choice(4, n, p=chances)
    return what.astype(np.uint8), labels.astype(np.int32), np.clip(levels, 0, k.top).astype(np.uint8)

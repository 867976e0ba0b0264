"""scikit-learn's digits as the notes split them: 1,200 to learn, 597 to test, pixels / 16, features shuffled."""

import functools

import numpy as np
from sklearn.datasets import load_digits


@functools.cache
def digits():
    """Return (x, y, queries, truth); the seeds are those with which the notes' figures come out."""
    x, y = load_digits(return_X_y=True)
    x = x[:, np.random.default_rng(101).permutation(64)] / 16.0
    order = np.random.default_rng(0).permutation(len(y))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]

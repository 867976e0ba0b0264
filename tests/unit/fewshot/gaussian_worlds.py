"""Gaussian worlds with known truth, many episodes at once."""

import numpy as np

DISTANCE = {64: 4.0, 640: 6.0}


def isotropic(episodes, ways, shots, d, seed, queries=200, distance=None):
    """Return features (n, d), support rows (E, C, k), true errors (E,); unit noise, expected distance by d."""
    rng = np.random.default_rng(seed)
    scale = (DISTANCE[d] if distance is None else distance) / np.sqrt(2 * d)
    centres = scale * rng.standard_normal((episodes, ways, 1, d))
    x = centres + rng.standard_normal((episodes, ways, shots, d))
    means = x.mean(axis=2)
    right = []
    for e in range(episodes):
        # queries need only their scores: <q, m_c>, a normal of covariance M M^T about <centre, m_c>
        mean = centres[e, :, 0] @ means[e].T - 0.5 * (means[e] ** 2).sum(axis=1)
        root = np.linalg.cholesky(means[e] @ means[e].T + 1e-9 * np.eye(ways))
        scores = mean[:, None] + rng.standard_normal((ways, queries, ways)) @ root.T
        right.append((scores.argmax(axis=2) == np.arange(ways)[:, None]).mean())
    rows = np.arange(episodes * ways * shots).reshape(episodes, ways, shots)
    return x.reshape(-1, d), rows, 1.0 - np.array(right)


def mape(predicted, true):
    """Relative error on accuracy, per episode (spec 1d)."""
    return np.abs(predicted - true) / (1.0 - true)


def t_value(differences):
    """Paired t."""
    return differences.mean() / (differences.std(ddof=1) / len(differences) ** 0.5)

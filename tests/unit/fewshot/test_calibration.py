"""The variance of nearest class mean from shots left out."""

import numpy as np
import pytest

from thrifty.errors import DataError
from thrifty.fewshot import NearestClassMean
from thrifty.fewshot.calibration import left_out_variance


def world(rng, shots, d=200, active=6, ways=5):
    """Features whose variance lies in a few of many dimensions, as those of networks do."""
    scale = np.r_[np.ones(active), 0.02 * np.ones(d - active)]
    means = np.r_[1.2 * np.ones(active), 0.02 * np.ones(d - active)] * rng.standard_normal((ways, d))
    y = np.repeat(np.arange(ways), shots)
    return means, lambda labels: means[labels] + scale * rng.standard_normal((len(labels), d)), y


def test_probabilities_are_about_the_accuracy():
    gaps, plain = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        _, draw, y = world(rng, 8)
        x, yq = draw(y), np.repeat(np.arange(5), 60)
        queries = draw(yq)
        for found, variance in ((gaps, left_out_variance(x, y)), (plain, None)):
            model = NearestClassMean(variance=variance).fit(x, y)
            right = (model.predict(queries) == yq).mean()
            found.append(model.predict_proba(queries).max(axis=1).mean() - right)
    assert np.mean(plain) > 0.1  # the pooled variance is far too certain here
    assert abs(np.mean(gaps)) < 0.06


def test_labels_stay():
    rng = np.random.default_rng(0)
    _, draw, y = world(rng, 4)
    x, queries = draw(y), draw(np.repeat(np.arange(5), 20))
    plain, calibrated = NearestClassMean().fit(x, y), NearestClassMean(variance=left_out_variance(x, y)).fit(x, y)
    assert np.array_equal(plain.predict(queries), calibrated.predict(queries))


def test_without_a_second_shot_there_is_none():
    assert left_out_variance(np.eye(3), [0, 1, 2]) is None
    assert left_out_variance(np.eye(3), [0, 0, 0]) is None
    with pytest.raises(DataError, match="must be"):
        left_out_variance(np.eye(3), [0, 1])

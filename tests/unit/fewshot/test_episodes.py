"""Episodes: what is drawn, how often, and nearest class mean on all of them against a loop."""

import numpy as np
import pytest

from thrifty.errors import DataError, KnobError
from thrifty.fewshot import (
    NearestClassMean,
    SoftKMeans,
    accuracies,
    dirichlet,
    evaluate,
    mean_interval,
    meta_dataset,
    uniform,
)
from thrifty.fewshot import episodes as ep


def labels(sizes=(30, 40, 50, 60, 70, 80), seed=0):
    y = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(y)


def real(rows):
    return rows[rows >= 0]


def check(found, y):
    """Every row has the label of its class, and none is used twice in an episode."""
    names = np.unique(y)
    for c, s, q in zip(found.classes, found.support, found.query, strict=True):
        used = np.concatenate([real(s), real(q)])
        assert len(set(used.tolist())) == len(used)
        for i, cls in enumerate(c):
            rows = np.concatenate([real(s[i]), real(q[i])])
            assert (y[rows] == names[cls]).all() if cls >= 0 else not len(rows)
        assert len(set(real(c).tolist())) == len(real(c))


def test_uniform_episodes_are_what_was_asked():
    y = labels()
    found = uniform(y, 5, 3, 7, 50, np.random.default_rng(0))
    assert found.support.shape == (50, 5, 3)
    assert found.query.shape == (50, 5, 7)
    assert found.even
    check(found, y)


def test_the_same_seed_gives_the_same_episodes():
    y = labels()
    first, again, other = (uniform(y, 4, 2, 3, 20, np.random.default_rng(s)) for s in (1, 1, 2))
    assert (first.support == again.support).all()
    assert (first.query == again.query).all()
    assert (first.support != other.support).any()


def test_names_do_not_matter():
    y = labels()
    names = np.array(["a", "b", "c", "d", "e", "f"])
    first, second = (uniform(v, 4, 2, 3, 5, np.random.default_rng(1)) for v in (y, names[y]))
    assert (first.query == second.query).all()


def test_all_samples_of_a_class_can_be_used():
    found = uniform(np.repeat([0, 1], 6), 2, 2, 4, 30, np.random.default_rng(0))
    both = np.concatenate([found.support, found.query], axis=2)
    assert (np.sort(both, axis=2) == np.arange(12).reshape(2, 6)[found.classes]).all()


def test_draws_without_replacement_are_uniform_and_ordered_at_random():
    """All 12 ordered pairs from 4 equally often: chi-square of 11 degrees below its 99.9 % point."""
    drawn = ep.without_replacement(np.full(24_000, 4), 2, np.random.default_rng(0))
    _, counts = np.unique(drawn @ [4, 1], return_counts=True)
    assert len(counts) == 12
    assert ((counts - 2000) ** 2 / 2000).sum() < 31.3


def test_draws_stop_where_numbers_run_out():
    drawn = ep.without_replacement(np.array([0, 1, 3, 5]), 4, np.random.default_rng(0))
    assert ((drawn >= 0).sum(axis=1) == [0, 1, 3, 4]).all()
    assert sorted(drawn[2]) == [-1, 0, 1, 2]


def test_dirichlet_episodes_are_unbalanced_and_complete():
    y = labels()
    found = dirichlet(y, 5, 3, 60, 300, np.random.default_rng(0))
    check(found, y)
    numbers = (found.query >= 0).sum(axis=2)
    assert (numbers.sum(axis=1) == 60).all()
    # Dirichlet(2) of 5 classes: variance of a share a(A - a)/(A^2 (A + 1)), a = 2, A = 10
    assert numbers.std() / 60 == pytest.approx((2 * 8 / (100 * 11)) ** 0.5, rel=0.12)
    flat = dirichlet(y, 5, 3, 60, 100, np.random.default_rng(0), concentration=1e6)
    assert ((flat.query >= 0).sum(axis=2) == 12).mean() > 0.95


def test_dirichlet_gives_what_a_class_lacks_to_others():
    found = dirichlet(labels((8, 8, 90)), 3, 4, 60, 50, np.random.default_rng(0))
    numbers = (found.query >= 0).sum(axis=2)
    assert (numbers.sum(axis=1) == 60).all()
    assert (numbers[found.classes < 2] <= 4).all()


def test_apportioned_numbers_add_up():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(6), 200)
    room = rng.integers(10, 40, (200, 6))
    numbers = ep.apportion(shares, 50, room)
    assert (numbers.sum(axis=1) == 50).all()
    assert (numbers <= room).all()
    assert (np.abs(ep.apportion(shares, 50, np.full((200, 6), 99)) - shares * 50) < 1).all()


def test_meta_dataset_episodes_keep_the_rules():
    y = labels(tuple(range(12, 132, 2)))
    sizes = np.bincount(y)
    found = meta_dataset(y, 200, np.random.default_rng(0))
    check(found[:40], y)
    ways = (found.classes >= 0).sum(axis=1)
    shots, queries = (found.support >= 0).sum(axis=2), (found.query >= 0).sum(axis=2)
    assert ways.min() == 5
    assert 45 <= ways.max() <= 50
    for e, w in enumerate(ways):
        mine = sizes[found.classes[e, :w]]
        assert (queries[e, :w] == min(10, mine.min() // 2)).all()
        assert (shots[e, :w] >= 1).all()
        assert (shots[e, :w] + queries[e, :w] <= mine).all()
        assert shots[e, w:].sum() == queries[e, w:].sum() == 0
    assert shots.sum(axis=1).max() <= 500
    assert not found.even
    # bigger classes get more shots
    assert np.corrcoef(sizes[found.classes[found.classes >= 0]], shots[found.classes >= 0])[0, 1] > 0.2


def features(y, d=16, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((y.max() + 1, d))
    return (centres[y] + 1.2 * rng.standard_normal((len(y), d)) + 3.0).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["uniform", "dirichlet", "meta"])
def test_all_at_once_equals_one_at_a_time(kind, dtype):
    y = labels(tuple(range(20, 80, 6)))
    x, rng = features(y, dtype=dtype), np.random.default_rng(3)
    found = {
        "uniform": lambda: uniform(y, 5, 3, 8, 60, rng),
        "dirichlet": lambda: dirichlet(y, 5, 3, 40, 60, rng),
        "meta": lambda: meta_dataset(y, 30, rng),
    }[kind]()
    fast, slow = accuracies(x, found), evaluate(NearestClassMean(), x, found)
    np.testing.assert_allclose(fast, slow, atol=1e-12)
    assert 0.3 < fast.mean() < 0.99


def test_chunks_change_nothing(monkeypatch):
    y = labels()
    x, found = features(y), uniform(y, 5, 3, 8, 40, np.random.default_rng(0))
    whole = accuracies(x, found)
    monkeypatch.setattr(ep, "CHUNK_BYTES", 1)
    assert (accuracies(x, found) == whole).all()


def test_random_features_are_at_chance():
    y = labels((1500,) * 8)  # many: what is left of a small class leans away from its shots
    x = np.random.default_rng(1).standard_normal((len(y), 32))
    found = mean_interval(accuracies(x, uniform(y, 5, 5, 15, 1000, np.random.default_rng(2))))
    assert abs(found.mean - 0.2) < 1.5 * found.half_width


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(4)
    for count in (5, 100):
        hits = [abs((i := mean_interval(rng.normal(0.5, 0.1, count))).mean - 0.5) <= i.half_width for _ in range(600)]
        assert 0.95 - 3 * 0.0089 < np.mean(hits) < 0.95 + 3 * 0.0089
    assert mean_interval([0.3]).half_width == float("inf")
    assert mean_interval([0.0, 1.0]).half_width == pytest.approx(6.3531, abs=1e-3)  # t of one degree: 12.706 / 2


def test_other_estimators_are_evaluated_too():
    y = labels()
    x, found = features(y), uniform(y, 5, 1, 10, 40, np.random.default_rng(0))
    assert evaluate(SoftKMeans(), x, found).mean() > evaluate(NearestClassMean(), x, found).mean() - 0.02


def test_what_cannot_be_drawn_is_refused_by_name():
    y = np.array(["ant"] * 3 + ["bee"] * 9 + ["cow"] * 9)
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"ant \(3\)"):
        uniform(y, 2, 2, 2, 1, rng)
    with pytest.raises(DataError, match="4 ways"):
        uniform(y, 4, 1, 1, 1, rng)
    with pytest.raises(KnobError, match="shots is 0; queries is -1"):
        uniform(y, 2, 0, -1, 1, rng)
    with pytest.raises(DataError, match="at least 5 ways"):
        meta_dataset(y, 1, rng)
    with pytest.raises(KnobError, match="concentration"):
        dirichlet(y, 2, 1, 4, 1, rng, concentration=0)
    with pytest.raises(DataError, match="to spare"):
        dirichlet(y, 2, 2, 100, 1, rng)
    with pytest.raises(DataError, match="NaN"):
        accuracies(np.full((21, 2), np.nan), uniform(y, 2, 1, 1, 1, rng))
    with pytest.raises(DataError, match="one per feature row"):
        uniform([], 2, 1, 1, 1, rng)

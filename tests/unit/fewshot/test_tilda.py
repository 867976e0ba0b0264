"""TILDA: its limit cases, what it never forgets, what sub-spaces and views buy and cost, saving."""

import warnings

import numpy as np
import pytest
from digit_split import digits
from sklearn.neighbors import KNeighborsClassifier

from thrifty.errors import DataError, KnobError, StoreError
from thrifty.fewshot import NearestClassMean, Tilda


def score(model):
    x, y, queries, truth = digits()
    return model.fit(x, y).score(queries, truth)


def test_one_part_one_anchor_is_the_nearest_class_mean():
    x, y, queries, truth = digits()
    model, ncm = Tilda(parts=1, anchors=1).fit(x, y), NearestClassMean().fit(x, y)
    means = np.stack([x[y == c].mean(axis=0) for c in range(10)])
    assert np.abs(model.anchors_[:, 0] - means).max() < 1e-15
    assert (model.predict(queries) == ncm.predict(queries)).all()
    assert model.score(queries, truth) == pytest.approx(0.899, abs=0.02)


def test_as_many_anchors_as_examples_is_the_nearest_neighbour():
    x, y, queries, truth = digits()
    model = Tilda(parts=1, anchors=int(np.bincount(y).max())).fit(x, y)
    assert (model.predict(queries) == KNeighborsClassifier(1).fit(x, y).predict(queries)).all()
    assert model.score(queries, truth) == pytest.approx(0.988, abs=0.02)


def test_accuracy_grows_with_the_anchors():
    found = [score(Tilda(1, anchors)) for anchors in (1, 4, 16)]
    assert found == pytest.approx([0.899, 0.916, 0.943], abs=0.02)
    assert found == sorted(found)


def test_more_parts_cost_accuracy_on_raw_pixels():
    found = [score(Tilda(parts, 4)) for parts in (1, 2, 4, 8, 16)]
    assert found == pytest.approx([0.916, 0.908, 0.894, 0.853, 0.809], abs=0.02)
    assert found[0] > found[3] > found[4]


@pytest.mark.parametrize("policy", ["balanced", "random", "nearest"])
def test_new_classes_change_no_anchor_of_the_old_ones(policy):
    x, y, queries, truth = digits()
    old, few = y < 5, truth < 5
    model = Tilda(8, 4, policy=policy).fit(x[old], y[old])
    before, alone = model.anchors_.copy(), model.score(queries[few], truth[few])
    model.partial_fit(x[~old], y[~old])
    assert (model.anchors_[:5] == before).all()
    assert (model.counts_[:5].sum(axis=2) == np.bincount(y)[:5, None]).all()
    # the problem has ten ways now: less accurate on the old classes, which is not forgetting
    assert model.score(queries[few], truth[few]) < alone


def test_accuracy_on_old_classes_when_the_problem_grows():
    x, y, queries, truth = digits()
    old, few = y < 5, truth < 5
    model = Tilda(8, 4).fit(x[old], y[old])
    alone = model.score(queries[few], truth[few])
    model.partial_fit(x[~old], y[~old])
    assert (alone, model.score(queries[few], truth[few])) == pytest.approx((0.922, 0.871), abs=0.03)


def test_balanced_anchors_do_not_depend_on_the_order_of_classes():
    x, y, queries, _ = digits()
    by_class = np.argsort(y, kind="stable")
    first, second = Tilda(8, 4).fit(x, y), Tilda(8, 4).fit(x[by_class], y[by_class])
    np.testing.assert_allclose(first.anchors_, second.anchors_, atol=1e-12)
    assert (first.predict(queries) == second.predict(queries)).all()


def test_one_anchor_does_not_depend_on_any_order():
    x, y, queries, _ = digits()
    order = np.random.default_rng(1).permutation(len(y))
    first, second = Tilda(8, 1).fit(x, y), Tilda(8, 1).fit(x[order], y[order])
    np.testing.assert_allclose(first.anchors_, second.anchors_, atol=1e-12)
    assert (first.predict(queries) == second.predict(queries)).mean() > 0.995


def test_random_anchors_vary_with_the_seed():
    found = [score(Tilda(8, 4, policy="random", seed=seed)) for seed in range(5)]
    assert found == pytest.approx([0.85] * 5, abs=0.035)
    assert len(set(found)) > 2
    counts = Tilda(8, 4, policy="random").fit(*digits()[:2]).counts_
    assert counts.min() > 10
    assert counts.max() < 60  # of 120 in 4


def test_nearest_anchors_are_better_than_balanced_ones():
    """Random or balanced anchors are noisy copies of the class mean; online k-means finds the clumps."""
    for parts in (1, 8):
        assert score(Tilda(parts, 4, policy="nearest")) > score(Tilda(parts, 4)) + 0.02


@pytest.mark.parametrize("policy", ["balanced", "random", "nearest"])
def test_running_means_are_batch_means(policy):
    x, y, _, _ = digits()
    chunks = np.array_split(np.arange(len(y)), 17)
    whole, bits = Tilda(7, 3, policy=policy).fit(x, y), Tilda(7, 3, policy=policy)
    for part in chunks:
        bits.partial_fit(x[part], y[part])
    np.testing.assert_allclose(bits.anchors_, whole.anchors_, atol=1e-12)
    assert (bits.counts_ == whole.counts_).all()
    if policy == "balanced":
        for c in range(10):
            for i in range(3):
                np.testing.assert_allclose(whole.anchors_[c, i], x[y == c][i::3].mean(axis=0), atol=1e-12)


def noisy_blocks(sigma, blocks, queries=4000):
    """Gaussian classes with known means; some of eight blocks of each query carry gross noise."""
    rng = np.random.default_rng(2)
    means = rng.standard_normal((10, 64))
    truth = rng.integers(0, 10, queries)
    x = means[truth] + sigma * rng.standard_normal((queries, 64))
    for i in range(queries):
        for b in rng.choice(8, blocks, replace=False):
            x[i, 8 * b : 8 * b + 8] += 20.0 * rng.standard_normal(8)
    return means, x, truth


@pytest.mark.parametrize(
    ("sigma", "ncm", "vote"),
    [(0.5, (0.41, 0.29, 0.23), (1.0, 1.0, 1.0)), (1.0, (0.40, 0.28, 0.25), (0.993, 0.983, 0.954))],
)
def test_votes_survive_gross_noise_in_some_blocks(sigma, ncm, vote):
    for blocks in (1, 2, 3):
        means, x, truth = noisy_blocks(sigma, blocks, 1500)
        mean = NearestClassMean().fit(means, range(10)).score(x, truth)
        parts = Tilda(parts=8, anchors=1).fit(means, range(10)).score(x, truth)
        assert mean == pytest.approx(ncm[blocks - 1], abs=0.06)
        assert parts == pytest.approx(vote[blocks - 1], abs=0.02)


def test_views_with_independent_noise_help():
    rng = np.random.default_rng(3)
    means, truth = rng.standard_normal((10, 64)), rng.integers(0, 10, 2000)
    views = means[truth][:, None] + 1.6 * rng.standard_normal((2000, 3, 64))
    model = Tilda(parts=8, anchors=1).fit(means, range(10))
    one, three = model.score(views[:, :1], truth), model.score(views, truth)
    assert one == pytest.approx(0.97, abs=0.03)
    assert three > 0.99
    assert (model.votes(views).sum(axis=1) == 24).all()
    assert (model.votes(views) == sum(model.votes(views[:, r]) for r in range(3))).all()
    two_level = Tilda(parts=8, anchors=1, vote="two_level").fit(means, range(10))
    assert (two_level.votes(views).sum(axis=1) == 3).all()
    assert two_level.score(views, truth) > one


def shifted(x):
    """Return (n, 3, 64): pictures of shuffled pixels, and the same one pixel to the right and down."""
    order = np.random.default_rng(101).permutation(64)
    images = np.empty_like(x)
    images[:, order] = x
    grid = images.reshape(-1, 8, 8)
    moved = [grid, np.pad(grid, ((0, 0), (0, 0), (1, 0)))[:, :, :8], np.pad(grid, ((0, 0), (1, 0), (0, 0)))[:, :8]]
    return np.stack([m.reshape(-1, 64)[:, order] for m in moved], axis=1)


def test_augmentation_that_breaks_labels_hurts():
    x, y, queries, truth = digits()
    model = Tilda(8, 4).fit(x, y)
    assert model.score(shifted(queries), truth) < model.score(queries, truth) - 0.02


def test_views_are_examples_when_learning():
    x, y, queries, _ = digits()
    views = shifted(x[:100])
    model = Tilda(8, 4).fit(views, y[:100])
    flat = Tilda(8, 4).fit(views.reshape(300, 64), np.repeat(y[:100], 3))
    assert (model.counts_ == flat.counts_).all()
    assert (model.predict_proba(queries) == flat.predict_proba(queries)).all()


def test_a_class_without_examples_is_never_predicted():
    x, y, queries, _ = digits()
    model = Tilda(8, 4).partial_fit(x[y < 3], y[y < 3], classes=np.arange(10))
    assert model.classes_.tolist() == list(range(10))
    assert (model.predict(np.vstack([queries, np.zeros((1, 64))])) < 3).all()
    assert (model.predict_proba(queries)[:, 3:] == 0).all()


def test_many_examples_of_one_class_favour_it():
    """Unbalanced: recall per class shows it. One class has four anchors, the other one."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((401, 8))
    y = np.r_[np.zeros(400, int), 1]
    x[400] = 0.5
    model = Tilda(1, 4).fit(x, y)
    assert model.counts_.astype(bool).sum(axis=2).tolist() == [[4], [1]]
    assert (model.predict(rng.standard_normal((500, 8))) == 0).mean() > 0.5


def test_margins_and_abstaining():
    x, y, queries, truth = digits()
    model = Tilda(8, 4).fit(x, y)
    top = np.sort(model.votes(queries), axis=1)
    assert (model.margins(queries) == top[:, -1] - top[:, -2]).all()
    decided = model.decide(queries, margin=3, unknown=-1)
    sure = decided != -1
    assert (sure == (model.margins(queries) >= 3)).all()
    assert 0.2 < sure.mean() < 1
    assert (decided[sure] == truth[sure]).mean() > model.score(queries, truth) + 0.03
    assert (model.decide(queries, margin=0) == model.predict(queries)).all()


@pytest.mark.parametrize("mixing", ["permutation", "rotation"])
def test_mixing_is_fixed_by_the_seed(mixing):
    x, y, queries, _ = digits()
    first, again, other = (Tilda(4, 2, mixing=mixing, seed=s).fit(x, y).votes(queries) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    whole = Tilda(1, 2, mixing=mixing).fit(x, y)  # distances of whole vectors do not change
    assert (whole.predict(queries) == Tilda(1, 2).fit(x, y).predict(queries)).all()


def test_bytes_are_those_of_the_anchors_whatever_the_parts():
    x, y, _, _ = digits()
    for parts in (1, 8):
        model = Tilda(parts, 4, dtype="float32").fit(x, y)
        assert model.footprint_.state_bytes == 10 * 4 * 64 * 4 + 10 * parts * 4 * 4
        assert model.footprint_.learn_operations == 3 * 64
        assert model.footprint_.predict_operations == 3 * 10 * 4 * 64
        assert model.footprint_.constant_bytes == 0
    assert Tilda(4, mixing="permutation").fit(x, y).footprint_.constant_bytes == 8 * 64


def test_float32_anchors_are_enough():
    assert score(Tilda(8, 4, dtype="float32")) == score(Tilda(8, 4))


@pytest.mark.parametrize("labels", ["numbers", "words"])
@pytest.mark.parametrize("knobs", [{}, {"policy": "random", "mixing": "rotation", "dtype": "float32", "parts": 5}])
def test_saved_and_loaded_it_goes_on_as_before(labels, knobs, tmp_path):
    x, y, queries, _ = digits()
    y = y if labels == "numbers" else np.array(["zero", "one", "two", "three"] * 3)[y]
    model = Tilda(**knobs).fit(x[:300], y[:300])
    again = Tilda.load(model.save(tmp_path / "deep" / "model.safetensors"))
    assert again.get_params() == model.get_params()
    for m in (model, again):
        m.partial_fit(x[300:400], y[300:400])
    assert (again.anchors_ == model.anchors_).all()
    assert again.anchors_.dtype == model.anchors_.dtype
    assert again.classes_.dtype == model.classes_.dtype
    assert (again.predict_proba(queries) == model.predict_proba(queries)).all()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


def test_what_is_no_saved_tilda_is_refused(tmp_path):
    from thrifty.fewshot import OnChipAnchors, saved

    x, y, _, _ = digits()
    good = Tilda().fit(x[:50], y[:50])
    path = good.save(tmp_path / "good")
    with pytest.raises(StoreError, match="there is no file"):
        Tilda.load(tmp_path / "none")
    (tmp_path / "junk").write_bytes(path.read_bytes()[:300])
    with pytest.raises(StoreError, match="no file that thrifty's estimators wrote"):
        Tilda.load(tmp_path / "junk")
    with pytest.raises(StoreError, match="another thing than a Tilda"):
        Tilda.load(OnChipAnchors().fit(x[:50], y[:50]).save(tmp_path / "other"))
    content, arrays = saved.read(path, "Tilda", 1, frozenset({"anchors", "counts", "mixing"}))
    with pytest.raises(StoreError, match="has version 2"):
        Tilda.load(saved.write(tmp_path / "new", "Tilda", 2, content, arrays))
    with pytest.raises(StoreError, match="has the arrays"):
        Tilda.load(saved.write(tmp_path / "more", "Tilda", 1, content, {**arrays, "extra": np.zeros(3)}))
    with pytest.raises(StoreError, match="does not fit its own description"):
        Tilda.load(saved.write(tmp_path / "cut", "Tilda", 1, content, {**arrays, "anchors": arrays["anchors"][:3]}))
    with pytest.raises(StoreError, match="does not describe a Tilda"):
        Tilda.load(saved.write(tmp_path / "knob", "Tilda", 1, {**content, "knobs": {"wide": 3}}, arrays))
    with pytest.raises(StoreError, match="cannot be written"):
        good.save(path / "below a file")


def test_bad_input_is_named():
    x, y, _, _ = digits()
    with pytest.raises(KnobError, match=r"policy is 'fair'.*parts is 65.*anchors is 0"):
        Tilda(65, 0, policy="fair").fit(x, y)
    with pytest.raises(DataError, match="labels are"):
        Tilda().fit(x, y).partial_fit(x[:2], ["a", "b"])
    with pytest.raises(DataError, match="no views"):
        Tilda().fit(x, y).predict(np.zeros((3, 0, 64)))
    with pytest.raises(DataError, match="64 features"):
        Tilda().fit(x, y).partial_fit(x[:3, :9], y[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tilda().fit(x, y).predict_proba(x[:3])

"""Nearest class mean, soft k-means, the logistic probe, preprocessing, EASY: hand-made answers and limits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from thrifty.errors import DataError, KnobError
from thrifty.fewshot import (
    Crops,
    LogisticProbe,
    NearestClassMean,
    SoftKMeans,
    augmented_shots,
    average_views,
    base_mean,
    ensemble,
    evaluate,
    preprocess,
    uniform,
)
from thrifty.fewshot.logistic_probe import rank_in_class, span
from thrifty.fewshot.preprocess import unit

SOURCE = Path(__file__).parents[3] / "src"


def blobs(seed=0, classes=4, shots=5, d=12, noise=1.0):
    rng = np.random.default_rng(seed)
    centres = 2.0 * rng.standard_normal((classes, d))
    y = np.repeat(np.arange(classes), shots)
    x, queries = (centres[y] + noise * rng.standard_normal((len(y), d)) for _ in range(2))
    return x, y, queries


# ---- nearest class mean


def test_labels_are_those_of_scikit_learns_nearest_centroid():
    x, y, queries = blobs()
    assert (NearestClassMean().fit(x, y).predict(queries) == NearestCentroid().fit(x, y).predict(queries)).all()


def test_any_order_and_chunks_give_the_same_means():
    x, y, queries = blobs(shots=9)
    x = np.round(x * 1024) / 1024  # sums of these are exact, so equality is to the bit
    whole = NearestClassMean().fit(x, y)
    rng = np.random.default_rng(0)
    for chunks in (1, 7, 36):
        order = rng.permutation(len(y))
        parts = NearestClassMean()
        for rows in np.array_split(order, chunks):
            parts.partial_fit(x[rows], y[rows])
        assert (parts.counts_ == whole.counts_).all()
        assert (parts.means_ == whole.means_).all()
        np.testing.assert_allclose(parts.scatters_, whole.scatters_, rtol=1e-10)
        np.testing.assert_allclose(parts.predict_proba(queries), whole.predict_proba(queries), atol=1e-12)


def test_a_long_stream_does_not_drift():
    rng = np.random.default_rng(1)
    x = 1e3 + rng.standard_normal((20_000, 2))
    stream = NearestClassMean()
    for rows in np.array_split(np.arange(len(x)), 400):
        stream.partial_fit(x[rows], rows % 2)
    for c in (0, 1):
        np.testing.assert_allclose(stream.means_[c], x[c::2].mean(axis=0), rtol=1e-13)
        assert stream.scatters_[c] == pytest.approx(((x[c::2] - x[c::2].mean(axis=0)) ** 2).sum(), rel=1e-10)


def test_new_classes_join_and_old_ones_do_not_move():
    x, y, _ = blobs()
    model = NearestClassMean().partial_fit(x[y == 2], y[y == 2])
    before = model.means_.copy()
    model.partial_fit(x[y == 0], y[y == 0]).partial_fit(x[y == 3], y[y == 3])
    assert model.classes_.tolist() == [0, 2, 3]
    assert (model.means_[1] == before[0]).all()


def test_a_class_without_shots_never_wins():
    model = NearestClassMean().partial_fit([[5.0], [6.0]], ["a", "c"], classes=["a", "b", "c"])
    assert model.predict([[0.0], [5.4]]).tolist() == ["a", "a"]  # the empty mean would be at 0
    assert model.predict_proba([[0.0]])[0, 1] == 0.0
    model.partial_fit([[0.0]], ["b"])
    assert model.predict([[0.0]]).tolist() == ["b"]


def test_fit_forgets():
    x, y, _ = blobs()
    model = NearestClassMean().fit(x, y)
    model.fit(x[y < 2], y[y < 2])
    assert model.counts_.tolist() == [5, 5]


def test_probabilities_are_those_of_the_model():
    """Many queries of two Gaussian classes: among those given probability p, a share p is right."""
    rng = np.random.default_rng(2)
    d, n = 20, 300
    centres = np.stack([np.zeros(d), np.full(d, 0.35)])
    y = np.repeat([0, 1], 50)
    truths, found = [], []
    for _ in range(40):
        model = NearestClassMean().fit(centres[y] + rng.standard_normal((100, d)), y)
        truths.append(rng.integers(0, 2, n))
        found.append(model.predict_proba(centres[truths[-1]] + rng.standard_normal((n, d)))[:, 1])
    truth, p = np.concatenate(truths), np.concatenate(found)
    for low in (0.1, 0.4, 0.7):
        part = (p > low) & (p < low + 0.2)
        assert truth[part].mean() == pytest.approx(p[part].mean(), abs=0.07)
    assert model.variance_ == pytest.approx(1 + 1 / 50, rel=0.06)


def test_priors_move_the_border():
    x, y = [[0.0], [0.5], [4.0], [4.5]], [0, 0, 1, 1]
    middle = [[2.3]]
    assert NearestClassMean().fit(x, y).predict(middle) == [1]
    assert NearestClassMean(priors=[0.999, 0.001], variance=2.0).fit(x, y).predict(middle) == [0]
    lopsided = NearestClassMean(priors="empirical", variance=2.0).fit([*x, [0.2], [0.3]], [*y, 0, 0])
    equal = NearestClassMean(variance=2.0).fit([*x, [0.2], [0.3]], [*y, 0, 0])
    assert lopsided.predict_proba(middle)[0, 0] > equal.predict_proba(middle)[0, 0]
    assert NearestClassMean(priors=[0.0, 1.0]).fit(x, y).predict([[0.0]]) == [1]


def test_two_classes_have_one_decision():
    model = NearestClassMean(variance=1.0).fit([[0.0], [2.0]], ["low", "high"])
    assert model.classes_.tolist() == ["high", "low"]
    np.testing.assert_allclose(model.decision_function([[0.5]]), [0.5 * (1.5**2 - 0.5**2)])


def test_cosine_ignores_length():
    x, y, queries = blobs()
    model = NearestClassMean("cosine").fit(x, y)
    rng = np.random.default_rng(0)
    stretched = NearestClassMean("cosine").fit(x * rng.uniform(0.1, 9, (len(x), 1)), y)
    np.testing.assert_allclose(stretched.means_, model.means_, atol=1e-12)
    assert (stretched.predict(queries * 7) == model.predict(queries)).all()
    means = np.stack([unit(unit(x[y == c]).mean(axis=0)) for c in range(4)])
    assert (model.predict(queries) == (unit(queries) @ means.T).argmax(axis=1)).all()


def test_moving_everything_changes_no_label():
    x, y, queries = blobs()
    for shift in (0.0, 1e6):
        moved = NearestClassMean().fit(x + shift, y).predict_proba(queries + shift)
        np.testing.assert_allclose(moved, NearestClassMean().fit(x, y).predict_proba(queries), atol=1e-6)


def test_one_shot_and_identical_shots_have_probabilities():
    one = NearestClassMean().fit([[0.0, 0], [3.0, 0], [0, 3.0]], [0, 1, 2])
    p = one.predict_proba([[0.1, 0.0], [1.5, 0.0]])
    assert np.isfinite(p).all()
    assert p[0, 0] > p[0, 1]
    assert p[1, 0] == pytest.approx(p[1, 1])
    same = NearestClassMean().fit([[0.0], [0.0], [1.0], [1.0]], [0, 0, 1, 1])
    assert same.predict_proba([[0.1]]).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"metric": "cosin"}, "cosine"),
        ({"preprocess": "MX"}, "'X'"),
        ({"preprocess": "ME"}, "base_mean"),
        ({"preprocess": "ME", "base_mean": [1.0]}, "shape"),
        ({"preprocess": "MM", "base_mean": [1.0] * 12}, "twice"),
        ({"priors": "uniforme"}, "uniform"),
        ({"priors": [1.0, 2.0]}, "4 classes"),
        ({"priors": [1.0, -2.0, 1.0, 1.0]}, "negative"),
        ({"variance": 0.0}, "positive"),
    ],
)
def test_knobs_are_refused_at_fit(knobs, words):
    x, y, _ = blobs()
    with pytest.raises(KnobError) as err:
        NearestClassMean(**knobs).fit(x, y)
    assert words in str(err.value)
    assert isinstance(err.value, ValueError)


def test_labels_of_two_kinds_are_refused():
    model = NearestClassMean().partial_fit([[0.0]], ["a"])
    with pytest.raises(DataError, match="known so far"):
        model.partial_fit([[0.0]], [1])
    with pytest.raises(DataError, match="NaN"):
        model.partial_fit([[np.nan]], ["a"])
    with pytest.raises(KnobError, match="call fit first"):
        NearestClassMean(preprocess="ME", base_mean="support").partial_fit([[0.0]], [1])


# ---- preprocessing, EASY


def test_me_output_has_unit_length():
    x, _, _ = blobs()
    np.testing.assert_allclose(np.linalg.norm(preprocess(x, "ME", base_mean(x)), axis=1), 1.0)


def test_me_is_the_identity_on_centred_unit_features():
    x = unit(blobs()[0])
    np.testing.assert_allclose(preprocess(x, "ME", np.zeros(12)), x, atol=1e-15)


def test_letters_apply_from_left_to_right():
    x = np.array([[-4.0, 9.0]])
    np.testing.assert_allclose(preprocess(x, "RP"), [[0.0, 3.0]])
    np.testing.assert_allclose(preprocess(x, "RPE"), [[0.0, 1.0]])
    with pytest.raises(DataError, match="'RP'"):
        preprocess(x, "P")
    np.testing.assert_allclose(base_mean(np.array([[4.0, 0.0], [16.0, 4.0]]), "PME"), [3.0, 1.0])


def test_huge_and_tiny_features_have_unit_length():
    np.testing.assert_allclose(unit(np.array([[3e200, 4e200], [3e-200, 4e-200]])), [[0.6, 0.8]] * 2)


def test_a_backbone_twice_changes_no_label():
    x, y, queries = blobs(noise=2.0)
    once = NearestClassMean(preprocess="ME", base_mean=x.mean(axis=0)).fit(x, y).predict(queries)
    twice, twice_queries = ensemble([x, x]), ensemble([queries, queries])
    model = NearestClassMean(preprocess="ME", base_mean=twice.mean(axis=0)).fit(twice, y)
    assert (model.predict(twice_queries) == once).all()


def test_ensembles_help_where_noises_are_independent():
    rng = np.random.default_rng(5)
    y = np.repeat(np.arange(8), 40)
    views = [rng.standard_normal((8, 10))[y] + 1.5 * rng.standard_normal((len(y), 10)) for _ in range(3)]
    found = uniform(y, 5, 1, 15, 200, rng)
    alone, together = (evaluate(NearestClassMean(), f, found) for f in (views[0], ensemble(views)))
    gain = together - alone
    assert gain.mean() > 3 * gain.std() / 200**0.5
    np.testing.assert_allclose(np.linalg.norm(ensemble(views, normalise=True), axis=1), 3**0.5)


def test_augmented_shots_average_what_crops_show():
    rng = np.random.default_rng(6)
    images = rng.random((3, 2, 8, 8))
    whole = Crops(views=2, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    flat = augmented_shots(images, lambda x: x.reshape(len(x), -1), rng, whole)
    np.testing.assert_allclose(flat, images.reshape(3, -1))  # a crop of everything is the image
    seen = []

    def spy(x):
        seen.append(x)
        return x.mean(axis=(2, 3))

    found = augmented_shots(images.astype(np.float32), spy, np.random.default_rng(0), Crops(views=4, size=(5, 6)))
    assert [s.shape for s in seen] == [(3, 2, 5, 6)] * 4
    assert seen[0].dtype == np.float32
    np.testing.assert_allclose(found, np.mean([s.mean(axis=(2, 3)) for s in seen], axis=0), rtol=1e-5)
    np.testing.assert_allclose(average_views(np.stack([s.mean(axis=(2, 3)) for s in seen], axis=1)), found, rtol=1e-5)


def test_crops_are_inside_and_linear():
    """A ramp stays a ramp, inside its range; means over crops are near the middle."""
    ramp = np.broadcast_to(np.arange(16.0), (500, 1, 16, 16))
    found = Crops(size=(4, 4))(ramp, np.random.default_rng(0))
    assert found.min() >= 0
    assert found.max() <= 15
    inner = np.diff(found[:, 0, 0], axis=1)
    assert (inner > 0).all()
    assert found.mean() == pytest.approx(7.5, abs=0.5)
    single = Crops(views=1)(np.ones((2, 3, 1, 1)), np.random.default_rng(0))
    assert (single == 1).all()


@pytest.mark.parametrize("knobs", [{"views": 0}, {"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}, {"size": (0, 4)}])
def test_crops_refuse(knobs):
    with pytest.raises(KnobError):
        Crops(**knobs)


# ---- soft k-means


def test_without_updates_it_is_the_nearest_class_mean():
    x, y, queries = blobs(noise=2.0)
    found = SoftKMeans(iterations=0, preprocess="").fit(x, y).predict(queries)
    assert (found == NearestClassMean().fit(x, y).predict(queries)).all()


def test_zero_sharpness_gives_uniform_weights_and_infinite_hard_ones():
    x, y, queries = blobs()
    weights, _ = SoftKMeans(sharpness=0.0).fit(x, y).transduce(queries)
    np.testing.assert_allclose(weights, 0.25)
    hard, means = SoftKMeans(sharpness=float("inf"), preprocess="").fit(x, y).transduce(queries)
    assert set(np.unique(hard)) == {0.0, 1.0}
    for c in range(4):  # a fixed point of hard k-means with shots
        np.testing.assert_allclose(means[c], np.concatenate([x[y == c], queries[hard[:, c] == 1]]).mean(axis=0))
    near, _ = SoftKMeans(sharpness=1e9, preprocess="").fit(x, y).transduce(queries)
    np.testing.assert_allclose(near, hard, atol=1e-6)


def test_one_update_by_hand():
    model = SoftKMeans(sharpness=1.0, iterations=1, preprocess="").fit([[0.0], [2.0]], [0, 1])
    _, means = model.transduce([[0.5]])
    w = 1 / (1 + np.exp(-(1.5**2 - 0.5**2)))  # weight of class 0
    np.testing.assert_allclose(means.ravel(), [0.5 * w / (1 + w), (2 + 0.5 * (1 - w)) / (2 - w)])


def test_queries_help_each_other():
    y = np.repeat(np.arange(6), 60)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((6, 20))[y] + 0.9 * rng.standard_normal((len(y), 20))
    found = uniform(y, 5, 1, 15, 150, rng)
    gain = evaluate(SoftKMeans(), x, found) - evaluate(NearestClassMean(), x, found)
    assert gain.mean() > 3 * gain.std() / 150**0.5


@pytest.mark.parametrize("knobs", [{"sharpness": -1.0}, {"iterations": -1}, {"iterations": 1.5}, {"preprocess": "?"}])
def test_soft_k_means_refuses(knobs):
    with pytest.raises(KnobError):
        SoftKMeans(**knobs).fit([[0.0], [1.0]], [0, 1])


# ---- logistic probe


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("d", [6, 200])
def test_the_span_of_the_shots_loses_nothing(classes, d):
    x, y, queries = blobs(classes=classes, d=d)
    ours = LogisticProbe(C=0.1, tolerance=1e-9).fit(x, y)
    theirs = LogisticRegression(C=0.1, tol=1e-9, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(queries), theirs.predict_proba(queries), atol=1e-5)


def test_the_penalty_is_chosen_on_the_shots_alone():
    x, y, queries = blobs(noise=9.0, shots=6, d=40)
    model = LogisticProbe("folds").fit(x, y)
    assert len(model.losses_) == 9
    assert model.losses_[model.penalty_] == min(model.losses_.values())
    losses = {"folds": [], 1e4: []}
    for seed in range(8):
        x, y, queries = blobs(seed, noise=9.0, shots=6, d=40)
        for penalty, found in losses.items():
            p = LogisticProbe(penalty).fit(x, y).predict_proba(queries)
            found.append(-np.log(p[np.arange(len(y)), y]).mean())
    assert np.mean(losses["folds"]) < np.mean(losses[1e4])
    with pytest.raises(DataError, match="two shots per class"):
        LogisticProbe("folds").fit(x[:7], y[:7])


def test_folds_hold_out_one_of_each_class():
    index = np.array([0, 1, 0, 0, 1, 1])
    fold = rank_in_class(index)
    for i in range(3):
        assert sorted(index[fold == i]) == [0, 1]


def test_span_gives_the_rows_back():
    x = np.random.default_rng(0).standard_normal((5, 30))
    z, basis = span(np.concatenate([x, x[:1]]))
    assert z.shape == (6, 5)
    np.testing.assert_allclose(z @ basis, np.concatenate([x, x[:1]]), atol=1e-12)


def test_the_probe_refuses():
    x, y, _ = blobs()
    with pytest.raises(KnobError, match="folds"):
        LogisticProbe("cv").fit(x, y)
    with pytest.raises(KnobError, match="positive"):
        LogisticProbe(0.0).fit(x, y)
    with pytest.raises(DataError, match="one class"):
        LogisticProbe().fit(x, np.zeros(len(x)))
    with pytest.raises(DataError, match="did not converge"):
        LogisticProbe(1e4, iterations=1).fit(x, y)


# ---- imports


def run_without(name, code):
    hide = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == {name!r}: raise ImportError('hidden: ' + name)
sys.meta_path.insert(0, Hide())
"""
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


def test_it_works_without_torch():
    code = """
from thrifty.fewshot import NearestClassMean
print(NearestClassMean().fit([[0.0], [2.0]], ['low', 'high']).predict([[1.7]]), 'torch' in sys.modules)
"""
    done = run_without("torch", code)
    assert done.stdout == "['high'] False\n", done.stderr


def test_without_scikit_learn_it_names_the_extra():
    done = run_without("sklearn", "import thrifty.fewshot")
    assert "pip install 'thrifty[fewshot]'" in done.stderr

"""Every few-shot estimator: scikit-learn's checks, counted; label permutation; float32 next to float64."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from thrifty.fewshot import ESTIMATORS, NearestClassMean, OnChipAnchors, OnChipCodes, SoftKMeans, Tilda

LEAST_CHECKS = 45  # scikit-learn 1.9 runs 50 and more on a classifier
_ALONE = "base_mean='support' needs all shots in one call of fit: partial_fit first is refused"
VARIANTS = {
    **{name: estimator() for name, estimator in ESTIMATORS.items()},
    "cosine": NearestClassMean("cosine"),
    "ME": NearestClassMean(preprocess="ME", base_mean="support"),
    "empirical": NearestClassMean(priors="empirical"),
    "soft_kmeans plain": SoftKMeans(preprocess=""),
    "tilda nearest": Tilda(None, 3, policy="nearest", mixing="rotation", vote="two_level"),
    "tilda random": Tilda(policy="random", dtype="float32"),
    "on_chip means": OnChipAnchors(form="mean", rounding="stochastic", metric="l1", tie="lowest"),
    "on_chip counts": OnChipCodes(cells="counts", codebook="kmeans"),
}
_PARTIAL = ("check_estimators_partial_fit_n_features", "check_n_features_in_after_fitting")
MORE_FAILURES = {"ME": dict.fromkeys(_PARTIAL, _ALONE)}


def data(seed=0, classes=4, shots=5, d=12):
    rng = np.random.default_rng(seed)
    centres = 2.0 * rng.standard_normal((classes, d))
    y = np.repeat(np.arange(classes), shots)
    return centres[y] + rng.standard_normal((len(y), d)), y, centres[y] + rng.standard_normal((len(y), d))


def results(estimator, declared):
    found = check_estimator(estimator, expected_failed_checks=declared, on_fail=None, on_skip=None)
    return {status: [r for r in found if r["status"] == status] for status in ("passed", "failed", "xfail", "skipped")}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_agrees(name):
    estimator = VARIANTS[name]
    declared = {**estimator.declared_failures, **MORE_FAILURES.get(name, {})}
    found = results(estimator, declared)
    assert not [(r["check_name"], r["exception"]) for r in found["failed"]]
    assert len(found["passed"]) >= LEAST_CHECKS
    assert {r["check_name"] for r in found["xfail"]} == set(declared)  # what is declared does fail
    assert len(found["skipped"]) <= 2


def test_the_battery_goes_red_on_a_broken_estimator():
    class Forgetful(NearestClassMean):
        def predict(self, X):
            return super().predict(X)[::-1]

    assert results(Forgetful(), {})["failed"]


def test_every_estimator_is_in_the_battery():
    assert {type(v) for v in VARIANTS.values()} == set(ESTIMATORS.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_renaming_the_labels_renames_the_answers(name):
    x, y, queries = data()
    new = np.array(["d", "a", "c", "b"])
    first = clone(VARIANTS[name]).fit(x, y)
    second = clone(VARIANTS[name]).fit(x, new[y])
    assert (second.predict(queries) == new[first.predict(queries)]).all()
    columns = np.argsort(new)
    np.testing.assert_allclose(second.predict_proba(queries), first.predict_proba(queries)[:, columns], atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_near_float64(name):
    x, y, queries = data(1)
    double = clone(VARIANTS[name]).fit(x, y)
    single = clone(VARIANTS[name]).fit(x.astype(np.float32), y)
    assert (single.predict(queries.astype(np.float32)) == double.predict(queries)).all()
    np.testing.assert_allclose(
        single.predict_proba(queries.astype(np.float32)), double.predict_proba(queries), atol=2e-4
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_proba_decision_and_labels_agree(name):
    x, y, queries = data(2)
    for classes in (2, 4):
        keep = y < classes
        fitted = clone(VARIANTS[name]).fit(x[keep], y[keep])
        proba, labels = fitted.predict_proba(queries), fitted.predict(queries)
        decision = fitted.decision_function(queries)
        np.testing.assert_allclose(proba.sum(axis=1), 1.0)
        assert (fitted.classes_[proba.argmax(axis=1)] == labels).all()
        assert decision.shape == ((len(queries),) if classes == 2 else (len(queries), 4))
        again = pickle.loads(pickle.dumps(fitted))
        assert (again.predict(queries) == labels).all()

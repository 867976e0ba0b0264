"""TextStatistics on a world with known truth: every line of specs/fewshot.md 2f, and the pitfalls of 2g."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from text_worlds import World

from thrifty.fewshot import NearestClassMean, uniform
from thrifty.fewshot.preprocess import InputError, OptionError
from thrifty.fewshot.text_statistics import (
    NamedFeatures,
    Ridge,
    TextStatistics,
    choose_on_classes,
    closed_alpha,
    learn_statistics,
)
from thrifty.fewshot.text_statistics.fusion import class_scales, grid_counts, pick, whitening
from thrifty.fewshot.text_statistics.learning import relative_spreads

BASE, HELD, NEW = np.arange(800), np.arange(800, 1000), np.arange(1000, 1200)
RUNS = 30
VARIANTS = {"ncm": (0.0, 0.0), "mean": ("validation", 0.0), "std": (0.0, "validation"), "both": ("validation",) * 2}


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def learned(world):
    rng = np.random.default_rng(1)
    return learn_statistics(world.named(BASE, 100, rng), world.named(HELD, 100, rng), Ridge((1.0,)))


def task(world, rng, shots, ways=20, queries=15):
    classes = rng.choice(NEW, ways, replace=False)
    return [world.draw(classes, n, rng) for n in (shots, min(shots, 4), queries)]


def fitted(learned, texts, alpha, beta, shots, held=None, **knobs):
    asks = "validation" in (alpha, beta)
    return TextStatistics(learned, texts, alpha=alpha, beta=beta, **knobs).fit(
        *shots, validation=held if asks else None
    )


def accuracy(model, queries):
    return float((model.predict(queries[0]) == queries[1]).mean())


@pytest.fixture(scope="module")
def table(world, learned):
    """Accuracy (RUNS,) and mean chosen alpha of each variant by number of shots."""
    found, alphas = {}, {}
    for k in (1, 2, 4, 8, 16):
        rng = np.random.default_rng(k)
        rows = {name: [] for name in (*VARIANTS, "closed")}
        chosen = []
        for _ in range(RUNS):
            shots, held, queries = task(world, rng, k)
            for name, (alpha, beta) in {**VARIANTS, "closed": ("closed", "closed")}.items():
                model = fitted(learned, world.texts, alpha, beta, shots, held)
                rows[name].append(accuracy(model, queries))
                if name == "mean":
                    chosen.append(model.alpha_.mean())
        found[k] = {name: np.array(values) for name, values in rows.items()}
        alphas[k] = float(np.mean(chosen))
    return found, alphas


def paired_t(better, worse):
    gap = better - worse
    return gap.mean() / (gap.std(ddof=1) / len(gap) ** 0.5)


# ---- 2f.1


def test_no_weight_of_text_is_nearest_class_mean(world, learned):
    shots, _, queries = task(world, np.random.default_rng(0), 2)
    model = fitted(learned, world.texts, 0.0, 0.0, shots)
    plain = NearestClassMean().fit(*shots)
    assert (model.predict(queries[0]) == plain.predict(queries[0])).all()
    assert accuracy(plain, queries) < 1  # labels that could differ


def test_full_weight_of_text_ignores_the_shots(world, learned):
    rng = np.random.default_rng(0)
    shots, _, queries = task(world, rng, 2)
    other = (shots[0] + rng.standard_normal(shots[0].shape), shots[1])
    first, second = (fitted(learned, world.texts, 1.0, 0.3, s) for s in (shots, other))
    np.testing.assert_array_equal(first.predict_proba(queries[0]), second.predict_proba(queries[0]))
    third = fitted(learned, world.texts, 0.9, 0.3, other)
    assert np.abs(first.predict_proba(queries[0]) - third.predict_proba(queries[0])).max() > 1e-3


@pytest.mark.parametrize("alpha", ["closed", "per_dimension", 0.2])
def test_no_shots_is_full_weight_of_text(world, learned, alpha):
    shots, _, queries = task(world, np.random.default_rng(0), 1)
    zero = TextStatistics(learned, world.texts, alpha=alpha, beta=1.0).fit_texts(np.unique(shots[1]))
    full = fitted(learned, world.texts, 1.0, 1.0, shots)
    np.testing.assert_allclose(zero.predict_proba(queries[0]), full.predict_proba(queries[0]), atol=1e-12)
    assert (zero.alpha_ == 1).all()


# ---- 2f.2


@pytest.mark.parametrize("relative", [True, False])
def test_a_constant_predicted_spread_changes_no_label(world, relative):
    rng = np.random.default_rng(0)
    flat = World()
    flat.spreads[:] = 1.3
    parts = [flat.named(c, 100, rng) for c in (BASE, HELD)]
    exact = [NamedFeatures(_exact_spread(p.features, p.labels, 1.3), p.labels, p.texts) for p in parts]
    learned = learn_statistics(*exact)
    shots, _, queries = task(world, rng, 1)
    labels = [
        fitted(learned, world.texts, 0.4, beta, shots, relative=relative).predict(queries[0])
        for beta in (0.0, 0.5, 1.0)
    ]
    assert (labels[0] == labels[1]).all()
    assert (labels[0] == labels[2]).all()


def _exact_spread(x, y, spread):
    """Return the samples moved so that every class has exactly this standard deviation everywhere."""
    shaped = x.reshape(len(np.unique(y)), -1, x.shape[1])
    mean = shaped.mean(axis=1, keepdims=True)
    return ((shaped - mean) / shaped.std(axis=1, ddof=1, keepdims=True) * spread + mean).reshape(x.shape)


# ---- 2f.3


@pytest.mark.parametrize("relative", [True, False])
def test_scaling_all_features_with_relative_spreads_changes_nothing(relative):
    found = []
    for scale in (1.0, 0.01):
        world, rng = World(classes=400, scale=scale), np.random.default_rng(3)
        learned = learn_statistics(world.named(np.arange(250), 50, rng), world.named(np.arange(250, 300), 50, rng))
        classes = rng.choice(np.arange(300, 400), 20, replace=False)
        shots, held, queries = (world.draw(classes, n, rng) for n in (1, 4, 15))
        model = fitted(learned, world.texts, 0.0, "validation", shots, held, relative=relative)
        half = fitted(learned, world.texts, 0.0, 0.5, shots, relative=relative)
        found.append((model.beta_, model.predict(queries[0]), half.predict(queries[0])))
    (beta, labels, halves), (beta_small, labels_small, halves_small) = found
    if relative:
        assert beta == beta_small
        assert (labels == labels_small).all()
        assert (halves == halves_small).all()
    else:
        assert (halves != halves_small).any()


# ---- 2f.4


def test_the_predictor_beats_the_constant_guess(learned):
    assert learned.mean_ratio == pytest.approx(0.27, abs=0.03)
    assert learned.spread_ratio < 0.15
    assert (learned.mean_ratio, learned.spread_ratio) < (1, 1)


def test_shuffled_texts_do_not_beat_it(world):
    rng = np.random.default_rng(1)
    base, held = world.named(BASE, 20, rng), world.named(HELD, 20, rng)
    mixed = {c: world.texts[o] for c, o in zip(BASE.tolist(), rng.permutation(BASE).tolist(), strict=True)}
    learned = learn_statistics(NamedFeatures(base.features, base.labels, mixed), held)
    assert learned.mean_ratio > 0.97
    assert learned.spread_ratio > 0.97


# ---- 2f.5


def test_accuracies_are_those_of_the_specification(table):
    found, _ = table
    expected = {
        1: (63.8, 95.6, 96.3, 96.5),
        2: (81.6, 97.2, 97.9, 97.9),
        4: (93.7, 98.4, 99.1, 99.1),
        16: (98.6, 98.9, 99.3, 99.3),
    }
    for k, row in expected.items():
        for name, percent in zip(VARIANTS, row, strict=True):
            assert 100 * found[k][name].mean() == pytest.approx(percent, abs=2.0), (k, name)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_text_helps_and_more_text_more(table, k):
    row = table[0][k]
    assert paired_t(row["mean"], row["ncm"]) > 3
    assert paired_t(row["std"], row["ncm"]) > 3
    assert row["both"].mean() >= row["mean"].mean() - 0.002
    assert paired_t(row["closed"], row["mean"]) > 3


def test_the_chosen_weight_falls_with_the_shots(table, learned):
    _, alphas = table
    values = [alphas[k] for k in (1, 2, 4, 8, 16)]
    assert all(a > b - 0.02 for a, b in itertools.pairwise(values))
    assert values[0] > 0.6
    assert values[-1] < 0.35
    theory = closed_alpha(learned, np.array([1, 2, 4, 8, 16]), np.ones(learned.dimension)).ravel()
    np.testing.assert_allclose(theory, [0.86, 0.76, 0.61, 0.44, 0.28], atol=0.02)
    assert (np.array(values) < theory + 0.02).all()  # ties take the least weight


@pytest.mark.parametrize(("beta", "least"), [(0.0, 0.961), (1.0, 0.98)])
def test_zero_shots(world, learned, beta, least):
    rng = np.random.default_rng(5)
    found = []
    for _ in range(RUNS):
        _, _, queries = task(world, rng, 1)
        found.append(
            accuracy(TextStatistics(learned, world.texts, beta=beta).fit_texts(np.unique(queries[1])), queries)
        )
    assert np.mean(found) > least


# ---- 2f.6


def test_shuffled_class_texts_destroy_the_gain(world, learned):
    rng = np.random.default_rng(6)
    zero, chosen, plain, helped = [], [], [], []
    for _ in range(RUNS):
        shots, held, queries = task(world, rng, 4)
        classes = np.unique(shots[1])
        others = np.roll(rng.permutation(classes), 1)
        mixed = {c: world.texts[o] for c, o in zip(classes.tolist(), others.tolist(), strict=True)}
        zero.append(accuracy(TextStatistics(learned, mixed).fit_texts(classes), queries))
        model = fitted(learned, mixed, "validation", 0.0, shots, held)
        chosen.append(model.alpha_.mean())
        helped.append(accuracy(model, queries))
        plain.append(accuracy(fitted(learned, mixed, 0.0, 0.0, shots), queries))
    assert np.mean(zero) == pytest.approx(1 / 20, abs=3 * np.std(zero) / RUNS**0.5 + 0.005)
    assert np.mean(chosen) < 0.1  # true texts: above 0.5
    assert np.mean(helped) <= np.mean(plain) + 0.005


# ---- open set


def test_open_set_scores_rank_a_class_above_strangers(world, learned):
    rng = np.random.default_rng(7)
    shots, _, queries = task(world, rng, 5)
    strangers, _ = world.draw(np.setdiff1d(NEW, shots[1])[:20], 15, rng)
    model = fitted(learned, world.texts, "closed", "closed", shots)
    same = model.open_set_scores(queries[0])[np.arange(len(queries[1])), np.searchsorted(model.classes_, queries[1])]
    other = model.open_set_scores(strangers).ravel()
    assert ((same > 0) & (same <= 0.5)).all()
    area = roc_auc_score(np.r_[np.ones_like(same), np.zeros_like(other)], np.r_[same, other])
    assert area > 0.95


def test_open_set_scores_are_the_stated_formula_with_the_class_own_scale(world, learned):
    shots, _, queries = task(world, np.random.default_rng(8), 2, ways=3)
    model = fitted(learned, world.texts, 0.5, 0.7, shots)
    assert np.ptp(model.class_scales_, axis=0).max() > 0.05  # scales that differ by class
    away = np.linalg.norm((queries[0][:, None] - model.means_) / model.class_scales_, axis=2)
    np.testing.assert_allclose(model.open_set_scores(queries[0]), 1 - 1 / (1 + np.exp(-0.01 * away)))


# ---- 2g


def test_a_class_of_the_predictor_is_refused_by_label_and_by_text(world, learned):
    x, y = world.draw(np.r_[5, 900, NEW[:3]], 2, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"2 class\(es\).*5 \(a base class\), 900 \(a validation class\)"):
        TextStatistics(learned, world.texts).fit(x, y)
    with pytest.raises(InputError, match="base class"):
        TextStatistics(learned, world.texts).fit_texts()
    renamed = {"new": world.texts[5], "other": world.texts[1000]}
    with pytest.raises(InputError, match="'new' \\(has the text of the base class 5\\)"):
        TextStatistics(learned, renamed).fit(x[:4], np.array(["new", "new", "other", "other"]))
    model = TextStatistics(learned, world.texts).fit(*world.draw(NEW[:2], 2, np.random.default_rng(0)))
    with pytest.raises(InputError, match="base class"):
        model.partial_fit(x[:1], y[:1])
    assert set(model.classes_.tolist()) == set(NEW[:2].tolist())  # and nothing was learned


def test_base_and_validation_may_not_overlap(world):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"1 class\(es\) are both base and validation: 9"):
        learn_statistics(world.named(np.arange(10), 3, rng), world.named(np.arange(9, 14), 3, rng))
    twin = World()
    twin.texts[20] = twin.texts[3]
    with pytest.raises(InputError, match="20 = 3"):
        learn_statistics(twin.named(np.arange(10), 3, rng), twin.named(np.arange(15, 25), 3, rng))


def choose(world, learned, classes, episodes, rng, **knobs):
    part = world.named(classes, 40, rng)
    return choose_on_classes(learned, part, uniform(part.labels, 20, 1, 15, episodes, rng), **knobs)


def test_a_choice_on_validation_classes_is_kept_apart_and_logged(world, learned):
    rng = np.random.default_rng(0)
    choice = choose(world, learned, HELD, 20, rng, betas=[0.0, 1.0])
    assert choice.alpha > 0
    assert choice.beta == 1.0
    assert choice.table.shape == (21, 2)
    assert choice.accuracy == choice.table.max()
    shots, _, queries = task(world, rng, 1)
    model = TextStatistics(learned, world.texts, alpha=choice, beta=choice).fit(*shots)
    assert (model.beta_, model.alpha_[0, 0]) == (1.0, choice.alpha)
    assert accuracy(model, queries) > 0.97
    assert choice.selection in model.log_
    assert "200 validation classes" in str(choice.selection)


def test_a_choice_may_see_neither_base_nor_task_classes(world, learned):
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="are base classes"):
        choose(world, learned, BASE[:40], 2, rng)
    shots, _, _ = task(world, rng, 1)
    with pytest.raises(InputError, match="Choice was made on"):
        TextStatistics(learned, world.texts, alpha=choose(world, learned, NEW, 2, rng)).fit(*shots)
    part = world.named(HELD, 2, rng)
    drawn = uniform(part.labels, 20, 1, 1, 2, rng)
    with pytest.raises(InputError, match="episodes must be some"):
        choose_on_classes(learned, part, drawn[:0])


def test_the_log_says_everything_that_was_chosen(world, learned):
    shots, held, _ = task(world, np.random.default_rng(0), 2)
    lines = [str(line) for line in fitted(learned, world.texts, "validation", "validation", shots, held).log_]
    assert len(lines) == 4
    assert lines[0].startswith("mean: ridge penalty")
    assert lines[1].startswith("spread: ridge penalty")
    assert "of 441, on 40 validation shots of the task" in lines[3]
    assert any("closed form" in str(line) for line in fitted(learned, world.texts, "closed", 0.0, shots).log_)


def test_ties_take_the_least_alpha_then_the_least_beta():
    choice = pick(np.array([[1, 3, 3], [3, 2, 3]]), 4, np.array([0.2, 0.4]), np.array([0.1, 0.5, 0.9]), "", NEW)
    assert (choice.alpha, choice.beta, choice.accuracy) == (0.2, 0.5, 0.75)


def test_the_grid_counts_what_predict_labels(world, learned):
    shots, _, queries = task(world, np.random.default_rng(4), 1)
    classes = np.unique(shots[1])
    means, spreads = learned.predict(np.stack([world.texts[c] for c in classes]))
    alphas, betas = np.array([0.0, 0.35, 1.0]), np.array([0.0, 0.6])
    shot_means = np.stack([shots[0][shots[1] == c].mean(axis=0) for c in classes])
    truth = np.searchsorted(classes, queries[1])
    right = grid_counts(
        means, spreads, shot_means, queries[0], truth, lambda _w: np.repeat(alphas[:, None], 20, axis=1), betas, True
    )
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            labels = fitted(learned, world.texts, alpha, beta, shots).predict(queries[0])
            assert right[i, j] == (labels == queries[1]).sum()


def test_small_spreads_hardly_count_in_the_literal_form():
    small = 0.01 * np.array([[1.0, 4.0]])
    literal, relative = (class_scales(small, 0.5, r)[0] for r in (False, True))
    assert literal[1] / literal[0] < 1.1
    assert relative[1] / relative[0] == pytest.approx((0.5 + 0.5 * 2) / (0.5 + 0.5 * 0.5))


def test_predicted_spreads_are_positive_wherever_the_text(world, learned):
    far = 50.0 * np.random.default_rng(0).standard_normal((20, 32))
    raw = learned.spreads(far)
    assert (raw < 0).any()
    assert (learned.predict(far)[1] > 0).all()


def test_one_shot_needs_no_variance_of_shots(world, learned):
    shots, _, queries = task(world, np.random.default_rng(0), 1)
    model = fitted(learned, world.texts, "closed", "closed", shots)
    assert np.isfinite(model.scale_).all()
    assert np.isfinite(model.predict_proba(queries[0])).all()


# ---- full covariance


@pytest.fixture(scope="module")
def tilted():
    """Classes whose dimensions depend on each other in one common way, six dimensions, text decides the mean."""
    rng = np.random.default_rng(0)
    texts = dict(enumerate(rng.standard_normal((300, 8))))
    means = np.stack(list(texts.values())) @ rng.standard_normal((8, 6)) / 8**0.5
    mixing = np.eye(6)
    mixing[:3, 3:] = 3 * np.eye(3)  # x_i and x_{i+3} move together: no single dimension tells

    def draw(classes, count):
        noise = rng.standard_normal((len(classes), count, 6)) @ mixing.T
        return (means[classes][:, None] + 0.7 * noise).reshape(-1, 6), np.repeat(classes, count)

    def named(classes, count):
        return NamedFeatures(*draw(classes, count), texts)

    return draw, texts, named(np.arange(200), 30), named(np.arange(200, 240), 30)


def test_full_covariances_see_what_single_dimensions_do_not(tilted):
    draw, texts, base, held = tilted
    single, full = learn_statistics(base, held), learn_statistics(base, held, full=True)
    found = {"single": [], "full": [], "none": []}
    for seed in range(RUNS):
        classes = np.random.default_rng(seed).choice(np.arange(240, 300), 5, replace=False)
        shots, queries = draw(classes, 2), draw(classes, 15)
        for name, learned, beta in (("single", single, 1.0), ("full", full, 1.0), ("none", full, 0.0)):
            found[name].append(accuracy(fitted(learned, texts, 0.0, beta, shots), queries))
    assert paired_t(np.array(found["full"]), np.array(found["single"])) > 3
    assert paired_t(np.array(found["full"]), np.array(found["none"])) > 3


def test_the_full_metric_uses_the_chosen_beta(tilted):
    draw, texts, base, held = tilted
    learned = learn_statistics(base, held, full=True)
    classes = np.arange(240, 245)
    tasks = (fitted(learned, texts, 0.0, "validation", draw(classes, 1), draw(classes, 1)) for _ in range(30))
    model = next(m for m in tasks if 0 < m.beta_ < 1)  # not the last of the grid
    spreads = learned.predict(np.stack([texts[c] for c in classes]))[1]
    expected = (model.beta_ * relative_spreads(spreads) + (1 - model.beta_) * np.eye(6)).mean(axis=0)
    np.testing.assert_allclose(model.scale_, expected)
    weights = whitening(model.scale_)
    np.testing.assert_allclose(weights @ weights.T, np.linalg.inv(expected), rtol=1e-8)


def test_full_without_weights_of_text_is_nearest_class_mean(tilted):
    draw, texts, base, held = tilted
    learned = learn_statistics(base, held, full=True)
    shots, queries = draw(np.arange(240, 250), 2), draw(np.arange(240, 250), 15)
    labels = fitted(learned, texts, 0.0, 0.0, shots).predict(queries[0])
    assert (labels == NearestClassMean().fit(*shots).predict(queries[0])).all()
    scores = fitted(learned, texts, "closed", 1.0, shots).open_set_scores(queries[0])
    assert scores.shape == (150, 10)
    assert np.isfinite(scores).all()


def test_full_is_refused_where_it_does_not_fit():
    world, rng = World(d=300, classes=60), np.random.default_rng(0)
    base, held = world.named(np.arange(40), 4, rng), world.named(np.arange(40, 60), 4, rng)
    with pytest.raises(OptionError, match="full=True with 300 dimensions; give components, at most 256"):
        learn_statistics(base, held, full=True)
    assert learn_statistics(base, held, full=True, components=10).predict(held.text_rows)[1].shape == (20, 10, 10)

"""The forecast: every "must show" of specs/fewshot.md section 1f, then its interval, its baselines, its refusals."""

import numpy as np
import pytest
from gaussian_worlds import isotropic, mape, t_value
from sklearn.datasets import load_digits
from sklearn.metrics import davies_bouldin_score

from thrifty.errors import DataError, KnobError
from thrifty.fewshot import NearestClassMean, episodes
from thrifty.fewshot import generalization as g
from thrifty.fewshot.generalization import distances, gaussian, moments
from thrifty.fewshot.generalization.interval import interval
from thrifty.fewshot.generalization.model import model_predictions

QUICK = g.GaussianModel(samples=2000, rehearsals=0)


def with_correction(name):
    return g.GaussianModel(correction=name, samples=2000, rehearsals=0)


def unbiased(table, rows):
    found = moments.moments_of_episodes(table, rows)
    return (distances.measured(found.gram) - distances.noise(found.traces, found.counts))[:, 0, 1]


def pairs(draws, shots, scales, delta, rng):
    """Two classes `delta` (d,) apart, noise scales (2, d): table and rows of `draws` supports."""
    d = len(delta)
    x = rng.standard_normal((draws, 2, shots, d)) * np.asarray(scales)[:, None]
    x[:, 1] += delta
    return x.reshape(-1, d), np.arange(draws * 2 * shots).reshape(draws, 2, shots)


def support(seed=0, ways=5, shots=5, d=64):
    x, _, _ = isotropic(1, ways, shots, d, seed, queries=1)
    return x, np.repeat(np.arange(ways), shots)


# ---- 1f.1 to 1f.5: distances


@pytest.mark.parametrize(("shots", "draws", "naive"), [(2, 2000, 10.5), (5, 1000, 4.8), (20, 250, 1.94)])
def test_1_the_distance_is_unbiased(shots, draws, naive):
    d = 640
    delta = np.full(d, d**-0.5)
    scales = np.stack([np.full(d, 0.10), np.full(d, 0.14)])
    table, rows = pairs(draws, shots, scales, delta, np.random.default_rng(shots))
    u = unbiased(table, rows)
    assert abs(u.mean() - 1.0) < 3 * u.std() / draws**0.5
    measured = distances.measured(moments.moments_of_episodes(table, rows).gram)[:, 0, 1].mean()
    assert measured == pytest.approx(1 + d * (0.01 + 0.0196) / shots, rel=0.02)
    assert measured == pytest.approx(naive, rel=0.03)


def test_2_the_variance_of_the_distance_is_the_formula():
    rng = np.random.default_rng(2)
    d, shots = 12, 5
    scales = np.stack([np.linspace(0.2, 1.5, d), np.linspace(1.2, 0.3, d)])
    delta = rng.standard_normal(d)
    u = unbiased(*pairs(40_000, shots, scales, delta, rng))
    formula = g.unbiased_variance(delta, (np.diag(scales[0] ** 2), np.diag(scales[1] ** 2)), (shots, shots))
    assert u.var() == pytest.approx(formula, rel=0.05)


def test_2_the_variance_with_unequal_shots():
    rng = np.random.default_rng(3)
    d, shots = 6, (3, 7)
    scales, delta = np.stack([np.full(d, 1.0), np.linspace(0.5, 1.5, d)]), np.full(d, 0.7)
    x, y = [rng.standard_normal((20_000, k, d)) * s for k, s in zip(shots, scales, strict=True)]
    gap = x.mean(axis=1) - y.mean(axis=1) - delta
    u = (gap**2).sum(axis=1) - sum(v.var(axis=1, ddof=1).sum(axis=1) / v.shape[1] for v in (x, y))
    formula = g.unbiased_variance(delta, (np.diag(scales[0] ** 2), np.diag(scales[1] ** 2)), shots)
    assert u.var() == pytest.approx(formula, rel=0.06)


def test_3_the_distance_is_the_u_statistic():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((4, 9)) + 3.0, rng.standard_normal((7, 9))
    cross = sum(float(v @ w) for v in x for w in y) / (len(x) * len(y))

    def own(z):
        inner = z @ z.T
        return (inner.sum() - np.trace(inner)) / (len(z) * (len(z) - 1))

    found = g.unbiased_squared_distances(np.concatenate([x, y]), ["x"] * 4 + ["y"] * 7)
    assert found[0, 1] == pytest.approx(own(x) + own(y) - 2 * cross, abs=1e-9)


@pytest.mark.parametrize(("d", "shots"), [(64, 1), (64, 2), (64, 5), (64, 20), (640, 2), (640, 5)])
def test_4_the_table_is_the_closed_form(d, shots):
    def closed_form(snr):
        return np.maximum(0.0, 1.0 - d / (shots * snr**2))

    fine = g.ratio_table(d, shots, repeats=1000)  # the authors' 100 repeats leave noise of .01 on each point
    inside = closed_form(fine.snr) > 0.02  # where U is mostly positive; below, it is mostly clipped
    assert inside.sum() > 20
    assert np.abs(fine.ratio - closed_form(fine.snr))[inside].max() < 0.03
    table = g.ratio_table(d, shots)
    inside = closed_form(table.snr) > 0.02
    between = np.linspace(table.snr[inside][0], table.snr[-1], 500)
    assert np.abs(table(between) - closed_form(between)).max() < 0.05
    assert table(np.array([table.snr[0] / 2]))[0] == 0.0
    assert table(np.array([table.snr[-1] * 2]))[0] == 1.0


def test_5_the_frame_changes_no_decision():
    rng = np.random.default_rng(5)
    table, rows, _ = isotropic(1, 6, 4, 64, 5, queries=1)
    means = table[rows[0]].mean(axis=1)
    centre = means.mean(axis=0)
    gram = (means - centre) @ (means - centre).T
    root, rank = moments.inverse_root(gram[None])
    frame = root[0] @ (means - centre)
    queries = 2 * rng.standard_normal((10_000, 64))
    before = ((queries[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    after = (((queries - centre) @ frame.T)[:, None] - (means - centre) @ frame.T) ** 2
    assert (after.sum(axis=2).argmin(axis=1) == before).all()
    assert rank[0] == 5
    np.testing.assert_allclose(frame @ frame.T, np.eye(6) - 1 / 6, atol=1e-10)


def test_the_frame_variance_has_its_degrees_of_freedom():
    """C (k - 1) of them: unbiased, where the paper's code divides by C k - 1."""
    table, rows, _ = isotropic(400, 5, 3, 64, 6, queries=1)
    squares = gaussian.shared_scale(moments.moments_of_episodes(table, rows)) ** 2
    assert abs(squares.mean() - 1.0) < 3 * squares.std() / 20


# ---- 1f.6, 1f.7, 1f.12: limits and invariance


@pytest.mark.parametrize("ways", [2, 5])
def test_6_identical_classes_are_at_chance(ways):
    table, rows, _ = isotropic(100, ways, 20, 64, ways, queries=1, distance=0.0)
    assert abs(g.forecast_episodes(table, rows, model=QUICK).mean() - (1 - 1 / ways)) < 0.06


def test_6_far_classes_make_no_error():
    table, rows, _ = isotropic(5, 4, 3, 64, 1, queries=1, distance=100.0)
    assert g.forecast_episodes(table, rows, model=QUICK).max() == 0.0


def test_6_with_many_shots_all_corrections_agree_with_the_truth():
    table, rows, true = isotropic(8, 4, 1000, 64, 6, queries=4000)
    found = [g.forecast_episodes(table, rows, model=with_correction(c)) for c in ("none", "asymptotic", "effective")]
    for predicted in found:
        np.testing.assert_allclose(predicted, found[0], atol=0.012)
        assert abs((predicted - true).mean()) < 0.01


@pytest.mark.parametrize("covariance", ["shared", "free", "full"])
def test_7_moving_turning_and_scaling_change_nothing(covariance):
    x, y = support(shots=8)
    rng = np.random.default_rng(7)
    turn = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    model = g.GaussianModel(covariance=covariance, samples=3000, rehearsals=0)
    first = g.forecast(x, y, model=model)
    for other in (x + 5.0, x @ turn, 37.0 * x, 0.01 * (x @ turn) - 3.0):
        second = g.forecast(other, y, model=model)
        assert f"{second.error:.6f}" == f"{first.error:.6f}"
        np.testing.assert_allclose(second.confusions, first.confusions, atol=1e-9)


def test_7_renaming_and_reordering_change_only_the_sampling():
    x, y = support(shots=8)
    order = np.random.default_rng(0).permutation(len(y))
    first, second = g.forecast(x, y, model=QUICK), g.forecast(x[order], y[order], model=QUICK)
    assert second.error == pytest.approx(first.error, abs=1e-12)
    names = np.array(["e", "c", "a", "d", "b"])
    renamed = g.forecast(x, names[y], model=QUICK)
    assert abs(renamed.error - first.error) < 5 * first.standard_error
    place = np.argsort(names)
    np.testing.assert_allclose(renamed.distances, first.distances[np.ix_(place, place)], atol=1e-9)


def test_12_the_same_seed_gives_the_same_number():
    x, y = support()
    model = g.GaussianModel(samples=1000, rehearsals=100)
    first, second = g.forecast(x, y, model=model), g.forecast(x, y, model=model)
    assert first.to_json() == second.to_json()
    other = g.forecast(x, y, model=g.GaussianModel(samples=1000, rehearsals=100, seed=1))
    assert other.error != first.error
    assert first.standard_error == pytest.approx((first.raw_error * (1 - first.raw_error) / (5 * 1000)) ** 0.5)
    assert abs(other.error - first.error) < 5 * first.standard_error


# ---- 1f.8, 1f.9, 1f.11: synthetic worlds in which the model is true


@pytest.mark.parametrize(("d", "shots", "count"), [(64, 5, 150), (64, 10, 150), (64, 20, 150), (640, 5, 60)])
def test_8_effective_beats_the_others_where_the_model_is_true(d, shots, count):
    table, rows, true = isotropic(count, 5, shots, d, shots, queries=1000)
    effective = mape(g.forecast_episodes(table, rows, model=QUICK), true)
    left_out = mape(g.leave_one_out_episodes(table, rows), true)
    assert effective.mean() < left_out.mean()
    for worse in ("none", "asymptotic"):
        other = mape(g.forecast_episodes(table, rows, model=with_correction(worse)), true)
        assert t_value(other - effective) > 3


def test_8_the_table_gives_the_answer_of_the_closed_form():
    table, rows, _ = isotropic(40, 5, 5, 64, 8, queries=1)
    closed = g.forecast_episodes(table, rows, model=QUICK)
    simulated = g.forecast_episodes(table, rows, model=with_correction("table"))
    assert np.abs(closed - simulated).mean() < 0.02


def test_9_leave_one_out_is_pessimistic_with_few_shots():
    biases = {}
    for shots in (2, 5, 20):
        table, rows, true = isotropic(150, 5, shots, 64, 90 + shots, queries=400)
        biases[shots] = (g.leave_one_out_episodes(table, rows) - true).mean()
    assert 0.05 < biases[2] < 0.14
    assert 0.02 < biases[5] < 0.08
    assert abs(biases[20]) < 0.015


def test_9_leaving_one_shot_of_one_class_out_is_far_worse():
    table, rows, true = isotropic(5, 5, 2, 640, 9)
    y = np.repeat(np.arange(5), 2)
    alone = np.mean([g.leave_one_shot_out(table[r.ravel()], y) for r in rows])
    assert alone > 0.95
    assert true.mean() < 0.7


@pytest.mark.parametrize(("shots", "most"), [(5, 0.09), (10, 0.06)])
def test_11_other_shot_counts_are_forecast(shots, most):
    wanted = (5, 20, 50)
    episodes_, ways, d = 60, 5, 64
    table, rows, _ = isotropic(episodes_, ways, 50, d, 11, queries=1)
    rng = np.random.default_rng(11)
    found = {k: g.forecast_episodes(table, rows[:, :, :shots], k, QUICK) for k in wanted}
    assert found[5].mean() > found[20].mean() > found[50].mean()
    # fresh queries for the truth at each k: the centres are those of isotropic(seed=11)
    centres = 4.0 / np.sqrt(2 * d) * np.random.default_rng(11).standard_normal((episodes_, ways, 1, d))
    for k, predicted in found.items():
        means = table[rows[:, :, :k]].mean(axis=2)
        queries = centres + rng.standard_normal((episodes_, ways, 100, d))
        scores = queries @ means.transpose(0, 2, 1)[:, None] - 0.5 * (means**2).sum(axis=2)[:, None, None]
        true = 1.0 - (scores.argmax(axis=3) == np.arange(ways)[:, None]).mean(axis=(1, 2))
        assert np.abs(predicted - true).mean() < most


def test_11_each_forecast_falls_with_the_shots():
    x, y = support(3)
    errors = [f.error for f in g.curve(x, y, model=QUICK)]
    assert (np.diff(errors) <= 0).all()
    assert errors[0] > errors[-1]


def test_11_its_own_shots_are_the_default():
    x, y = support(4)
    assert g.forecast(x, y, 5, QUICK).error == pytest.approx(g.forecast(x, y, model=QUICK).error, abs=1e-12)


# ---- 1f.10: real features, both regimes


def digits_mape(ways, shots, count=300):
    found = load_digits()
    x, rng = found.data / 16, np.random.default_rng([ways, shots])
    drawn = episodes.uniform(found.target, ways, shots, 100, count, rng)
    true = 1.0 - episodes.accuracies(x, drawn)
    model = mape(g.forecast_episodes(x, drawn.support, model=QUICK), true)
    return model, mape(g.leave_one_out_episodes(x, drawn.support), true)


@pytest.mark.parametrize(("ways", "shots"), [(2, 2), (5, 2)])
def test_10_digits_the_model_wins_with_few_shots(ways, shots):
    model, left_out = digits_mape(ways, shots)
    assert t_value(left_out - model) > 3


def test_10_digits_leave_one_out_wins_with_many_shots():
    model, left_out = digits_mape(5, 20)
    assert t_value(model - left_out) > 3


@pytest.mark.parametrize("covariance", ["shared", "full"])
def test_10_digits_the_offset_of_other_classes_wins_again(covariance):
    found = load_digits()
    x, y = found.data / 16, found.target
    model = g.GaussianModel(covariance=covariance, samples=2000, rehearsals=0)
    for shots in (5, 20):
        rng = np.random.default_rng(shots)
        offset = g.learn_offset(x[y < 5], y[y < 5], 3, shots, rng, episodes=200, model=model)
        tried = g.trial(x[y >= 5], y[y >= 5], 3, shots, rng, episodes=200, model=model)
        left_out = g.leave_one_out_episodes(x[y >= 5], tried.episodes.support)
        corrected = np.abs(np.clip(tried.predicted - offset.value, 0, 1) - tried.true)
        assert corrected.mean() < np.abs(left_out - tried.true).mean()
        assert corrected.mean() < np.abs(tried.predicted - tried.true).mean() + 0.003


# ---- two classes, covariances, single shots


def test_two_classes_need_no_sampling():
    x, y = support(ways=2, shots=10)
    few = g.forecast(x, y, model=g.GaussianModel(samples=1, rehearsals=0))
    many = g.forecast(x, y, model=g.GaussianModel(samples=9, rehearsals=0, seed=3))
    assert few.error == many.error
    assert few.standard_error == 0.0
    from scipy.stats import norm

    u = g.unbiased_squared_distances(x, y)[0, 1]
    gap = x[y == 0].mean(axis=0) - x[y == 1].mean(axis=0)
    length = np.linalg.norm(gap)
    along = np.concatenate([(x[y == c] - x[y == c].mean(axis=0)) @ gap / length for c in (0, 1)])
    s = np.sqrt((along**2).sum() / 18)
    assert few.error == pytest.approx(norm.cdf(-u / length / (2 * s)), rel=1e-9)


def test_two_classes_sampled_agree_with_the_closed_form():
    offsets = np.array([[[2.0, 0.5], [-1.0, 0.3]]])
    noises = np.random.default_rng(0).standard_normal((1, 2, 2, 2))
    exact = gaussian.confusions(offsets, noises, 1, 0)[0]
    for c in (0, 1):
        scores = offsets[0, c] + np.random.default_rng(c).standard_normal((100_000, 2)) @ noises[0, c]
        assert exact[c, 1] == pytest.approx((scores[:, 1] > scores[:, 0]).mean(), abs=0.006)


@pytest.mark.parametrize("covariance", sorted(g.COVARIANCES))
def test_every_covariance_is_near_the_truth_where_all_are_true(covariance):
    table, rows, true = isotropic(60, 4, 20, 64, 12, queries=400)
    model = g.GaussianModel(covariance=covariance, samples=2000, rehearsals=0)
    predicted = g.forecast_episodes(table, rows, model=model)
    assert abs((predicted - true).mean()) < 0.025
    if covariance != "full":  # 20 shots for a 3 x 3 covariance: noisier
        assert mape(predicted, true).mean() < 0.05


def test_full_covariance_sees_what_isotropy_cannot():
    """Classes far apart along a quiet axis, noise along another between them: few errors in truth."""
    rng = np.random.default_rng(13)
    d, shots, ways = 3, 60, 3
    centres = np.array([[0.0, 0, 0], [4.0, 0, 0], [2.0, 6.0, 0]])
    x = centres[:, None] + rng.standard_normal((ways, shots, d)) * np.array([1.0, 3.0, 0.1])
    y = np.repeat(np.arange(ways), shots)
    queries = centres[:, None] + rng.standard_normal((ways, 5000, d)) * np.array([1.0, 3.0, 0.1])
    means = x.mean(axis=1)
    away = ((queries[:, :, None] - means) ** 2).sum(axis=3)
    true = 1 - (away.argmin(axis=2) == np.arange(ways)[:, None]).mean()
    full, shared = (
        g.forecast(x.reshape(-1, d), y, model=g.GaussianModel(covariance=c, rehearsals=0)).error
        for c in ("full", "shared")
    )
    assert abs(full - true) < 0.02
    assert abs(shared - true) > 0.03


def test_one_shot_needs_a_sigma_and_uses_it():
    table, rows, true = isotropic(100, 5, 1, 64, 14)
    y = np.arange(5)
    with pytest.raises(DataError, match="within_scale"):
        g.forecast(table[rows[0].ravel()], y)
    predicted = g.forecast_episodes(table, rows, model=g.GaussianModel(sigma=1.0, samples=1000))
    assert np.abs(predicted - true).mean() < 0.22
    assert (predicted < true).mean() > 0.8  # optimistic: U is a difference of large numbers, clipped at 0
    found = g.forecast(table[rows[0].ravel()], y, model=g.GaussianModel(sigma=1.0, samples=1000, rehearsals=100))
    assert found.low <= found.high
    assert g.within_scale(*support(shots=400)) == pytest.approx(1.0, abs=0.02)


def test_a_class_of_one_shot_takes_the_spread_of_the_others():
    x, y = support(shots=10)
    keep = np.ones(len(y), bool)
    keep[1:10] = False  # class 0 keeps one
    found = g.forecast(x[keep], y[keep], model=g.GaussianModel(samples=2000, rehearsals=200))
    assert found.shots == (1, 10, 10, 10, 10)
    assert 0 <= found.low <= found.high <= 1


def test_unequal_shots_batch_is_the_single_forecast():
    table, rows, _ = isotropic(4, 5, 6, 64, 15, queries=1)
    batch = g.forecast_episodes(table, rows, model=QUICK)
    y = np.repeat(np.arange(5), 6)
    single = [g.forecast(table[r.ravel()], y, model=QUICK).error for r in rows]
    np.testing.assert_allclose(batch, single, atol=1e-12)
    np.testing.assert_allclose(
        g.leave_one_out_episodes(table, rows), [g.leave_one_out(table[r.ravel()], y) for r in rows], atol=1e-12
    )


# ---- the interval


def test_the_interval_holds_the_truth_where_the_model_is_true():
    """95 % asked; the bound is three standard errors below 0.92 for 40 episodes."""
    table, rows, true = isotropic(40, 5, 5, 64, 16, queries=2000)
    y = np.repeat(np.arange(5), 5)
    model = g.GaussianModel(samples=1000, rehearsals=200)
    found = [g.forecast(table[r.ravel()], y, model=model) for r in rows]
    inside = np.mean([f.low <= t <= f.high for f, t in zip(found, true, strict=True)])
    assert inside >= 0.78
    assert np.mean([f.high - f.low for f in found]) < 0.45


def test_the_interval_holds_on_features_that_are_not_gaussian():
    """Ten digits, 20 shots: the model is six points too optimistic; leave-one-out widens the interval to the truth."""
    found = load_digits()
    x = found.data / 16
    drawn = episodes.uniform(found.target, 10, 20, 100, 12, np.random.default_rng(0))
    true = 1.0 - episodes.accuracies(x, drawn)
    model = g.GaussianModel(samples=1000, rehearsals=200)
    forecasts = [g.forecast(x[s.ravel()], np.repeat(np.arange(10), 20), model=model) for s in drawn.support]
    assert np.mean([f.error for f in forecasts]) < true.mean() - 0.03
    assert np.mean([f.low <= t <= f.high for f, t in zip(forecasts, true, strict=True)]) >= 0.75
    assert all(f.left_out is not None for f in forecasts)


def test_more_shots_make_the_interval_shorter():
    model = g.GaussianModel(samples=1000, rehearsals=200)
    widths = []
    for shots in (3, 30):
        low, high = (g.forecast(*support(17, shots=shots), model=model).__dict__[e] for e in ("low", "high"))
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_interval_of_other_shots():
    x, y = support(18, shots=10)
    model = g.GaussianModel(samples=1000, rehearsals=400)
    ends = [(f.low, f.high) for f in g.curve(x, y, (2, 10, 100), model)]
    assert ends[0][0] > ends[2][0]
    assert ends[0][1] > ends[2][1]


def test_classes_without_spread_or_distance_do_not_break_it():
    x = np.repeat(np.eye(3), 2, axis=0)
    assert g.forecast(x, [0, 0, 1, 1, 2, 2]).error == 0.0
    same = g.forecast(np.zeros((6, 3)), [0, 0, 1, 1, 2, 2])
    assert same.error == pytest.approx(2 / 3)
    two = g.forecast([[0.0], [1.0], [0.0], [1.0]], [0, 0, 1, 1])
    assert two.error == pytest.approx(0.5)
    assert 0 <= two.low <= two.high <= 1


# ---- how many more shots


def test_shots_needed_is_the_first_that_meets_the_accuracy():
    x, y = support(19, shots=10)
    at_20, at_21 = (1 - g.forecast(x, y, k, QUICK).error for k in (20, 21))
    needed = g.shots_needed(x, y, at_20, QUICK)
    assert needed.shots == 20 or at_21 == at_20
    assert needed.more == needed.shots - 10
    assert g.forecast(x, y, needed.shots - 1, QUICK).accuracy < at_20


def test_shots_needed_says_never():
    x, y = support(19, shots=10)
    needed = g.shots_needed(x, y, 0.9999, QUICK)
    assert needed.shots is None
    assert needed.more is None
    assert needed.best_accuracy < 0.9999


def test_shots_needed_has_two_ends():
    x, y = support(20, shots=10)
    model = g.GaussianModel(samples=1000, rehearsals=200)
    target = g.forecast(x, y, 12, model).accuracy
    needed = g.shots_needed(x, y, target, model)
    assert needed.optimistic <= needed.shots
    assert needed.pessimistic is None or needed.pessimistic >= needed.shots


# ---- what a forecast says, offsets, baselines


def test_confusions_name_the_pair_that_is_near():
    rng = np.random.default_rng(21)
    centres = np.zeros((4, 30))
    centres[1, 0], centres[2, 1], centres[3, 1] = 8.0, 8.0, 9.5
    x = centres.repeat(20, axis=0) + rng.standard_normal((80, 30))
    found = g.forecast(x, np.array(["oak", "elm", "cat", "dog"]).repeat(20), model=QUICK)
    assert {found.worst(2)[0][:2], found.worst(2)[1][:2]} == {("cat", "dog"), ("dog", "cat")}
    np.testing.assert_allclose(found.confusions.sum(axis=1), 1.0)
    assert found.error == pytest.approx(1 - np.diag(found.confusions).mean())
    assert found.centroids.shape == (4, 3)
    gaps = np.linalg.norm(found.centroids[:, None] - found.centroids, axis=2)
    np.testing.assert_allclose(gaps, found.distances, atol=1.0)  # shrunken distances fit no points exactly
    assert len(found.worst(100)) == 12


def test_the_standard_errors_of_the_distances_are_right():
    rng = np.random.default_rng(22)
    d = 40
    table, rows = pairs(3000, 6, np.ones((2, d)), np.full(d, 0.5), rng)
    found = moments.moments_of_episodes(table, rows)
    u = distances.measured(found.gram) - distances.noise(found.traces, found.counts)
    errors = distances.separation_errors(u, found, gaussian.shared_scale(found) ** 2, found.squares)[:, 0, 1]
    assert errors.mean() == pytest.approx(u[:, 0, 1].std(), rel=0.06)
    assert found.squares.mean() == pytest.approx(d, rel=0.03)  # trace of the squared identity


def test_an_offset_moves_the_forecast_and_is_only_for_its_case():
    found = load_digits()
    x, y = found.data / 16, found.target
    offset = g.learn_offset(x[y < 5], y[y < 5], 3, 5, np.random.default_rng(0), episodes=50, model=QUICK)
    test = np.concatenate([np.flatnonzero(y == c)[:5] for c in (5, 6, 7)])
    plain, moved = (g.forecast(x[test], y[test], model=QUICK, offset=o) for o in (None, offset))
    assert moved.error == pytest.approx(np.clip(plain.error - offset.value, 0, 1))
    assert moved.raw_error == plain.error
    assert moved.low <= moved.error <= moved.high
    with pytest.raises(KnobError, match="ways 3, here 2"):
        g.forecast(x[test[:10]], y[test[:10]], model=QUICK, offset=offset)
    with pytest.raises(KnobError, match="at 5, here"):
        g.forecast(x[test], y[test], 20, QUICK, offset)


def test_an_offset_for_other_shots():
    found = load_digits()
    x, y = found.data / 16, found.target
    tried = g.trial(x, y, 3, 5, np.random.default_rng(0), at=20, episodes=40, model=QUICK)
    assert tried.episodes.support.shape == (40, 3, 20)
    assert np.abs(tried.predicted - tried.true).mean() < 0.08
    offset = g.learn_offset(x, y, 3, 5, np.random.default_rng(0), at=20, episodes=40, model=QUICK)
    assert offset.value == pytest.approx((tried.predicted - tried.true).mean())
    assert (offset.shots, offset.at) == (5, 20)


def test_leave_one_out_by_hand():
    x = [[0.0], [4.0], [5.0], [9.0]]
    # fold 0: means 4 and 9, tests 0 and 5: 0 is right, 5 is wrong; fold 1: means 0 and 5, tests 4 (wrong) and 9
    assert g.leave_one_out(x, ["a", "a", "b", "b"]) == 0.5


def test_davies_bouldin_is_scikit_learns():
    x, y = support(shots=6)
    assert g.davies_bouldin(x, y) == pytest.approx(davies_bouldin_score(x, y))
    assert g.davies_bouldin(x, y, "frame") < g.davies_bouldin(x, y)
    assert g.davies_bouldin([[0.0], [2.0], [0.0], [2.0]], [0, 0, 1, 1]) == np.inf


def test_the_line_through_the_index_predicts_error():
    table, rows, true = isotropic(80, 5, 10, 64, 23)
    y = np.repeat(np.arange(5), 10)
    index = np.array([g.davies_bouldin(table[r.ravel()], y) for r in rows])
    line = g.Line.through(index[:40], true[:40])
    assert line.slope > 0
    assert np.abs(line(index[40:]) - true[40:]).mean() < np.abs(true[40:] - true[:40].mean()).mean()
    assert g.Line.through([1.0, 1.0], [0.2, 0.4])(1.0) == pytest.approx(0.3)


def test_nearest_class_mean_forecasts_after_its_preprocessing():
    x, y = support(shots=6)
    estimator = NearestClassMean(preprocess="ME", base_mean=x.mean(axis=0))
    centred = x - x.mean(axis=0)
    by_hand = g.forecast(centred / np.linalg.norm(centred, axis=1, keepdims=True), y, model=QUICK)
    assert estimator.forecast(x, y, model=QUICK).error == pytest.approx(by_hand.error)
    with pytest.raises(KnobError, match="cosine"):
        NearestClassMean("cosine").forecast(x, y)


# ---- refusals


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"covariance": "fuller"}, "full"),
        ({"correction": "efective"}, "effective"),
        ({"sigma": -1.0}, "positive"),
        ({"sigma": 1.0, "covariance": "full"}, "one scale"),
        ({"samples": 0}, "at least 1"),
        ({"rehearsals": 3}, "at least 100"),
        ({"level": 1.0}, "(0, 1)"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, words):
    with pytest.raises(KnobError) as err:
        g.GaussianModel(**knobs)
    assert words in str(err.value)


def test_what_cannot_be_forecast_is_refused():
    x, y = support()
    with pytest.raises(DataError, match="two classes"):
        g.forecast(x, np.zeros(len(x)))
    with pytest.raises(DataError, match="NaN"):
        g.forecast(np.where(x > 2, np.nan, x), y)
    with pytest.raises(DataError, match="shape"):
        g.forecast(x, y[:-1])
    with pytest.raises(KnobError, match="effective"):
        g.forecast(x, y, 10, with_correction("none"))
    with pytest.raises(KnobError, match="shots"):
        g.forecast(x, y, 0)
    with pytest.raises(KnobError, match="'shared'"):
        g.forecast(*support(shots=4), model=g.GaussianModel(covariance="full"))
    with pytest.raises(DataError, match="leave-one-out"):
        g.leave_one_out(x[::5], y[::5])
    with pytest.raises(KnobError, match="accuracy"):
        g.shots_needed(x, y, 1.0)


def test_many_ways_few_dimensions():
    """More classes than dimensions: the frame is the whole space."""
    rng = np.random.default_rng(24)
    centres = 5 * rng.standard_normal((12, 4))
    x = centres.repeat(10, axis=0) + rng.standard_normal((120, 4))
    y = np.arange(12).repeat(10)
    found = moments.moments_of_support(x, y)
    assert found.rank[0] == 4
    assert gaussian.shared_scale(found)[0] == pytest.approx(1.0, abs=0.1)
    queries = centres.repeat(500, axis=0) + rng.standard_normal((6000, 4))
    true = 1 - NearestClassMean().fit(x, y).score(queries, np.arange(12).repeat(500))
    assert abs(g.forecast(x, y, model=QUICK).error - true) < 0.04
    low, high = interval(found, g.GaussianModel(samples=500, rehearsals=100))
    assert low <= high
    assert model_predictions(found, QUICK)[0].shape == (1, 12, 12)

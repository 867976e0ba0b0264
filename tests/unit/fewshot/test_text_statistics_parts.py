"""The parts of text_statistics: texts, class statistics, splits, ridge, perceptron; the estimator's interface."""

import pickle

import numpy as np
import pytest
import torch
from text_worlds import World

from thrifty.fewshot import ESTIMATORS, NearestClassMean
from thrifty.fewshot.preprocess import InputError, OptionError
from thrifty.fewshot.text_statistics import (
    NamedFeatures,
    Perceptron,
    Ridge,
    TextStatistics,
    class_statistics,
    closed_alpha,
    embed_descriptions,
    embed_names,
    learn_statistics,
    split_classes,
)
from thrifty.fewshot.text_statistics.learning import closed_beta
from thrifty.fewshot.text_statistics.perceptron import batches, initial, loss_and_gradients
from thrifty.fewshot.text_statistics.regressors import learn_map
from thrifty.fewshot.text_statistics.texts import chunks

LETTERS = "abcdefghij"


def count_words(text):
    return len(text.split())


# ---- texts


def test_names_are_averaged_over_templates():
    seen = []

    def encode(texts):
        seen.extend(texts)
        return [[len(t), 1.0] for t in texts]

    found = embed_names(["cat", "mouse"], encode, ["{}", "the {}, a {}"])
    assert seen == ["cat", "the cat, a cat", "mouse", "the mouse, a mouse"]
    np.testing.assert_allclose(found["cat"], [(3 + 14) / 2, 1.0])
    with pytest.raises(OptionError, match="must hold"):
        embed_names(["cat"], encode, ["cat"])


def test_long_descriptions_are_cut_at_sentences_then_at_words():
    text = "One two three. Four! Five six seven eight nine ten eleven. Twelve."
    pieces = chunks(text, count_words, 4)
    assert pieces == ["One two three. Four!", "Five six seven eight", "nine ten eleven. Twelve."]
    assert " ".join(pieces) == text
    with pytest.raises(InputError, match="alone is longer than 0"):
        chunks("word", count_words, 0)
    found = embed_descriptions({"x": text}, lambda texts: [[count_words(t)] for t in texts], count_words, 4)
    np.testing.assert_allclose(found["x"], [4.0])
    with pytest.raises(InputError, match="1 description"):
        embed_descriptions({"x": "  "}, lambda texts: [[1.0]], count_words)
    with pytest.raises(InputError, match="finite"):
        embed_names(["a"], lambda texts: [[np.nan]])


# ---- class statistics, named features, splits


def test_statistics_of_classes_of_unequal_size():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 3)), np.array([0, 0, 0, 0, 0, 1, 1, 1, 2])
    found = class_statistics(x, y)
    for c in (0, 1):
        np.testing.assert_allclose(found.means[c], x[y == c].mean(axis=0))
        np.testing.assert_allclose(found.spreads[c], x[y == c].std(axis=0, ddof=1))
        np.testing.assert_allclose(class_statistics(x, y, full=True).spreads[c], np.cov(x[y == c].T))
    assert np.isnan(found.spreads[2]).all()
    assert found.counts.tolist() == [5, 3, 1]
    rests = np.concatenate([x[y == c] - x[y == c].mean(axis=0) for c in (0, 1)])
    np.testing.assert_allclose(found.within, (rests**2).sum(axis=0) / 6)


def test_named_features_say_all_that_is_wrong():
    with pytest.raises(InputError, match=r"NaN.*labels have shape \(1,\)"):
        NamedFeatures(np.array([[np.nan], [1.0]]), ["a"], {})
    with pytest.raises(InputError, match=r"1 class\(es\) have no text embedding: 'b'"):
        NamedFeatures(np.eye(2), ["a", "b"], {"a": [1.0]})
    with pytest.raises(InputError, match="one length; not so: 'b'"):
        NamedFeatures(np.eye(2), ["a", "b"], {"a": [1.0], "b": [1.0, 2.0]})
    part = NamedFeatures(np.eye(3), ["a", "b", "a"], {"a": [1.0], "b": [2.0]}).only(["a"])
    assert part.features.shape == (2, 3)
    assert list(part.texts) == ["a"]


def test_splits_are_disjoint_complete_and_keep_groups_together():
    names = [f"c{i}" for i in range(100)]
    groups = {n: i // 7 for i, n in enumerate(names)}
    for given in (None, groups):
        parts = split_classes(names, (0.6, 0.2, 0.2), np.random.default_rng(0), given)
        assert sorted(np.concatenate(parts).tolist()) == sorted(names)
        assert abs(len(parts[0]) - 60) <= (0 if given is None else 7)
    homes = [{groups[c] for c in part.tolist()} for part in parts]
    assert not homes[0] & homes[1]
    assert not homes[0] & homes[2]
    assert not homes[1] & homes[2]
    again = split_classes(names, (0.6, 0.2, 0.2), np.random.default_rng(0), groups)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    with pytest.raises(OptionError, match="adding up to 1"):
        split_classes(names, (0.6, 0.2), np.random.default_rng(0))
    with pytest.raises(OptionError, match="a part would be empty"):
        split_classes(names, (0.5, 0.5), np.random.default_rng(0), dict.fromkeys(names, 0))


# ---- ridge


def test_ridge_leaves_one_class_out_exactly():
    rng = np.random.default_rng(0)
    t, y = rng.standard_normal((30, 5)), rng.standard_normal((30, 2))
    t, y = t - t.mean(axis=0), y - y.mean(axis=0)
    for penalty in (0.5, 20.0):
        _, chosen = Ridge((penalty,)).learn(t, y, t, y, rng, None)
        left = []
        for i in range(30):
            keep = np.arange(30) != i
            tk, yk = t[keep] - t[keep].mean(axis=0), y[keep] - y[keep].mean(axis=0)
            w = np.linalg.solve(tk.T @ tk + penalty * np.eye(5), tk.T @ yk)
            left.append(y[i] - y[keep].mean(axis=0) - (t[i] - t[keep].mean(axis=0)) @ w)
        assert chosen.score == pytest.approx(float(np.mean(np.square(left))), rel=1e-9)


def test_ridge_is_the_closed_form_and_takes_the_best_penalty():
    rng = np.random.default_rng(0)
    t = rng.standard_normal((60, 5))
    y = t @ rng.standard_normal((5, 3)) + 0.1 * rng.standard_normal((60, 3))
    map_, chosen = learn_map(Ridge((1e-3, 1.0, 1e4)), t, y, t, y, rng)
    assert chosen.tried == 3
    assert float(chosen.chosen) < 1e4
    z = lambda v: (v - v.mean(axis=0)) / v.std(axis=0)  # noqa: E731
    w = np.linalg.solve(z(t).T @ z(t) + float(chosen.chosen) * np.eye(5), z(t).T @ z(y))
    np.testing.assert_allclose(map_(t), z(t) @ w * y.std(axis=0) + y.mean(axis=0))
    with pytest.raises(OptionError, match="penalties"):
        Ridge(())


def test_a_constant_target_is_predicted_exactly():
    rng = np.random.default_rng(0)
    t, y = rng.standard_normal((20, 3)), np.c_[np.full(20, 7.0), rng.standard_normal(20)]
    map_, _ = learn_map(Ridge(), t, y, t, y, rng)
    np.testing.assert_allclose(map_(10 * t)[:, 0], 7.0)


# ---- perceptron


def test_perceptron_has_torch_s_loss_and_gradients():
    rng = np.random.default_rng(0)
    w = {k: v.astype(np.float64) for k, v in initial(4, 7, 3, rng).items()}
    w["gain"], w["shift"] = rng.uniform(0.5, 1.5, 7), rng.standard_normal(7)
    t, y = rng.standard_normal((9, 4)), rng.standard_normal((9, 3))
    kept = (rng.random((9, 7)) > 0.1) / 0.9
    loss, gradients, seen = loss_and_gradients(w, t, y, kept)
    p = {k: torch.tensor(v, requires_grad=True) for k, v in w.items()}
    mean, var = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    pre = torch.tensor(t) @ p["in"] + p["in_bias"]
    normal = torch.nn.functional.batch_norm(pre, mean, var, p["gain"], p["shift"], training=True, momentum=1.0)
    out = (torch.nn.functional.gelu(normal) * torch.tensor(kept)) @ p["out"] + p["out_bias"]
    expected = torch.nn.functional.mse_loss(out, torch.tensor(y))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, p[name].grad.numpy(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(seen["var"] * 9 / 8, var.numpy())


def test_perceptron_steps_as_torch_s_adamw():
    rng = np.random.default_rng(0)
    w = initial(2, 3, 1, rng)
    params = {k: torch.tensor(v.copy(), requires_grad=True) for k, v in w.items()}
    optimiser = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=1e-2)
    state = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in w.items()}
    for step in range(1, 5):
        g = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in w.items()}
        Perceptron()._update(w, g, state, step)
        for k, p in params.items():
            p.grad = torch.tensor(g[k])
        optimiser.step()
    for k, p in params.items():
        np.testing.assert_allclose(w[k], p.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_perceptron_keeps_its_best_epoch_whatever_comes_after():
    rng = np.random.default_rng(0)
    t = rng.standard_normal((40, 6)).astype(np.float64)
    y = np.tanh(t @ rng.standard_normal((6, 2))) + 0.5 * rng.standard_normal((40, 2))
    held = rng.standard_normal((30, 6))
    y_held = np.tanh(held @ rng.standard_normal((6, 2)))
    steps = []
    long = Perceptron(epochs=30, rate=0.03, batch=16)
    learned, chosen = long.learn(
        t, y, held, y_held, np.random.default_rng(1), lambda done, of: steps.append((done, of))
    )
    best = int(chosen.chosen)
    assert 1 <= best < 30
    assert steps[-1] == (30, 30)
    short, again = Perceptron(epochs=best, rate=0.03, batch=16).learn(
        t, y, held, y_held, np.random.default_rng(1), None
    )
    np.testing.assert_array_equal(learned(held), short(held))
    assert chosen.score == again.score == pytest.approx(float(((learned(held) - y_held) ** 2).mean()), rel=1e-6)


def test_perceptron_learns_what_a_line_cannot():
    rng = np.random.default_rng(0)
    t = rng.standard_normal((900, 3))
    y = np.c_[np.abs(t[:, 0]), t[:, 1] * t[:, 2]]
    parts = t[:600], y[:600], t[600:], y[600:]
    line, _ = learn_map(Ridge(), *parts, rng)
    curve, _ = learn_map(Perceptron(epochs=60, expansion=16.0, rate=1e-2), *parts, rng)
    errors = [float(((m(t[600:]) - y[600:]) ** 2).mean()) for m in (line, curve)]
    assert errors[1] < 0.4 * errors[0]


def test_perceptron_takes_the_place_of_ridge():
    world, rng = World(classes=400, d=16), np.random.default_rng(0)
    base, held = (world.named(c, 30, rng) for c in (np.arange(300), np.arange(300, 360)))
    learned = learn_statistics(base, held, Perceptron(), rng=np.random.default_rng(0))
    again = learn_statistics(base, held, Perceptron(), rng=np.random.default_rng(0))
    assert learned.mean_ratio < 0.6
    assert learned.log[0].what.startswith("mean: epoch")
    np.testing.assert_array_equal(learned.means(held.text_rows), again.means(held.text_rows))


def test_batches_never_hold_one_class_alone():
    found = list(batches(257, 128, np.random.default_rng(0)))
    assert [len(b) for b in found] == [128, 129]
    assert sorted(np.concatenate(found).tolist()) == list(range(257))
    with pytest.raises(OptionError, match="batch is 1"):
        Perceptron(batch=1)
    with pytest.raises(OptionError, match="dropout is 1"):
        Perceptron(dropout=1)


# ---- learning


@pytest.fixture(scope="module")
def small():
    world, rng = World(classes=160, d=24), np.random.default_rng(0)
    base, held = world.named(np.arange(90), 12, rng), world.named(np.arange(90, 120), 12, rng)
    return world, base, held, learn_statistics(base, held)


def test_the_measured_error_is_free_of_sampling_noise():
    world = World(classes=600)
    true = {}
    for per_class in (3, 60):
        rng = np.random.default_rng(0)
        base = world.named(np.arange(400), 200, rng)
        held = world.named(np.arange(400, 600), per_class, rng)
        true[per_class] = learn_statistics(base, held, Ridge((1.0,))).error.mean()
    assert true[3] == pytest.approx(true[60], rel=0.1)  # within / 3 is twice the error itself


def test_closed_beta_is_the_least_squares_weight():
    rng = np.random.default_rng(0)
    predicted = np.exp(rng.standard_normal((40, 6)))
    middle = np.exp(np.log(predicted).mean(axis=1, keepdims=True))
    assert closed_beta(predicted, middle * (1 + 0.3 * (predicted / middle - 1))) == pytest.approx(0.3)
    assert closed_beta(predicted, predicted) == pytest.approx(1.0)
    assert closed_beta(np.ones((3, 4)), predicted[:3, :4]) == 0.0


def test_closed_alpha_is_the_bayesian_weight(small):
    _, _, _, learned = small
    weights = np.random.default_rng(0).uniform(0.5, 2, learned.dimension)
    noise, error = (weights**2 * learned.within).sum(), (weights**2 * learned.error).sum()
    found = closed_alpha(learned, np.array([0, 1, 5]), weights)
    np.testing.assert_allclose(found.ravel(), [1.0, noise / (noise + error), (noise / 5) / (noise / 5 + error)])
    each = closed_alpha(learned, np.array([2]), weights, per_dimension=True)
    np.testing.assert_allclose(
        each[0], (learned.within / 2) / (learned.within / 2 + np.maximum(learned.error, 0)), rtol=1e-6
    )


def test_a_constant_feature_has_a_weight_too(small):
    _, base, held, _ = small
    base, held = (
        NamedFeatures(np.c_[p.features, np.full(len(p.labels), 2.0)], p.labels, p.texts) for p in (base, held)
    )
    found = closed_alpha(learn_statistics(base, held), np.array([0, 3]), np.ones(25), per_dimension=True)
    assert np.isfinite(found).all()
    assert (found[0] == 1).all()


def test_preparation_is_learned_on_base_classes_only(small):
    _, base, held, _ = small
    learned = learn_statistics(base, held, preprocess="ME", components=5)
    assert learned.dimension == 5
    assert learned.prepared.inputs == 24
    moved = NamedFeatures(held.features + 3.0, held.labels, held.texts)
    other = learn_statistics(base, moved, preprocess="ME", components=5)
    np.testing.assert_array_equal(learned.prepared.axes, other.prepared.axes)
    np.testing.assert_array_equal(learned.prepared.centre, base.features.mean(axis=0))
    unit = base.features - base.features.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    x = learned.prepared(base.features)
    assert np.abs(np.cov(x.T) - np.diag(np.diag(np.cov(x.T)))).max() < 1e-12
    np.testing.assert_allclose(x, (unit - unit.mean(axis=0)) @ learned.prepared.axes)
    with pytest.raises(OptionError, match=r"components is 25; it must be in 1\.\.24"):
        learn_statistics(base, held, components=25)


def test_learning_says_all_that_is_wrong(small):
    world, base, held, _ = small
    thin = NamedFeatures(held.features[:1, :20], held.labels[:1], world.texts)
    with pytest.raises(InputError, match=r"24 dimensions, validation features 20; 0 validation class"):
        learn_statistics(base, thin)
    with pytest.raises(InputError, match="text embeddings have shape"):
        learn_statistics(base, held).predict(np.zeros((2, 31)))


# ---- the estimator's interface


def task(world, rng, shots=3, classes=LETTERS):
    rows = 120 + np.arange(len(classes))
    x, y = world.draw(rows, shots, rng)
    names = dict(zip(rows.tolist(), classes, strict=True))
    return x, np.array([names[c] for c in y.tolist()]), {names[c]: world.texts[c] for c in names}


def test_it_is_an_estimator_of_the_table():
    assert ESTIMATORS["text_statistics"] is TextStatistics


def test_without_text_it_is_nearest_class_mean(small):
    world, *_ = small
    x, y, _ = task(world, np.random.default_rng(0))
    queries = task(world, np.random.default_rng(1))[0]
    ours, plain = TextStatistics().fit(x, y), NearestClassMean().fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(queries), plain.predict_proba(queries), atol=1e-12)
    np.testing.assert_allclose(
        ours.open_set_scores(queries[:2])[:, 0],
        1 / (1 + np.exp(0.01 * np.linalg.norm(queries[:2] - ours.means_[0], axis=1))),
    )


@pytest.mark.parametrize("alpha", ["closed", "per_dimension", 0.4])
def test_chunks_of_shots_in_any_order_give_one_fit(small, alpha):
    world, _, _, learned = small
    x, y, texts = task(world, np.random.default_rng(0))
    queries = task(world, np.random.default_rng(1))[0]
    whole = TextStatistics(learned, texts, alpha=alpha, beta=0.5).fit(x, y)
    order = np.random.default_rng(2).permutation(len(y))
    parts = TextStatistics(learned, texts, alpha=alpha, beta=0.5)
    for rows in np.array_split(order, 4):
        parts.partial_fit(x[rows], y[rows])
    np.testing.assert_allclose(parts.predict_proba(queries), whole.predict_proba(queries), atol=1e-9)


def test_classes_without_shots_are_known_by_their_text_until_shots_come(small):
    world, _, _, learned = small
    x, y, texts = task(world, np.random.default_rng(0))
    queries, truth, _ = task(world, np.random.default_rng(1), shots=30)
    model = TextStatistics(learned, texts).fit_texts()
    zero = float((model.predict(queries) == truth).mean())
    assert 0.4 < zero < 1
    few = model.partial_fit(x[y <= "e"], y[y <= "e"])
    np.testing.assert_allclose(few.alpha_[5:], 1.0)
    assert (few.alpha_[:5] < 0.9).all()
    model.partial_fit(x[y > "e"], y[y > "e"])
    assert (model.predict(queries) == truth).mean() > zero
    np.testing.assert_allclose(model.means_, TextStatistics(learned, texts).fit(x, y).means_)
    announced = TextStatistics(learned, texts).partial_fit(x[y == "a"], y[y == "a"], classes=["b"])
    assert set(announced.predict(queries).tolist()) == {"a", "b"}


def test_renamed_labels_float32_pickles_and_probabilities(small):
    world, _, _, learned = small
    x, y, texts = task(world, np.random.default_rng(0))
    queries = task(world, np.random.default_rng(1))[0]
    model = TextStatistics(learned, texts, beta=0.5).fit(x, y)
    back = {c: LETTERS[::-1][i] for i, c in enumerate(LETTERS)}
    renamed = TextStatistics(learned, {back[c]: t for c, t in texts.items()}, beta=0.5)
    renamed.fit(x, np.array([back[c] for c in y]))
    assert [back[c] for c in model.predict(queries)] == renamed.predict(queries).tolist()
    single = TextStatistics(learned, texts, beta=0.5).fit(x.astype(np.float32), y)
    np.testing.assert_allclose(
        single.predict_proba(queries.astype(np.float32)), model.predict_proba(queries), atol=2e-4
    )
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(queries), model.predict_proba(queries))
    proba = model.predict_proba(queries)
    np.testing.assert_allclose(proba.sum(axis=1), 1.0)
    assert (model.classes_[proba.argmax(axis=1)] == model.predict(queries)).all()


def test_probabilities_are_about_as_sure_as_right_where_dimensions_are_independent():
    world, rng = World(classes=500, d=16), np.random.default_rng(0)
    world.spreads[:] = 2.0
    learned = learn_statistics(world.named(np.arange(300), 40, rng), world.named(np.arange(300, 400), 40, rng))
    sure, right = [], []
    for _ in range(20):
        classes = np.sort(rng.choice(np.arange(400, 500), 10, replace=False))
        shots, queries = world.draw(classes, 2, rng), world.draw(classes, 20, rng)
        model = TextStatistics(learned, world.texts).fit(*shots)
        sure.append(model.predict_proba(queries[0]).max(axis=1).mean())
        right.append((model.predict(queries[0]) == queries[1]).mean())
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.05)


def test_refusals_name_the_knob(small):
    world, _, _, learned = small
    x, y, texts = task(world, np.random.default_rng(0))
    for knobs, message in (
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": "close"}, "close: closed"),
        ({"beta": True}, "beta is True"),
        ({"alpha": "per_dimension", "beta": "validation"}, "has no grid"),
        ({"variance": -1.0}, "variance is -1.0"),
        ({"alpha": "validation"}, "call fit"),
    ):
        with pytest.raises(OptionError, match=message):
            TextStatistics(learned, texts, **knobs).fit(x, y)
    with pytest.raises(OptionError, match="go together"):
        TextStatistics(learned).fit(x, y)
    with pytest.raises(OptionError, match="needs statistics"):
        TextStatistics().fit_texts()
    with pytest.raises(OptionError, match="there are no shots"):
        TextStatistics(learned, texts, alpha="validation").fit_texts()
    with pytest.raises(OptionError, match="before partial_fit"):
        TextStatistics(learned, texts, alpha="validation").partial_fit(x, y)
    with pytest.raises(InputError, match="X has 23 features"):
        TextStatistics(learned, texts).fit(x[:, :23], y)
    with pytest.raises(InputError, match="no text embedding: 'z'"):
        TextStatistics(learned, texts).fit(x, np.where(y == "a", "z", y))
    with pytest.raises(InputError, match=r"classes without shots: \['z'\]"):
        TextStatistics(learned, texts, alpha="validation").fit(x, y, validation=(x[:1], ["z"]))

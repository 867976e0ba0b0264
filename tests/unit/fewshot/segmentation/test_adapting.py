"""Adapting and scoring: the protocol, and what a correct implementation must show on pictures of coloured shapes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from shape_worlds import CLASSES, Filters, shapes
from torch import nn

from thrifty.errors import DataError, Incompatible, KnobError, StoreError
from thrifty.fewshot.segmentation import (
    IGNORE,
    METHODS,
    Augment,
    Fitting,
    InMemory,
    Segmenter,
    Support,
    Svf,
    adapt,
    choose_rate,
    evaluate,
    fingerprint,
    sample,
)

QUICK = Fitting(steps=6, lr=0.05, augment=Augment(views=2))
GOOD = Fitting(steps=80, lr=0.2, cache=True, augment=Augment(views=2))


@pytest.fixture(scope="module")
def world():
    """Return (training pool, test set, encoder)."""
    return shapes(40, seed=1), shapes(16, seed=2), Filters()


class Fine(Filters):
    """The first of the two maps."""

    channels, strides = (24,), (2,)

    def forward(self, x):
        return super().forward(x)[:1]


def miou(model, data):
    return evaluate(model, data).miou()


# ---- what it must show


def test_shots_and_layers(world):
    pool, test, encoder = world

    def score(net, shots, method):
        few = [sample(pool, shots, np.random.default_rng(seed)) for seed in range(3)]
        return np.mean([miou(adapt(net, f, method, replace(GOOD, seed=s)), test) for s, f in enumerate(few)])

    fine = Fine()  # one map at stride 2: what a linear probe can do when the grid is not the limit
    assert score(fine, 5, "linear") > 90
    assert score(fine, 5, "linear") >= score(fine, 1, "linear") - 1
    wanted = ((1, "multilayer"), (5, "multilayer"), (5, "linear"))
    scores = {(k, m): score(encoder, k, m) for k, m in wanted}
    assert scores[5, "multilayer"] > 90
    assert scores[5, "multilayer"] >= scores[1, "multilayer"] - 1
    assert scores[5, "multilayer"] >= scores[5, "linear"] - 2


def test_one_picture_can_be_learned_by_heart(world):
    one = Support.whole(InMemory([world[0].picture(0)], [world[0].mask(0)], CLASSES))
    fitting = Fitting(steps=150, lr=0.2, augment=Augment(flip=False, views=1))
    assert miou(adapt(world[2], one, "multilayer", replace(fitting, cache=True)), one.data) > 93
    start = adapt(world[2], one, "linear", replace(fitting, steps=20))
    assert miou(adapt(world[2], one, "finetune", fitting, start), one.data) > miou(start, one.data) + 2


@pytest.mark.parametrize("method", ["linear", "multilayer"])
@pytest.mark.parametrize("cache", [False, True])
def test_the_frozen_encoder_does_not_move(world, method, cache):
    encoder = copy.deepcopy(world[2]).train()  # as a careless caller leaves it: dropout and statistics on
    before, mode = fingerprint(encoder), encoder.training
    model = adapt(encoder, sample(world[0], 1, np.random.default_rng(0)), method, replace(QUICK, cache=cache))
    assert fingerprint(encoder) == fingerprint(model.encoder) == before
    assert encoder.training == mode
    with torch.no_grad():
        encoder.norm.running_mean[0] += 1
    assert fingerprint(encoder) != before  # buffers are seen


def test_an_encoder_that_moves_itself_is_refused(world):
    class Restless(Filters):
        def forward(self, x):
            self.norm.running_mean.add_(1)
            return super().forward(x)

    with pytest.raises(Incompatible, match="must not write state"):
        adapt(Restless(), sample(world[0], 1, np.random.default_rng(0)), "linear", QUICK)


def test_the_rate_falls_to_zero_as_a_polynomial():
    fitting = Fitting(lr=0.2)
    assert [fitting.rate(t, 10) for t in (0, 4, 10)] == [0.2, 0.2 * 0.6**0.9, 0.0]
    assert [Fitting(epochs=3, batch=4, drop_last=d).total(19) for d in (True, False)] == [12, 15]
    assert Fitting(epochs=3, drop_last=True).total(2) == 3  # never without a step
    assert Fitting(epochs=3, steps=7).total(19) == 7


# ---- the protocol


def test_tuned_methods_begin_with_the_linear_head(world):
    few = sample(world[0], 1, np.random.default_rng(0))
    linear = adapt(world[2], few, "linear", QUICK)
    still = replace(QUICK, steps=0)
    for method in ("svf", "lora", "finetune"):
        begun = adapt(world[2], few, method, still, linear)
        assert all((a == b).all() for a, b in zip(begun.head.state_dict().values(), linear.head.state_dict().values()))
        assert (begun.predict(few.data.picture(0)[None]) == linear.predict(few.data.picture(0)[None])).mean() > 0.999
        alone = adapt(world[2], few, method, QUICK)
        given = adapt(world[2], few, method, QUICK, linear)
        assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), given.state_dict().values()))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_weights_and_another_does_not(world, method):
    few = sample(world[0], 1, np.random.default_rng(0))
    fitting = replace(QUICK, augment=Augment(crop=(40, 40), operations=1))
    torch.manual_seed(1)
    first = adapt(world[2], few, method, fitting)
    torch.manual_seed(2)  # the caller's generator does not matter
    second = adapt(world[2], few, method, fitting)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    third = adapt(world[2], few, method, replace(fitting, seed=1))
    assert not torch.equal(first.head.classify.weight, third.head.classify.weight)


def test_cached_features_change_nothing(world):
    few = sample(world[0], 2, np.random.default_rng(0))
    for method in ("linear", "multilayer"):
        fitting = replace(QUICK, steps=12, augment=Augment(views=2, crop=(40, 40)))
        plain, cached = (adapt(world[2], few, method, replace(fitting, cache=c)) for c in (False, True))
        for a, b in zip(plain.head.state_dict().values(), cached.head.state_dict().values()):
            assert torch.allclose(a.float(), b.float(), atol=1e-5)


def test_ignored_pixels_teach_nothing(world):
    picture, mask = world[0].picture(0), world[0].mask(0).copy()
    mask[:24] = IGNORE
    other = mask.copy()
    heads = []
    for m in (mask, other):
        data = InMemory([picture], [m], CLASSES)
        heads.append(adapt(world[2], data, "linear", replace(QUICK, augment=Augment(views=1))).head.classify.weight)
    assert torch.equal(*heads)
    with pytest.raises(DataError, match="ignored"):
        adapt(world[2], InMemory([picture], [np.full_like(mask, IGNORE)], CLASSES), "linear", QUICK)


def test_batch_norm_inside_moves_only_when_asked(world):
    few = sample(world[0], 1, np.random.default_rng(0))
    before = world[2].norm.running_mean.clone()
    kept = adapt(world[2], few, "finetune", QUICK)
    moved = adapt(world[2], few, "finetune", replace(QUICK, encoder_statistics=True))
    assert torch.equal(kept.encoder.norm.running_mean, before)
    assert not torch.equal(moved.encoder.norm.running_mean, before)
    assert not torch.equal(kept.encoder.first.weight, world[2].first.weight)


def test_batch_norm_has_no_weight_decay(world):
    from thrifty.fewshot.segmentation.adapting import _groups
    from thrifty.fewshot.segmentation.segmenter import build

    model = build(world[2], "finetune", CLASSES, torch.Generator().manual_seed(0))
    decayed, plain = _groups(model, Fitting())
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert {id(p) for p in plain["params"]} == {id(p) for p in norms}
    assert plain["weight_decay"] == 0.0 < decayed["weight_decay"]
    assert len(plain["params"]) + len(decayed["params"]) == len(list(model.parameters()))


def test_a_whole_set_of_any_sizes_is_scored_once(world):
    model = adapt(world[2], sample(world[0], 1, np.random.default_rng(0)), "linear", QUICK)
    sizes = [(48, 48), (48, 48), (40, 60), (48, 48)]
    data = InMemory([np.zeros((*s, 3), np.uint8) for s in sizes], [np.ones(s, np.uint8) for s in sizes], CLASSES)
    calls = []
    found = evaluate(model, data, batch=3, progress=lambda done, count: calls.append((done, count)))
    assert found.counts.sum() == sum(h * w for h, w in sizes)
    assert calls == [(i, 4) for i in range(1, 5)]
    assert (evaluate(model, data, batch=1).counts == found.counts).all()
    assert evaluate(model, data, size=(32, 32)).counts.sum() == 4 * 32 * 32


def test_progress_reports_every_step(world):
    calls = []
    adapt(world[2], sample(world[0], 1, np.random.default_rng(0)), "linear", QUICK, progress=lambda *c: calls.append(c))
    assert [c[:2] for c in calls] == [(i, 6) for i in range(1, 7)]
    assert all(np.isfinite(c[2]) for c in calls)


def test_the_rate_is_chosen_without_the_test_set(world):
    pool, _, encoder = world
    few = sample(pool, 2, np.random.default_rng(0))
    fitting = replace(QUICK, steps=30)
    best, scores = choose_rate(encoder, few, [1e-6, 0.2, 1e9], shapes(6, seed=5), "multilayer", fitting)
    assert best == 0.2 == max(scores, key=scores.get)
    assert list(scores) == [1e-6, 0.2, 1e9]
    best, scores = choose_rate(encoder, few, [1e-6, 0.2], method="multilayer", fitting=fitting)
    assert best == 0.2  # on a held-out third of the support
    with pytest.raises(KnobError, match="start"):
        choose_rate(encoder, few, [0.1], method="svf", start=adapt(encoder, few, "linear", QUICK))
    with pytest.raises(KnobError, match="no rates"):
        choose_rate(encoder, few, [])


# ---- refusals, saving


def test_wrong_starts_and_knobs(world):
    few = sample(world[0], 1, np.random.default_rng(0))
    linear, multi = (adapt(world[2], few, m, QUICK) for m in ("linear", "multilayer"))
    with pytest.raises(Incompatible, match="multilayer"):
        adapt(world[2], few, "svf", QUICK, multi)
    with pytest.raises(Incompatible, match="same encoder"):
        adapt(Filters(seed=3), few, "svf", QUICK, linear)
    with pytest.raises(Incompatible, match="no start"):
        adapt(world[2], few, "multilayer", QUICK, linear)
    with pytest.raises(KnobError, match=r"batch is 0.*lr is -1.*cache needs"):
        Fitting(batch=0, lr=-1, cache=True)
    with pytest.raises(KnobError, match="give a thrifty"):
        adapt(nn.Linear(2, 2), few)
    with pytest.raises(DataError, match="too large"):
        adapt(world[2], few, "finetune", replace(QUICK, lr=1e30))


@pytest.mark.parametrize("method", [*METHODS, Svf(strict=True)])
def test_what_was_trained_is_saved_and_loaded(world, method, tmp_path):
    few = sample(world[0], 1, np.random.default_rng(0))
    model = adapt(world[2], few, method, replace(QUICK, encoder_statistics=True))
    model.save(tmp_path / "model.safetensors")
    again = Segmenter.load(tmp_path / "model.safetensors", world[2])
    assert again.classes == CLASSES
    assert again.method == model.method
    x = model.encoder.prepare(few.data.picture(0)[None])
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_loaded_says_why(world, tmp_path):
    path = tmp_path / "model.safetensors"
    adapt(world[2], sample(world[0], 1, np.random.default_rng(0)), "linear", QUICK).save(path)
    with pytest.raises(StoreError, match="another encoder"):
        Segmenter.load(path, Filters(seed=9))
    path.write_bytes(b"nothing")
    with pytest.raises(StoreError, match="not a saved segmenter"):
        Segmenter.load(path, world[2])
    with pytest.raises(StoreError, match="cannot be written"):
        adapt(world[2], sample(world[0], 1, np.random.default_rng(0)), "linear", QUICK).save(tmp_path / "no" / "x")

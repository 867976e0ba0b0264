"""On-chip learning as estimators: agreement with floats by bits, saturation, slots, codebooks, saving."""

import numpy as np
import pytest
from digit_split import digits

from thrifty.associative import Feed
from thrifty.errors import DataError, KnobError, StoreError
from thrifty.fewshot import OnChipAnchors, OnChipCodes, Tilda

BOTH = [OnChipAnchors, OnChipCodes]


def test_label_agreement_with_floats_by_bits():
    x, y, queries, truth = digits()
    real = Tilda(8, 16).fit(x, y)
    labels = real.predict(queries)
    fine = OnChipAnchors(8, 16, limits=(0, 1)).fit(x, y)
    assert (fine.predict(queries) == labels).mean() >= 0.98
    agree, score = {}, {}
    for bits in (8, 6, 4, 3, 2, 1):
        model = OnChipAnchors(8, 16, bits=bits, fraction=0, limits=(0, 1)).fit(x, y)
        agree[bits] = (model.predict(queries) == labels).mean()
        score[bits] = model.score(queries, truth)
    assert agree[8] >= 0.98
    assert [agree[b] for b in (8, 6, 4)] == pytest.approx([0.997, 0.993, 0.953], abs=0.02)
    assert real.score(queries, truth) == pytest.approx(0.879, abs=0.02)
    assert [score[b] for b in (8, 6, 4, 3, 2)] == pytest.approx([0.878, 0.884, 0.879, 0.878, 0.822], abs=0.02)
    assert score[1] < 0.65  # flat down to three bits, then a cliff
    assert score[2] < score[3] < score[8] + 0.01


def test_binary_memories_and_counts_on_digits():
    x, y, queries, truth = digits()
    table = {(8, 16): (0.737, 0.905), (8, 64): (0.899, 0.915), (16, 64): (0.869, 0.908), (4, 16): (0.529, 0.878)}
    for (parts, words), (binary, counts) in table.items():
        found, fills = {}, []
        for cells in ("bits", "counts"):
            models = [OnChipCodes(parts, words, cells=cells, seed=s).fit(x, y) for s in range(3)]
            found[cells] = [m.score(queries, truth) for m in models]
            fills += [m.fill_ for m in models]
        assert np.mean(found["bits"]) == pytest.approx(binary, abs=0.1)
        assert np.mean(found["counts"]) == pytest.approx(counts, abs=0.04)
        assert np.mean(found["counts"]) > np.mean(found["bits"])
        assert 0.25 < min(fills) <= max(fills) < 0.7


def test_k_means_codebooks_are_at_least_as_good_as_random_ones():
    x, y, queries, truth = digits()
    random, clumps = (
        np.mean(
            [OnChipCodes(8, 16, cells="counts", codebook=c, seed=s).fit(x, y).score(queries, truth) for s in range(3)]
        )
        for c in ("random", "kmeans")
    )
    assert clumps > random


@pytest.mark.parametrize("kind", BOTH)
def test_the_range_is_frozen_and_saturation_counted(kind):
    x, y, queries, _ = digits()
    model = kind(parts=4).calibrate(x[:200])
    frozen = model.range_
    model.partial_fit(x[:300], y[:300])
    assert model.saturated_ == 0
    wild = x[300:310].copy()
    wild[:, :3] = [-7.0, 9.0, 2.0]
    model.partial_fit(wild, y[300:310])
    assert model.range_ == frozen
    assert model.saturated_ == 30
    levels, outside = model.levels(wild)
    assert outside.tolist() == [3] * 10
    assert levels[:, :3].tolist() == [[0, 255, 255]] * 10
    before = model.state_.tobytes()
    model.predict(100 * queries)
    assert model.state_.tobytes() == before  # predicting changes nothing


@pytest.mark.parametrize("kind", BOTH)
def test_new_classes_leave_every_old_word_and_take_the_next_slot(kind):
    x, y, queries, _ = digits()
    model = kind(parts=4).calibrate(x)
    first = np.isin(y, (7, 3))
    model.partial_fit(x[first][:50], y[first][:50], classes=range(10))
    assert set(model.predict(queries)) <= {3, 7}
    assert (model.predict_proba(queries)[:, [0, 1, 2, 4, 5, 6, 8, 9]] == 0).all()
    old = model.state_.copy()
    model.partial_fit(x[~first], y[~first])
    assert model.known_[:2] == y[first][:2].tolist() or set(model.known_[:2]) == {3, 7}
    for f in old.fields:
        if not f.shared:
            assert (model.state_[f.name][:2] == old[f.name]).all()
    assert len(model.known_) == model.memory_.classes == 10


def test_the_nearest_anchor_learns_as_tilda_does():
    x, y, queries, truth = digits()
    real = Tilda(4, 8, policy="nearest").fit(x, y)
    model = OnChipAnchors(4, 8, policy="nearest", limits=(0, 1), fraction=6).fit(x, y)
    assert (model.predict(queries) == real.predict(queries)).mean() > 0.97
    turns = OnChipAnchors(4, 8, limits=(0, 1), fraction=6).fit(x, y)
    assert model.score(queries, truth) > turns.score(queries, truth) + 0.02
    assert (model.state_["counts"].sum(axis=2) == model.state_["seen"][:, None]).all()


def test_chunks_do_not_matter():
    x, y, _, _ = digits()
    for model in (OnChipAnchors(8, 4), OnChipCodes(8, 16)):
        whole = type(model)(**model.get_params()).calibrate(x).partial_fit(x, y)
        model.calibrate(x)
        for part in np.array_split(np.arange(len(y)), 29):
            model.partial_fit(x[part], y[part])
        order = [model.known_.index(label) for label in whole.known_]
        for f in whole.state_.fields:
            if not f.shared:
                assert (model.state_[f.name][order] == whole.state_[f.name]).all()


def test_capacity_and_full_anchors():
    x, y, _, _ = digits()
    model = OnChipAnchors(4, 1, capacity=3, n_max=5).calibrate(x)
    model.partial_fit(x[y < 3], y[y < 3])
    assert model.refused_ == (y < 3).sum() - 15
    state, classes = model.state_.tobytes(), model.classes_
    with pytest.raises(DataError, match="4 classes, but capacity is 3"):
        model.partial_fit(x[y == 5], y[y == 5])
    assert model.state_.tobytes() == state
    assert model.classes_ is classes


def test_a_forgotten_class_is_not_predicted_and_can_come_back():
    x, y, queries, _ = digits()
    model = OnChipAnchors(8, 4).fit(x, y)
    before = model.state_.copy()
    model.forget(4)
    assert 4 not in model.predict(queries)
    model.partial_fit(x[y == 4], y[y == 4])
    assert model.state_["means"].tobytes() == before["means"].tobytes()


@pytest.mark.parametrize("kind", BOTH)
def test_views_add_up(kind):
    x, y, queries, _ = digits()
    model = kind(parts=8).fit(x, y)
    views = np.stack([queries, queries[:, ::-1]], axis=1)
    total = model.votes(queries) + model.votes(queries[:, ::-1])
    assert (model.votes(views) == total).all()


def test_the_levels_of_a_feed_are_those_of_the_range():
    x, y, queries, _ = digits()
    stored = np.rint(queries * 16 * 7).astype(np.int8)  # 0..112, scale 1 / 112
    model = OnChipAnchors(limits=(0, 1)).fit(x, y)
    feed = model.feed("int8", 1 / 112)
    assert feed == Feed.of("int8", 0, 112)
    by_feed, by_range = feed.levels(stored)[0].astype(int), model.levels(stored / 112)[0].astype(int)
    assert np.abs(by_feed - by_range).max() <= 1
    assert (by_feed == by_range).mean() > 0.9


@pytest.mark.parametrize("kind", BOTH)
def test_saved_and_loaded_it_goes_on_as_before(kind, tmp_path):
    x, y, queries, _ = digits()
    words = np.array([f"digit {c}" for c in range(10)])[y]
    model = kind(limits=(0, 1), capacity=12).fit(x[:300], words[:300])
    again = kind.load(model.save(tmp_path / "model"))
    for m in (model, again):
        m.partial_fit(x[300:600], words[300:600])
    assert again.state_.tobytes() == model.state_.tobytes()
    assert (again.predict_proba(queries) == model.predict_proba(queries)).all()
    assert again.range_ == model.range_
    assert (again.saturated_, again.refused_, again.known_) == (model.saturated_, model.refused_, model.known_)
    with pytest.raises(StoreError, match="another thing than"):
        BOTH[kind is OnChipAnchors].load(tmp_path / "model")


def test_the_names_of_the_rules_are_in_the_file(tmp_path):
    """L1 and L2, sums and means give other labels: the file says which."""
    x, y, queries, _ = digits()
    model = OnChipAnchors(8, 4, metric="l1", form="mean", fraction=6, rounding="stochastic", tie="lowest", seed=3).fit(
        x, y
    )
    again = OnChipAnchors.load(model.save(tmp_path / "model"))
    assert again.memory_ == model.memory_
    assert (again.predict(queries) == model.predict(queries)).all()
    assert (model.predict(queries) != OnChipAnchors(8, 4).fit(x, y).predict(queries)).any()


def test_a_codebook_that_does_not_fit_its_state_is_refused(tmp_path):
    from thrifty.fewshot import saved

    x, y, _, _ = digits()
    path = OnChipCodes(8, 16).fit(x, y).save(tmp_path / "model")
    content, arrays = saved.read(path, "OnChipCodes", 1, frozenset({"state", "codebook"}))
    for name in ("state", "codebook"):
        cut = {**arrays, name: arrays[name][:5]}
        with pytest.raises(StoreError):
            OnChipCodes.load(saved.write(tmp_path / name, "OnChipCodes", 1, content, cut))


def test_footprint_is_what_the_chip_holds():
    x, y, _, _ = digits()
    anchors = OnChipAnchors(8, 4, n_max=257, fraction=0).fit(x, y)
    assert anchors.footprint_.state_bytes == 10 * 4 * 64 * (2 + 1) + 44
    codes = OnChipCodes(8, 16).fit(x, y)
    assert (codes.footprint_.state_bytes, codes.footprint_.constant_bytes) == (160 + 2 + 4 + 2, 16 * 64)
    assert codes.footprint_.learn_operations < codes.footprint_.predict_operations


def test_bad_knobs_are_named():
    x, y, _, _ = digits()
    for model, words in (
        (OnChipAnchors(bits=9), "bits"), (OnChipAnchors(parts=99), "parts is 99"),
        (OnChipAnchors(limits=(1, 0)), "low must lie"), (OnChipAnchors(capacity=0), "capacity is 0"),
        (OnChipCodes(words=0), "words is 0"), (OnChipCodes(parts=0), "parts is 0"),
        (OnChipCodes(cells="maybe"), "cells is 'maybe'"), (OnChipCodes(codebook="best"), "codebook is 'best'"),
    ):  # fmt: skip
        with pytest.raises(KnobError, match=words):
            model.fit(x, y)
    with pytest.raises(DataError, match="labels are"):
        OnChipAnchors().fit(x, y).partial_fit(x[:1], ["a"])

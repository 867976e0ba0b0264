"""The integer learners: equal to a second, plain writing of them; exact means, dead zones, votes, new classes."""

import dataclasses
import pickle

import numpy as np
import pytest
from golden_learners import GoldenAnchors, GoldenCodes
from learner_cases import CASES, CLASSIFY, LEARN, NEW_CLASS, book, stream

from thrifty.associative import Anchors, Ballot, Codes, Feed, Range, State, bounds, hardware
from thrifty.associative.codes import log2
from thrifty.associative.distance import distances
from thrifty.associative.state import Field
from thrifty.errors import DataError, KnobError

OPERATIONS = 10_000  # of all cases together


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_golden_model_after_every_request(name):
    k = CASES[name]
    golden = GoldenAnchors(k) if isinstance(k, Anchors) else GoldenCodes(k)
    state = k.fresh()
    n = OPERATIONS // len(CASES) + 1
    what, labels, levels = stream(k, n, seed=3)
    done = set()
    for i, (w, c) in enumerate(zip(what.tolist(), labels.tolist())):
        x = levels[i].tolist()
        if w == CLASSIFY:
            assert k.vote(state, levels[i : i + 1]).winners()[0] == golden.classify(x)
        elif w in (LEARN, NEW_CLASS) and c >= k.classes:
            continue
        elif w == LEARN:
            assert k.learn(state, levels[i : i + 1], np.array([c])) == golden.learn(x, c)
        elif w == NEW_CLASS:
            k.new_class(state, c)
            golden.new_class(c)
        else:
            state.clear()
            golden.reset()
        done.add(w)
        if i % 10 == 0 or w != CLASSIFY:
            assert golden.same(state)
    assert done == {0, 1, 2, 3}


@pytest.mark.parametrize("name", CASES)
def test_many_at_once_is_one_by_one(name):
    k = CASES[name]
    _, labels, levels = stream(k, 300, seed=4)
    labels = np.minimum(labels, k.classes - 1)
    whole, single = k.fresh(), k.fresh()
    learned = k.learn(whole, levels, labels)
    assert learned == sum(k.learn(single, x[None], np.array([c])) for x, c in zip(levels, labels))
    assert whole.tobytes() == single.tobytes()
    assert learned < 300 if name in ("sums fill up", "nearest") else learned == 300
    together, apart = k.vote(whole, levels), [k.vote(whole, x[None]) for x in levels]
    assert (together.votes == np.concatenate([b.votes for b in apart])).all()
    assert (together.ties == np.concatenate([b.ties for b in apart])).all()


def test_the_sum_form_is_the_true_mean():
    k = Anchors(5, 1, parts=1, anchors=2, fraction=6, n_max=1500)
    x = np.random.default_rng(0).integers(0, 256, (2000, 5)).astype(np.uint8)
    state = k.fresh()
    k.learn(state, x, np.zeros(2000, int))
    for i in range(2):
        true = x[i::2].mean(axis=0) * 2**6
        assert (state["means"][0, i] == np.floor(true + 0.5)).all()
        assert (state["sums"][0, i] == x[i::2].sum(axis=0)).all()


def mean_of(levels, **knobs):
    """Return the mean in units of the largest level's step that the mean form ends with; levels: (n, d)."""
    k = Anchors(levels.shape[1], 1, parts=1, anchors=1, form="mean", **knobs)
    state = k.fresh()
    k.learn(state, levels, np.zeros(len(levels), int))
    return state["means"][0, 0] / 2.0**k.fraction


@pytest.mark.parametrize(("bits", "fraction", "error"), [(4, 0, 0.061), (8, 0, 0.015), (8, 4, 0.0017), (8, 8, 0.00009)])
def test_the_error_of_the_mean_form_falls_with_its_bits(bits, fraction, error):
    """2,000 uniform inputs; `bits` + `fraction` bits below the point of numbers in 0..1."""
    x = np.random.default_rng(1).integers(0, 1 << bits, (2000, 400)).astype(np.uint8)
    gaps = np.abs(mean_of(x, bits=bits, fraction=fraction) - x.mean(axis=0)) / (1 << bits)
    assert error / 1.5 < gaps.mean() < 1.5 * error


ZEROS_THEN_ONES = np.repeat([0, 1], [100, 1900]).astype(np.uint8)[:, None]  # true mean .95


@pytest.mark.parametrize(("fraction", "ends_at"), [(4, 0.0), (8, 0.578), (12, 0.895)])
def test_dead_zone(fraction, ends_at):
    found = mean_of(ZEROS_THEN_ONES, bits=1, fraction=fraction)
    assert found[0] == pytest.approx(ends_at, abs=5e-4)


def test_rounding_down_is_worse_and_stochastic_rounding_mends_it():
    assert mean_of(ZEROS_THEN_ONES, bits=1, fraction=8, rounding="floor")[0] == pytest.approx(0.332, abs=5e-4)
    many = np.repeat(ZEROS_THEN_ONES, 50, axis=1)
    found = mean_of(many, bits=1, fraction=8, rounding="stochastic", seed=3)
    assert found.mean() == pytest.approx(0.95, abs=3 * found.std() / 50**0.5 + 2e-3)
    assert len(set(found)) > 10


def test_half_up_for_negative_gaps():
    """From 3 towards 0 with n = 2: -3 / 2 is -1.5, half up -1, so 2; towards 6, 3 / 2 gives 2, so 5."""
    for second, ends_at in ((0, 2), (6, 5)):
        assert mean_of(np.array([[3], [second]], np.uint8), fraction=0)[0] == ends_at


@pytest.mark.parametrize("name", CASES)
def test_a_new_class_changes_no_word_of_the_others(name):
    k = CASES[name]
    _, _, levels = stream(k, 120, seed=5)
    state = k.fresh()
    k.learn(state, levels[:60], np.arange(60) % 2)
    before = state.copy()
    votes = k.vote(state, levels).votes
    k.learn(state, levels[60:], np.full(60, 2))
    for f in state.fields:
        if not f.shared:
            assert (state[f.name][:2] == before[f.name][:2]).all()
            assert (state[f.name][3:] == 0).all()
    assert set(k.vote(before, levels).winners()) <= {0, 1}
    if isinstance(k, Codes):
        assert (k.vote(state, levels).votes[:, :2] == votes[:, :2]).all()
    k.new_class(state, 2)
    assert not k.valid(state)[2:].any()
    assert set(k.vote(state, levels).winners()) <= {0, 1}


@pytest.mark.parametrize("name", CASES)
def test_unused_classes_never_win(name):
    k = CASES[name]
    _, _, levels = stream(k, 40, seed=6)
    state = k.fresh()
    assert (k.vote(state, levels).winners() == -1).all()
    k.learn(state, levels[:1], np.array([k.classes - 1]))
    assert (k.vote(state, levels).winners() == k.classes - 1).all()


def test_bits_learn_idempotently_in_any_order_and_never_clear():
    k = Codes(book(7, 12, 16), classes=3, parts=4)
    rng = np.random.default_rng(7)
    x, c = rng.integers(0, 256, (80, 16)).astype(np.uint8), rng.integers(0, 3, 80)
    one, two = k.fresh(), k.fresh()
    for part in np.array_split(np.arange(80), 7):
        before = one["cells"].copy()
        k.learn(one, x[part], c[part])
        assert (one["cells"] & before == before).all()
    order = rng.permutation(np.tile(np.arange(80), 3))
    k.learn(two, x[order], c[order])
    assert one.tobytes() == two.tobytes()
    assert 0 < k.fill(one) < 1


def test_binary_memory_fails_as_it_fills():
    """One class after the other, each example a random vector: the more are stored, the more classes tie."""
    rng = np.random.default_rng(8)
    k = Codes(book(8, 8, 32), classes=4, parts=8)
    right, fills = [], []
    for each in (2, 8, 128):
        x, c = rng.integers(0, 256, (4 * each, 32)).astype(np.uint8), np.repeat(np.arange(4), each)
        state = k.fresh()
        k.learn(state, x, c)
        right.append((k.vote(state, x).winners() == c).mean())
        fills.append(k.fill(state))
    assert fills == sorted(fills)
    assert fills[-1] > 0.99
    assert right[0] == 1.0
    assert right[0] > right[1] > right[2]
    assert right[2] == pytest.approx(0.25, abs=0.05)


# ---- the majority vote unit


def ballot(votes, ties=None, valid=None):
    votes = np.array(votes, np.int64)[None]
    ties = np.zeros_like(votes) if ties is None else np.array(ties, np.int64)[None]
    return Ballot(votes, ties, np.ones(votes.shape[1], bool) if valid is None else np.array(valid))


@pytest.mark.parametrize(
    ("given", "winner", "margin"),
    [
        (([3, 3, 3],), 0, 0),  # all tie: the lowest
        (([0, 0, 0],), 0, 0),  # nobody voted
        (([0, 0, 0], None, [False, False, True]), 2, 0),
        (([4, 4, 1], [8, 7, 0]), 1, 0),  # even, equal, the smaller distance
        (([4, 4, 1], [7, 7, 0]), 0, 0),
        (([2, 3, 0], [0, 9, 0]), 1, 1),  # odd: no tie to break
        (([9, 3, 2], None, [False, True, True]), 1, 1),
        (([5], None, [True]), 0, 0),
        (([5], None, [False]), -1, 0),
        (([-900, -700, -700],), 1, 0),  # scores may be negative
    ],
)
def test_majority_vote(given, winner, margin):
    b = ballot(*given)
    assert b.winners()[0] == winner
    assert b.margins()[0] == margin
    assert b.winners(margin)[0] == winner
    if b.valid.sum() > 1:
        assert b.winners(margin + 1)[0] == -1


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_each_sub_space_votes_once(parts):
    k = Anchors(10, 3, parts=parts, anchors=2)
    state = k.fresh()
    x = np.random.default_rng(9).integers(0, 256, (30, 10)).astype(np.uint8)
    k.learn(state, x, np.arange(30) % 3)
    assert (k.vote(state, x).votes.sum(axis=1) == parts).all()
    both = k.vote(state, x).over_views(2)
    assert (both.votes.sum(axis=1) == 2 * parts).all()
    with pytest.raises(KnobError, match="no groups of 7 views"):
        k.vote(state, x).over_views(7)


# ---- levels, distances, state


def test_a_range_is_frozen_and_counts_what_is_outside():
    levels, outside = Range((-1.0,), (1.0,), 4).levels([[-1.0, 1.0, -1.5, 7.0], [0.0, 0.07, -0.06, 0.9]])
    assert levels.tolist() == [[0, 15, 0, 15], [8, 8, 7, 14]]
    assert outside.tolist() == [2, 0]


def test_a_range_for_each_part():
    levels, outside = Range((0.0, 10.0), (1.0, 20.0)).levels([[0.5, 1.0, 15.0, 20.0, 21.0]])
    assert levels.tolist() == [[128, 255, 128, 255, 255]]  # parts (0, 2), (2, 5)
    assert outside.tolist() == [1]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("bits", [8, 5, 1])
def test_a_feed_spreads_its_range_over_all_levels(dtype, bits):
    info = np.iinfo(dtype)
    feed = Feed.of(dtype, bits=bits)
    levels, outside = feed.levels(np.arange(info.min, info.max + 1)[None])
    real = np.linspace(0, 2**bits - 1, info.max - info.min + 1)
    assert np.abs(levels[0] - real).max() <= 0.6
    assert outside[0] == 0
    if bits == 8 and dtype != "int16":
        assert (levels[0] == np.arange(256)).all()


def test_a_calibrated_feed_saturates_and_counts():
    feed = Feed.of("int16", -100, 900)
    levels, outside = feed.levels(np.array([[-32768, -101, -100, 400, 900, 901, 32767]]))
    assert levels.tolist() == [[0, 0, 0, 128, 255, 255, 255]]
    assert outside.tolist() == [2]  # what still rounds to the first and the last level is inside


def test_distances_are_exact_at_any_width():
    rng = np.random.default_rng(10)
    for bits in (1, 8, 15, 24):
        a, b = rng.integers(0, 1 << bits, (2, 20, 33))
        away = a[:, None].astype(object) - b.astype(object)
        assert (distances(a, b, "l2", bits) == (away * away).sum(axis=2)).all()
        assert (distances(a, b, "l1", bits) == np.abs(away).sum(axis=2)).all()


def test_log2_is_within_half_a_percent_of_a_bit():
    v = np.unique(np.concatenate([np.arange(1, 5000), np.random.default_rng(0).integers(1, 2**32, 5000)]))
    assert np.abs(log2(v) / 256 - np.log2(v)).max() < 0.008
    assert (np.diff(log2(v)) >= 0).all()


def test_parts_cover_the_features_once():
    for d in (1, 5, 16, 33, 1280):
        for parts in {1, min(d, 7), d}:
            sizes = np.diff(bounds(d, parts))
            assert sizes.sum() == d
            assert sizes.min() >= 1
            assert sizes.max() - sizes.min() <= 1


def test_a_state_is_its_bytes():
    state = State([Field("small", "uint8", (3,)), Field("wide", "uint32", (2,)), Field("means", "int16", (2, 2))])
    state["wide"][:], state["means"][:], state["small"][:] = (1, 2**32 - 1), ((3, 4), (5, 6)), (7, 8, 9)
    assert state.tobytes().hex() == "01000000ffffffff03000400050006000708090" + "0"
    for again in (state.copy(), State(state.fields, state.tobytes()), pickle.loads(pickle.dumps(state))):
        assert again.tobytes() == state.tobytes()
        again["wide"][0] = 99
        assert state["wide"][0] == 1
    with pytest.raises(DataError, match="12 bytes was given; this learner's has 20"):
        State(state.fields, bytes(12))


@pytest.mark.parametrize("name", ["sums", "bits", "counts", "means stochastic"])
def test_room_for_more_classes_keeps_every_word(name):
    k = CASES[name]
    _, labels, levels = stream(k, 100, seed=11)
    state = k.fresh()
    k.learn(state, levels, np.minimum(labels, k.classes - 1))
    wide = dataclasses.replace(k, classes=k.classes + 9)
    more = state.widened(wide.fields())
    for f in state.fields:
        assert (more[f.name][: len(state[f.name])] == state[f.name]).all()
    assert (k.vote(state, levels).winners() == wide.vote(more, levels).winners()).all()


# ---- what it would cost, what is refused


def test_memory_and_operations_do_not_depend_on_the_number_of_examples_or_parts():
    sizes = {Anchors(64, 10, parts=p).fresh().size_bytes for p in (1, 4, 16, 64)}
    assert sizes == {10 * 4 * 64 * (4 + 2) + 10 * 4 + 4}  # sums, means, counts, one word for saturation
    assert Anchors(64, 10).operations() == {"learn": 128, "classify": 3 * 10 * 4 * 64}
    assert Codes(book(0, 64, 64), 10).fresh().size_bytes == 10 * 16 * 64 // 8 + 2 + 4 + 2


def test_modelled_hardware():
    h = hardware(Anchors(64, 10, fraction=0, n_max=4096), lanes=16)
    assert (h.learn_cycles, h.classify_cycles) == (4, 164)
    assert h.memory_bits == 10 * 4 * 64 * (8 + 32) + 320
    c = hardware(Codes(book(0, 64, 64), 10), lanes=16)
    assert (c.learn_cycles, c.classify_cycles, c.codebook_bits) == (261, 270, 64 * 64 * 8)
    assert c.block_rams == 16 + 4  # a memory of 64 x 10 bits per sub-space; 256 x 128 bits of codebook
    with pytest.raises(KnobError, match="lanes is 0"):
        hardware(Anchors(4, 2, parts=1), lanes=0)


def test_all_wrong_knobs_are_named_at_once():
    with pytest.raises(KnobError) as err:
        Anchors(8, 2, parts=9, anchors=0, bits=9, form="median", metric="cosine")
    for word in ("parts is 9", "anchors is 0", "bits is 9", "form is 'median'", "metric is 'cosine'"):
        assert word in str(err.value)
    with pytest.raises(KnobError, match="leaves 32 bits"):
        Anchors(8, 2, parts=2, fraction=8, n_max=1 << 17)
    with pytest.raises(KnobError, match="an option of form='mean'"):
        Anchors(8, 2, parts=2, rounding="stochastic")
    with pytest.raises(KnobError, match=r"levels are 0\.\.15"):
        Codes(np.full((2, 4), 16), 2, parts=2, bits=4)
    with pytest.raises(KnobError, match="codebook has shape"):
        Codes(np.zeros(4), 2)
    for wrong in (lambda: Feed.of("float32"), lambda: Feed.of("int8", 5, 5), lambda: Feed(0, 1 << 14)):
        with pytest.raises(KnobError):
            wrong()
    with pytest.raises(KnobError, match="low must lie below high"):
        Range((1.0,), (1.0,))
    with pytest.raises(DataError, match="NaN"):
        Range((0.0,), (1.0,)).levels([[np.nan]])

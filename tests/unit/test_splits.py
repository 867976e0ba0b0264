from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import DataError
from thrifty.splits import draw, stratified


@settings(max_examples=50, deadline=None)
@given(st.integers(20, 200), st.integers(1, 5), st.floats(0.2, 0.8), st.integers(0, 1000))
def test_every_class_is_carved_in_its_share(n, classes, share, seed):
    y = np.arange(n) % classes
    kept, carved = stratified(y, share, seed)
    assert sorted([*kept, *carved]) == list(range(n))
    for value in range(classes):
        assert abs((y[carved] == value).sum() - share * (y == value).sum()) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000))
def test_groups_stay_whole_even_when_they_hold_several_classes(seed):
    rng = np.random.default_rng(seed)
    groups, y = rng.integers(0, 30, 300), rng.integers(0, 3, 300)
    kept, carved = stratified(y, 0.3, seed, groups)
    assert not set(groups[kept]) & set(groups[carved])
    assert 0.1 < len(carved) / 300 < 0.5


def test_one_group_cannot_be_split():
    with pytest.raises(DataError, match=r"1 group\(s\)"):
        stratified(np.zeros(10, int), 0.3, 0, np.zeros(10, int))


def test_shares_outside_the_open_interval_are_refused():
    with pytest.raises(DataError, match=r"must be in \(0, 1\)"):
        stratified(np.zeros(10, int), 1.5, 0)


def test_a_class_of_one_stays_in_training():
    kept, carved = stratified(np.array([0] * 20 + [1]), 0.2, 0)
    assert 20 in kept
    assert len(carved) == 4


def test_draw_takes_every_class_first():
    y = np.array([0] * 90 + [1] * 10)
    rows = draw(y, 10, 0)
    assert np.bincount(y[rows]).tolist() == [9, 1]
    assert np.array_equal(rows, draw(y, 10, 0))

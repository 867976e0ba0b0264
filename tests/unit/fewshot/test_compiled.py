"""The compiled way through many episodes gives the labels of the NumPy way."""

from __future__ import annotations

import numpy as np
import pytest

from thrifty.fewshot import accuracies, compiled, uniform
from thrifty.fewshot.episodes import _right_even, _swapped, _table

pytest.importorskip("numba")


def both(x, drawn):
    table = _table(x)
    return compiled.right_shares(table, drawn), _right_even(table, drawn)


@pytest.mark.parametrize(("ways", "shots", "queries", "kind"), [
    (2, 1, 1, np.float32), (4, 3, 2, np.float64), (5, 5, 15, np.float32), (6, 1, 3, np.float64), (11, 2, 7, np.float32),
])  # fmt: skip
def test_same_shares_as_numpy(ways, shots, queries, kind):
    rng = np.random.default_rng(ways)
    y = np.repeat(np.arange(12), 30)
    x = (rng.standard_normal((12, 33))[y] + 1.5 * rng.standard_normal((len(y), 33))).astype(kind)
    fast, plain = both(x, uniform(y, ways, shots, queries, 200, rng))
    assert (fast == plain).all()
    assert 0.1 < fast.mean() < 0.999


def test_ties_go_to_the_first_class_and_chunks_do_not_matter(monkeypatch):
    y = np.repeat(np.arange(5), 8)
    x = np.ones((40, 3), np.float32)  # every query is as near to every mean
    drawn = uniform(y, 5, 2, 3, 50, np.random.default_rng(0))
    fast, plain = both(x, drawn)
    assert (fast == 0.2).all()
    assert (plain == 0.2).all()
    x = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    whole, _ = both(x, drawn)
    monkeypatch.setattr(compiled, "MEANS_BYTES", 5 * 3 * 4 * 7)
    assert (both(x, drawn)[0] == whole).all()


def test_draws_are_those_of_numpy():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, 300)
    others = np.stack([rng.integers(i, np.maximum(sizes, i + 1)) for i in range(6)])
    plain = _swapped(sizes, others, 7)
    assert (compiled.swapped(sizes, others, 7) == plain).all()
    assert (plain[:, 6] == -1).all()
    for row, size in zip(plain, sizes, strict=True):
        held = row[row >= 0]
        assert len(set(held)) == len(held) == min(size, 6)
        assert (held < size).all()


def test_accuracies_uses_it_for_many_even_episodes_only(monkeypatch):
    y = np.repeat(np.arange(3), 10)
    x = np.random.default_rng(0).standard_normal((30, 4))
    drawn = uniform(y, 3, 2, 4, 700, np.random.default_rng(0))
    asked = []
    real = compiled.right_shares
    monkeypatch.setattr(compiled, "right_shares", lambda t, e: asked.append(len(e)) or real(t, e))
    fast = accuracies(x, drawn)
    assert asked == [700]
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert (accuracies(x, drawn) == fast).all()
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "right_shares", lambda t, e: pytest.fail("too few episodes to compile for"))
    accuracies(x, drawn[:5])

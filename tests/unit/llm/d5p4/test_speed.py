"""What was made fast chooses as the plain way does: compiled search, sums in float32, only the masked positions."""

from __future__ import annotations

import pytest
import torch

from thrifty.errors import DataError
from thrifty.llm import d5p4
from thrifty.llm.d5p4 import compiled, kernels
from thrifty.llm.d5p4.selectors import FLOOR, _greedy


def pools(count, shapes=((8, 8), (4, 4), (5, 3), (3, 9), (6, 1), (1, 7))):
    """Random kernels, some of them full of ties: few features, of few values, and equal qualities."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        k, w = shapes[number % len(shapes)]
        x = torch.randn(k * w, 12, generator=generator, dtype=torch.float64)
        raw = torch.randn(k * w, generator=generator, dtype=torch.float64)
        if number % 3 == 1:
            x, raw = torch.randint(2, (k * w, 3), generator=generator).double() + 0.0, raw.round()
            x[:, 0] = 1.0
        if number % 3 == 2:
            x, raw = x[:1].expand(k * w, -1), torch.zeros(k * w, dtype=torch.float64)
        form = d5p4.FORMS[number % 2]
        yield k, w, d5p4.kernel(d5p4.normalised(raw), d5p4.gram(x), form, 1.0 + number % 5)


@pytest.mark.parametrize("partition", [True, False])
def test_the_compiled_search_takes_every_step_of_the_plain_one(partition):
    pytest.importorskip("numba")
    ties = 0
    for k, w, kernel in pools(60):
        n = k * w
        groups = torch.arange(n) // w if partition else torch.arange(n)
        chosen, own = _greedy(kernel, groups, torch.arange(n), k)
        fast, variance = compiled.greedy(kernel.numpy(), w if partition else 1, torch.arange(n).numpy(), k, FLOOR)
        assert (torch.from_numpy(fast) == chosen).all()
        assert (torch.from_numpy(variance) == own).all()  # to the last bit
        ties += len(own[:, -1].unique()) < n
    assert ties > 20


def test_a_choice_does_not_depend_on_numba(monkeypatch):
    pytest.importorskip("numba")
    fast = [
        d5p4.greedy_map(kernel, k, starts=s, polish=s == "all") for k, _, kernel in pools(24) for s in ("all", "one")
    ]
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert fast == [
        d5p4.greedy_map(kernel, k, starts=s, polish=s == "all") for k, _, kernel in pools(24) for s in ("all", "one")
    ]
    assert any(c.flagged for c in fast)
    assert not all(c.flagged for c in fast)


def test_only_a_finite_symmetric_kernel_is_taken_as_it_is():
    pytest.importorskip("numba")
    good = torch.eye(5, dtype=torch.float64)
    assert compiled.usable(good.numpy())
    for place, value in (((1, 3), 1e-17), ((2, 2), torch.nan), ((4, 4), torch.inf), ((0, 1), -torch.inf)):
        bad = good.clone()
        bad[place] = value
        assert not compiled.usable(bad.numpy())


def log_p(n, t, v, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(n, t, v, generator=generator), -1)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("kind", d5p4.QUALITIES)
def test_float32_sums_are_those_of_float64(kind, numba, monkeypatch):
    if numba:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compiled, "available", lambda: False)
    monkeypatch.setattr(kernels, "_PIECE", 1000)  # several pieces
    masked = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[2] = False
    for v, scale in ((7, 1.0), (301, 3.0), (5003, 0.1), (301, 200.0)):
        p = log_p(4, 9, v, scale=scale)
        exact = d5p4.quality(p, kind, masked, precision=torch.float64)
        torch.testing.assert_close(d5p4.quality(p, kind, masked), exact, rtol=2e-5, atol=2e-6)
        part = d5p4.quality(p[:, 2:7], kind, masked[:, 2:7])  # not contiguous
        torch.testing.assert_close(part, d5p4.quality(p[:, 2:7].clone(), kind, masked[:, 2:7]))
    broken = log_p(2, 3, 50)
    broken[1, 2, 40] = torch.nan
    with pytest.raises(DataError, match="1 qualities are not finite"):
        d5p4.normalised(d5p4.quality(broken, kind, torch.ones(2, 3, dtype=torch.bool)))


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("kind", d5p4.QUALITIES)
def test_only_masked_positions_are_read_where_the_others_are_point_masses(kind, numba, monkeypatch):
    if numba:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(compiled, "available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(41, (5, 8), generator=generator)
    ids[torch.rand(5, 8, generator=generator) < 0.5] = 40
    ids[3] = 7  # nothing masked
    p, _ = d5p4.Subs(lambda x: (torch.randn(*x.shape, 41, generator=generator), torch.zeros(*x.shape, 2)), 40)(ids)
    whole = d5p4.quality(p, kind, ids == 40)
    read = d5p4.quality(p.masked_fill((ids != 40)[..., None], torch.nan), kind, ids == 40, points=True)
    torch.testing.assert_close(read, whole, rtol=1e-5, atol=1e-7)


def test_the_gram_matrix_of_near_equal_states_keeps_their_differences():
    generator = torch.Generator().manual_seed(0)
    common = 100 * torch.randn(1, 6000, generator=generator)
    states = common + 0.01 * torch.randn(12, 6000, generator=generator)  # cosines of 1 - 1e-8
    exact = 1 - d5p4.gram(states, torch.float64)
    off = ~torch.eye(12, dtype=torch.bool)
    assert 0 < float(exact[off].max()) < 2e-8
    torch.testing.assert_close((1 - d5p4.gram(states))[off], exact[off], rtol=0.02, atol=0)
    flat = torch.nn.functional.normalize(states, dim=1)
    plain = (1 - (flat @ flat.T).double())[off]
    assert float((plain - exact[off]).abs().max()) > float(exact[off].max())  # what float32 alone would give
    huge = d5p4.gram(1e25 * torch.randn(3, 5, generator=generator))
    assert torch.isfinite(huge).all()


@pytest.mark.parametrize("form", d5p4.FORMS)
def test_choices_of_float32_are_those_of_float64(form):
    agree = 0
    for seed in range(30):
        p = log_p(16, 6, 97, seed)
        hidden = torch.randn(16, 6, 24, generator=torch.Generator().manual_seed(seed + 1)) + 2.0
        found = []
        for precision in (torch.float32, torch.float64):
            raw, cosines = d5p4.quality(p, precision=precision), d5p4.gram(hidden, precision)
            found.append(d5p4.Select(form=form, beta=4.0)(raw, cosines, 4))
        agree += found[0].indices == found[1].indices
        assert found[0].value == pytest.approx(found[1].value, abs=1e-4)
    assert agree == 30

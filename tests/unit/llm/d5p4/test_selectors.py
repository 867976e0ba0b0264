"""Selectors keep every equality of their specification; no language model takes part."""

from __future__ import annotations

import itertools

import pytest
import torch

from thrifty.errors import DataError, KnobError
from thrifty.llm import d5p4


def pool(k, w, form="additive", beta=1.0, seed=0, width=16):
    """A random pool of k groups of w: quality, cosines, kernel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(k * w, width, generator=generator, dtype=torch.float64)
    q = d5p4.normalised(torch.randn(k * w, generator=generator, dtype=torch.float64))
    cosines = d5p4.gram(x)
    return q, cosines, d5p4.kernel(q, cosines, form, beta)


def groups(choice, w):
    return sorted(i // w for i in choice.indices)


SHAPES = [(2, 2), (3, 3), (4, 3), (4, 4), (8, 8)]


@pytest.mark.parametrize(("k", "w"), SHAPES)
def test_one_of_each_group_by_every_selector_and_the_value_is_the_determinant(k, w):
    for seed in range(12):
        for form, beta in (("additive", 1.0), ("additive", 10.0), ("multiplicative", 5.0)):
            q, cosines, kernel = pool(k, w, form, beta, seed)
            generator = torch.Generator().manual_seed(seed)
            found = [
                d5p4.greedy_map(kernel, k), d5p4.greedy_map(kernel, k, starts="one"), d5p4.greedy_beam(q, k),
                d5p4.diverse_beam(q, cosines, k, 2.0), d5p4.independent(k * w, k, generator),
            ]  # fmt: skip
            if w**k <= 4096:
                found.append(d5p4.exhaustive(kernel, k))
            assert all(groups(c, w) == list(range(k)) for c in found)
            rows = torch.tensor(found[0].indices)
            assert found[0].value == pytest.approx(float(torch.logdet(kernel[rows][:, rows])), abs=1e-6)
            assert found[0].value >= found[1].value - 1e-12


def test_greedy_keeps_its_own_determinant():
    """The incremental sum of logs is the determinant: checked on a kernel that is well-conditioned."""
    q, _, kernel = pool(6, 4, seed=3)
    del q
    best, value = None, float("-inf")
    for start in range(24):
        chosen, total = [start], float(torch.log(kernel[start, start]))
        for _ in range(5):
            left = [i for i in range(24) if i // 4 not in {c // 4 for c in chosen}]
            gains = [d5p4.log_det(kernel, [*chosen, i]) for i in left]
            pick = left[max(range(len(left)), key=gains.__getitem__)]
            total = max(gains)
            chosen.append(pick)
        if total > value:
            best, value = tuple(sorted(chosen)), total
    found = d5p4.greedy_map(kernel, 6)
    assert found.indices == best
    assert found.value == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(("k", "w"), [(2, 2), (2, 5), (3, 3), (4, 3)])
def test_many_starts_equal_brute_force_on_small_pools(k, w):
    missed = 0
    for seed in range(30):
        for form, beta in (("additive", 1.0), ("additive", 10.0), ("multiplicative", 1.0), ("multiplicative", 5.0)):
            _, _, kernel = pool(k, w, form, beta, seed)
            best, found = d5p4.exhaustive(kernel, k), d5p4.greedy_map(kernel, k)
            missed += found.indices != best.indices
            assert found.value <= d5p4.greedy_map(kernel, k, polish=True).value + 1e-12
            assert best.value - found.value < 0.1
            assert d5p4.map_set(kernel, k).indices == best.indices
    assert missed <= (3 if (k, w) == (4, 3) else 0)  # greedy has no guarantee; of 120 pools


def test_the_gap_stays_small_beyond_and_one_start_is_worse():
    gaps, single = [], []
    for seed in range(40):
        _, _, kernel = pool(4, 4, "additive", 10.0, seed)
        best = d5p4.exhaustive(kernel, 4).value
        gaps.append(best - d5p4.greedy_map(kernel, 4).value)
        single.append(best - d5p4.greedy_map(kernel, 4, starts="one").value)
    assert min(gaps) >= -1e-9
    assert max(gaps) < 0.1
    assert sum(single) > 2 * sum(gaps)
    assert sum(single) / 40 > 0.01


def test_one_candidate_or_one_group_leaves_no_choice():
    _, _, kernel = pool(5, 1)
    assert d5p4.greedy_map(kernel, 5).indices == (0, 1, 2, 3, 4)
    q, cosines, kernel = pool(1, 6)
    assert d5p4.greedy_map(kernel, 1).indices == (int(q.argmax()),)
    assert d5p4.greedy_map(d5p4.kernel(q, cosines, "multiplicative", 3.0), 1).indices == (int(q.argmax()),)


def test_without_similarity_it_is_the_greedy_beam():
    for seed in range(20):
        q, cosines, _ = pool(4, 3, seed=seed)
        q = q.clamp_min(0.01)
        assert d5p4.greedy_map(d5p4.kernel(q, cosines, beta=0.0), 4).indices == d5p4.greedy_beam(q, 4).indices
        top = tuple(sorted(q.topk(4).indices.tolist()))
        assert d5p4.greedy_map(torch.diag(q), 4, partition=False).indices == top
        assert d5p4.greedy_beam(q, 4, partition=False).indices == top
        assert d5p4.diverse_beam(q, cosines, 4, 0.0).indices == d5p4.greedy_beam(q, 4).indices


def test_a_twin_is_not_chosen_when_there_is_another():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    x[2] = x[0]  # candidate 2 (group 1) is the twin of candidate 0 (group 0)
    x[1] = -5 * x[3] + torch.randn(8, generator=generator, dtype=torch.float64)
    kernel = d5p4.kernel(torch.full((4,), 0.5, dtype=torch.float64), d5p4.gram(x), beta=50.0)
    assert d5p4.greedy_map(kernel, 2).indices != (0, 2)


def test_order_and_scale_do_not_matter():
    for seed in range(10):
        _, _, kernel = pool(4, 3, beta=5.0, seed=seed)
        found = d5p4.greedy_map(kernel, 4)
        assert d5p4.greedy_map(7.5 * kernel, 4).indices == found.indices
        order = torch.cat([torch.tensor([g * 3 + i for i in (2, 0, 1)]) for g in (2, 0, 3, 1)])
        moved = d5p4.greedy_map(kernel[order][:, order], 4)
        assert tuple(sorted(order[list(moved.indices)].tolist())) == found.indices


def test_the_first_step_of_equal_candidates_gives_one_per_group():
    for form in d5p4.FORMS:
        q = d5p4.normalised(torch.zeros(12))
        cosines = d5p4.gram(torch.ones(12, 5))
        assert torch.allclose(cosines, torch.ones(12, 12, dtype=torch.float64), atol=1e-12)
        found = d5p4.greedy_map(d5p4.kernel(q, cosines, form, 1.0), 4)
        assert groups(found, 3) == [0, 1, 2, 3]
        assert found.flagged == (form == "additive")


def test_quality_and_similarity():
    log_p = torch.log_softmax(torch.tensor([[[5.0, 0, 0], [0, 0, 0]], [[0, 0, 0.0], [0, 0, 0]]]), -1)
    raw = d5p4.quality(log_p)
    assert raw[1] == pytest.approx(-torch.tensor(3.0).log().item(), abs=1e-6)
    assert raw[0] > raw[1]
    certain = torch.full((1, 2, 3), float("-inf"))
    certain[:, :, 0] = 0.0
    assert d5p4.quality(certain)[0] == 0.0  # a point mass has no entropy and gives no NaN
    masked = torch.tensor([[False, True], [True, True]])
    both = d5p4.quality(log_p, "masked_entropy", masked)
    assert both[0] == pytest.approx(float(both[1]), abs=1e-6)
    assert torch.isfinite(d5p4.quality(certain, "self_certainty")).all()
    assert d5p4.normalised(torch.tensor([2.0, 4.0])).tolist() == [0.0, 1.0]
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.nn.functional.normalize(x.flatten(1).double(), dim=1)
    assert torch.allclose(d5p4.gram(x, torch.float64), flat @ flat.T, atol=1e-12)
    assert torch.allclose(d5p4.gram(x), flat @ flat.T, atol=1e-6)
    rbf = d5p4.similarity(d5p4.gram(x.double()), gamma=0.5)
    assert rbf[0, 1] == pytest.approx(float(torch.exp(-0.5 * (flat[0] - flat[1]).square().sum())), abs=1e-9)


def test_with_a_temperature_all_sets_are_drawn_in_proportion_to_a_power_of_their_determinants():
    _, _, kernel = pool(2, 2, seed=4)
    generator = torch.Generator().manual_seed(0)
    draws = 1000
    for temperature in (1.0, 3.0):
        sets = [(a, b) for a in (0, 1) for b in (2, 3)]
        expected = torch.softmax(torch.tensor([d5p4.log_det(kernel, s) for s in sets]) / temperature, 0)
        found = [d5p4.exhaustive(kernel, 2, temperature=temperature, generator=generator) for _ in range(draws)]
        share = torch.tensor([sum(c.indices == s for c in found) / draws for s in sets])
        assert ((share - expected).abs() < 3 * (expected * (1 - expected) / draws).sqrt()).all()
        assert found[0].value == pytest.approx(d5p4.log_det(kernel, found[0].indices))
    assert d5p4.exhaustive(kernel, 2).indices == sets[int(expected.argmax())]
    with pytest.raises(KnobError, match=r"temperature is 1\.0"):
        d5p4.exhaustive(kernel, 2, temperature=1.0)


def test_k_dpp_draws_sets_in_proportion_to_their_determinants():
    _, _, kernel = pool(5, 1, seed=2)
    generator = torch.Generator().manual_seed(0)
    counts = {s: 0 for s in itertools.combinations(range(5), 3)}
    draws = 1500
    for _ in range(draws):
        counts[d5p4.k_dpp(kernel, 3, generator).indices] += 1
    dets = torch.tensor([torch.det(kernel[list(s)][:, list(s)]) for s in counts])
    expected = dets / dets.sum()
    seen = torch.tensor([c / draws for c in counts.values()])
    assert ((seen - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()


def test_bad_pools_are_refused():
    _, _, kernel = pool(3, 3)
    with pytest.raises(KnobError, match="9 candidates are not 2 groups"):
        d5p4.greedy_map(kernel, 2)
    with pytest.raises(KnobError, match=r"k is 10; it must be in 1\.\.9"):
        d5p4.greedy_map(kernel, 10, partition=False)
    with pytest.raises(DataError, match="not finite"):
        d5p4.greedy_map(kernel.index_fill(0, torch.tensor([1]), float("nan")), 3)
    with pytest.raises(DataError, match="not symmetric"):
        d5p4.greedy_map(kernel + torch.eye(9, dtype=torch.float64).roll(1, 0), 3)
    with pytest.raises(DataError, match="square"):
        d5p4.greedy_map(kernel[:2], 3)
    with pytest.raises(DataError, match="rank below 3"):
        d5p4.k_dpp(torch.ones(6, 6), 3, torch.Generator())
    with pytest.raises(KnobError, match="too many"):
        d5p4.exhaustive(pool(12, 8)[2], 12)
    with pytest.raises(DataError, match="qualities are not finite"):
        d5p4.normalised(torch.tensor([1.0, float("nan")]))
    for call in (
        lambda: d5p4.kernel(torch.ones(2), torch.ones(2, 2), "addtive"), lambda: d5p4.similarity(kernel, "rbff"),
        lambda: d5p4.similarity(kernel, gamma=0.0), lambda: d5p4.quality(torch.zeros(1, 1, 2), "entropie"),
        lambda: d5p4.quality(torch.zeros(1, 1, 2), "masked_entropy"), lambda: d5p4.greedy_map(kernel, 3, starts="two"),
    ):  # fmt: skip
        with pytest.raises(KnobError):
            call()

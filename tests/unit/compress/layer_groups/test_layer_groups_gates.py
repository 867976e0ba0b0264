"""Hard-concrete gates and the Lagrangian."""

import math

import pytest
import torch
from tiny_stacks import HEADS, INNER, LAYERS, WIDTH, tiny

from thrifty.compress.layer_groups import Gates, Lagrangian, count_expected, random_masks, sizes, stack_of
from thrifty.compress.layer_groups.gates import (
    OFFSET,
    counts,
    evaluation_mask,
    expected_sparsity,
    open_probability,
    sample,
)
from thrifty.errors import KnobError

pytest.importorskip("transformers")


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 2.0])
def test_gates_open_as_often_as_the_formula_says(log_alpha):
    masks = sample(torch.full((100_000,), log_alpha), draws())
    p = float(open_probability(torch.tensor(log_alpha)))
    assert float((masks > 0).float().mean()) == pytest.approx(p, rel=0.01)
    assert masks.min() >= 0
    assert masks.max() <= 1


def test_the_offset_and_the_checked_values():
    assert pytest.approx(1.5986, abs=5e-5) == OFFSET
    found = open_probability(torch.tensor([-2.0, 0.0, 2.0])).tolist()
    assert found == pytest.approx([0.4010, 0.8318, 0.9734], abs=5e-5)


def test_initial_values():
    gates = Gates(stack_of(tiny("hubert")).units(("heads", "units", "channels")), draws())
    start = {"heads": math.log(0.99 / 0.01), "channels": math.log(0.99 / 0.01), "units": 0.0}
    for unit, value in zip(gates.units, gates.log_alpha, strict=True):
        assert float(value.detach().mean()) == pytest.approx(start[unit.kind], abs=0.05)
        assert 0.001 < float(value.detach().std()) < 0.05


def test_the_mask_of_evaluation():
    log_alpha = torch.tensor([3.0, -4.0, 0.5, -3.0])
    zeros = round(4 - float(open_probability(log_alpha).sum()))
    found = evaluation_mask(log_alpha)
    assert zeros == 2
    assert (found[[1, 3]] == 0).all()
    assert found[[0, 2]].tolist() == pytest.approx([1 / (1 + math.exp(-0.8 * a * 1.5)) for a in (3.0, 0.5)])
    assert int((evaluation_mask(torch.full((5,), -30.0)) > 0).sum()) == 1  # a layer keeps one


def test_expected_parameters_are_the_formula_by_hand():
    """Attention 3 (D + 1) H s + (H s + 1) D, feed-forward (D + 1) F + (F + 1) D, norms 4 D."""
    stack = stack_of(tiny("hubert"))
    units, size = stack.units(), WIDTH // HEADS
    kept = {u.name: 1.7 if u.kind == "heads" else 11.3 for u in units}
    attention = 3 * (WIDTH + 1) * 1.7 * size + (1.7 * size + 1) * WIDTH
    layer = attention + (WIDTH + 1) * 11.3 + (11.3 + 1) * WIDTH + 4 * WIDTH
    assert float(count_expected(stack.scope("layers"), units, kept)) == pytest.approx(LAYERS * layer)
    whole = sum(p.numel() for p in stack.trunk.encoder.layers.parameters())
    assert count_expected(stack.scope("layers"), (), {}) == whole


def test_expected_parameters_of_chained_convolutions():
    """A convolution between two that lose channels counts with the product of both."""
    stack = stack_of(tiny("wav2vec2"))
    units = stack.units(("channels",))
    kept = {units[0].name: 4.0, units[1].name: 6.0}
    shapes = {n: s for n, s in stack.scope("layers", ("channels",)).items() if n.startswith("feature_extractor")}
    expected = 1 * 4 * 10 + 2 * 4 + 4 * 6 * 3 + 6 * 8 * 3  # with the group norm of the first, no biases
    assert count_expected(shapes, units, kept) == pytest.approx(expected)


def test_lagrangian_alone_drives_the_sparsity_to_the_ramped_target():
    stack = stack_of(tiny("bert"))
    gates, pressure = Gates(stack.units(), draws()), Lagrangian(0.6, ramp=100)
    shapes = stack.scope("layers")
    parts = [{"params": list(m.parameters()), "maximize": m is pressure} for m in (gates, pressure)]
    optimizer = torch.optim.AdamW(parts, lr=0.05, weight_decay=0.0)
    seen = []
    for step in range(600):
        sparsity = expected_sparsity(gates, shapes)
        optimizer.zero_grad()
        pressure(sparsity, step).backward()
        optimizer.step()
        seen.append(float(sparsity.detach()))
    assert pressure.target(50) == pytest.approx(0.3)
    assert seen[0] < 0.15
    assert seen[-50:] == pytest.approx([0.6] * 50, abs=0.02)
    kept = counts(gates.evaluate())
    away = [abs(kept[n] - float(e.detach())) for n, e in gates.expected().items()]
    assert max(away) <= 0.5 + 1e-6  # the masks of evaluation keep what is expected, up to rounding


def test_the_lambdas_rise_where_the_target_is_missed():
    pressure = Lagrangian(0.5, ramp=0)
    pressure(torch.tensor(0.2), 0).backward()
    assert float(pressure.lambda1.grad) == pytest.approx(-0.3)  # ascent makes it negative: less sparsity costs more
    assert float(pressure.lambda2.grad) == pytest.approx(0.09)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_settling_meets_the_sparsity(sparsity, uniform):
    stack = stack_of(tiny("bert"))
    gates = Gates(stack.units(), draws())
    with torch.no_grad():
        for value in gates.log_alpha:
            value += torch.randn(value.shape, generator=draws(3))
    gates.settle(stack, sparsity, uniform=uniform)
    masks = gates.evaluate()
    before, after = sizes(stack, masks)
    # a head is 8 x 24 x 4 numbers, three of them when all layers lose one at once
    assert 1 - after / before == pytest.approx(sparsity, abs=0.25 if uniform else 0.1)
    if uniform:
        assert len({n for u, n in zip(gates.units, counts(masks).values(), strict=True) if u.kind == "units"}) == 1


def test_random_masks_meet_the_sparsity_and_follow_the_seed():
    stack = stack_of(tiny("llama"))
    masks, again, other = (random_masks(stack, 0.5, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(masks[n], again[n]) for n in masks)
    assert any(not torch.equal(masks[n], other[n]) for n in masks)
    assert set(counts(masks).values()) <= set(range(1, max(INNER, HEADS)))
    before, after = sizes(stack, masks)
    assert 0.45 < 1 - after / before < 0.75


def test_sparsities_that_cannot_be_are_refused():
    stack = stack_of(tiny("bert"))
    with pytest.raises(KnobError, match="between 0 and 1"):
        random_masks(stack, 1.0)
    with pytest.raises(KnobError, match="at most"):
        random_masks(stack, 0.99)
    with pytest.raises(KnobError, match="no channels to remove"):
        random_masks(stack, 0.5, ("channels",))

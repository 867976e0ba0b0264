from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from thrifty.objectives import products
from thrifty.objectives.features import cosines, distances
from thrifty.objectives.graph_distillation import similarity_graph
from thrifty.objectives.products import FAR, LARGE, PANEL, gram, gram_for_distances, product
from thrifty.objectives.relational_distillation import relative_distances

ROWS, WIDE = 128, 2048  # a batch, and features that are large


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["oneDNN", "no oneDNN"])
def engine(request, monkeypatch):
    """Both ways to multiply."""
    if request.param == "no oneDNN":
        monkeypatch.setattr(products, "ONEDNN", False)
    elif not products.ONEDNN:
        pytest.skip("this torch has no oneDNN")


# equal to the plain formula


@pytest.mark.parametrize("shape", [(131, 600), (16, 5000), (40, 3), (1, 1 << 17), (PANEL + 1, LARGE // PANEL)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_of_rows_and_their_gradient(shape, dtype, engine):
    h, g = normal(*shape, dtype=dtype).requires_grad_(True), normal(shape[0], shape[0], seed=1, dtype=dtype)
    found = gram(h)
    (mine,) = torch.autograd.grad((found * g).sum(), h)
    exact = h.detach().double().requires_grad_(True)
    whole = exact @ exact.T
    (theirs,) = torch.autograd.grad((whole * g).sum(), exact)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for value, expected in ((found.detach(), whole.detach()), (mine, theirs)):
        assert value.dtype == dtype
        assert float((value.double() - expected).abs().max() / expected.abs().max()) < tolerance
    assert torch.equal(found, found.T) or h.numel() < LARGE


def plain_graph(h):
    unit = h / h.norm(dim=1, keepdim=True)
    weights = (unit @ unit.T).relu() * (1 - torch.eye(len(h), dtype=h.dtype))
    scale = weights.sum(1).rsqrt()
    return scale[:, None] * weights * scale


def plain_distances(h):
    apart = (h[:, None] - h[None]).square().sum(-1)
    real = apart > 0
    apart = torch.where(real, apart, 1).sqrt() * real
    return apart / (apart.sum() / (len(h) * (len(h) - 1)))


@pytest.mark.parametrize(("mine", "plain"), [(similarity_graph, plain_graph), (relative_distances, plain_distances)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_graphs_of_large_features_are_those_of_the_plain_formulas(mine, plain, offset, engine):
    """Value and gradient at 1e-5 in float32, where products are split and where rows are far from the origin."""
    h, g = (normal(40, 1800) + offset).relu().requires_grad_(True), normal(40, 40, seed=1)
    assert h.numel() >= LARGE
    exact = h.detach().double().requires_grad_(True)
    found, expected = mine(h), plain(exact)
    (ours,) = torch.autograd.grad((found * g).sum(), h)
    (theirs,) = torch.autograd.grad((expected * g).sum(), exact)
    apart = (found.double() - expected).detach()
    assert float(apart.abs().max() / expected.detach().abs().max()) < 1e-5
    assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("function", [gram, gram_for_distances, cosines, distances])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_gradients_in_float64(function, offset, monkeypatch):
    """Of large features too: the limit is lowered, so that these are split into panels."""
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "PANEL", 2)
    h = (normal(5, 4, dtype=torch.float64) + offset).requires_grad_(True)
    if function is gram_for_distances:  # products about the mean, whose own gradient is left out: use differences
        assert torch.autograd.gradcheck(lambda x: squares(gram_for_distances(x)), (h,))
    else:
        assert torch.autograd.gradcheck(function, (h,))


def squares(found):
    return found.diagonal()[:, None] + found.diagonal()[None] - 2 * found


def test_rows_are_centred_only_where_their_mean_is_most_of_them():
    h = normal(ROWS, WIDE)
    assert torch.equal(gram_for_distances(h), gram(h))
    centred = gram_for_distances(h + 10)
    torch.testing.assert_close(centred, gram(h - h.mean(0)), atol=0.05, rtol=0)
    share = float((h + 10).mean(0).square().sum() * ROWS / (h + 10).square().sum())
    assert share > FAR
    few = h[:4, :8] + 1  # small ones always are
    torch.testing.assert_close(gram_for_distances(few), gram(few - few.mean(0)))


def test_equal_rows_of_large_features_have_no_distance_and_no_gradient(engine):
    h = normal(1, WIDE).repeat(ROWS, 1)
    h[64:] += 1
    h.requires_grad_(True)
    found = distances(h)
    assert not found.detach()[:64, :64].any()
    (grad,) = torch.autograd.grad(found[:64, :64].sum(), h)
    assert not grad.any()


def test_nan_is_not_hidden_in_large_features(engine):
    h = normal(ROWS, WIDE)
    h[70, 3] = torch.nan
    assert torch.isnan(distances(h)[70, :70]).all()
    assert torch.isnan(cosines(h)[70, :70]).all()


# what it costs


def flops(function, *arguments):
    """Count the operations of a function, those of oneDNN among them."""
    known = {torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[0]}
    with FlopCounterMode(display=False, custom_mapping=known if products.ONEDNN else {}) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [similarity_graph, relative_distances])
def test_operations(function, dtype):
    """Forward at most 5/8 of one product of all pairs; backward one of them, where autograd's own takes two."""
    h = normal(ROWS, WIDE, dtype=dtype).requires_grad_(True)
    whole = 2 * ROWS * ROWS * WIDE
    assert flops(torch.matmul, h, h.T) == whole
    found = function(h)
    assert whole / 2 < flops(function, h) <= 5 / 8 * whole
    assert flops(torch.autograd.grad, found.sum(), h) == whole


@pytest.mark.skipif(not products.ONEDNN, reason="this torch has no oneDNN")
def test_onednn_multiplies_what_it_is_quick_at(monkeypatch):
    """Rows with gaps would go to its reference kernel, which takes seconds."""
    a, b = normal(ROWS, ROWS), normal(ROWS, 2 * WIDE)
    assert products._quick(a, b)
    assert products._quick(b, b.T)
    small, gaps = a[:4, :4], b[:, :WIDE]
    for left, right in ((a, gaps), (a[:, :64], b[:64]), (a.double(), b.double()), (small.clone(), small.clone())):
        assert not products._quick(left, right)
        torch.testing.assert_close(product(left, right), left @ right)
    torch.testing.assert_close(product(a, b), a @ b, atol=1e-3, rtol=1e-5)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not products._has_onednn()

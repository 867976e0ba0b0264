"""SVF and LoRA: they start as the original, train what they say, and merge back."""

import copy

import pytest
import torch
from shape_worlds import Filters
from torch import nn
from torch.nn.utils import parametrize

from thrifty.errors import Incompatible, KnobError, NoMatch
from thrifty.fewshot.segmentation import (
    METHODS,
    Head,
    Lora,
    Svf,
    apply_lora,
    apply_svf,
    merge_lora,
    merge_svf,
    trainable,
    wrap,
)
from thrifty.fewshot.segmentation.lora import LowRank
from thrifty.fewshot.segmentation.methods import method_of
from thrifty.fewshot.segmentation.svf import SingularValues


def layers():
    torch.manual_seed(0)
    return [
        (nn.Linear(40, 24), torch.randn(5, 40)),
        (nn.Linear(24, 40), torch.randn(5, 24)),
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), torch.randn(2, 6, 9, 9)),
        (nn.Conv2d(30, 4, 1, bias=False), torch.randn(2, 30, 5, 5)),
    ]


def vit_b(patch, size):
    """Return ViT-B with one qkv layer, on the meta device: shapes without numbers (SAM's encoder has that form)."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.SamVisionModel(transformers.SamVisionConfig(patch_size=patch, image_size=size))


# ---- singular values


@pytest.mark.parametrize("case", range(4))
def test_svf_starts_as_the_original(case):
    layer, x = layers()[case]
    before = layer(x).detach()
    weight = layer.weight.detach().clone()
    count = apply_svf(layer)
    assert (layer(x) - before).abs().max() < 1e-5
    assert count == min(weight.flatten(1).shape)


def test_svf_in_float64_is_exact_to_14_digits():
    layer, x = nn.Linear(64, 48).double(), torch.randn(3, 64, dtype=torch.float64)
    before = layer(x).detach()
    apply_svf(layer)
    assert (layer(x) - before).abs().max() < 1e-13


def test_svf_trains_the_strengths_and_keeps_the_directions():
    layer, x = layers()[0]
    apply_svf(layer)
    directions = copy.deepcopy(dict(layer.named_buffers()))
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    values = layer.parametrizations.weight.original
    start = values.detach().clone()
    layer(x).square().sum().backward()
    optimizer.step()
    assert (values != start).all()
    assert all((directions[n] == b).all() for n, b in layer.named_buffers())
    u = layer.parametrizations.weight[0].left
    off = u.T @ layer.weight @ layer.parametrizations.weight[0].right.T - torch.diag(values)
    assert off.abs().max() < 1e-5


def test_what_svf_leaves_trainable():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Linear(5, 5))
    strict, loose = copy.deepcopy(net), copy.deepcopy(net)
    assert apply_svf(strict, strict=True) == apply_svf(loose) == 8 + 5
    assert trainable(strict) == 8 + 5
    depthwise, norm = 8 * 9 + 8, 16  # the two biases of the changed layers are frozen
    assert trainable(loose) == 8 + 5 + depthwise + norm
    assert not parametrize.is_parametrized(loose[1])


def test_svf_counts_of_vit_b_14():
    encoder = vit_b(14, 518).vision_encoder
    body = nn.ModuleList([encoder.patch_embed, encoder.layers])
    assert apply_svf(body, strict=True) == 12 * 4 * 768 + 588 == 37_452


def test_svf_merges_back_and_refuses_a_new_weight():
    layer, x = layers()[2]
    apply_svf(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(1.5)
    wanted = layer(x).detach()
    with pytest.raises(Incompatible):
        layer.weight = torch.zeros_like(layer.weight)
    assert merge_svf(layer) == 1
    assert not parametrize.is_parametrized(layer)
    assert (layer(x) - wanted).abs().max() < 1e-6


def test_singular_values_of_a_convolution_are_those_of_its_matrix():
    weight = torch.randn(5, 3, 2, 2)
    made = SingularValues(weight)
    found = made.right_inverse(weight)
    assert torch.allclose(found, torch.linalg.svdvals(weight.reshape(5, 12)))


# ---- low rank


@pytest.mark.parametrize("case", range(4))
def test_lora_starts_exactly_as_the_original_and_merges(case):
    layer, x = layers()[case]
    adapter = LowRank(layer, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(1)).eval()
    assert (adapter(x) == layer(x)).all()
    with torch.no_grad():
        adapter.up.weight.normal_()
    changed = adapter(x)
    assert (changed - layer(x)).abs().max() > 0.1
    merged = adapter.merged()
    assert type(merged) is type(layer)
    assert (merged(x) - changed).abs().max() < 1e-4


def test_lora_drops_out_in_training_only():
    layer, x = layers()[0]
    adapter = LowRank(layer, dropout=0.5)
    with torch.no_grad():
        adapter.up.weight.normal_()
    assert (adapter.train()(x) != adapter(x)).any()
    assert (adapter.eval()(x) == adapter(x)).all()


def test_lora_counts_of_vit_b():
    model = vit_b(16, 1024)
    assert apply_lora(model, ("qkv",), rank=16) == 12 * 16 * (768 + 2304) == 589_824
    assert trainable(model) == 589_824
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):  # transformers has three layers where the paper's DINOv2 has one: more numbers
        split = wrap(transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14)))
        assert apply_lora(split, split.lora_targets) == 12 * 3 * 16 * (768 + 768)


def test_lora_by_name_and_back():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "qkv": nn.Linear(4, 12), "b": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
    names = set(dict(net.named_modules()))
    assert apply_lora(net, ("qkv",), rank=2) == 2 * 2 * 16
    assert {n for n, m in net.named_modules() if isinstance(m, LowRank)} == {"qkv", "b.qkv"}
    assert merge_lora(net) == 2
    assert set(dict(net.named_modules())) == names
    with pytest.raises(NoMatch, match="ends in nothing_like_it"):
        apply_lora(net, ("nothing_like_it",))
    with pytest.raises(KnobError):
        apply_lora(net, ("qkv",), rank=0)


# ---- heads and methods


def test_head_sizes():
    assert trainable(Head(768, 19)) == 768 * 19 + 19 + 1536 == 16_147
    assert trainable(Head(3072, 19)) == 3072 * 19 + 19 + 6144 == 64_531


@pytest.mark.parametrize("name", METHODS)
def test_preparing_leaves_the_encoder_alone_and_its_maps_as_they_were(name):
    encoder = Filters()
    state = copy.deepcopy(encoder.state_dict())
    x = torch.randn(2, 3, 16, 16)
    before = encoder.eval()(x)
    made = method_of(name).prepare(encoder, torch.Generator().manual_seed(0)).eval()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made(x), before))
    assert all((v == state[k]).all() for k, v in encoder.state_dict().items())
    assert all(p.requires_grad for p in encoder.parameters())
    assert (trainable(made) > 0) == method_of(name).trains_encoder


def test_knobs_reach_the_method():
    made = Lora(rank=2, targets=("first",)).prepare(Filters(), torch.Generator().manual_seed(0))
    assert trainable(made) == 2 * 27 + 24 * 2
    assert trainable(Svf(strict=True).prepare(Filters(), torch.Generator())) == 24 + 24
    with pytest.raises(NoMatch, match="no method 'loar'; close: lora"):
        method_of("loar")

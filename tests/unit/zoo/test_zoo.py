from __future__ import annotations

import pytest
import torch
from torch import nn

from thrifty.errors import KnobError, NoMatch
from thrifty.zoo import ZOO, create
from thrifty.zoo.layers import same_padding


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one inference, counted by hooks on the layers that have weights."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        places = 1 if isinstance(module, nn.Linear) else output[0, 0].numel()
        total += places * module.weight.numel()

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *model.input_shape))
    for handle in handles:
        handle.remove()
    return total


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


HAR = {8: (1150, 97328), 16: (3958, 333920), 24: (8430, 709776), 32: (14566, 1224896), 40: (22366, 1879280),
       48: (31830, 2672928), 64: (55750, 4678016), 80: (86326, 7240160)}  # fmt: skip


@pytest.mark.parametrize("filters", HAR)
def test_resnetv1_6_on_har_has_the_published_size(filters):
    model = create("resnetv1-6", filters=filters)
    assert (params(model), macs(model)) == HAR[filters]
    assert params(model) == 13 * filters**2 + 39 * filters + 6


@pytest.mark.parametrize(
    ("shape", "classes", "filters", "expected"),
    [
        ((13, 39), 10, 16, (4218, 108208)),
        ((13, 39), 10, 80, (87610, 2215280)),
        ((3, 16, 16), 43, 16, (10731, 1209008)),
        ((3, 16, 16), 43, 80, (242923, 27999600)),
    ],
)
def test_resnetv1_6_on_speech_and_signs(shape, classes, filters, expected):
    model = create("resnetv1-6", input_shape=shape, classes=classes, filters=filters)
    assert (params(model), macs(model)) == expected


MLPERF_MACS = {"resnet-8": 12_501_632, "ds-cnn": 2_656_768, "mobilenet-v1": 7_489_664, "autoencoder": 264_192}


@pytest.mark.parametrize("name", MLPERF_MACS)
def test_mlperf_tiny_models_have_the_macs_of_the_reference(name):
    assert macs(create(name)) == MLPERF_MACS[name]


def test_wide_resnets_have_the_published_sizes():
    # Zagoruyko and Komodakis 2016, table 5: WRN-16-8 11.0M, WRN-28-10 36.5M parameters.
    assert params(create("wide-resnet", depth=28, width=10)) == pytest.approx(36.5e6, rel=0.002)
    assert params(create("wide-resnet", depth=16, width=8)) == pytest.approx(11.0e6, rel=0.005)
    assert params(create("preact-resnet-18")) == 11_172_170


def test_gkd_variant_gives_non_negative_outputs_of_every_group():
    model = create("wide-resnet", depth=28, width=0.5, order="post").eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores, outputs = model.features(x)
    assert [tuple(o.shape) for o in outputs] == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 32)]
    assert all(float(o.detach().min()) >= 0 for o in outputs)
    assert torch.equal(scores, model(x))
    assert len(model.groups[0]) == 4


@pytest.mark.parametrize("name", ZOO)
def test_every_model_runs_trains_and_exports(name):
    model = create(name)
    x = torch.randn(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    y = model.eval()(x)
    assert y.shape == ((2, 640) if name == "autoencoder" else (2, y.shape[1]))
    assert torch.allclose(y[:1], model(x[:1]), atol=1e-5)
    exported = torch.export.export(model, (x[:1],)).module()
    assert torch.allclose(exported(x[:1]), model(x[:1]), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(32, 3, 2), (49, 10, 2), (10, 4, 2), (33, 3, 2), (7, 1, 2), (8, 5, 1)]
)
def test_same_padding_gives_the_ceiling_and_puts_the_rest_behind(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert (size + before + after - kernel) // stride + 1 == -(-size // stride)
    assert after - before in (0, 1)


def test_stride_two_pads_behind_like_the_reference():
    pads = [m.padding for m in create("resnet-8").modules() if isinstance(m, nn.ZeroPad2d)]
    assert pads == [(0, 1, 0, 1), (0, 1, 0, 1)]
    pads = [m.padding for m in create("ds-cnn").modules() if isinstance(m, nn.ZeroPad2d)]
    assert pads == [(1, 1, 4, 5)]


def test_batch_normalisation_is_an_option():
    model = create("resnetv1-6", batch_norm=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 6
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv1d))


def test_lenet_for_both_kinds_of_digits():
    assert params(create("lenet", input_shape=(1, 28, 28))) == 61_706  # LeNet-5 with ReLU and max pooling
    assert create("lenet")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_names_and_options_that_do_not_exist():
    with pytest.raises(NoMatch, match="close: resnet-8"):
        create("resnet-9")
    with pytest.raises(KnobError, match=r"'filter' \(close: filters\)"):
        create("resnetv1-6", filter=3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnetv1-6", {"input_shape": (9,), "filters": 0}, r"input_shape is \(9,\).*filters is 0"),
        ("ds-cnn", {"blocks": 0}, "blocks is 0"),
        ("mobilenet-v1", {"width": 0.0}, "width is 0"),
        ("wide-resnet", {"depth": 27}, "6 n"),
        ("wide-resnet", {"order": "both"}, "order is 'both'"),
        ("lenet", {"input_shape": (1, 2, 2)}, "4x4"),
        ("autoencoder", {"input_shape": (1, 640)}, "input_shape"),
    ],
)
def test_bad_options_say_what_is_allowed(name, options, said):
    with pytest.raises(KnobError, match=said):
        create(name, **options)


def test_options_of_another_type_are_refused():
    with pytest.raises(KnobError, match="lenet: classes is 'ten'; it must be a whole number"):
        create("lenet", classes="ten")
    assert create("lenet", classes=3, input_shape=[1, 8, 8]).input_shape == (1, 8, 8)

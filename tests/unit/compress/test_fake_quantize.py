import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from thrifty import arith
from thrifty.arith import Format
from thrifty.compress.fake_quantize import WeightQuantizer, fake_quantize, integers
from thrifty.errors import KnobError


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    bits=st.integers(2, 16),
    signed=st.booleans(),
    exponent=st.integers(-20, 4),
    channels=st.sampled_from([1, 5]),
)
def test_value_is_that_of_arith_bit_for_bit(seed, bits, signed, exponent, channels):
    rng = np.random.default_rng(seed)
    scale = (rng.uniform(0.5, 1.0, channels) * 2.0**exponent).astype(np.float32)
    x = (rng.normal(size=(5, 7)) * scale.mean() * 2.0 ** (bits - 1)).astype(np.float32)
    x[0, :4] = scale[0] * np.array([0.5, -0.5, 1.5, -1.5], np.float32)  # ties
    fmt = Format(bits, signed, tuple(float(s) for s in scale))
    axis = 0 if channels > 1 else -1
    stored = arith.quantize(x, fmt, axis=0)
    tensors = torch.from_numpy(x), torch.from_numpy(scale)
    assert np.array_equal(integers(*tensors, bits, signed, axis).numpy(), stored)
    assert np.array_equal(fake_quantize(*tensors, bits, signed, axis).numpy(), arith.dequantize(stored, fmt, axis=0))


def test_rounding_again_changes_nothing():
    x = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(64, generator=torch.Generator().manual_seed(1)) * 1e-4 + 1e-6
    once = fake_quantize(x, scale, 16, True, 0)
    assert torch.equal(fake_quantize(once, scale, 16, True, 0), once)


def test_gradient_is_straight_through_inside_and_zero_outside():
    x = torch.tensor([-9.0, -8.4, 0.3, 7.4, 7.6], requires_grad=True)
    fake_quantize(x, torch.tensor([1.0]), 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_gradient_of_a_learned_scale():
    x, scale = torch.tensor([0.3, 20.0, -20.0]), torch.tensor([1.0], requires_grad=True)
    fake_quantize(x, scale, 4).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx((0 - 0.3) + 7 - 8)


def test_gradient_of_a_scale_per_channel():
    x = torch.tensor([[0.3, 20.0], [0.6, 0.0]])
    scale = torch.ones(2, requires_grad=True)
    fake_quantize(x, scale, 4, True, 0).sum().backward()
    assert scale.grad is not None
    assert scale.grad.tolist() == pytest.approx([6.7, 0.4])


@pytest.mark.parametrize("axis", [-1, 0])
def test_operator_is_registered_correctly(axis):
    scale = torch.full((3 if axis == 0 else 1,), 0.1)
    arguments = (torch.randn(3, 4, requires_grad=True), scale, 8, True, axis)
    torch.library.opcheck(torch.ops.thrifty.fake_quantize, arguments)


def test_other_types_than_float32_are_refused():
    with pytest.raises(KnobError, match="float32"):
        fake_quantize(torch.zeros(2, dtype=torch.float64), torch.ones(1), 8)


def quantised_layer():
    layer = nn.Conv2d(2, 4, 3)
    quantizer = WeightQuantizer(8, 4)
    parametrize.register_parametrization(layer, "weight", quantizer)
    quantizer.scale.copy_(torch.tensor([0.01, 0.02, 0.03, 0.04]))
    return layer


def test_export_keeps_one_node():
    program = torch.export.export(quantised_layer().eval(), (torch.randn(1, 2, 5, 5),))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets == ["thrifty.fake_quantize.default", "aten.conv2d.default"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_whole_graph_forward_and_backward(backend):
    layer, x = quantised_layer(), torch.randn(2, 2, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out = compiled(x)
    assert torch.equal(out, layer(x))
    out.sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0


def test_state_is_plain_tensors_and_copies_are_independent():
    layer = quantised_layer()
    twin = copy.deepcopy(layer)
    assert all(type(v) in (torch.Tensor, nn.Parameter) for v in layer.state_dict().values())
    fresh = nn.Conv2d(2, 4, 3)
    parametrize.register_parametrization(
        fresh, "weight", WeightQuantizer.from_spec(fresh, layer.parametrizations.weight[0].spec())
    )
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.weight, layer.weight)
    twin.parametrizations.weight[0].scale.mul_(2)
    assert not torch.equal(twin.weight, layer.weight)


def test_format_of_a_weight():
    fmt = quantised_layer().parametrizations.weight[0].format
    assert (fmt.bits, fmt.signed, len(fmt.scale)) == (8, True, 4)

"""From graphs to programs: what becomes of every node, and what is refused, all at once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import integer
from thrifty.arith import Format
from thrifty.deploy.lower import check, lower
from thrifty.deploy.ops.example import Example
from thrifty.deploy.run import predict, run
from thrifty.errors import UnsupportedModel
from thrifty.graph import Graph, Node

RNG = np.random.default_rng(0)
INT8, INT16 = Format(8, True, (0.05,)), Format(16, True, (2.0**-10,))


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def conv(name, x, weight, shape, bias=None, groups=1, fmt=None, pad=1, **rest):
    axes = weight.ndim - 2
    attrs = {"stride": (1,) * axes, "padding": ((pad, pad),) * axes, "dilation": (1,) * axes, "groups": groups}
    constants = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    weights = None
    if fmt is not None:
        limits = (0.05 if fmt.bits == 8 else 2.0**-10, *((-128, 127) if fmt.bits == 8 else (-32768, 32767)))
        weights = integer.weight_format(weight, bias, fmt.bits, limits, fmt.scale[0], power_of_two=fmt.bits == 16)
    return Node(name, "conv", (x,), attrs, shape, module=f"net.{name}", constants=constants, format=fmt,
                weight_format=weights, **rest)  # fmt: skip


def linear(name, x, weight, bias=None, fmt=None, weights=None):
    constants = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Node(name, "linear", (x,), {}, (len(weight),), module=f"net.{name}", constants=constants, format=fmt,
                weight_format=weights)  # fmt: skip


def source(shape, fmt=None):
    return Node("x", "input", shape=shape, format=fmt)


def ops(program):
    return [c.op for c in program.calls]


# --- what nodes become ---


def test_linear_behind_flatten_reads_the_map_in_place():
    weight = normal(3, 2 * 4 * 5)
    graph = Graph(
        (source((2, 4, 5)), Node("f", "flatten", ("x",), shape=(40,)), Node("r", "relu", ("f",), shape=(40,)),
         linear("l", "r", weight)),
        ("l",),
    )  # fmt: skip
    program = lower(graph)
    assert ops(program) == ["copy", "clamp", "linear"]
    x = normal(6, 2, 4, 5)
    assert np.allclose(predict(program, x), np.maximum(x, 0).reshape(6, -1) @ weight.T, atol=1e-5)


def test_flatten_that_others_read_is_in_channels_order():
    x = normal(3, 2, 4, 5)
    flat = Node("f", "flatten", ("x",), shape=(40,))
    program = lower(Graph((source((2, 4, 5)), flat), ("f",)))
    assert ops(program) == ["permute", "copy"]
    assert np.array_equal(predict(program, x), x.reshape(3, 40))
    weight = normal(3, 40)
    both = Graph((source((2, 4, 5)), flat, linear("l", "f", weight), Node("a", "add", ("f", "f"), shape=(40,)),
                  linear("m", "a", weight), Node("s", "add", ("l", "m"), shape=(3,))), ("s",))  # fmt: skip
    assert np.allclose(predict(lower(both), x), 3 * x.reshape(3, 40) @ weight.T, atol=1e-4)


def test_flatten_of_one_position_or_one_channel_needs_no_permute():
    for shape in ((7, 1, 1), (1, 3, 4), (7, 1)):
        size = int(np.prod(shape))
        program = lower(Graph((source(shape), Node("f", "flatten", ("x",), shape=(size,))), ("f",)))
        assert "permute" not in ops(program)
        x = normal(2, *shape)
        assert np.array_equal(predict(program, x), x.reshape(2, size))


def test_activations_vanish_into_their_producers():
    nodes = (
        source((2, 5, 5)),
        conv("c", "x", normal(4, 2, 3, 3), (4, 5, 5)),
        Node("r", "relu6", ("c",), shape=(4, 5, 5)),
        Node("p", "maxpool", ("r",), {"kernel": (5, 5), "stride": (5, 5), "padding": ((0, 0),) * 2, "ceil": False},
             (4, 1, 1)),
        Node("q", "relu", ("p",), shape=(4, 1, 1)),
    )  # fmt: skip
    program = lower(Graph(nodes, ("q",)))
    assert ops(program) == ["conv", "maxpool"]
    assert [(c.attrs["low"], c.attrs["high"]) for c in program.calls] == [(0.0, 6.0), (0.0, np.inf)]
    assert [c.name for c in program.calls] == ["c", "p"]
    assert program.calls[0].module == "net.c"


def test_an_activation_with_two_readers_of_its_input_stands_alone():
    nodes = (
        source((2, 5, 5), INT8),
        conv("c", "x", normal(2, 2, 3, 3), (2, 5, 5), fmt=INT8),
        Node("r", "relu", ("c",), shape=(2, 5, 5)),
        Node("a", "add", ("r", "c"), shape=(2, 5, 5), format=INT8),
    )
    program = lower(Graph(nodes, ("a",)))
    assert ops(program) == ["conv", "clamp", "add"]
    assert program.calls[1].attrs == {"low": 0, "high": 127}


def test_batchnorm_folds_into_the_layer_it_alone_reads():
    weight, bias, scale, shift = normal(4, 2, 3, 3), normal(4), normal(4), normal(4)
    norm = Node("n", "batchnorm", ("c",), shape=(4, 5, 5), module="net.n", constants={"scale": scale, "shift": shift})
    layer = conv("c", "x", weight, (4, 5, 5), bias)
    relu = Node("r", "relu", ("n",), shape=(4, 5, 5))
    program = lower(Graph((source((2, 5, 5)), layer, norm, relu), ("r",)))
    assert ops(program) == ["conv"]
    apart = lower(Graph((source((2, 5, 5)), layer, norm, relu, Node("a", "add", ("r", "c"), shape=(4, 5, 5))), ("a",)))
    assert ops(apart) == ["conv", "depthwise", "add"]
    x = normal(2, 2, 5, 5)
    held = run(apart, np.moveaxis(x, 1, -1), trace=True)
    plain = held["c_out"]
    expected = np.maximum(plain * scale + shift, 0)
    assert np.allclose(run(program, np.moveaxis(x, 1, -1)), expected, atol=1e-5)
    assert np.allclose(held["n_out"], expected, atol=1e-5)
    assert apart.calls[1].macs == 4 * 5 * 5


@pytest.mark.parametrize("fmt", [INT8, INT16])
def test_batchnorm_alone_in_integers_is_close_to_the_real_one(fmt):
    scale, shift = normal(3), normal(3)
    constants = {"scale": scale, "shift": shift}
    nodes = (source((3, 4, 4), fmt), Node("n", "batchnorm", ("x",), shape=(3, 4, 4), constants=constants, format=fmt))
    program = lower(Graph(nodes, ("n",)))
    assert ops(program) == ["depthwise"]
    x = np.clip(normal(5, 3, 4, 4), -2, 2)
    expected = x * scale[:, None, None] + shift[:, None, None]
    assert np.abs(predict(program, x) - expected).max() < (0.15 if fmt.bits == 8 else 0.01)


def test_identity_disappears_and_a_changed_format_becomes_a_rescale():
    other = Format(8, True, (0.1,))
    assert lower(Graph((source((3,)), Node("i", "identity", ("x",), shape=(3,))), ("i",))).calls == ()
    nodes = (source((3,), INT8), Node("i", "identity", ("x",), shape=(3,), format=other))
    assert ops(lower(Graph(nodes, ("i",)))) == ["rescale"]
    pool = {"kernel": (2,), "stride": (2,), "padding": ((0, 0),), "ceil": False}
    nodes = (source((3, 4), INT8), Node("p", "maxpool", ("x",), pool, (3, 2), format=other))
    program = lower(Graph(nodes, ("p",)))
    assert ops(program) == ["maxpool", "rescale"]
    assert predict(program, np.ones((1, 3, 4))).ravel().tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_inputs_narrower_than_their_type_are_clamped_first():
    nodes = (source((3,), Format(4, True, (1.0,))), Node("r", "relu", ("x",), shape=(3,)))
    program = lower(Graph(nodes, ("r",)))
    assert ops(program) == ["clamp", "clamp"]
    assert run(program, np.array([100, -100, 3]).reshape(1, 1, 1, 3)).ravel().tolist() == [7, 0, 3]


def test_depthwise_grouped_and_plain_convolutions():
    weights = {"depthwise": (normal(4, 1, 3, 3), 4, 4), "grouped": (normal(8, 2, 3, 3), 2, 8),
               "widened": (normal(8, 1, 3, 3), 4, 8), "plain": (normal(3, 4, 3, 3), 1, 3)}  # fmt: skip
    found = {}
    for name, (weight, groups, filters) in weights.items():
        program = lower(Graph((source((4, 5, 6)), conv("c", "x", weight, (filters, 5, 6), groups=groups)), ("c",)))
        call = program.calls[0]
        found[name] = (call.op, call.constants["weight"].shape, call.macs)
    assert found == {
        "depthwise": ("depthwise", (3, 3, 4), 4 * 9 * 30),
        "grouped": ("conv", (8, 3, 3, 2), 8 * 9 * 2 * 30),
        "widened": ("conv", (8, 3, 3, 1), 8 * 9 * 30),
        "plain": ("conv", (3, 3, 3, 4), 3 * 9 * 4 * 30),
    }


def test_signals_are_maps_of_one_row():
    program = lower(Graph((source((2, 9)), conv("c", "x", normal(4, 2, 3), (4, 9))), ("c",)))
    assert program.buffers["x"].shape == (1, 9, 2)
    assert program.calls[0].attrs["pad"] == (0, 0, 1, 1)
    assert program.calls[0].constants["weight"].shape == (4, 1, 3, 2)
    assert program.calls[0].macs == 4 * 9 * 6


def test_heads():
    nodes = (source((5,), INT8), Node("s", "softmax", ("x",), {"axis": 0}, (5,)))
    program = lower(Graph(nodes, ("s",)))
    assert program.buffers[program.output].dtype == "uint8"
    assert program.buffers[program.output].scale == 1 / 256
    assert program.classes == 5
    nodes = (source((5,), INT8), Node("a", "argmax", ("x",), {"axis": 0, "keepdim": False}, (), "int64"))
    program = lower(Graph(nodes, ("a",)))
    assert program.classes == 0
    assert predict(program, np.eye(5)).tolist() == [0, 1, 2, 3, 4]


def test_equal_constants_are_one_object():
    weight, bias = normal(2, 2, 3, 3), normal(2)
    nodes = (source((2, 5, 5)), conv("a", "x", weight, (2, 5, 5), bias), conv("b", "a", weight.copy(), (2, 5, 5), bias))
    first, second = lower(Graph(nodes, ("b",))).calls
    assert first.constants["weight"] is second.constants["weight"]
    assert first.constants["bias"] is second.constants["bias"]


def test_every_call_carries_all_its_attributes():
    scaling = {"requant", "pre_shift", "shift", "rounding", "low", "high"}
    known = {
        "conv": scaling | {"stride", "pad", "groups", "weight_bits"},
        "depthwise": scaling | {"stride", "pad", "weight_bits"},
        "linear": scaling | {"weight_bits"}, "avgpool": scaling | {"kernel", "stride", "pad"},
        "maxpool": {"kernel", "stride", "pad", "low", "high"}, "add": {"multipliers", "shift", "low", "high"},
        "concat": {"axis", "multipliers", "shift", "low", "high"}, "rescale": {"multipliers", "shift", "low", "high"},
        "clamp": {"low", "high"}, "permute": {"axes"},
    }  # fmt: skip
    for seed in range(60):
        for call in lower(random_graph(seed)).calls:
            assert set(call.attrs) == known.get(call.op, set())
            if "requant" in call.attrs:
                assert ("multiplier" in call.constants) == (call.attrs["requant"] == "multiplier")


def test_names_are_unique_even_when_nodes_take_them():
    nodes = (source((2, 5)), conv("c", "x", normal(2, 2, 1), (2, 5), pad=0),
             conv("c_out", "c", normal(2, 2, 1), (2, 5), pad=0))  # fmt: skip
    program = lower(Graph(nodes, ("c_out",)))
    names = [*program.buffers, *(c.name for c in program.calls)]
    assert len(set(names)) == len(names)


def test_nodes_that_no_output_needs_are_left_out():
    nodes = (source((3,)), Node("a", "relu", ("x",), shape=(3,)), Node("b", "aten.erf.default", ("x",), shape=(3,)))
    assert ops(lower(Graph(nodes, ("a",)))) == ["clamp"]


# --- overflow ---


def test_sums_that_may_overflow_are_refused_with_numbers():
    weight = np.ones((2, 400), np.float32)
    fine = linear("l", "x", weight, fmt=INT16, weights=Format(16, True, (2.0**-7,)))
    bad = replace(fine, weight_format=Format(16, True, (2.0**-13,)))
    assert check(Graph((source((400,), INT16), fine), ("l",))) == ()
    (refusal,) = check(Graph((source((400,), INT16), bad), ("l",)))
    assert "net.l" in refusal
    assert str(400 * 8192 * 32767 + 4096) in refusal


def test_a_relu_in_front_halves_what_must_fit():
    """An input that cannot be negative and weights of one sign: the bound uses it."""
    weight = np.full((1, 8), -1.0, np.float32)
    fmt = Format(16, True, (2.0**-15,))
    layer = linear("l", "r", weight, fmt=Format(16, True, (1.0,)), weights=Format(16, True, (2.0**-13,)))
    nodes = (source((8,), fmt), Node("r", "relu", ("x",), shape=(8,)), layer)
    assert len(check(Graph(nodes, ("l",)))) == 0  # -8 * 8192 * 32767 fits; 8 * 8192 * 32768 would not
    direct = replace(layer, inputs=("x",))
    assert len(check(Graph((nodes[0], direct), ("l",)))) == 1


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**9))
def test_formats_made_by_weight_format_are_never_refused(seed):
    assert check(random_graph(seed)) == ()


def random_graph(seed):
    rng = np.random.default_rng(seed)
    e = Example(rng, str(rng.choice(["int8", "int16", "float32"])))
    x = e.input((int(rng.integers(1, 5)), 6, 7))
    for _ in range(int(rng.integers(1, 6))):
        step = rng.integers(5)
        if step == 0:
            x = e.activation(e.conv(x, int(rng.integers(1, 6))))
        elif step == 1:
            x = e.activation(e.add(x, e.conv(x, e.shape(x)[0], kernel=1)))
        elif step == 2:
            x = e.activation(e.pool(x, str(rng.choice(["maxpool", "avgpool"]))))
        elif step == 3:
            x = e.activation(e.concat([x, e.changed(x)], 0))
        else:
            x = e.activation(e.batchnorm(x))
    return e.graph(e.linear(e.flat(x), 4))


# --- refusals ---


def test_all_refusals_come_at_once_each_with_its_module():
    bad = normal(2, 2, 3, 3)
    bad[0, 0, 0, 0], bad[0, 0, 0, 1] = np.nan, np.inf
    dilated = {**conv("c", "x", bad, ()).attrs, "dilation": (2, 2)}
    nodes = (
        source((2, 5, 5)),
        replace(conv("c", "x", abs(bad), (2, 5, 5)), constants={"weight": normal(2, 2, 3, 3)}, attrs=dilated),
        conv("d", "c", bad, (2, 5, 5)),
        Node("e", "aten.erf.default", ("d",), shape=(2, 5, 5), module="net.e"),
        Node("s", "softmax", ("e",), {"axis": 0}, (2, 5, 5), module="net.s"),
        Node("p", "pad", ("s",), {"padding": ((1, 1), (0, 0))}, (2, 7, 5), module="net.p"),
    )  # fmt: skip
    with pytest.raises(UnsupportedModel) as caught:
        lower(Graph(nodes, ("p",)))
    refusals = caught.value.refusals
    assert len(refusals) == 5
    for module, words in (
        ("c", "dilation"),
        ("d", "2 values"),
        ("e", "aten.erf.default"),
        ("s", "softmax"),
        ("p", "pad"),
    ):
        assert sum(f"net.{module}'" in r and words in r for r in refusals) == 1, (module, refusals)


def test_several_inputs_or_outputs_are_refused():
    nodes = (source((3,)), Node("z", "input", shape=(3,)), Node("a", "add", ("x", "z"), shape=(3,)))
    assert any("2 inputs (x, z)" in r for r in check(Graph(nodes, ("a",))))
    nodes = (source((3,)), Node("a", "relu", ("x",), shape=(3,)))
    assert any("2 outputs (a, x)" in r for r in check(Graph(nodes, ("a", "x"))))


REFUSED = {
    "average pool that counts unequally": (
        Node("p", "avgpool", ("x",), {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1),) * 2, "ceil": False,
             "count_include_pad": False}, (2, 2, 2)), "count_include_pad",
    ),
    "ceil": (
        Node("p", "avgpool", ("x",), {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0),) * 2, "ceil": True,
             "count_include_pad": True}, (2, 2, 2)), "ceil_mode=False",
    ),
    "three spatial axes": (
        Node("p", "maxpool", ("x",), {"kernel": (1,) * 3, "stride": (1,) * 3, "padding": ((0, 0),) * 3, "ceil": False},
             (2, 3, 3)), "(C, H, W)",
    ),
    "unknown attribute": (
        Node("p", "maxpool", ("x",), {"kernel": (1, 1), "stride": (1, 1), "padding": ((0, 0),) * 2, "ceil": False,
             "indices": True}, (2, 3, 3)), "indices",
    ),
    "linear on a map": (Node("l", "linear", ("x",), {}, (2, 3, 4), constants={"weight": normal(4, 3)}), "flatten"),
    "argmax of a map": (Node("a", "argmax", ("x",), {"axis": 0, "keepdim": False}, (3, 3), "int64"), "vector"),
    "four axes": (Node("r", "relu", ("x",), shape=(2, 3, 3, 1)), "at most (C, H, W)"),
    "broadcast": (Node("a", "add", ("x",), shape=(2, 3, 3)), "two inputs of equal shape"),
    "integers": (Node("r", "relu", ("x",), shape=(2, 3, 3), dtype="int32"), "float32 is supported"),
    "nothing": (Node("r", "relu", ("x",), shape=(0,)), "without elements"),
    "other activation": (Node("g", "aten.gelu.default", ("x",), shape=(2, 3, 3)), "supported: hardswish or relu"),
    "product of two": (Node("m", "aten.matmul.default", ("x", "x"), shape=(2, 3, 3)), "supported: a linear layer"),
    "unheard of": (Node("e", "aten.erf.default", ("x",), shape=(2, 3, 3)), "supported: add, argmax, avgpool"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_name_the_nearest_form(name):
    node, words = REFUSED[name]
    refusals = check(Graph((source((2, 3, 3)), replace(node, module="net.it")), (node.name,)))
    assert any(words in r and "net.it" in r for r in refusals), refusals


def test_integer_refusals():
    wide = Format(16, True, (0.1,))
    for node, words in (
        (Node("h", "hardswish", ("x",), shape=(3,), format=wide), "8-bit"),
        (Node("s", "softmax", ("x",), {"axis": 0}, (3,)), "16 bits"),
        (Node("a", "add", ("x", "x"), shape=(3,)), "no format"),
        (Node("a", "add", ("x", "x"), shape=(3,), format=Format(16, False, (0.1,))), "unsigned"),
        (Node("a", "add", ("x", "x"), shape=(3,), format=Format(8, True, (0.1, 0.2))), "2 scales"),
        (Node("a", "add", ("x", "x"), shape=(3,), format=Format(8, True, (1e-8,))), "scale ratio"),
        (linear("l", "x", normal(2, 3), fmt=wide), "its weights have no format"),
        (linear("l", "x", normal(2, 3), fmt=wide, weights=Format(8, False, (0.1,))), "unsigned"),
        (linear("l", "x", normal(2, 3), fmt=wide, weights=Format(8, True, (0.1,) * 3)), "3 scales"),
    ):
        refusals = check(Graph((source((3,), wide), node), (node.name,)))
        assert len(refusals) == 1, refusals
        assert words in refusals[0]


def test_softmax_over_too_many_is_refused():
    nodes = (source((3000,), INT8), Node("s", "softmax", ("x",), {"axis": 0}, (3000,)))
    assert "2047" in check(Graph(nodes, ("s",)))[0]


def test_examination_goes_on_behind_a_node_without_format():
    nodes = (
        source((2, 5, 5), INT8),
        conv("c", "x", normal(2, 2, 3, 3), (2, 5, 5)),
        Node("a", "add", ("c", "x"), shape=(2, 5, 5), module="net.a", format=INT8),
        Node("b", "aten.erf.default", ("a",), shape=(2, 5, 5), module="net.b", format=INT8),
    )
    refusals = check(Graph(nodes, ("b",)))
    assert [r.split("'")[1] for r in refusals] == ["net.c", "net.b"]


def test_weights_are_not_writable():
    call = lower(Graph((source((3,)), linear("l", "x", normal(2, 3))), ("l",))).calls[0]
    with pytest.raises(ValueError, match="read-only"):
        call.constants["weight"][0, 0] = 1

"""Integer constants: MicroAI's worked case, the proof against overflow, and agreement with real numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import arith, integer
from thrifty.arith import Format
from thrifty.errors import KnobError
from thrifty.graph import Graph, Node

X, W, B = [1.5, -2.25, 0.75], [[0.5, -0.25, 1.0]], [19 / 64]  # specs/deploy.md 1f.1


def worked(rounding):
    fx, fw, fy = Format(8, True, (2.0**-5,)), Format(8, True, (2.0**-6,)), Format(8, True, (2.0**-5,))
    x, w = arith.quantize(X, fx), integer.weight_integers(W, fw)
    acc = (w.astype(np.int64) * x).sum(axis=1) + integer.bias_integers(B, fx.scale[0], fw.scale)
    return x, w, acc, integer.requant(fx.scale[0], fw.scale, fy.scale[0], rounding)


def test_worked_dense_case():
    x, w, acc, nearest = worked("half_up")
    floor = worked("floor")[3]
    assert x.tolist() == [48, -72, 24]
    assert w.tolist() == [[32, -16, 64]]
    assert acc.tolist() == [4832]
    assert floor.apply(acc).tolist() == [75]
    assert nearest.apply(acc).tolist() == [76]
    assert floor.apply(-acc).tolist() == [-76]
    assert nearest.apply(-acc).tolist() == [-75]


def test_output_range_of_the_worked_case():
    assert arith.power_of_two_scale(2.7, 8) == 2.0**-5


def test_saturation():
    fmt = Format(8, True, (1.0,))
    raw = integer.Requant("shift", shift=(3,)).apply(np.array([128 * 8, -129 * 8]))
    assert raw.tolist() == [128, -129]
    assert arith.saturate(raw, *integer.clamp_limits(fmt)).tolist() == [127, -128]
    assert arith.saturate(raw, *integer.clamp_limits(fmt, "relu")).tolist() == [127, 0]


def test_three_products_of_127_need_more_than_16_bits():
    w, b, scaling = np.full((1, 3), 127), np.zeros(1, np.int64), integer.Requant("shift")
    refusal = integer.overflow(w, b, -127, 127, scaling, limit=2**15)
    assert refusal is not None
    assert "48387" in refusal
    assert integer.overflow(w, b, -127, 127, scaling) is None


def test_bound_covers_every_order_of_summation():
    rng = np.random.default_rng(0)
    w, b = rng.integers(-128, 128, (3, 5)), rng.integers(-1000, 1000, 3)
    least, greatest = integer.acc_bound(w, b, -128, 127)
    for _ in range(200):
        terms = np.concatenate([w * rng.choice([-128, 127], (3, 5)), b[:, None]], axis=1)
        sums = np.cumsum(rng.permuted(terms, axis=1), axis=1)
        assert (sums.min(axis=1) >= least).all()
        assert (sums.max(axis=1) <= greatest).all()


def test_bound_is_reached():
    w, b = np.array([[3, -2]]), np.array([7])
    signed, shifted = integer.acc_bound(w, b, -128, 127), integer.acc_bound(w, b, 0, 255, pre_shift=1)
    assert [int(v[0]) for v in signed] == [-3 * 128 - 2 * 127, 3 * 127 + 2 * 128 + 7]
    assert [int(v[0]) for v in shifted] == [-2 * 2 * 255, 2 * (3 * 255 + 7)]


@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=5), st.integers(-10, 10), st.integers(-10, 10),
    st.sampled_from(integer.ROUNDINGS),
)  # fmt: skip
def test_powers_of_two_become_shifts_that_divide(exponents, e_in, e_out, rounding):
    scales = [2.0**e for e in exponents]
    scaling = integer.requant(2.0**e_in, scales, 2.0**e_out, rounding)
    assert scaling.kind == "shift"
    acc = np.random.default_rng(1).integers(-(2**20), 2**20, (50, len(scales)))
    real = acc * 2.0**e_in * np.array(scales) / 2.0**e_out
    expected = np.floor(real + (0.5 if rounding == "half_up" else 0.0))
    assert np.array_equal(scaling.apply(acc), expected)


@given(st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=4), st.floats(1e-4, 1.0), st.floats(1e-3, 1.0))
def test_multipliers_are_within_one_unit_of_the_real_product(scales, s_in, s_out):
    scaling = integer.requant(s_in, [*scales, 0.3], s_out)
    top = max(*scales, 0.3) * s_in / s_out
    acc = np.random.default_rng(1).integers(-(2**15), 2**15, (50, len(scales) + 1))
    acc >>= int(scaling.left_shift[0])
    real = acc * s_in * np.array([*scales, 0.3]) / s_out
    assert np.abs(scaling.apply(acc) - real).max() <= 0.5 + np.abs(acc).max() * max(top, 0.5) * 2.0**-29


def test_apply_is_the_same_in_torch():
    torch = pytest.importorskip("torch")
    acc = np.random.default_rng(0).integers(-(2**27), 2**27, (6, 2))
    for scaling in (
        integer.requant(2.0**-5, (2.0**-6, 2.0**-3), 2.0**-5),
        integer.requant(2.0**-5, (2.0**-6, 2.0**3), 2.0**-5, "floor"),
        integer.requant(2.0**-5, (2.0**-6,), 2.0**-5, "floor"),
        integer.requant(0.3, (0.1, 0.2), 0.05),
    ):
        assert np.array_equal(scaling.apply(torch.from_numpy(acc)).numpy(), scaling.apply(acc))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_chosen_weight_formats_never_overflow(seed):
    rng = np.random.default_rng(seed)
    power, bits = bool(rng.random() < 0.5), int(rng.choice([2, 4, 8, 16]))
    x = Format(16 if bits == 16 else 8, True, (2.0 ** int(rng.integers(-12, 3)) * (1 if power else 0.9),))
    x = Format(x.bits, True, tuple(float(np.float32(s)) for s in x.scale))
    w = rng.standard_normal((5, int(rng.integers(1, 400)))) * 10.0 ** rng.uniform(-4, 2, (5, 1))
    w[int(rng.integers(5))] = 0
    b = rng.standard_normal(5) * 10.0 ** rng.uniform(-3, 3) if rng.random() < 0.7 else None
    inputs = (x.scale[0], x.low, x.high)
    out = integer.least_out_scale(w, b, inputs) * 2.0 ** int(rng.integers(0, 30))
    out = 2.0 ** np.ceil(np.log2(out)) if power else out
    options = {"per_channel": bool(rng.random() < 0.5), "power_of_two": power}
    fmt = integer.weight_format(w, b, bits, inputs, out, **options)
    q = integer.weight_integers(w, fmt)
    biases = integer.bias_integers(np.zeros(5) if b is None else b, x.scale[0], fmt.scale)
    scaling = integer.requant(x.scale[0], fmt.scale, out)
    assert (scaling.kind == "shift") == power
    assert integer.overflow(q, biases, x.low, x.high, scaling) is None


def test_weight_format_is_the_largest_weight_when_nothing_overflows():
    w = np.array([[0.5, -0.3], [3.1, 1.0], [0.0, 0.0]])
    inputs = (0.1, -128, 127)
    assert integer.weight_format(w, None, 8, inputs, 0.1, power_of_two=False).scale[:2] == tuple(
        float(np.float32(m / 127)) for m in (0.5, 3.1)
    )
    exponents = [int(np.log2(s)) for s in integer.weight_format(w, None, 8, inputs, 0.1).scale]
    assert exponents == [-7, -5, -5]  # the channel of zeros takes the largest


def test_sixteen_bit_weights_are_coarser_where_many_are_summed():
    few, many = np.ones((1, 2)), np.ones((1, 2000))
    inputs = (2.0**-12, -32768, 32767)
    scales = [integer.weight_format(w, None, 16, inputs, 2.0**-6).scale[0] for w in (few, many)]
    assert scales[1] > 500 * scales[0]


def test_an_output_scale_that_no_weights_can_serve_is_refused():
    with pytest.raises(KnobError, match="at least"):
        integer.weight_format([[1.0]], None, 8, (1.0, -128, 127), 2.0**-26)
    with pytest.raises(KnobError):
        integer.weight_format([[1.0]], None, 8, (1.0, -128, 127), 1e-12, power_of_two=False)


def test_a_bias_that_does_not_fit_is_refused_with_numbers():
    with pytest.raises(KnobError, match=r"1e\+10"):
        integer.bias_integers([1e10], 1.0, (1.0,))


def test_unknown_rounding_is_refused():
    for call in (integer.requant, lambda *a, rounding: integer.pool_requant(1.0, 1.0, 9, rounding)):
        with pytest.raises(KnobError, match="nearest"):
            call(1.0, (1.0,), 1.0, rounding="nearest")


def test_pool_requant_divides_by_the_count():
    sums = np.arange(-4000, 4000)
    for count in (1, 4, 9, 64):
        scaling = integer.pool_requant(0.5, 0.25, count)
        assert scaling.kind == ("multiplier" if count == 9 else "shift")
        expected = np.floor(sums * 2 / count + 0.5)
        assert np.array_equal(scaling.apply(sums[:, None])[:, 0], expected)


def test_shifts_beyond_31_give_nearly_nothing():
    scaling = integer.requant(2.0**-20, (2.0**-20,), 1.0)
    assert scaling.shift == (31,)
    assert set(scaling.apply(np.array([[-(2**30)], [2**30 - 1]])).ravel().tolist()) <= {0}


def test_no_shift_is_longer_than_31_to_the_left_either():
    assert integer.requant(2.0**20, (2.0**20,), 1.0).shift == (-31,)


def test_sums_of_equal_scales_are_exact():
    multipliers, shift = integer.add_constants([0.1], 0.1, 16)
    x = np.arange(-32768, 32768)
    assert np.array_equal(arith.round_shift(x * multipliers[0], shift), x)


def test_lookup_table_holds_every_byte():
    for signed in (True, False):
        x, y = Format(8, signed, (0.05,)), Format(8, True, (0.06,))
        table = integer.lookup_table(integer.hardswish, x, y)
        q = np.arange(x.low, x.high + 1)
        expected = arith.quantize(integer.hardswish(arith.dequantize(q, x)), y)
        assert np.array_equal(table[q - x.low], expected)
    with pytest.raises(KnobError, match="16"):
        integer.lookup_table(integer.hardswish, Format(16, True, (1.0,)), Format(8, True, (1.0,)))


def test_integer_softmax_is_close_to_the_real_one():
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (200, 10))
    y = integer.softmax_integers(x, integer.softmax_table(0.1)) / 256
    e = np.exp((x - x.max(axis=1, keepdims=True)) * 0.1)
    assert np.abs(y - e / e.sum(axis=1, keepdims=True)).max() <= 1 / 256
    assert y.max() <= 255 / 256


def test_formats_and_limits_along_a_graph():
    wide, narrow = Format(8, True, (0.1,)), Format(8, True, (0.05,))
    nodes = (
        Node("x", "input", shape=(2, 4, 4), format=wide),
        Node("c", "conv", ("x",), shape=(2, 4, 4)),
        Node("r", "relu6", ("c",), shape=(2, 4, 4), format=narrow),
        Node("p", "maxpool", ("r",), shape=(2, 2, 2)),
        Node("f", "flatten", ("p",), shape=(8,)),
        Node("m", "relu", ("x",), shape=(2, 4, 4)),
        Node("s", "softmax", ("f",), shape=(8,)),
    )
    graph = Graph(nodes, ("s",))
    assert [integer.output_format(graph, n) for n in "xcrpfm"] == [wide, narrow, narrow, narrow, narrow, wide]
    assert integer.output_format(graph, "s") == integer.SOFTMAX_FORMAT
    assert [integer.output_limits(graph, n) for n in "xcrpfm"] == [(-128, 127), *[(0, 120)] * 4, (0, 127)]


def test_storage_of_formats():
    assert [integer.storage(Format(b, s, (1.0,))) for b, s in ((2, True), (8, False), (9, True))] == [
        "int8", "uint8", "int16",
    ]  # fmt: skip
    with pytest.raises(KnobError, match="unsigned"):
        integer.storage(Format(12, False, (1.0,)))

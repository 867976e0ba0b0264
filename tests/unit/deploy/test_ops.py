"""What each operator computes, against loops written from the words of program.py, one number at a time."""

import itertools

import numpy as np
import pytest

from thrifty import integer
from thrifty.deploy.lower import lower
from thrifty.deploy.ops import LOWERED_BY, OPS
from thrifty.deploy.ops.conv import channels_last
from thrifty.deploy.ops.numeric import integer_product, windows
from thrifty.deploy.ops.permute import hwc_axes
from thrifty.deploy.ops.softmax import exp32, softmax32
from thrifty.deploy.program import Buffer, Call, Program
from thrifty.deploy.run import run
from thrifty.graph import OPERATORS


def rounded(acc, call, channel):
    """Requantise and clamp one accumulator, in Python's integers."""
    a = call.attrs
    if a["requant"] == "float":
        value = acc
    elif a["requant"] == "multiplier":
        m = call.constants["multiplier"]
        value = ((int(acc) << a["pre_shift"]) * int(m[channel % len(m)]) + 2**31) >> 32
    else:
        s = a["shift"][channel % len(a["shift"])]
        half = (1 << s) >> 1 if s > 0 and a["rounding"] == "half_up" else 0
        value = int(acc) << -s if s <= 0 else (int(acc) + half) >> s
    return min(max(value, a["low"]), a["high"])


def taps(x, call, kernel, oy, ox):
    """Yield (ky, kx, vector of channels) of the window, without what lies outside."""
    (sh, sw), (top, _, left, _) = call.attrs["stride"], call.attrs["pad"]
    for ky, kx in itertools.product(range(kernel[0]), range(kernel[1])):
        y, z = oy * sh + ky - top, ox * sw + kx - left
        if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
            yield ky, kx, x[y, z]


def conv(call, x, out):
    w, groups = call.constants["weight"], call.attrs["groups"]
    filters, kh, kw, width = w.shape
    for oy, ox, co in np.ndindex(out.shape):
        acc = call.constants["bias"][co]
        first = co // (filters // groups) * width
        for ky, kx, vector in taps(x, call, (kh, kw), oy, ox):
            for ci in range(width):
                acc = acc + vector[first + ci] * w[co, ky, kx, ci]
        out[oy, ox, co] = rounded(acc, call, co)


def depthwise(call, x, out):
    w = call.constants["weight"]
    for oy, ox, c in np.ndindex(out.shape):
        acc = call.constants["bias"][c]
        for ky, kx, vector in taps(x, call, w.shape[:2], oy, ox):
            acc = acc + vector[c] * w[ky, kx, c]
        out[oy, ox, c] = rounded(acc, call, c)


def linear(call, x, out):
    w, flat = call.constants["weight"], x.reshape(-1)
    for co in range(len(w)):
        acc = call.constants["bias"][co]
        for k in range(len(flat)):
            acc = acc + flat[k] * w[co, k]
        out[0, 0, co] = rounded(acc, call, co)


def pool(call, x, out):
    kernel = call.attrs["kernel"]
    for oy, ox, c in np.ndindex(out.shape):
        window = [vector[c] for _, _, vector in taps(x, call, kernel, oy, ox)]
        if call.op == "maxpool":
            out[oy, ox, c] = np.clip(max(window), call.attrs["low"], call.attrs["high"])
            continue
        acc = x.dtype.type(0)
        for v in window:
            acc = acc + v
        acc = acc / np.float32(kernel[0] * kernel[1]) if call.attrs["requant"] == "float" else acc
        out[oy, ox, c] = rounded(acc, call, 0)


LOOPS = {"conv": conv, "depthwise": depthwise, "linear": linear, "maxpool": pool, "avgpool": pool}


def inputs_of(program, rng, n=2):
    b = program.buffers[program.input]
    if b.dtype == "float32":
        return rng.standard_normal((n, *b.shape)).astype(np.float32)
    limits = np.iinfo(b.dtype)
    return rng.integers(limits.min, limits.max + 1, (n, *b.shape)).astype(b.dtype)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in LOOPS for k in OPS[n].kinds])
def test_sums_and_windows_equal_plain_loops(name, kind):
    checked = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        program = lower(OPS[name].example(rng, kind))
        held = run(program, inputs_of(program, rng), trace=True)
        for call in program.calls:
            x, found = held[call.inputs[0]], held[call.output]
            if call.op not in LOOPS or found[0].size * np.prod(call.attrs.get("kernel", (3, 3))) > 3000:
                continue
            wide = np.float32 if kind == "float32" else np.int64
            constants = {k: v.astype(wide) for k, v in call.constants.items()}
            plain = Call(call.op, call.name, call.inputs, call.output, call.attrs, constants)
            for one, got in zip(x, found):
                expected = np.empty(got.shape, wide)
                LOOPS[call.op](plain, one.astype(wide), expected)
                assert np.array_equal(got, expected), f"{name} {kind} seed {seed}"
                checked += 1
    assert checked >= 8


def only(op, inputs, shape, attrs, dtype="int8", in_shapes=None, constants=None):
    """Return a program of one call."""
    buffers = {n: Buffer(n, s, d) for n, (s, d) in zip(inputs, in_shapes)} | {"y": Buffer("y", shape, dtype)}
    return Program("p", buffers, (Call(op, "c", tuple(inputs), "y", attrs, constants or {}),), inputs[0], "y")


@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_add_concat_and_rescale_equal_plain_integers(kind):
    seen = set()
    for name, seed in itertools.product(("add", "concat", "rescale"), range(10)):
        rng = np.random.default_rng(seed)
        program = lower(OPS[name].example(rng, kind))
        held = run(program, inputs_of(program, rng), trace=True)
        for call in program.calls:
            a = call.attrs
            if "multipliers" not in a:
                continue
            parts = [held[n].astype(object) * m for n, m in zip(call.inputs, a["multipliers"])]
            acc = parts[0] + parts[1] if call.op == "add" else parts[0]
            if call.op == "concat":
                acc = np.concatenate(parts, axis=a["axis"] + 1)
            expected = np.clip((acc + ((1 << a["shift"]) >> 1)) >> a["shift"], a["low"], a["high"])
            assert np.abs(acc).max() + 2 ** a["shift"] // 2 < 2**31
            assert np.array_equal(held[call.output], expected)
            seen.add(call.op)
    assert seen == {"add", "concat", "rescale"}


def test_float_clamp_keeps_the_sign_of_zero_and_cuts():
    program = only("clamp", ["x"], (1, 1, 4), {"low": 0.0, "high": 6.0}, "float32", [((1, 1, 4), "float32")])
    y = run(program, np.array([-0.0, -1.0, 7.0, 3.5], np.float32).reshape(1, 1, 1, 4))
    assert y.ravel().tolist() == [0, 0, 6, 3.5]
    assert np.signbit(y.ravel()).tolist() == [True, False, False, False]


def test_padding_never_wins_a_max_pool():
    attrs = {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1, 1, 1), "low": -128, "high": 127}
    program = only("maxpool", ["x"], (2, 2, 1), attrs, "int8", [((3, 3, 1), "int8")])
    x = np.arange(-100, -91).reshape(1, 3, 3, 1)
    assert run(program, x).ravel().tolist() == [-96, -95, -93, -92]


@pytest.mark.parametrize("name", ["maxpool", "avgpool"])
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_pools_in_place_in_raster_order_give_the_same(name, kind):
    """Element by element in one memory, as generated code does when the output takes the input's place."""
    done = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        program = lower(OPS[name].example(rng, kind))
        call = program.calls[0] if program.calls[0].op == name else program.calls[1]
        held = run(program, inputs_of(program, rng, 1), trace=True)
        x, y = held[call.inputs[0]][0], held[call.output][0]
        if not OPS[name].in_place(call) or x.itemsize != y.itemsize:
            continue
        memory = x.copy().reshape(-1)
        wide = np.float32 if kind == "float32" else np.int64
        for i, (oy, ox, c) in enumerate(np.ndindex(y.shape)):
            now = memory.reshape(x.shape)
            sh, sw = call.attrs["stride"]
            attrs = {**call.attrs, "stride": (1, 1), "pad": (-oy * sh, 0, -ox * sw, 0)}
            one = Call(name, "c", (), "", attrs, call.constants)
            result = np.empty((1, 1, 1), wide)
            pool(one, now[:, :, c : c + 1].astype(wide), result)
            memory[i : i + 1] = result.astype(y.dtype).ravel().view(x.dtype)
        assert np.array_equal(memory[: y.size].view(y.dtype), y.reshape(-1))
        done += 1
    assert done >= 10


def test_pools_padded_above_are_not_in_place():
    attrs = {"kernel": (2, 2), "stride": (1, 1), "pad": (1, 0, 0, 0)}
    assert OPS["maxpool"].in_place(Call("maxpool", "c", ("x",), "y", attrs)) == ()


def test_permute_is_that_of_channels_first_arrays():
    rng = np.random.default_rng(0)
    for axes in itertools.permutations(range(3)):
        x = rng.integers(-9, 9, (2, 3, 4, 5))  # n, C, H, W
        expected = x.transpose(0, *(a + 1 for a in axes)).transpose(0, 2, 3, 1)
        found = x.transpose(0, 2, 3, 1).transpose(0, *(a + 1 for a in hwc_axes(axes)))
        assert np.array_equal(found, expected)


def test_argmax_takes_the_first_of_equals():
    program = only("argmax", ["x"], (1, 1, 1), {}, "int32", [((1, 1, 4), "int8")])
    x = np.array([[1, 7, 7, -3], [-5, -5, -6, -7]]).reshape(2, 1, 1, 4)
    assert run(program, x).ravel().tolist() == [1, 0]


def test_lookup_reads_signed_and_unsigned_bytes():
    table = np.arange(256).astype(np.uint8)
    for dtype, x in (("int8", [-128, 0, 127]), ("uint8", [0, 128, 255])):
        program = only("lookup", ["x"], (1, 1, 3), {}, "uint8", [((1, 1, 3), dtype)], {"table": table})
        assert run(program, np.array(x).reshape(1, 1, 1, 3)).ravel().tolist() == [0, 128, 255]


def test_exp32_is_within_two_units_in_the_last_place():
    t = np.linspace(-87, 0, 200001).astype(np.float32)
    exact = np.exp(t.astype(np.float64))
    units = np.abs(exp32(t) - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() <= 2
    assert exp32(np.float32([0.0, -100.0, -np.inf])).tolist() == [1, 0, 0]


def test_softmax32_sums_to_one():
    x = np.random.default_rng(0).standard_normal((50, 10)).astype(np.float32) * 10
    assert np.abs(softmax32(x).sum(axis=1) - 1).max() < 1e-6


def test_integer_product_is_exact_beyond_float():
    rng = np.random.default_rng(0)
    for top in (100, 2**15, 2**26):
        a, b = rng.integers(-top, top, (4, 300)), rng.integers(-top, top, (300, 3))
        expected = a.astype(object) @ b.astype(object)
        assert np.array_equal(integer_product(a, b), expected)


def test_windows_follow_the_output_not_the_padding():
    x = np.arange(12).reshape(1, 3, 4, 1)
    view = windows(x, (2, 2), (2, 2), (0, 0, 0, 0), (2, 2))
    assert view.shape == (1, 2, 2, 2, 2, 1)
    assert view[0, 1, 1, :, :, 0].tolist() == [[10, 11], [0, 0]]


def test_weights_of_signals_get_a_row():
    assert channels_last(np.zeros((5, 2, 3))).shape == (5, 1, 3, 2)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, op in OPS.items() for k in op.kinds])
def test_examples_use_their_operator_and_are_reproducible(name, kind):
    found = 0
    for seed in range(8):
        graphs = [OPS[name].example(np.random.default_rng(seed), kind) for _ in range(2)]
        programs = [lower(g) for g in graphs]
        found += any(c.op == name for c in programs[0].calls)
        x = inputs_of(programs[0], np.random.default_rng(seed))
        first, second = (run(p, x) for p in programs)
        out = programs[0].buffers[programs[0].output]
        assert np.array_equal(first, second)
        assert first.shape[1:] == out.shape
        assert first.dtype == out.dtype
    assert found >= 4


def test_every_graph_operator_but_input_and_pad_is_lowered():
    assert set(LOWERED_BY) == OPERATORS - {"input", "pad"}
    assert all(OPS[name].name == name for name in OPS)


def test_hardswish_is_that_of_the_integer_rule():
    x = np.linspace(-5, 5, 101).astype(np.float32).reshape(1, 1, 1, -1)
    program = only("hardswish", ["x"], (1, 1, 101), {}, "float32", [((1, 1, 101), "float32")])
    assert np.array_equal(run(program, x), integer.hardswish(x))

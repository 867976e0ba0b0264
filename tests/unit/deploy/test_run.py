"""The interpreter from outside: layouts, batches, traces, and what it refuses."""

import numpy as np
import pytest

from thrifty.arith import Format
from thrifty.deploy.lower import lower
from thrifty.deploy.ops.example import Example
from thrifty.deploy.run import BATCH, dequantize, predict, quantize_input, run, saturation
from thrifty.errors import DataError
from thrifty.graph import Graph, Node


def permuted(shape, axes, fmt=None):
    out = tuple(shape[a] for a in axes)
    nodes = (Node("x", "input", shape=shape, format=fmt), Node("p", "permute", ("x",), {"axes": axes}, out))
    return lower(Graph(nodes, ("p",)))


@pytest.mark.parametrize("kind", ["int8", "int16", "float32"])
def test_batches_do_not_change_results(kind):
    e = Example(np.random.default_rng(3), kind)
    x = e.input((3, 6, 6))
    program = lower(e.graph(e.linear(e.flat(e.activation(e.conv(x, 4))), 5)))
    data = quantize_input(program, np.random.default_rng(0).standard_normal((2 * BATCH + 3, 3, 6, 6)))
    whole = run(program, data)
    assert np.array_equal(whole, np.concatenate([run(program, one[None]) for one in data]))
    assert np.array_equal(whole, run(program, data, trace=True)[program.output])
    assert run(program, data[:0]).shape == (0, 1, 1, 5)


def test_trace_holds_every_buffer():
    e = Example(np.random.default_rng(0), "int8")
    program = lower(e.graph(e.pool(e.conv(e.input((3, 6, 6)), 4), "maxpool")))
    held = run(program, np.zeros((2, 6, 6, 3), np.int8), trace=True)
    assert set(held) == set(program.buffers)
    assert all(v.dtype == program.buffers[n].dtype and v.shape[1:] == program.buffers[n].shape for n, v in held.items())


@pytest.mark.parametrize(("shape", "axes"), [((2, 3, 4), (0, 2, 1)), ((2, 5), (1, 0)), ((7,), (0,))])
def test_layouts_come_back_as_torch_has_them(shape, axes):
    x = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    expected = x.transpose(0, *(a + 1 for a in axes))
    assert np.array_equal(predict(permuted(shape, axes), x), expected)
    coarse = predict(permuted(shape, axes, Format(8, True, (0.03125,))), x)
    assert coarse.dtype == np.float32
    assert np.abs(coarse - expected).max() <= 0.03125 / 2


def test_input_rounds_ties_up_and_saturates():
    program = permuted((4,), (0,), Format(8, True, (1.0,)))
    assert quantize_input(program, [[0.5, -0.5, 300, -np.inf]]).ravel().tolist() == [1, 0, 127, -128]


def test_dequantize_gives_the_reals_of_any_buffer():
    program = permuted((2, 2, 1), (0, 1, 2), Format(8, True, (0.5,)))
    assert dequantize(program, "x", np.arange(4).reshape(1, 2, 1, 2)).tolist() == [[[[0.0], [1.0]], [[0.5], [1.5]]]]


def test_wrong_inputs_are_refused_with_shapes():
    program = permuted((2, 3, 4), (0, 1, 2), Format(8, True, (0.5,)))
    for bad in (np.zeros((1, 3, 4, 2)), np.zeros((1, 2, 12)), np.zeros((1, 24)), np.zeros(24)):
        with pytest.raises(DataError, match="2 channels"):
            quantize_input(program, bad)
    with pytest.raises(DataError, match="1 NaN"):
        quantize_input(program, np.where(np.arange(24).reshape(1, 2, 3, 4) == 5, np.nan, 0.0))
    with pytest.raises(DataError, match=r"\(3, 4, 2\)"):
        run(program, np.zeros((1, 2, 3, 4)))
    for values in (128, 0.5):
        with pytest.raises(DataError, match="int8"):
            run(program, np.full((1, 3, 4, 2), values))


def test_saturation_counts_limits_but_not_the_zeros_of_a_relu():
    fmt = Format(8, True, (1.0,))
    nodes = (
        Node("x", "input", shape=(4,), format=fmt),
        Node("a", "add", ("x", "x"), shape=(4,), format=fmt),
        Node("r", "relu", ("a",), shape=(4,)),
        Node("s", "add", ("a", "r"), shape=(4,), format=fmt),
    )
    program = lower(Graph(nodes, ("s",)))
    found = saturation(program, run(program, np.array([100, -100, 1, -1]).reshape(1, 1, 1, 4), trace=True))
    assert (found["a"].low, found["a"].high, found["a"].size) == (1, 1, 4)
    assert (found["r"].low, found["r"].high) == (0, 1)
    assert (found["s"].low, found["s"].high) == (1, 1)


def test_float_programs_count_no_saturation():
    program = lower(Graph((Node("x", "input", shape=(4,)), Node("r", "relu", ("x",), shape=(4,))), ("r",)))
    assert saturation(program, run(program, np.ones((1, 1, 1, 4)), trace=True)) == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_what_is_no_array_of_numbers_is_refused(kind):
    program = a_program(kind)
    shape = program.buffers[program.input].shape
    for wrong in (["a"], [[1.0], [2.0, 3.0]], None):
        with pytest.raises(DataError):
            predict(program, wrong)
    with pytest.raises(DataError, match="complex"):
        run(program, np.zeros((1, *shape), np.complex64))


@pytest.mark.filterwarnings("error")
def test_reals_beyond_float32_saturate_like_infinity():
    program = a_program("int8")
    h, w, c = program.buffers[program.input].shape
    huge, infinite = (np.full((1, c, h, w), v) * [[[[1.0]]]] for v in (1e300, np.inf))
    assert np.array_equal(predict(program, huge), predict(program, infinite))
    assert np.array_equal(quantize_input(program, np.full((1, c, h, w), -3e38)), quantize_input(program, -infinite))


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_no_inputs_give_no_outputs(kind):
    program = a_program(kind)
    h, w, c = program.buffers[program.input].shape
    some = predict(program, np.zeros((2, c, h, w)))
    assert predict(program, np.zeros((0, c, h, w))).shape == (0, *some.shape[1:])


def a_program(kind: str):
    """Return a program from a map to a vector."""
    e = Example(np.random.default_rng(0), kind)
    x = e.input((3, 4, 5))
    return lower(e.graph(e.linear(e.flat(x), 4)))

"""The arena: nothing alive is overwritten, and little is wasted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.deploy.ops import OPS
from thrifty.deploy.plan import plan
from thrifty.deploy.program import Buffer, Call, Program


class Sketch:
    """A program of opaque calls; only names, shapes and operators matter to the planner."""

    def __init__(self, size, dtype="int8"):
        self.buffers = {"x": Buffer("x", (1, 1, size), dtype)}
        self.calls = []

    def call(self, op, inputs, size, dtype="int8", **attrs):
        name = f"b{len(self.calls)}"
        self.buffers[name] = Buffer(name, (1, 1, size), dtype)
        self.calls.append(Call(op, f"c{len(self.calls)}", tuple(inputs), name, attrs))
        return name

    def program(self):
        return Program("p", self.buffers, tuple(self.calls), "x", self.calls[-1].output)


def assert_valid(program, made, scratch):
    """Brute force: at every call, no two things alive share a byte, unless an output takes its dying input's place."""
    assert set(made.offsets) == set(program.buffers) | set(scratch)
    last = {n: max((i for i, c in enumerate(program.calls) if n in c.inputs), default=0) for n in program.buffers}
    last[program.output] = len(program.calls) - 1
    for i, call in enumerate(program.calls):
        alive = [n for n in program.buffers if made.lives[n][0] <= i <= made.lives[n][1]]
        assert set(call.inputs) | {call.output} <= set(alive)
        assert all(made.lives[n] == (made.lives[n][0], max(last[n], made.lives[n][0])) for n in alive)
        owner = np.full(made.arena_bytes, -1)
        order = [n for n in alive if n != call.output] + ([call.name] if call.name in scratch else [])
        for k, name in enumerate(order):
            size = made.sizes[name]
            span = owner[made.offsets[name] : made.offsets[name] + size]
            assert len(span) == size
            assert (span == -1).all(), f"{name} lies over {order[int(span.max())]} at call {i}"
            span[:] = k
        start, size = made.offsets[call.output], program.buffers[call.output].size_bytes
        hit = {order[k] for k in set(owner[start : start + size].tolist()) - {-1}}
        allowed = {
            call.inputs[k]
            for k in OPS[call.op].in_place(call)
            if last[call.inputs[k]] == i and made.offsets[call.inputs[k]] == start
        }
        assert hit <= allowed, f"the output of call {i} lies over {hit - allowed}"
    assert all(offset % 8 == 0 for offset in made.offsets.values())


def random_program(seed):
    """Return a chain, a residual net, an inception-like net, or any mixture, with pools between."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["chain", "residual", "inception", "mixed"])
    size = int(rng.integers(8, 4000))
    s = Sketch(size)
    x, n = "x", size
    for _ in range(int(rng.integers(1, 9))):
        step = {"chain": 0, "residual": 1, "inception": 2}.get(str(kind), int(rng.integers(3)))
        if step == 0:
            n = max(1, int(n * rng.choice([0.5, 1, 1, 2])))
            x = s.call("conv", [x], n)
        elif step == 1:
            short = s.call("conv", [x], n) if rng.random() < 0.3 else x
            y = s.call("conv", [s.call("conv", [x], int(n * rng.choice([0.25, 1, 4])) + 1)], n)
            x = s.call("add", [y, short], n)
        else:
            sizes = [max(1, int(n * f)) for f in rng.dirichlet(np.ones(int(rng.integers(2, 5))))]
            parts = [s.call("conv", [s.call("conv", [x], max(1, v // 2))], v) for v in sizes]
            n = sum(sizes)
            x = s.call("concat", parts, n)
        if rng.random() < 0.3:
            n = max(1, n // 4)
            x = s.call("maxpool", [x], n, pad=(0, 0, 0, 0))
        elif rng.random() < 0.3:
            x = s.call(str(rng.choice(["clamp", "rescale", "copy"])), [x], n)
    x = s.call("linear", [x], 10)
    program = s.program()
    scratch = {c.name: int(rng.integers(1, 200)) for c in program.calls if c.op == "conv" and rng.random() < 0.5}
    return program, scratch if rng.random() < 0.5 else {}


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**9))
def test_random_programs_never_overlap(seed):
    program, scratch = random_program(seed)
    made = plan(program, scratch)
    assert_valid(program, made, scratch)
    assert made.bound_bytes <= made.arena_bytes


def test_random_programs_are_within_five_percent_of_the_bound():
    ratios = []
    for seed in range(150):
        program, scratch = random_program(seed)
        made = plan(program, scratch)
        ratios.append(made.arena_bytes / made.bound_bytes)
    assert np.mean(np.array(ratios) <= 1.05) >= 0.97
    assert max(ratios) <= 1.2


def test_bound_is_the_live_set():
    s = Sketch(800)
    a = s.call("conv", ["x"], 1600)
    b = s.call("conv", [a], 400)
    s.call("conv", [b], 80)
    made = plan(s.program(), {"c1": 104})
    assert (made.bound_bytes, made.arena_bytes) == (2400, 2400)


def test_residual_addition_takes_the_place_of_an_input():
    s = Sketch(1000)
    a = s.call("conv", ["x"], 1000)
    b = s.call("conv", [a], 1000)
    s.call("add", [b, a], 1000)
    made = plan(s.program())
    assert made.arena_bytes == 2000
    assert made.offsets["b2"] in (made.offsets[a], made.offsets[b])


def test_an_input_that_is_read_later_is_not_overwritten():
    s = Sketch(1000)
    a = s.call("clamp", ["x"], 1000)
    s.call("add", [a, "x"], 1000)
    made = plan(s.program())
    assert made.offsets[a] != made.offsets["x"]
    assert made.arena_bytes == 2000


def test_elements_of_unequal_width_are_not_in_place():
    s = Sketch(1000)
    s.call("rescale", ["x"], 1000, dtype="int16")
    assert plan(s.program()).arena_bytes == 3000


@pytest.mark.parametrize("op", ["conv", "depthwise", "linear", "concat", "permute", "softmax", "argmax"])
def test_other_operators_never_write_over_their_input(op):
    s = Sketch(1000)
    s.call(op, ["x"], 1000)
    assert plan(s.program()).arena_bytes == 2000


def test_pools_shrink_in_place_unless_padded_before():
    for pad, arena in (((0, 0, 0, 0), 1000), ((0, 1, 0, 1), 1000), ((1, 0, 0, 0), 1256)):
        s = Sketch(1000)
        s.call("maxpool", ["x"], 250, pad=pad)
        assert plan(s.program()).arena_bytes == arena


def test_the_place_above_a_shrunken_block_is_free():
    s = Sketch(1000)
    a = s.call("maxpool", ["x"], 248, pad=(0, 0, 0, 0))
    b = s.call("conv", [a], 744)
    s.call("conv", [b], 8)
    assert plan(s.program()).arena_bytes == 1000


def test_har_resnet_meets_its_bound():
    """ResNetv1-6, 16 filters, HAR: MicroAI allocates pools of 6144 bytes and the input besides."""
    f, s = 16, Sketch(128 * 9)
    a = s.call("conv", ["x"], 128 * f)
    b = s.call("maxpool", [s.call("conv", [a], 128 * f)], 64 * f, pad=(0, 0, 0, 0))
    b = s.call("conv", [b], 64 * f)
    short = s.call("maxpool", [s.call("conv", [a], 128 * f)], 64 * f, pad=(0, 0, 0, 0))
    x = s.call("add", [b, short], 64 * f)
    y = s.call("conv", [s.call("conv", [x], 64 * f)], 64 * f)
    x = s.call("maxpool", [s.call("add", [y, x], 64 * f)], f, pad=(0, 0, 0, 0))
    s.call("linear", [x], 6)
    made = plan(s.program())
    assert_valid(s.program(), made, {})
    assert made.arena_bytes == made.bound_bytes == 5120


def test_a_program_without_calls():
    program = Program("p", {"x": Buffer("x", (1, 1, 5), "int8")}, (), "x", "x")
    made = plan(program)
    assert (made.arena_bytes, dict(made.offsets)) == (8, {"x": 0})


def test_plans_are_reproducible():
    program, scratch = random_program(7)
    assert plan(program, scratch) == plan(program, scratch)

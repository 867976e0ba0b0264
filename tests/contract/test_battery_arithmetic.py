"""The arithmetic battery: the integer rule in NumPy, in torch, in C on this computer and on emulated Cortex-M cores."""

import numpy as np
import pytest
import torch
from arithmetic import on_host, on_target
from checks import check_clamp, check_floor_shift, check_round_shift, check_scale
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty import arith

INT8 = np.arange(-128, 128, dtype=np.int64)
INT16 = np.arange(-(2**15), 2**15, dtype=np.int64)
SHIFTS = np.arange(-8, 32)
int32 = st.integers(-(2**31), 2**31 - 1)


@pytest.fixture(scope="module", params=["host", "cortex-m0plus", "cortex-m4", "cortex-m7"])
def rule(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arith")
    return on_host(folder) if request.param == "host" else on_target(folder, request.param)


def test_every_int8_by_every_shift(rule):
    assert check_round_shift(rule, INT8, SHIFTS) == 256 * 40
    assert check_floor_shift(rule, INT8, SHIFTS[SHIFTS >= 0]) == 256 * 32


def test_every_int16_by_every_shift(rule):
    assert check_round_shift(rule, INT16, SHIFTS) == 65536 * 40


def test_every_int8_clamped_to_every_int8_range(rule):
    assert check_clamp(rule, np.arange(-200, 200), INT8[::5], INT8[::3]) > 800_000


def test_every_int16_by_many_multipliers(rule):
    multipliers = np.array([1, 2, 3, 2**15, 2**30, 2**31 - 1, 1234567891, 715827883])
    assert check_scale(rule, INT16, multipliers, range(4)) == 65536 * 8 * 4


def test_random_int32_with_their_extremes(rule):
    rng = np.random.default_rng(0)
    acc = np.concatenate([rng.integers(-(2**31), 2**31, 5000), [-(2**31), 2**31 - 1, -(2**30), 2**30, -1, 0, 1]])
    multipliers = np.concatenate([rng.integers(0, 2**31, 20), [1, 2**31 - 1]])
    assert check_scale(rule, acc, multipliers, [0]) == len(acc) * 22
    fitting = acc[np.abs(acc) < 2**30]
    assert check_round_shift(rule, fitting, np.arange(0, 32)) == len(fitting) * 32


@settings(max_examples=300, deadline=None)
@given(acc=int32, multiplier=st.integers(0, 2**31 - 1), pre_shift=st.integers(0, 15))
def test_scaling_is_the_nearest_integer_ties_up(acc, multiplier, pre_shift):
    """Against Python's unbounded integers: the definition itself."""
    exact = (acc << pre_shift) * multiplier
    got = int(arith.scale_by(np.array([acc]), np.array([multiplier]), pre_shift)[0])
    if abs(exact) < 2**62:
        assert got == (exact + 2**31) // 2**32
        assert -(2**31) <= got * 2**32 - exact <= 2**31


@settings(max_examples=300, deadline=None)
@given(value=int32, shift=st.integers(-8, 31))
def test_shifting_is_the_nearest_integer_ties_up(value, shift):
    got = int(arith.round_shift(np.array([value]), shift)[0])
    assert got == (value << -shift if shift <= 0 else (value + 2 ** (shift - 1)) // 2**shift)
    assert int(arith.round_shift(np.array([value]), np.array([shift]))[0]) == got


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(int32, min_size=1, max_size=20),
    shift=st.integers(0, 31),
    multiplier=st.integers(1, 2**31 - 1),
)
def test_torch_is_numpy(values, shift, multiplier):
    a, t = np.array(values), torch.tensor(values, dtype=torch.int64)
    assert arith.round_shift(a, shift).tolist() == arith.round_shift(t, shift).tolist()
    assert arith.floor_shift(a, shift).tolist() == arith.floor_shift(t, shift).tolist()
    assert arith.scale_by(a, multiplier).tolist() == arith.scale_by(t, multiplier).tolist()
    assert arith.saturate(a, -128, 127).tolist() == arith.saturate(t, -128, 127).tolist()

"""The C kernels of conv, depthwise and linear, alone: their bits against NumPy, their instructions against ceilings."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import WARNINGS, Case, Machine, make, make_float, random_cases, run_host

from thrifty.deploy.c.pack import choose, pack
from thrifty.deploy.program import Buffer, Call
from thrifty.errors import UnsupportedModel

SANITIZERS = ("-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
BYTES = ("uint8", 8, "uint8")


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def float_cases(seed: int, count: int) -> list[Case]:
    rng, cases = np.random.default_rng(seed), []
    for _ in range(count):
        groups = int(rng.choice([1, 1, 2]))
        cases.append(make_float(
            rng,
            str(rng.choice(["conv", "conv", "depthwise", "linear"])),
            (int(rng.integers(3, 8)), int(rng.integers(3, 8)), groups * int(rng.choice([1, 2, 3, 4, 6]))),
            groups * int(rng.integers(1, 8)),
            (int(rng.integers(1, 4)), int(rng.integers(1, 4))),
            (int(rng.integers(1, 3)), int(rng.integers(1, 3))),
            tuple(int(v) for v in rng.integers(0, 3, 4)),
            groups,
            (-np.inf, np.inf) if rng.random() < 0.5 else (0.0, 6.0),
        ))  # fmt: skip
    return cases


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_headers_stand_alone(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    headers = ("arith", "block", "rows", "conv", "linear", "depthwise", "depthwise_stride2", "generic", "conv_float")
    headers += ("associative",)
    for header in [f"{name}.h" for name in headers]:
        (tmp_path / "one.c").write_text(f'#include "{header}"\n#include "{header}"\n')
        run = subprocess.run(
            [compiler, *WARNINGS, "-fsyntax-only", str(tmp_path / "one.c")], capture_output=True, check=False
        )
        assert run.returncode == 0, run.stderr


@needs("gcc")
def test_random_calls_on_the_host_gcc() -> None:
    run_host(random_cases(1, 30) + float_cases(1, 15), "gcc", SANITIZERS)


@needs("clang")
def test_random_calls_on_the_host_clang() -> None:
    run_host(random_cases(2, 20) + float_cases(2, 10), "clang", SANITIZERS)


@needs("gcc")
def test_random_calls_on_the_host_optimised() -> None:
    run_host(random_cases(3, 12) + float_cases(3, 10), "gcc", ("-O3",))


@needs("arm-none-eabi-gcc")
@pytest.mark.parametrize(
    ("cpu", "seed", "count", "opt"),
    [
        ("cortex-m4", 4, 60, "-O3"),
        ("cortex-m4", 5, 20, "-Os"),
        ("cortex-m7", 6, 20, "-O2"),
        ("cortex-m0plus", 7, 20, "-O2"),
    ],
)
def test_random_calls_on_a_core_gcc(cpu: str, seed: int, count: int, opt: str) -> None:
    Machine(random_cases(seed, count) + float_cases(seed, 5), cpu, "gcc", opt).check()


@pytest.mark.parametrize(
    ("cpu", "seed", "count", "opt"),
    [("cortex-m4", 8, 30, "-O3"), ("cortex-m7", 9, 15, "-O2"), ("cortex-m0plus", 10, 15, "-Os")],
)
def test_random_calls_on_a_core_zig(cpu: str, seed: int, count: int, opt: str) -> None:
    pytest.importorskip("ziglang")
    Machine(random_cases(seed, count) + float_cases(seed, 5), cpu, "zig", opt).check()


@needs("arm-none-eabi-gcc")
def test_weights_of_extreme_size_and_long_sums() -> None:
    """Sums near the ends of int32, four bits with and without room for the larger factor, all clamps."""
    rng, cases = np.random.default_rng(11), []
    for in_type in ("int8", "uint8"):
        for bits in (4, 8):
            for out_type, clamp in (("int8", None), ("uint8", None), ("int8", (-7, 9)), ("int16", (0, 1000))):
                types = (in_type, bits, out_type)
                for op, shape in (("conv", (3, 4, 120)), ("linear", (1, 1, 500)), ("depthwise", (5, 4, 6))):
                    cases.append(make(rng, op, shape, 5, types=types, clamp=clamp, extreme=out_type != "int16"))
    assert {"W4X", "W4", "W8"} <= {
        i.split(", ")[1] for c in cases for i in c.kernel.instances if "PAIRS" in i or "FOURS" in i
    }
    Machine(cases).check()


@needs("arm-none-eabi-gcc")
def test_sixteen_bit_products_that_fill_the_accumulator() -> None:
    """SMLAD's own sum of two products may pass 2^31 on the way; the total does not."""
    rng = np.random.default_rng(12)
    case = make(rng, "linear", (1, 1, 4), 4, types=("int16", 16, "int16"))
    weight = np.array([[-32768, -32768, 32767, 32767]] * 4, np.int16)
    constants = {**case.call.constants, "weight": weight, "bias": np.full(4, -(2**20), np.int32)}
    call = Call("linear", "layer", ("x",), "y", {**case.call.attrs}, constants)
    data = np.array([[[-32768, -32768, -32768, -32768]]], np.int16)
    acc = int((weight[0].astype(np.int64) * data.reshape(-1)).sum() - 2**20)
    assert abs(acc) < 2**31 < 2 * 32768**2 + 1
    expected = np.clip((acc * call.constants["multiplier"].astype(np.int64) + 2**31) >> 32, -32768, 32767)
    Machine([Case(call, case.x, case.y, data, expected.astype(np.int16).reshape(1, 1, 4))]).check()


# ---- instructions: counts, not time, so they are the same on every computer ----

CEILINGS = {  # layer: (call, instructions per multiply-accumulate that it may take)
    "3x3 16->16": (dict(shape=(32, 32, 16), out=16, types=BYTES), 0.97),
    "3x3 32->32": (dict(shape=(16, 16, 32), out=32, types=BYTES), 0.92),
    "3x3 64->64": (dict(shape=(8, 8, 64), out=64, types=BYTES), 0.90),
    "3x3 64->64, 4 bits": (dict(shape=(8, 8, 64), out=64, types=("int8", 4, "int8")), 1.08),
    "3x3 16->16, 16 bits": (dict(shape=(16, 16, 16), out=16, types=("int16", 16, "int16")), 0.88),
    "3x3 stride 2, 16->32": (dict(shape=(32, 32, 16), out=32, types=BYTES, stride=(2, 2), pad=(1, 1, 1, 1)), 1.0),
    "3x3 3->16": (dict(shape=(32, 32, 3), out=16), 1.37),
    "10x4 1->64 stride 2": (dict(shape=(49, 10, 1), out=64, kernel=(10, 4), stride=(2, 2), pad=(4, 5, 1, 1)), 1.32),
    "1-D 3, 80->80": (dict(shape=(1, 64, 80), out=80, kernel=(1, 3), types=BYTES), 0.90),
    "1-D 3, 9->16": (dict(shape=(1, 128, 9), out=16, kernel=(1, 3)), 1.46),
    "1x1 64->64": (dict(shape=(25, 5, 64), out=64, kernel=(1, 1), types=BYTES), 0.97),
    "1x1 8->16": (dict(shape=(48, 48, 8), out=16, kernel=(1, 1), types=BYTES), 1.82),
    "linear 640->128": (dict(op="linear", shape=(1, 1, 640), out=128), 1.19),
    "linear 640->128, 4 bits": (dict(op="linear", shape=(1, 1, 640), out=128, types=("int8", 4, "int8")), 1.15),
    "linear 8->128": (dict(op="linear", shape=(1, 1, 8), out=128), 2.2),
    "depthwise 64, 25x5": (dict(op="depthwise", shape=(25, 5, 64), types=BYTES), 2.28),
    "depthwise 32, 24x24": (dict(op="depthwise", shape=(24, 24, 32), types=BYTES), 2.0),
    "depthwise 16, 48x48 stride 2": (dict(op="depthwise", shape=(48, 48, 16), types=BYTES, stride=(2, 2)), 3.0),
}  # fmt: skip


@needs("arm-none-eabi-gcc")
def test_instructions_stay_below_their_ceilings() -> None:
    rng = np.random.default_rng(0)
    cases = [make(rng, **call) for call, _ in CEILINGS.values()]
    machine = Machine(cases)
    for (name, (_, ceiling)), case, count in zip(CEILINGS.items(), cases, machine.check()):
        macs = case.y.shape[0] * case.y.shape[1] * case.call.constants["weight"].size
        assert count / macs <= ceiling, f"{name}: {count / macs:.3f} instructions per multiply-accumulate"
        assert case.kernel.scratch_bytes <= 5000, name
    assert machine.code_bytes < 12_000  # of ten kinds of kernels; a network has three or four


# ---- packing ----


def test_four_bit_weights_take_half_the_flash() -> None:
    rng = np.random.default_rng(0)
    eight, four = (make(rng, "linear", (1, 1, 512), 64, types=("int8", bits, "int8")).kernel for bits in (8, 4))
    assert eight.flash_bytes - four.flash_bytes == 512 * 64 // 2


def test_choice_of_kernels() -> None:
    rng = np.random.default_rng(0)
    wanted = {
        "conv": dict(shape=(8, 8, 16), out=16),
        "linear": dict(op="linear", shape=(1, 1, 64), out=10),
        "depthwise": dict(op="depthwise", shape=(8, 8, 16)),
        "depthwise_stride2": dict(op="depthwise", shape=(8, 8, 16), stride=(2, 2)),
        "generic": dict(shape=(8, 8, 16), out=16, groups=4),
    }
    for variant, call in wanted.items():
        case = make(rng, **call)
        assert choose(case.call, case.x, case.y) == case.kernel.variant == variant
    whole_window = make(rng, shape=(3, 3, 16), out=16, pad=(0, 0, 0, 0))
    assert whole_window.kernel.variant == "linear"  # one output pixel
    one = make_float(rng, "conv", (4, 4, 2), 3)
    assert choose(one.call, one.x, one.y) == "float"


def test_one_shift_needs_no_multipliers_and_many_become_multipliers() -> None:
    rng = np.random.default_rng(0)
    one = make(rng, requant="shift", shift=9)
    many = make(rng, requant="shift", shift=(7, 8, 9, 10, 7, 8, 9, 10))
    assert "SHIFT" in one.kernel.instances[1]
    assert "MULT" in many.kernel.instances[1]
    assert many.kernel.flash_bytes - one.kernel.flash_bytes == 4 * 8


def test_constants_are_one_text_that_can_be_repeated() -> None:
    kernel = make(np.random.default_rng(0)).kernel
    text = kernel.constants("a")
    assert text == kernel.constants("a")
    assert "static const thrifty_conv_t a = {" in text
    assert "a_stream[" in text
    assert kernel.call("a", "x", "y", "s") == "thrifty_conv(&a, x, y, s);"


def test_sizes_beyond_sixteen_bits_are_refused_by_name() -> None:
    attrs = {"low": -128, "high": 127, "requant": "multiplier", "pre_shift": 0, "weight_bits": 8}
    one = np.ones(1, np.int32)
    constants = {"weight": np.ones((1, 70000), np.int8), "bias": one, "multiplier": one}
    call = Call("linear", "head", ("x",), "y", attrs, constants)
    with pytest.raises(UnsupportedModel, match="head takes a size of 70000"):
        pack(call, Buffer("x", (1, 1, 70000), "int8"), Buffer("y", (1, 1, 1), "int8"))

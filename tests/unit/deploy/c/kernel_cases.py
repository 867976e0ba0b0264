"""Random conv, depthwise and linear calls, their NumPy meaning, and how to compile and run them alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.deploy.c.pack import Kernel, pack
from thrifty.deploy.c.text import c_array
from thrifty.deploy.program import Buffer, Call

KERNELS = Path(__file__).parents[4] / "src/thrifty/deploy/c/kernels"
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-ffp-contract=off", f"-I{KERNELS}")
LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}
CTYPE = {"int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t", "float32": "float"}


@dataclass(frozen=True)
class Case:
    """One call with its input and what must come out."""

    call: Call
    x: Buffer
    y: Buffer
    data: np.ndarray
    expected: np.ndarray

    @property
    def kernel(self) -> Kernel:
        return pack(self.call, self.x, self.y)


def make(
    rng: np.random.Generator,
    op: str = "conv",
    shape: tuple[int, int, int] = (8, 8, 8),
    out: int = 8,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    pad: tuple[int, int, int, int] | None = None,
    groups: int = 1,
    types: tuple[str, int, str] = ("int8", 8, "int8"),
    requant: str = "multiplier",
    rounding: str = "half_up",
    clamp: tuple[int, int] | None = None,
    shift: tuple[int, ...] | int | None = None,
    pre_shift: int = 0,
    extreme: bool = False,
) -> Case:
    """Return a call with random constants, scaled so that outputs fill their type and some saturate."""
    in_type, bits, out_type = types
    kh, kw = kernel
    pad = ((kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2) if pad is None else pad
    h, w, c = shape
    if op == "linear":
        k, weight_shape, out_shape = h * w * c, (out, h * w * c), (1, 1, out)
    else:
        oh, ow = (h + pad[0] + pad[1] - kh) // stride[0] + 1, (w + pad[2] + pad[3] - kw) // stride[1] + 1
        out = c if op == "depthwise" else out
        k = kh * kw * (1 if op == "depthwise" else c // groups)
        weight_shape = (kh, kw, c) if op == "depthwise" else (out, kh, kw, c // groups)
        out_shape = (oh, ow, out)
    low_w, high_w = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    low_x, high_x = LIMITS[in_type]
    big = max(high_x, -low_x)
    most = max(1, (2**31 - 1) // (big * k) - 1)  # so that no sum leaves int32
    low_w, high_w = max(low_w, -most), min(high_w, most)
    weight = rng.integers(low_w, high_w + 1, weight_shape)
    data = rng.integers(low_x, high_x + 1, shape)
    if extreme:
        weight = rng.choice([low_w, high_w], weight_shape)
        data = rng.choice([low_x, high_x], shape)
    spread = np.sqrt(k) * big * max(abs(low_w), high_w) / 3
    bias = rng.integers(-int(spread) - 1, int(spread) + 2, out)
    room = 2**31 - 1 - big * max(abs(low_w), high_w) * k
    bias = np.clip(bias, -min(room, 2**30), min(room, 2**30))
    target = LIMITS[out_type][1] / (1.5 * spread)
    attrs: dict[str, Any] = {"stride": stride, "pad": pad, "groups": groups, "weight_bits": bits, "requant": requant,
                             "pre_shift": 0, "shift": (), "rounding": rounding}  # fmt: skip
    constants = {"weight": weight.astype(np.int16 if bits > 8 else np.int8), "bias": bias.astype(np.int32)}
    if requant == "multiplier":
        scale = np.clip(target * rng.uniform(0.3, 1.5, out), 2.0**-31, 0.49)
        attrs["pre_shift"] = pre_shift
        constants["multiplier"] = np.floor(scale * 2.0 ** (32 - pre_shift)).clip(1, 2**31 - 1).astype(np.int32)
    else:
        best = max(0, round(-np.log2(target)))
        attrs["shift"] = (best,) if shift is None else (shift,) if isinstance(shift, int) else tuple(shift)
        if len(attrs["shift"]) == 1:
            bias = bias if attrs["shift"][0] < 2 else np.clip(bias, -(2**30), 2**30)
    attrs["low"], attrs["high"] = clamp or LIMITS[out_type]
    call = Call(op, "layer", ("x",), "y", attrs, constants)
    x, y = Buffer("x", shape, in_type), Buffer("y", out_shape, out_type)
    return Case(call, x, y, data.astype(in_type), reference(call, x, y, data))


def make_float(
    rng: np.random.Generator, op: str, shape: tuple[int, int, int], out: int, kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1), pad: tuple[int, int, int, int] = (0, 0, 0, 0), groups: int = 1,
    clamp: tuple[float, float] = (-np.inf, np.inf),
) -> Case:  # fmt: skip
    """Return a float32 call with random constants."""
    h, w, c = shape
    groups = groups if op == "conv" else 1
    if op == "linear":
        kernel, stride, pad = (1, 1), (1, 1), (0, 0, 0, 0)
    oh, ow = (h + pad[0] + pad[1] - kernel[0]) // stride[0] + 1, (w + pad[2] + pad[3] - kernel[1]) // stride[1] + 1
    out = c if op == "depthwise" else out
    sizes = {"linear": (out, h * w * c), "depthwise": (*kernel, c), "conv": (out, *kernel, c // groups)}
    attrs = {"stride": stride, "pad": pad, "groups": groups, "weight_bits": 32, "requant": "float",
             "low": clamp[0], "high": clamp[1]}  # fmt: skip
    weight, bias = rng.standard_normal(sizes[op]), rng.standard_normal(out)
    constants = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
    call = Call(op, "layer", ("x",), "y", attrs, constants)
    x, y = Buffer("x", shape, "float32"), Buffer("y", (1, 1, out) if op == "linear" else (oh, ow, out), "float32")
    data = rng.standard_normal(shape).astype(np.float32)
    return Case(call, x, y, data, float_reference(call, y, data))


def float_reference(call: Call, y: Buffer, data: np.ndarray) -> np.ndarray:
    """Return sums in the order (ky, kx, ci), rounded after every product and every sum."""
    a, weight, bias = call.attrs, call.constants["weight"], call.constants["bias"]
    if call.op == "linear":
        weight, data = weight[:, None, None, :], data.reshape(1, 1, -1)
    groups = data.shape[2] if call.op == "depthwise" else a["groups"]
    if call.op == "depthwise":
        weight = weight.transpose(2, 0, 1)[..., None]
    co, kh, kw, ci = weight.shape
    padded = np.pad(data, (a["pad"][:2], a["pad"][2:], (0, 0)))
    acc = np.broadcast_to(bias, y.shape).astype(np.float32)
    (oh, ow), (sh, sw) = y.shape[:2], a["stride"]
    group = np.arange(co) // (co // groups)
    for ky in range(kh):
        for kx in range(kw):
            for i in range(ci):
                part = padded[ky : ky + (oh - 1) * sh + 1 : sh, kx : kx + (ow - 1) * sw + 1 : sw][..., group * ci + i]
                acc = (acc + (part * weight[:, ky, kx, i]).astype(np.float32)).astype(np.float32)
    return np.clip(acc, np.float32(a["low"]), np.float32(a["high"])).astype(np.float32)


def reference(call: Call, x: Buffer, y: Buffer, data: np.ndarray) -> np.ndarray:
    """Return what program.py says that the call computes."""
    a, weight, bias = call.attrs, call.constants["weight"].astype(np.int64), call.constants["bias"].astype(np.int64)
    data = data.astype(np.int64)
    if call.op == "linear":
        acc = (weight @ data.reshape(-1) + bias).reshape(y.shape)
    else:
        if call.op == "depthwise":
            weight = weight.transpose(2, 0, 1)[..., None]
            groups = x.shape[2]
        else:
            groups = a["groups"]
        co, kh, kw, ci = weight.shape
        padded = np.pad(data, ((a["pad"][0], a["pad"][1]), (a["pad"][2], a["pad"][3]), (0, 0)))
        acc = np.broadcast_to(bias, y.shape).copy()
        oh, ow = y.shape[:2]
        for ky in range(kh):
            for kx in range(kw):
                part = padded[ky : ky + (oh - 1) * a["stride"][0] + 1 : a["stride"][0],
                              kx : kx + (ow - 1) * a["stride"][1] + 1 : a["stride"][1]]  # fmt: skip
                part = part.reshape(oh, ow, groups, ci)
                taps = weight[:, ky, kx].reshape(groups, co // groups, ci)
                acc += np.einsum("hwgi,goi->hwgo", part, taps).reshape(acc.shape)
    assert (abs(acc) << a["pre_shift"]).max() < 2**31
    if a["requant"] == "multiplier":
        acc = ((acc << a["pre_shift"]) * call.constants["multiplier"].astype(np.int64) + (1 << 31)) >> 32
    else:
        shift = np.broadcast_to(np.array(a["shift"]), acc.shape[-1:])
        half = np.where((shift > 0) & (a["rounding"] == "half_up"), np.int64(1) << np.clip(shift - 1, 0, 62), 0)
        acc = ((acc << np.clip(-shift, 0, 31)) + half) >> np.clip(shift, 0, 62)
    return np.clip(acc, a["low"], a["high"]).astype(y.dtype)


def random_case(rng: np.random.Generator, op: str) -> Case | None:
    """Return a call of random shape, types and requantisation; None when the random numbers make no sense."""
    in_type = str(rng.choice(["int8", "uint8", "int16"]))
    bits = int(rng.choice([4, 8, 8, 16] if in_type == "int16" else [4, 8]))
    out_type = str(rng.choice(["int8", "uint8", "int16"]))
    k: dict[str, Any] = {"types": (in_type, bits, out_type), "extreme": bool(rng.random() < 0.2)}
    k["requant"] = str(rng.choice(["multiplier", "shift"]))
    k["rounding"] = str(rng.choice(["half_up", "floor"]))
    low, high = LIMITS[out_type]
    if rng.random() < 0.4:
        k["clamp"] = (0 if rng.random() < 0.6 else max(low, -int(rng.integers(1, 100))),
                      high if rng.random() < 0.5 else int(rng.integers(1, high)))  # fmt: skip
    channels, k["out"] = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 12])), int(rng.integers(1, 14))
    if op == "linear":
        k["shape"] = (int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.choice([1, 3, 4, 7, 8, 16, 31])))
    else:
        k |= _random_window(rng, op, channels)
    if k["requant"] == "multiplier":
        k["pre_shift"] = int(rng.choice([0, 0, 0, 1, 2]))
    elif rng.random() < 0.5:
        filters = channels if op == "depthwise" else k["out"]
        many = tuple(int(v) for v in rng.integers(3, 14, filters))
        k["shift"] = many if rng.random() < 0.6 else int(rng.integers(-2, 12))
    try:
        return make(rng, op=op, **k)
    except AssertionError:  # a sum, shifted to the left, leaves int32
        return None


def _random_window(rng: np.random.Generator, op: str, channels: int) -> dict[str, Any]:
    kh, kw = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    stride = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    if op == "depthwise" and rng.random() < 0.7:
        kh, kw, stride = 3, 3, (1, 1) if rng.random() < 0.5 else (2, 2)
    elif rng.random() < 0.3:
        kh, kw = 1, 1
    h, w = int(rng.integers(1, 9)), int(rng.integers(1, 20))
    if op == "conv" and rng.random() < 0.3:
        h, kh = 1, 1
    pad = (0, 0, 0, 0) if rng.random() < 0.4 else tuple(int(v) for v in rng.integers(0, 3, 4))
    h, w = max(h, kh - pad[0] - pad[1], 1), max(w, kw - pad[2] - pad[3], 1)
    found: dict[str, Any] = {"shape": (h, w, channels), "kernel": (kh, kw), "stride": stride, "pad": pad}
    if op == "conv" and rng.random() < 0.15:
        groups = int(rng.choice([g for g in (1, 2, 3, 4, 5, 6, 8) if channels % g == 0]))
        found |= {"groups": groups, "out": groups * int(rng.integers(1, 4))}
    return found


def random_cases(seed: int, count: int) -> list[Case]:
    """Return about `count` random calls: half convolutions, the rest depthwise and linear."""
    rng = np.random.default_rng(seed)
    made = [random_case(rng, str(op)) for op in rng.choice(["conv", "conv", "depthwise", "linear"], count)]
    return [case for case in made if case is not None]


def source(cases: list[Case]) -> str:
    """Return C: for each case n `caseN_x`, `caseN_y`, and a function `caseN` that runs it."""
    headers = sorted({h for case in cases for h in case.kernel.headers})
    parts = [f'#include "{h}"' for h in headers]
    parts += dict.fromkeys(i for case in cases for i in case.kernel.instances)
    for i, case in enumerate(cases):
        kernel, name = case.kernel, f"case{i}"
        parts.append(kernel.constants(f"{name}_k"))
        size = {d: int(np.prod(b.shape)) for d, b in (("x", case.x), ("y", case.y))}
        for d, b in (("x", case.x), ("y", case.y)):
            parts.append(f"{CTYPE[b.dtype]} {name}_{d}[{size[d]}] __attribute__((aligned(8)));")
        parts.append(f"uint8_t {name}_s[{max(8, kernel.scratch_bytes)}] __attribute__((aligned(8)));")
        call = kernel.call(f"{name}_k", f"{name}_x", f"{name}_y", f"{name}_s")
        parts.append(f"void {name}(void);\n__attribute__((noinline)) void {name}(void)\n{{\n    {call}\n}}")
    return "\n".join(parts) + "\n"


def run_host(cases: list[Case], compiler: str = "gcc", flags: tuple[str, ...] = ("-O2",)) -> None:
    """Compile a program that feeds every case and compares; raise AssertionError with its words otherwise."""
    text = source(cases) + "#include <stdio.h>\n#include <string.h>\n"
    main = ["int main(void) {\n    int bad = 0;"]
    for i, case in enumerate(cases):
        ctype_x, ctype_y = CTYPE[case.x.dtype], CTYPE[case.y.dtype]
        text += c_array(f"in{i}", case.data, ctype_x) + "\n" + c_array(f"out{i}", case.expected, ctype_y) + "\n"
        main.append(f"    memcpy(case{i}_x, in{i}, sizeof in{i}); case{i}();")
        main.append(f'    if (memcmp(case{i}_y, out{i}, sizeof out{i})) {{ bad = 1; printf("case {i} differs\\n"); }}')
    text += "\n".join(main) + "\n    return bad;\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.c"
        path.write_text(text)
        binary = path.with_suffix("")
        command = [compiler, *WARNINGS, *flags, str(path), "-o", str(binary)]
        _compile(command)
        done = subprocess.run([str(binary)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[:500] + done.stderr[:2000]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


# ---- Cortex-M in Unicorn ----

CPU_FLAGS = {
    "cortex-m4": ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    "cortex-m7": ("-mcpu=cortex-m7", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv5-sp-d16"),
    "cortex-m0plus": ("-mcpu=cortex-m0plus", "-mthumb", "-mfloat-abi=soft"),
}
LINK = """
SECTIONS {
    . = 0x10000;
    .text : { *(.text*) *(.rodata*) }
    /DISCARD/ : { *(.ARM.exidx*) }
    . = 0x20000000;
    .data : { *(.data*) *(.bss*) *(COMMON) }
}
"""


class Machine:
    """An image of cases on an emulated core."""

    def __init__(self, cases: list[Case], cpu: str = "cortex-m4", compiler: str = "gcc", opt: str = "-O3") -> None:
        self.cases, self.cpu = cases, cpu
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "k.c").write_text(source(cases))
            (folder / "link.ld").write_text(LINK)
            if compiler == "gcc":
                tool = ["arm-none-eabi-gcc", *CPU_FLAGS[cpu], "-fno-ipa-icf"]
                tail = ["-nostdlib", "-lgcc"]
            else:
                abi = "eabi" if cpu == "cortex-m0plus" else "eabihf"
                tool = [sys.executable, "-m", "ziglang", "cc", "-target", f"thumb-freestanding-{abi}"]
                tool += [f"-mcpu={cpu.replace('-', '_')}", "-fno-sanitize=all"]
                tail = []  # zig brings its own run-time library
            flags = [*WARNINGS, opt, "-ffreestanding", "-ffunction-sections", "-fdata-sections"]
            _compile([*tool, *flags, "-c", str(folder / "k.c"), "-o", str(folder / "k.o")])
            entries = [f"-Wl,-u,case{i}" for i in range(len(cases))]
            link = [f"-Wl,-T,{folder / 'link.ld'}", "-Wl,--gc-sections", "-Wl,-e,case0", *entries, *tail]
            _compile([*tool, str(folder / "k.o"), "-o", str(folder / "k.elf"), *link])
            self.elf = (folder / "k.elf").read_bytes()
        self._load()

    def _load(self) -> None:
        import io

        import unicorn
        import unicorn.arm_const as arm
        from elftools.elf.elffile import ELFFile

        elf = ELFFile(io.BytesIO(self.elf))
        table = elf.get_section_by_name(".symtab")
        self.symbols = {s.name: s["st_value"] for s in table.iter_symbols() if s["st_size"] or s["st_value"]}
        self.sizes = {s.name: s["st_size"] for s in table.iter_symbols() if s["st_info"]["type"] == "STT_FUNC"}
        self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        models = {"m4": arm.UC_CPU_ARM_CORTEX_M4, "m7": arm.UC_CPU_ARM_CORTEX_M7, "m0plus": arm.UC_CPU_ARM_CORTEX_M0}
        self.uc.ctl_set_cpu_model(models[self.cpu.removeprefix("cortex-")])
        self.uc.mem_map(0x10000, 0x400000)
        self.uc.mem_map(0x20000000, 0x400000)
        self.uc.mem_map(0x30000000, 0x1000)
        for segment in elf.iter_segments():
            if segment["p_type"] == "PT_LOAD" and segment["p_filesz"]:
                self.uc.mem_write(segment["p_vaddr"], segment.data())
        if self.cpu != "cortex-m0plus":
            self.uc.mem_map(0xE000E000, 0x1000)
            self.uc.mem_write(0xE000ED88, (0xF << 20).to_bytes(4, "little"))
            self.uc.reg_write(arm.UC_ARM_REG_FPEXC, 0x40000000)
        self.counted = 0
        lengths: dict[tuple[int, int], int] = {}

        def block(uc: Any, address: int, size: int, _: Any) -> None:
            key = (address, size)
            if key not in lengths:
                code = uc.mem_read(address, size)
                at = n = 0
                while at < size:
                    at += 4 if (code[at + 1] >> 3) in (0b11101, 0b11110, 0b11111) else 2
                    n += 1
                lengths[key] = n
            self.counted += lengths[key]

        self.uc.hook_add(unicorn.UC_HOOK_BLOCK, block)

    @property
    def code_bytes(self) -> int:
        """Bytes of all kernels, the functions of the cases left out."""
        return sum(size for name, size in self.sizes.items() if not name.startswith("case"))

    def run(self, i: int) -> tuple[np.ndarray, int]:
        """Return (output, instructions) of case i."""
        import unicorn.arm_const as arm

        case, uc = self.cases[i], self.uc
        for suffix, content in (("x", case.data.tobytes()), ("s", b"\x77" * case.kernel.scratch_bytes)):
            if f"case{i}_{suffix}" in self.symbols:  # absent when the case never reads it
                uc.mem_write(self.symbols[f"case{i}_{suffix}"], content)
        uc.reg_write(arm.UC_ARM_REG_SP, 0x20000000 + 0x3FFF00)
        uc.reg_write(arm.UC_ARM_REG_LR, 0x30000001)
        saved = {getattr(arm, f"UC_ARM_REG_R{r}"): 0x11110000 + r for r in range(4, 12)}
        for register, value in saved.items():
            uc.reg_write(register, value)
        self.counted = 0
        uc.emu_start(self.symbols[f"case{i}"] | 1, 0x30000000)
        assert all(uc.reg_read(r) == v for r, v in saved.items()), "a saved register was lost"
        assert uc.reg_read(arm.UC_ARM_REG_SP) == 0x20000000 + 0x3FFF00
        raw = bytes(uc.mem_read(self.symbols[f"case{i}_y"], case.expected.nbytes))
        return np.frombuffer(raw, case.expected.dtype).reshape(case.expected.shape), self.counted

    def check(self) -> list[int]:
        """Run every case, compare with NumPy, return the instruction counts."""
        counts = []
        for i, case in enumerate(self.cases):
            got, count = self.run(i)
            assert np.array_equal(got, case.expected), f"case {i} ({case.kernel.variant}) differs on {self.cpu}"
            counts.append(count)
        return counts

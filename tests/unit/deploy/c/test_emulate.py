"""The emulated cores: the program's bits on each, reproducible counts, stack."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from c_programs import KINDS, Sketch, batch, network, same_bits
from elftools.elf.elffile import ELFFile

from thrifty.deploy.c import counting
from thrifty.deploy.c.build import build
from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.emulate import emulate
from thrifty.deploy.run import run
from thrifty.errors import DataError, MissingExtra, ToolError

ON = [(kind, "cortex-m4", "gcc") for kind in KINDS]
ON += [(kind, core, "gcc") for kind in ("int8", "int16", "float32") for core in ("cortex-m0plus", "cortex-m7")]
ON += [
    ("int8", "cortex-m4", "zig"),
    ("int4", "cortex-m4", "zig"),
    ("float32", "cortex-m4", "zig"),
    ("int8", "cortex-m0plus", "zig"),
]


@pytest.mark.parametrize(("kind", "core", "compiler"), ON)
def test_the_emulated_core_gives_the_programs_bits(kind, core, compiler, built):
    program = network(kind)
    x = batch(program, 12)
    assert same_bits(emulate(built(kind, core, compiler), x, count=False).outputs, run(program, x))


def test_counts_are_reproducible_and_split_by_layer(built):
    image, x = built("int8"), batch(network("int8"), 3)
    first, again = emulate(image, x), emulate(image, x)
    assert (first.instructions_each, first.per_layer) == (again.instructions_each, again.per_layer)
    assert first.instructions == max(first.instructions_each)
    assert list(first.per_layer) == [call.name for call in network("int8").calls]
    rest = first.instructions - sum(first.per_layer.values())
    assert 0 < rest < 40  # model_run itself: its calls
    assert first.per_layer["flat"] == 0
    assert first.per_layer["stem"] > first.per_layer["relu"] > 0


def test_counting_changes_nothing(built):
    image, x = built("int8"), batch(network("int8"), 4)
    with_counts, without = emulate(image, x), emulate(image, x, count=False)
    assert same_bits(with_counts.outputs, without.outputs)
    assert with_counts.stack_bytes == without.stack_bytes
    assert without.instructions is None
    assert without.per_layer == {}


def test_both_counters_agree(built, monkeypatch):
    image, x = built("int8"), batch(network("int8"), 2)
    assert counting.native_hook() is not None
    native = emulate(image, x)
    monkeypatch.setattr(counting, "native_hook", lambda: None)
    plain = emulate(image, x)
    assert plain.instructions_each == native.instructions_each
    assert plain.per_layer == native.per_layer


def test_without_a_c_compiler_python_counts(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert counting.native_hook.__wrapped__() is None


def test_the_stack_counts_for_the_ram(built):
    e = emulate(built("int8"), batch(network("int8"), 1))
    assert 16 <= e.stack_bytes < 2048
    assert e.ram_bytes == built("int8").data_bytes + e.stack_bytes


def test_a_fault_says_where(built, tmp_path):
    image = built("int8")
    with image.elf.open("rb") as stream:
        elf = ELFFile(stream)
        symbol = elf.get_section_by_name(".symtab").get_symbol_by_name("layer_pool")[0]
        place = next(
            s for s in elf.iter_segments() if s["p_vaddr"] <= symbol["st_value"] < s["p_vaddr"] + s["p_filesz"]
        )
        offset = place["p_offset"] + (symbol["st_value"] & ~1) - place["p_vaddr"]
    data = bytearray(image.elf.read_bytes())
    data[offset : offset + 2] = bytes.fromhex("00de")  # udf #0
    broken = tmp_path / "broken.elf"
    broken.write_bytes(data)
    with pytest.raises(ToolError, match=r"cortex-m4 stopped in layer_pool"):
        emulate(replace(image, elf=broken), batch(network("int8"), 1))


def test_inputs_that_do_not_fit_are_refused(built):
    with pytest.raises(DataError, match=r"the model takes \(n, 8, 8, 3\)"):
        emulate(built("int8"), np.zeros((3, 8, 8)))


def test_without_unicorn_the_extra_is_named(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "unicorn", None)
    with pytest.raises(MissingExtra, match=r"thrifty\[deploy\]"):
        emulate(built("int8"), batch(network("int8"), 1))


@pytest.mark.parametrize("channels", [4, 8])
def test_gcc_removes_no_pooling_in_place(channels, tmp_path):
    """gcc 12 -O3 took the unclipped pooling for a function without effects, and dropped its call."""
    s = Sketch("int8", np.random.default_rng(3))
    s.buffer("image", (1, 128, channels), "uint8")
    pool = {"kernel": (1, 2), "stride": (1, 2), "pad": (0, 0, 0, 0)}
    x = s.call("maxpool", "first", ("image",), (1, 64, channels), "uint8", pool)
    y = s.call("clamp", "cut", (x,), (1, 64, channels), "uint8", {"low": 3})
    program = s.program("net", s.call("maxpool", "second", (y,), (1, 32, channels), "uint8", pool))
    x = batch(program, 4)
    image = build(emit(program, tmp_path / "c"), "cortex-m4", compiler="gcc")
    assert same_bits(emulate(image, x).outputs, run(program, x))

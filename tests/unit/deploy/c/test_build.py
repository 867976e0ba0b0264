"""Cross-compilation: two compilers, measured sizes, errors that say what to do."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from c_programs import batch, network, same_bits, tiny

from thrifty.deploy.c import build as build_module
from thrifty.deploy.c.build import WARNINGS, build, runtime, tool_environment
from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.emulate import emulate
from thrifty.deploy.run import run
from thrifty.deploy.targets import targets
from thrifty.errors import KnobError, MissingExtra, NoMatch, ToolError

KERNELS = sorted(runtime("start.c").parent.parent.joinpath("kernels").glob("*.h"))
M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
ZIG = [sys.executable, "-m", "ziglang", "cc", "-target", "thumb-freestanding-eabihf", "-mcpu=cortex_m4+vfp4d16sp"]
HOSTS = {
    "gcc": ["gcc"],
    "clang": ["clang"],
    "arm": ["arm-none-eabi-gcc", *M4],
    "m0": ["arm-none-eabi-gcc", "-mcpu=cortex-m0plus", "-mthumb"],
}


@pytest.mark.parametrize("compiler", HOSTS)
def test_every_kernel_compiles_alone(compiler):
    assert len(KERNELS) >= 14
    for header in KERNELS:
        source = f'#include "{header}"\nint nothing;\n'
        command = [*HOSTS[compiler], *WARNINGS, "-O1", "-c", "-x", "c", "-", "-o", "/dev/null"]
        done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{header.name}: {done.stderr[:2000]}"


def test_all_kernels_compile_together_under_zig(tmp_path):
    source = tmp_path / "all.c"
    source.write_text("".join(f'#include "{header}"\n' for header in KERNELS))
    command = [*ZIG, *WARNINGS, "-O1", "-c", source, "-o", tmp_path / "all.o"]
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=tool_environment())
    assert done.returncode == 0, done.stderr[:2000]


def test_sizes_are_those_of_the_linked_image(built):
    image = built("int8")
    out = subprocess.run(["arm-none-eabi-size", "-A", image.elf], capture_output=True, text=True, check=True).stdout
    sizes = {w[0]: int(w[1]) for w in map(str.split, out.splitlines()) if len(w) == 3 and w[0].startswith(".")}
    assert image.sections == {name: size for name, size in sizes.items() if size}
    assert image.flash_bytes == sum(size for name, size in sizes.items() if name != ".bss")
    assert image.data_bytes == image.sections[".bss"] >= image.manifest.arena_bytes
    assert image.flash_bytes > image.manifest.constant_bytes


def test_test_vectors_are_not_counted(built, tmp_path):
    assert build(emit(network("int8"), tmp_path / "c"), "cortex-m4").flash_bytes == built("int8").flash_bytes


def test_zig_serves_where_gcc_is_missing(monkeypatch, tmp_path):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "arm-none-eabi-gcc" else which(name))
    folder = emit(tiny(), tmp_path / "c")
    assert build(folder, "cortex-m4").compiler == "zig"
    with pytest.raises(MissingExtra, match="compiler='zig'"):
        build(folder, "cortex-m4", compiler="gcc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(MissingExtra, match=r"pip install 'thrifty\[deploy\]'"):
        build(folder, "cortex-m4")


def test_a_compiler_error_shows_the_compilers_words_and_the_command(tmp_path):
    folder = emit(tiny(), tmp_path / "c")
    source = folder / "net.c"
    source.write_text(source.read_text().replace("net_run(void)\n{", "net_run(void)\n{\n    no_such_function();"))
    with pytest.raises(ToolError, match=r"(?s)arm-none-eabi-gcc .*-O3.*no_such_function"):
        build(folder, "cortex-m4", compiler="gcc")


@pytest.mark.parametrize("knob", [{"target": "host"}, {"opt": "-O9"}, {"compiler": "tcc"}])
def test_knobs_outside_their_range_are_refused(knob, tmp_path):
    folder = emit(tiny(), tmp_path / "c")
    with pytest.raises(KnobError, match=r"host|-O9|tcc"):
        build(folder, **{"target": "cortex-m4", **knob})


def test_an_unknown_target_is_refused_with_its_neighbours(tmp_path):
    with pytest.raises(NoMatch, match="cortex-m4"):
        build(tmp_path, "cortex-m5")


def test_the_command_and_the_compiler_are_on_record(built):
    image = built("int8")
    assert "-ffp-contract=off" in image.command
    assert "-Werror" in image.command
    assert "arm-none-eabi-gcc" in image.version


@pytest.mark.parametrize("kind", ["int8", "int16", "float32"])
@pytest.mark.parametrize("opt", ["-O0", "-O1", "-O2", "-Os"])
def test_optimisation_does_not_change_a_bit(opt, kind, tmp_path):
    program = network(kind)
    x = batch(program, 3)
    image = build(emit(program, tmp_path / "c"), "cortex-m4", opt, "gcc")
    assert same_bits(emulate(image, x, count=False).outputs, run(program, x))


def test_the_cache_belongs_to_the_user():
    folder = build_module.cache_folder()
    assert folder.stat().st_mode & 0o077 == 0
    if "ZIG_GLOBAL_CACHE_DIR" not in os.environ:
        assert Path(tool_environment()["ZIG_GLOBAL_CACHE_DIR"]).parent == folder


def test_every_core_has_flags_for_both_compilers():
    for t in targets().values():
        assert (t.core == "host") == (not t.gcc_flags) == (not t.zig_flags) == (t.unicorn is None) == (t.qemu is None)


def test_make_qemu_works_from_the_emitted_folder_alone(tmp_path):
    program = tiny()
    x = batch(program, 2)
    for outputs, status in ((run(program, x), 0), (255 - run(program, x).view("uint8"), 1)):
        folder = emit(program, tmp_path / "c", (x, outputs.view("int8")))
        done = subprocess.run(["make", "-s", "-C", folder, "qemu"], capture_output=True, check=False)
        assert (done.returncode != 0) == status, done.stderr

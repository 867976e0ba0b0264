"""The emitted folder: deterministic, self-contained, never half-written."""

import json
import re
import subprocess

import numpy as np
import pytest
from c_programs import KINDS, batch, network, tiny

from thrifty import arith
from thrifty.deploy.c.emit import emit, render
from thrifty.deploy.c.manifest import Manifest
from thrifty.deploy.program import Buffer, Program
from thrifty.deploy.run import run
from thrifty.deploy.targets import target
from thrifty.errors import DataError, KnobError


def vectors(program, count=2):
    x = batch(program, count)
    return x, run(program, x)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_program_gives_the_same_bytes(kind, tmp_path):
    first = emit(network(kind), tmp_path / "a", vectors(network(kind)))
    again = emit(network(kind), tmp_path / "b", vectors(network(kind)))
    assert contents(first) == contents(again)


def test_the_folder_says_what_is_in_it(tmp_path):
    folder = emit(network("int8"), tmp_path / "c")
    manifest = Manifest.read(folder)
    assert set(manifest.files) == set(contents(folder))
    assert manifest.input.shape == (8, 8, 3)
    assert manifest.output.size_bytes == 10
    assert [layer.op for layer in manifest.layers] == [call.op for call in network("int8").calls]
    assert manifest.arena_bytes >= 8 * 8 * (3 + 8)


def test_only_the_kernels_that_are_needed_are_copied(tmp_path):
    kernels = {p.name for p in (emit(tiny(), tmp_path / "c") / "kernels").iterdir()}
    assert kernels == {"add.h", "clamp.h", "simd.h"}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_stdint_is_included(kind, tmp_path):
    folder = emit(network(kind), tmp_path / "c", vectors(network(kind)))
    own = {p.name for p in folder.rglob("*.h")}
    for path in folder.rglob("*.[ch]"):
        for name in re.findall(r"#\s*include\s+[<\"]([^>\"]+)", path.read_text()):
            assert name in ("stdint.h", "stddef.h") or name.split("/")[-1] in own, (path.name, name)


def test_layers_are_told_apart_by_module_operator_and_shape(tmp_path):
    text = (emit(network("int8"), tmp_path / "c") / "net.c").read_text()
    assert "/* Layer 2: depthwise, module block.0\n" in text
    assert "from pool_out: uint8 (4, 4, 8), scale 2^-2" in text
    assert "NET_LAYER void layer_block_0(void)" in text


def test_a_copy_in_place_has_no_code(tmp_path):
    folder = emit(network("int8"), tmp_path / "c")
    flat = next(layer for layer in Manifest.read(folder).layers if layer.name == "flat")
    assert flat.function == ""
    assert "Nothing to do" in (folder / "net.c").read_text()


def test_equal_constants_are_there_once(tmp_path):
    program = network("int8")
    lookup = next(c for c in program.calls if c.op == "lookup")
    assert (emit(program, tmp_path / "c") / "net.c").read_text().count("curve_table[256]") == 1
    assert lookup.constants["table"].size == 256


def test_inner_kernels_are_made_once_before_the_layers(tmp_path):
    text = (emit(network("int8"), tmp_path / "c") / "net.c").read_text()
    made = re.findall(r"^THRIFTY_\w+\(.*\)$", text, re.MULTILINE)
    assert made
    assert len(made) == len(set(made))
    assert text.rindex(made[-1]) < text.index("/* Layer 0")
    assert "HAS_" not in text


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_the_self_test_passes_and_fails_when_it_should(kind, tmp_path):
    program = network(kind)
    x, y = vectors(program)
    emit(program, tmp_path / "c", (x, y))
    assert subprocess.run(["make", "-s", "-C", tmp_path / "c"], check=False).returncode == 0
    wrong = y.copy()
    wrong[-1, 0, 0, -1] += 1
    emit(program, tmp_path / "c", (x, wrong))
    assert subprocess.run(["make", "-s", "-C", tmp_path / "c"], check=False, capture_output=True).returncode != 0


def test_an_emission_without_vectors_compiles_and_says_that_it_checks_nothing(tmp_path):
    folder = emit(tiny(), tmp_path / "c")
    assert "checks nothing" in (folder / "main.c").read_text()
    subprocess.run(["make", "-s", "-C", folder], check=True)


def test_vectors_of_another_shape_or_range_are_refused(tmp_path):
    x, y = vectors(tiny())
    with pytest.raises(DataError, match="test inputs have shape"):
        emit(tiny(), tmp_path / "c", (x[0], y))
    with pytest.raises(DataError, match="test outputs have shape"):
        emit(tiny(), tmp_path / "c", (x, y[:1]))
    with pytest.raises(DataError, match="do not fit int8"):
        emit(tiny(), tmp_path / "c", (x.astype(int) + 200, y))
    assert not list(tmp_path.iterdir())


def test_an_earlier_emission_is_replaced_and_other_files_stay(tmp_path):
    folder = emit(network("int8", name="old"), tmp_path / "c")
    (folder / "notes.txt").write_text("mine")
    emit(tiny(), folder)
    files = set(contents(folder))
    assert files == {*Manifest.read(folder).files, "notes.txt"}
    assert "old.c" not in files


@pytest.mark.parametrize("name", ["Makefile", "model.json"])
def test_files_of_others_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(KnobError, match=name):
        emit(tiny(), tmp_path)
    assert contents(tmp_path) == {name: "{}"}


def test_a_manifest_cannot_make_files_elsewhere_vanish(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = emit(tiny(), tmp_path / "c")
    manifest = json.loads((folder / "model.json").read_text())
    manifest["files"] += ["../precious", str(precious)]
    (folder / "model.json").write_text(json.dumps(manifest))
    emit(tiny(), folder)
    assert precious.exists()


def test_a_folder_that_emit_did_not_write_has_no_manifest(tmp_path):
    with pytest.raises(KnobError, match="no emitted model"):
        Manifest.read(tmp_path)


def test_a_program_without_calls_hands_its_input_through(tmp_path):
    program = Program("echo", {"x": Buffer("x", (1, 1, 3), "int8")}, (), "x", "x")
    x = batch(program, 2)
    emit(program, tmp_path / "c", (x, x))
    subprocess.run(["make", "-s", "-C", tmp_path / "c"], check=True)


QUANTIZE = """
#define NET_WITH_FLOAT_INPUT
#include "net.h"
#include <stdio.h>
int main(void)
{
    static float real[NET_INPUT_SIZE];
    static net_input_t stored[NET_INPUT_SIZE];
    if (fread(real, sizeof real, 1, stdin) != 1) return 1;
    net_quantize_input(real, stored);
    return fwrite(stored, sizeof stored, 1, stdout) != 1;
}
"""


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("scale", [2.0**-5, 0.0472])
def test_real_inputs_are_quantised_by_the_one_rule(dtype, scale, tmp_path):
    scale = float(np.float32(scale))
    program = Program("net", {"x": Buffer("x", (10, 10, 10), dtype, scale)}, (), "x", "x")
    fmt = arith.Format(16 if dtype == "int16" else 8, dtype != "uint8", (scale,))
    real = np.random.default_rng(0).normal(0, fmt.high * scale, 1000).astype(np.float32)
    ties = (np.arange(-100, 100) + 0.5) * scale
    real[:200], real[200:204] = ties, (-0.0, 1e30, -1e30, np.inf)
    for name, text in render(program, None, target("host")).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "q.c").write_text(QUANTIZE)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(["cc", *flags, "q.c", "net.c", "-o", "q"], cwd=tmp_path, check=True)
    out = subprocess.run([tmp_path / "q"], input=real.tobytes(), capture_output=True, check=True).stdout
    assert np.array_equal(np.frombuffer(out, dtype), arith.quantize(real, fmt))

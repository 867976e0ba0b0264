"""The second witness agrees with the first: outputs bit for bit, instructions within a tick of the counter."""

import shutil

import pytest
from c_programs import batch, network, same_bits

from thrifty.deploy.c.emulate import emulate
from thrifty.deploy.c.qemu import qemu
from thrifty.deploy.run import run
from thrifty.errors import MissingExtra

ON = [("int8", "cortex-m4"), ("int8", "cortex-m0plus"), ("float32", "cortex-m7")]


@pytest.mark.parametrize(("kind", "core"), ON)
def test_qemu_and_unicorn_agree(kind, core, built):
    program, image = network(kind), built(kind, core)
    x = batch(program, 4)
    witness, emulation = qemu(image, x), emulate(image, x)
    assert same_bits(witness.outputs, run(program, x))
    assert same_bits(witness.outputs, emulation.outputs)
    for a, b in zip(witness.instructions_each, emulation.instructions_each, strict=True):
        assert abs(a - b) <= witness.tolerance


def test_two_runs_count_the_same(built):
    x = batch(network("int8"), 2)
    assert qemu(built("int8"), x).instructions_each == qemu(built("int8"), x).instructions_each


def test_a_missing_qemu_is_named(built, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith("qemu") else which(name))
    with pytest.raises(MissingExtra, match="qemu-system-arm"):
        qemu(built("int8"), batch(network("int8"), 1))

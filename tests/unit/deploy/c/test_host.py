"""The emitted C on this computer: the program's bits, under two compilers and the sanitizers."""

import numpy as np
import pytest
from c_programs import KINDS, batch, network, same_bits, tiny

from thrifty.deploy.c import host
from thrifty.deploy.c.host import run_host
from thrifty.deploy.run import run
from thrifty.errors import DataError, MissingExtra, ToolError


@pytest.mark.parametrize("kind", KINDS)
def test_host_gives_the_programs_bits(kind):
    program = network(kind)
    x = batch(program, 50)
    assert same_bits(run_host(program, x), run(program, x))


@pytest.mark.parametrize("kind", KINDS)
def test_clang_with_sanitizers_gives_the_programs_bits(kind):
    program = network(kind)
    x = batch(program, 5)
    assert same_bits(run_host(program, x, compiler="clang", sanitize=True), run(program, x))


def test_one_example_needs_no_batch_axis():
    x = batch(tiny(), 1)
    assert same_bits(run_host(tiny(), x[0]), run(tiny(), x))


def test_a_program_is_compiled_once(monkeypatch):
    program = tiny()
    run_host(program, batch(program, 1))
    monkeypatch.setattr(host, "run_tool", lambda *_: pytest.fail("compiled again"))
    run_host(program, batch(program, 2))


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 5, 4, 3)), np.zeros((0, 4, 4, 3)), np.full((1, 4, 4, 3), 128), np.full((1, 4, 4, 3), np.nan)]
)
def test_inputs_that_do_not_fit_are_refused(bad):
    with pytest.raises(DataError, match="inputs"):
        run_host(tiny(), bad)


def test_a_missing_compiler_is_named():
    with pytest.raises(MissingExtra, match="no-such-cc"):
        run_host(tiny(), batch(tiny(), 1), compiler="no-such-cc")


def test_a_refused_option_shows_the_compilers_own_words():
    with pytest.raises(ToolError, match="-fno-such-option"):
        run_host(tiny(), batch(tiny(), 1), flags=("-fno-such-option",))

"""Names and numbers in C: valid, unique, exact."""

import re
import subprocess

import numpy as np
import pytest
from c_programs import batch, tiny
from hypothesis import given
from hypothesis import strategies as st

from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.host import run_host
from thrifty.deploy.c.text import KEYWORDS, c_array, c_float, c_name, c_names, c_number, comment
from thrifty.deploy.program import Buffer, Call, Program
from thrifty.deploy.run import run
from thrifty.errors import DataError

IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
NAMES = st.one_of(st.text(max_size=12), st.sampled_from(sorted(KEYWORDS)), st.from_regex(r"[a-c_.0-2]{0,4}"))


@given(st.lists(NAMES, max_size=12), st.sets(NAMES.map(c_name), max_size=6))
def test_any_names_become_different_identifiers(wanted, taken):
    names = c_names(wanted, taken)
    assert len(names) == len(wanted) == len(set(names))
    assert not set(names) & (taken | KEYWORDS)
    assert all(IDENTIFIER.fullmatch(name) for name in names)


@given(NAMES)
def test_a_name_stays_once_it_is_an_identifier(name):
    assert c_name(c_name(name).rstrip("_")) == c_name(name)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_floats_read_back_to_the_same_bits(value):
    text = c_float(value)
    assert re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?f", text)
    assert "." in text or "e" in text  # 2f is no C
    assert np.float32(float(text[:-1])).tobytes() == np.float32(value).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(value):
    with pytest.raises(DataError, match="finite"):
        c_float(value)
    with pytest.raises(DataError, match="non-finite"):
        c_array("w", np.array([1.0, value], np.float32), "float")


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60))
def test_integer_arrays_read_back(values):
    text = c_array("w", np.array(values, np.int32), "int32_t")
    assert all(len(line) <= 110 for line in text.splitlines())
    body = text[text.index("{") + 1 : text.rindex("}")]
    assert [eval(v) for v in body.replace("\n", " ").split(",")[:-1]] == values


def test_the_most_negative_integer_is_an_expression_of_the_right_type():
    assert c_number(-(2**31), "int32_t") == "(-2147483647 - 1)"
    assert c_number(2**32 - 1, "uint32_t") == "4294967295u"


@given(st.text())
def test_comments_cannot_be_left(text):
    safe = comment(text)
    assert "*/" not in safe
    assert "/*" not in safe
    assert safe.isascii()


HOSTILE = [
    "int", "arena", "model.run", "model_input", "thrifty_add_s8_s8_s8", "MODEL_LAYER", "INT8_MAX",
    "int8_t", "0", "a.b", "a_b", "layer_a", "main", "*/ #error",
    "größe", "x", "THRIFTY_DSP", "arena_2", "and", "unix",
]  # fmt: skip


def test_hostile_module_names_compile(tmp_path):
    buffers = {n: Buffer(n, (1, 1, 4), "int8", 1.0, n) for n in HOSTILE}
    names = list(buffers)
    table = {"table": np.arange(-128, 128).astype(np.int8)}
    calls = tuple(
        Call("lookup", name, (a,), b, {}, {"table": np.roll(table["table"], i)}, module=b)
        for i, (name, a, b) in enumerate(zip(HOSTILE[::-1], names, names[1:]))
    )
    program = Program("model", buffers, calls, names[0], names[-1])
    x = batch(program, 3)
    assert np.array_equal(run_host(program, x), run(program, x))
    emit(program, tmp_path / "c", (x, run(program, x)))
    subprocess.run(["make", "-s", "-C", tmp_path / "c", "CC=clang"], check=True)


def test_the_prefix_of_public_names_is_the_name_of_the_program(tmp_path):
    folder = emit(tiny(name="My net-2"), tmp_path / "c")
    header = (folder / "My_net_2.h").read_text()
    assert "void My_net_2_run(void);" in header
    assert "#define MY_NET_2_INPUT_SIZE 48" in header

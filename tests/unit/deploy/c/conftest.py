"""Images of hand-written programs, each built once for all tests."""

import functools

import pytest
from c_programs import batch, network

from thrifty.deploy.c.build import build
from thrifty.deploy.c.emit import emit
from thrifty.deploy.run import run


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Return a function (kind, target, compiler) -> Image of `network(kind)`."""

    @functools.cache
    def folder(kind):
        program = network(kind)
        x = batch(program, 2)
        return emit(program, tmp_path_factory.mktemp(kind) / "c", (x, run(program, x)))

    @functools.cache
    def image(kind, target="cortex-m4", compiler="gcc"):
        return build(folder(kind), target, compiler=compiler)

    return image

"""deploy(): the one call from a graph to a proven C project, and what it refuses."""

import errno
import os

import numpy as np
import pytest

from thrifty.arith import Format
from thrifty.deploy import deploy, measure, rehearse
from thrifty.deploy.fidelity import layer_fidelity, signal_to_error
from thrifty.deploy.lower import lower
from thrifty.deploy.run import predict
from thrifty.errors import DataError, KnobError, MissingExtra, NoMatch, StoreError, UnsupportedModel
from thrifty.graph import Graph, Node

INT8 = Format(8, True, (2.0**-5,))


def network(channels=8, fmt=INT8, op="relu"):
    """A convolution, an activation, a pool and a linear layer on 1 x 6 x 6, with formats unless `fmt` is None."""
    rng = np.random.default_rng(0)
    w1 = rng.normal(0, 0.4, (channels, 1, 3, 3)).astype(np.float32)
    w2 = rng.normal(0, 0.3, (3, channels)).astype(np.float32)
    weight = None if fmt is None else Format(8, True, (2.0**-6,))
    conv = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    pool = {"kernel": (6, 6), "stride": (6, 6), "padding": ((0, 0), (0, 0)), "ceil": False, "count_include_pad": True}
    nodes = (
        Node("x", "input", shape=(1, 6, 6), format=fmt),
        Node(
            "c", "conv", ("x",), conv, (channels, 6, 6), module="body.0", constants={"weight": w1}, weight_format=weight
        ),
        Node("r", op, ("c",), {}, (channels, 6, 6), module="body.1", format=fmt),
        Node("p", "avgpool", ("r",), pool, (channels, 1, 1), format=fmt),
        Node("f", "flatten", ("p",), {}, (channels,)),
        Node(
            "y", "linear", ("f",), {}, (3,), module="head", constants={"weight": w2}, weight_format=weight, format=fmt
        ),
    )
    return Graph(nodes, ("y",))


@pytest.fixture
def samples():
    return np.random.default_rng(1).normal(0, 1, (12, 1, 6, 6)).astype(np.float32)


def test_a_graph_becomes_a_proven_project(tmp_path, samples):
    done = deploy(network(), tmp_path / "c", samples=samples, vectors=4, name="tiny")
    assert done.proven
    assert done.parity.samples == {"program": 12, "host C": 12, "cortex-m4 (emulated)": 4}
    assert set(done.parity.mismatches.values()) == {0}
    assert done.target == "cortex-m4"
    assert (done.flash_bytes, done.ram_bytes) == (done.cost.flash_bytes, done.cost.ram_bytes)
    assert done.instructions == done.cost.instructions > done.cost.macs / 2
    assert sum(done.layer_instructions.values()) <= done.instructions
    assert 0 < done.stack_bytes < done.ram_bytes
    assert done.image.elf.is_file()
    assert done.image.folder == tmp_path / "c"
    assert (tmp_path / "c" / "tiny.c").is_file()
    assert not (tmp_path / "c" / "build").exists()  # sources only
    assert [p.name for p in tmp_path.iterdir()] == ["c"]  # nothing temporary is left
    assert done.cost.params == 8 * 9 + 8 + 8 * 3 + 3
    layers = {layer.name: layer for layer in done.layers()}
    assert layers["c"].shape == (8, 6, 6)
    assert layers["c"].macs == 36 * 9 * 8
    assert layers["y"].module == "head"


def test_without_samples_the_vectors_are_random_and_equal(tmp_path):
    program = lower(network())
    first, second = (deploy(program, tmp_path / n, vectors=5) for n in "ab")
    assert first.cost == second.cost
    assert (tmp_path / "a" / "main.c").read_bytes() == (tmp_path / "b" / "main.c").read_bytes()
    assert first.parity.samples["program"] == 5
    again = deploy(program, tmp_path / "a", vectors=5)
    assert again.cost == first.cost


def test_float32_and_the_host(tmp_path, samples):
    graph = network(fmt=None)
    done = deploy(graph, tmp_path / "c", samples=samples)
    assert done.proven
    host = deploy(graph, tmp_path / "h", "host", samples=samples)
    assert host.proven
    assert host.image is None
    assert host.instructions is None
    assert host.flash_bytes is None
    assert host.ram_bytes >= lower(graph).buffers["x"].size_bytes
    assert measure(lower(graph)).flash_bytes == done.flash_bytes


def test_a_rehearsal_measures_the_same_and_leaves_nothing(tmp_path, samples, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    kept = deploy(network(), tmp_path / "c", samples=samples)
    tried = rehearse(network(), samples=samples)
    assert tried.cost == kept.cost
    assert tried.folder is None
    assert tried.image is None


def test_a_difference_is_counted(tmp_path, samples, monkeypatch):
    from thrifty.deploy.c import host

    plain = host.run_host

    def wrong(program, stored):
        y = plain(program, stored).copy()
        y[3] += 1
        y[7, 0, 0, 0] -= 1
        return y

    monkeypatch.setattr(host, "run_host", wrong)
    done = deploy(network(), tmp_path / "c", samples=samples)
    assert not done.proven
    assert done.parity.mismatches["host C"] == 2


def test_without_a_host_compiler_the_target_is_proven_alone(tmp_path, samples, monkeypatch):
    from thrifty.deploy.c import host

    def missing(*_):
        raise MissingExtra("no cc")

    monkeypatch.setattr(host, "run_host", missing)
    done = deploy(network(), tmp_path / "c", samples=samples, vectors=3)
    assert done.parity.samples == {"program": 3, "cortex-m4 (emulated)": 3}


def test_everything_that_cannot_be_deployed_is_listed(tmp_path):
    graph = network(fmt=None, op="aten.elu.default")
    worse = graph.with_nodes({"p": Node("p", "aten.mean.dim", ("r",), {}, (8, 1, 1), module="pool")})
    with pytest.raises(UnsupportedModel) as caught:
        deploy(worse, tmp_path / "c")
    assert len(caught.value.refusals) == 2
    assert "body.1" in str(caught.value)
    assert "pool" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"target": "cortex-m44"}, NoMatch, "close: cortex-m4"),
        ({"vectors": 0}, KnobError, "at least one test vector"),
        ({"samples": np.zeros((0, 1, 6, 6))}, DataError, "no samples"),
        ({"samples": np.full((2, 1, 6, 6), np.nan)}, DataError, "NaN"),
        ({"samples": np.zeros((2, 6, 1, 7))}, DataError, r"\(2, 6, 1, 7\)"),
        ({"samples": np.zeros((2, 36))}, DataError, r"\(2, 36\)"),
    ],
)
def test_bad_requests_leave_nothing(tmp_path, options, kind, word):
    with pytest.raises(kind, match=word):
        deploy(network(), tmp_path / "c", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flash", "ram", "word"), [(2000, None, "flash"), (None, 300, "RAM"), (2000, 300, "RAM")])
def test_a_target_that_is_too_small_is_refused(tmp_path, monkeypatch, flash, ram, word):
    from dataclasses import replace

    from thrifty.deploy import targets

    small = replace(targets.target("cortex-m4"), name="small", title="a small board", flash_bytes=flash, ram_bytes=ram)
    monkeypatch.setitem(targets.targets(), "small", small)
    with pytest.raises(KnobError, match=f"does not fit a small board.*{word}"):
        deploy(network(), tmp_path / "c", "small")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    import pathlib

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(StoreError, match="No space left on device"):
        deploy(network(), tmp_path / "c")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        deploy(network(), tmp_path / "file" / "c")


def test_a_project_of_an_earlier_call_survives_a_failure(tmp_path, monkeypatch):
    deploy(network(), tmp_path / "c")
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    from thrifty.deploy.c import emulate

    def broken(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(emulate, "emulate", broken)
    with pytest.raises(StoreError):
        deploy(network(channels=4), tmp_path / "c")
    assert {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()} == before


# float against integer, layer by layer


def test_fidelity_is_the_ratio_of_signal_to_error(samples):
    program, exact = lower(network()), lower(network(fmt=None))
    found = layer_fidelity(program, exact, samples)
    assert set(found) == {c.name for c in program.calls}
    decibels = {name: value for name, (value, _) in found.items()}
    assert all(10 < d < 60 for d in decibels.values() if d is not None)
    difference = predict(exact, samples) - predict(program, samples)
    by_hand = 10 * np.log10((predict(exact, samples) ** 2).sum() / (difference**2).sum())
    assert decibels["y"] == pytest.approx(by_hand)
    assert signal_to_error(np.ones(3), np.ones(3)) == float("inf")
    assert signal_to_error(np.zeros(3), np.ones(3)) == float("-inf")


def test_saturation_is_the_share_of_clipped_outputs(samples):
    narrow = network(fmt=Format(8, True, (2.0**-9,)))
    wide = network(fmt=Format(8, True, (2.0**-3,)))
    exact = lower(network(fmt=None))
    shares = [layer_fidelity(lower(g), exact, samples)["c"][1] for g in (narrow, wide)]
    assert shares[0] > 0.1
    assert shares[1] == 0.0

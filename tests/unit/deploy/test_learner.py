"""Learning on the device: every state byte and every answer is the replay's, whatever the compiler and the core."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from learner_cases import CASES, stream

from thrifty.associative import Anchors, Codes, Feed, State
from thrifty.deploy.c.build import WARNINGS, build
from thrifty.deploy.c.emit import emit
from thrifty.deploy.c.emulate import Core
from thrifty.deploy.c.learner import LearnerC, describe
from thrifty.deploy.c.manifest import Manifest
from thrifty.deploy.c.stream_learner import carry_out, on_host
from thrifty.deploy.learner import (
    CLASSIFY,
    LEARN,
    Learner,
    Requests,
    deploy_learner,
    rehearse_learner,
    replay,
)
from thrifty.deploy.plan import beside, plan
from thrifty.deploy.program import Buffer, Call, Program
from thrifty.deploy.run import run
from thrifty.errors import DataError, KnobError


def requests_for(memory, n, seed=0, **more):
    what, labels, levels = stream(memory, n, seed, **more)
    return Requests(what, labels, levels.reshape(n, 1, 1, memory.features))


def little_network(dtype="int8", features=12):
    """A program of one linear layer, int8 (4, 4, 2) -> features of a type."""
    rng = np.random.default_rng(1)
    limits = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}[dtype]
    attrs = {"weight_bits": 8, "requant": "multiplier", "pre_shift": 0, "shift": (0,), "rounding": "half_up"}
    gain = 2**24 if dtype != "int16" else 2**30
    constants = {
        "weight": rng.integers(-128, 128, (features, 32)).astype(np.int8),
        "bias": rng.integers(-9000, 9000, features).astype(np.int32),
        "multiplier": rng.integers(gain // 2, gain, features).astype(np.int32),
    }
    buffers = {"x": Buffer("x", (4, 4, 2), "int8"), "y": Buffer("y", (1, 1, features), dtype, 0.1)}
    call = Call(
        "linear", "head", ("x",), "y", {"low": limits[0], "high": limits[1], **attrs}, constants, macs=32 * features
    )
    return Program("net", buffers, (call,), "x", "y")


def images(n, classes, seed=2):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    centres = rng.integers(-100, 100, (classes, 4, 4, 2))
    return np.clip(centres[y] + rng.integers(-25, 26, (n, 4, 4, 2)), -128, 127).astype(np.int8), y


# ---- the same bytes


@pytest.mark.parametrize("name", CASES)
def test_every_learner_on_the_emulated_m4_and_on_this_computer(name):
    memory = CASES[name]
    made = rehearse_learner(Learner.alone(memory), requests_for(memory, 70, seed=1))
    assert made.parity.mismatches == {"host C": 0, "cortex-m4 (emulated)": 0}
    assert made.parity.samples == {"program": 70, "host C": 70, "cortex-m4 (emulated)": 70}
    assert made.proven


def test_five_hundred_examples_with_classes_that_come_late(tmp_path):
    memory = Anchors(18, 6, parts=3, anchors=2)
    requests = requests_for(memory, 1100, chances=(0.5, 0.5, 0.0, 0.0))
    assert (requests.what == LEARN).sum() > 500
    seen = requests.labels[requests.what == LEARN]
    assert set(seen[:80]) == {0}
    assert set(seen) == set(range(7))  # one of them has no room: refused
    made = deploy_learner(Learner.alone(memory), tmp_path / "c", requests)
    assert made.proven
    answers = replay(Learner.alone(memory), requests).answers
    assert (answers[(requests.what == LEARN) & (requests.labels == 6)] == 0).all()
    done = answers[requests.what == CLASSIFY]
    assert (done == requests.labels[requests.what == CLASSIFY])[-200:].mean() > 0.8
    assert made.learn_instructions < made.classify_instructions


@pytest.mark.parametrize(
    ("name", "compiler"),
    [(n, "gcc") for n in CASES] + [(n, "clang") for n in ("sums", "sums wide", "means stochastic", "bits", "counts")],
)
def test_two_compilers_under_sanitizers(name, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    memory = CASES[name]
    learner, requests = Learner.alone(memory), requests_for(memory, 60, seed=2)
    answers, states = on_host(learner, requests, compiler, sanitize=True)
    expected = replay(learner, requests)
    assert (answers == expected.answers).all()
    assert states == expected.states


@pytest.mark.parametrize(
    ("name", "core", "compiler"),
    [
        ("sums", "cortex-m0plus", "gcc"),
        ("means stochastic", "cortex-m0plus", "gcc"),
        ("counts", "cortex-m7", "gcc"),
        ("sums l1 bytes", "cortex-m4", "zig"),
        ("means", "cortex-m4", "zig"),
        ("bits", "cortex-m0plus", "zig"),
    ],
)
def test_other_cores_and_compilers(name, core, compiler):
    memory = CASES[name]
    made = rehearse_learner(Learner.alone(memory), requests_for(memory, 40, seed=3), core, compiler)
    assert made.proven
    assert made.parity.samples[f"{core} (emulated)"] == 40


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_behind_a_network(dtype):
    x, y = images(40, 3)
    memory = Anchors(12, 3, parts=4, anchors=2)
    program = little_network(dtype)
    features = run(program, x).reshape(40, -1)
    low, high = np.percentile(features, [5, 95]).astype(int)
    learner = Learner.behind(program, memory, Feed.of(dtype, int(low), int(high)))
    requests = Requests.test_then_learn(x, y)
    made = rehearse_learner(learner, requests)
    assert made.proven
    done = replay(learner, requests)
    assert done.state["saturated"][0] == learner.feed.levels(features)[1].sum() > 0
    assert (done.answers[::2] == y)[20:].mean() > 0.8
    assert made.network_instructions > 12 * 32 / 2
    assert made.state_bytes == done.state.size_bytes


def test_the_networks_own_output_is_not_touched():
    program, memory = little_network(), Anchors(12, 3, parts=4, anchors=2)
    x, y = images(10, 3)
    made = emit_and_build(Learner.behind(program, memory))
    core = Core(made)
    for image, label in zip(x, y):
        before = core.run(image)
        for function, argument in (("learn", int(label)), ("classify", 0), ("learn", 99)):
            core.call(core.symbols[f"net_{function}"], argument)
            assert core.uc.mem_read(core.output, 12) == before.tobytes()
        assert (before.reshape(-1) == run(program, image[None]).reshape(-1)).all()


def emit_and_build(learner, place=None):
    import tempfile
    from pathlib import Path

    folder = Path(place or tempfile.mkdtemp()) / "c"
    dtype = learner.program.buffers[learner.program.output].dtype
    emit(learner.program, folder, addition=LearnerC(learner.memory, learner.feed, dtype, learner.start))
    return build(folder, "cortex-m4")


# ---- memory


def test_the_state_is_counted_in_ram_and_shared_with_nothing(tmp_path):
    program, memory = little_network(), Anchors(12, 3, parts=4, anchors=2)
    with_learner = emit_and_build(Learner.behind(program, memory), tmp_path)
    emit(program, tmp_path / "bare")
    bare = build(tmp_path / "bare", "cortex-m4")
    state = State(memory.fields()).size_bytes
    ballot = 3 * (8 + 4) + 4
    arena = with_learner.manifest.arena_bytes - bare.manifest.arena_bytes
    assert with_learner.data_bytes - bare.data_bytes == pytest.approx(state + ballot + arena, abs=12)
    assert with_learner.manifest.learner.state_bytes == state
    core = Core(with_learner)
    arena_at, state_at = core.output, core.symbols["net_state"]
    assert not arena_at - 40 < state_at < arena_at + with_learner.manifest.arena_bytes


def test_scratch_lies_beside_the_output_and_grows_the_arena_only_when_it_must():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(1, 200, 3)
        b = {name: Buffer(name, (1, 1, int(s)), "int8") for name, s in zip("xyz", sizes)}
        whole = Program("p", b, (Call("conv", "c", ("x",), "y"), Call("conv", "d", ("y",), "z")), "x", "z")
        first, size = plan(whole), int(rng.integers(1, 400))
        found, offset = beside(whole, first, size)
        start, end = found.offsets["z"], found.offsets["z"] + b["z"].size_bytes
        assert offset + size <= start or offset >= end
        assert offset % 8 == 0
        assert offset + size <= found.arena_bytes
        assert found.bound_bytes <= found.arena_bytes
        assert found.arena_bytes >= first.arena_bytes
        if size <= max(start, first.arena_bytes - end - 7):
            assert found.arena_bytes == first.arena_bytes


# ---- what is emitted


def test_the_self_test_passes_here_and_on_qemu_and_fails_on_a_changed_state(tmp_path):
    memory = Codes(np.random.default_rng(4).integers(0, 256, (5, 12)), classes=3, parts=4)
    x, y = images(10, 3)
    learner = Learner.behind(little_network(), memory)
    deploy_learner(learner, tmp_path / "c", Requests.test_then_learn(x, y), vectors=12)
    assert subprocess.run(["make", "-C", tmp_path / "c"], capture_output=True, check=False).returncode == 0
    if shutil.which("qemu-system-arm"):
        assert subprocess.run(["make", "-C", tmp_path / "c", "qemu"], capture_output=True, check=False).returncode == 0
    main = tmp_path / "c" / "main.c"
    text = main.read_text()
    place = text.index("test_state[")
    first = text.index("{", place)
    changed = text[:first] + text[first:].replace(" 0,", " 1,", 1)
    assert changed != text
    main.write_text(changed)
    assert subprocess.run(["make", "-C", tmp_path / "c"], capture_output=True, check=False).returncode != 0


def test_without_requests_the_self_test_shows_how_to_call(tmp_path):
    learner = Learner.alone(CASES["sums"])
    emit(learner.program, tmp_path / "c", addition=LearnerC(learner.memory, learner.feed, "uint8"))
    assert subprocess.run(["make", "-C", tmp_path / "c"], capture_output=True, check=False).returncode == 0
    assert "learner_learn(label)" in (tmp_path / "c" / "README.md").read_text()


def test_equal_learners_give_equal_files_and_no_learner_none(tmp_path):
    learner = Learner.alone(CASES["bits"])
    for name in ("a", "b"):
        emit(learner.program, tmp_path / name, addition=LearnerC(learner.memory, learner.feed, "uint8"))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    emit(little_network(), tmp_path / "plain")
    assert Manifest.read(tmp_path / "plain").learner is None
    text = "".join(p.read_text() for p in (tmp_path / "plain").rglob("*") if p.is_file())
    assert "learn" not in text.replace("learned", "")


def test_views_margins_and_forgetting_through_the_c_functions(tmp_path):
    """clear_votes, vote per view, winner with a margin: against the ballot of the interpreter."""
    memory = replace(CASES["sums"], anchors=1)
    _, labels, levels = stream(memory, 30, seed=9)
    labels = np.minimum(labels, 4)
    state = memory.fresh()
    memory.learn(state, levels[:24], labels[:24])
    memory.new_class(state, 1)
    ballot = memory.vote(state, levels[24:]).over_views(3)
    wanted = [int(ballot.winners(m)[i]) for i in range(2) for m in (0, 1, 2, 4, 9)]
    learner = Learner.alone(memory)
    emit(learner.program, tmp_path / "c", addition=LearnerC(memory, learner.feed, "uint8"))
    rows = ",".join(map(str, levels.reshape(-1)))
    (tmp_path / "c" / "views.c").write_text(
        f"""
#include "learner.h"
#include <stdio.h>
static const uint8_t x[] = {{{rows}}};
static const int32_t y[] = {{{",".join(map(str, labels))}}};
static const int32_t margins[5] = {{0, 1, 2, 4, 9}};
static void load(int i) {{ int j; for (j = 0; j < 9; j++) learner_input[j] = x[9 * i + j]; learner_run(); }}
int main(void)
{{
    int i, v;
    for (i = 0; i < 24; i++) {{ load(i); if (!learner_learn(y[i])) return 1; }}
    if (!learner_new_class(1) || learner_new_class(5) || learner_new_class(-1)) return 2;
    for (i = 24; i < 30; i += 3) {{
        learner_clear_votes();
        for (v = 0; v < 3; v++) {{ load(i + v); learner_vote(); }}
        for (v = 0; v < 5; v++) printf("%d\\n", (int)learner_winner(margins[v]));
    }}
    learner_reset();
    printf("%d\\n", (int)learner_classify());
    return 0;
}}
"""
    )
    folder = tmp_path / "c"
    subprocess.run(["cc", *WARNINGS, "-O2", "learner.c", "views.c", "-o", "views"], cwd=folder, check=True)
    out = subprocess.run([folder / "views"], capture_output=True, text=True, check=True).stdout.split()
    assert [int(v) for v in out] == [*wanted, -1]
    assert -1 in wanted
    assert len(set(wanted)) > 1


def test_a_learner_can_start_with_what_another_has_learned():
    memory = CASES["counts"]
    _, labels, levels = stream(memory, 80, seed=5)
    labels = np.minimum(labels, memory.classes - 1)
    start = memory.fresh()
    memory.learn(start, levels[:50], labels[:50])
    requests = Requests(np.tile([1, 0], 15), labels[50:], levels[50:].reshape(30, 1, 1, -1))
    learner = Learner.alone(memory, start=start)
    made = rehearse_learner(learner, requests)
    assert made.proven
    assert replay(learner, requests).answers[0] >= 0
    fresh = rehearse_learner(Learner.alone(memory), requests)
    assert made.flash_bytes > fresh.flash_bytes  # the initial values
    assert start.tobytes() == learner.start.tobytes()


def test_a_broken_learner_is_noticed(monkeypatch):
    """The comparison goes red when the C does something else."""
    memory = CASES["sums"]
    learner, requests = Learner.alone(memory), requests_for(memory, 30, seed=6)
    expected = replay(replace(learner, memory=replace(memory, metric="l1", fraction=3)), requests)
    _, states = on_host(learner, requests)
    assert states != expected.states
    image = emit_and_build(learner)
    assert carry_out(image, requests).states != expected.states


def test_counts_are_reproducible_and_by_request():
    memory = CASES["sums"]
    image = emit_and_build(Learner.alone(memory))
    requests = requests_for(memory, 40, seed=7)
    first, again = carry_out(image, requests), carry_out(image, requests)
    assert (first.instructions == again.instructions).all()
    assert first.mean(LEARN) < first.mean(CLASSIFY)
    assert set(first.most()) == {"learn", "classify", "new_class"}
    assert 30 < first.stack_bytes < 1024


# ---- what is refused


def test_learners_that_do_not_fit_are_refused_with_all_reasons():
    memory = Anchors(11, 3, parts=4, bits=7)
    with pytest.raises(KnobError, match=r"12 elements, the learner 11 features.*levels of 8 bits, the learner takes 7"):
        Learner(little_network(), memory, Feed.of("int8"))
    program = little_network()
    wide = replace(program, buffers={**program.buffers, "y": replace(program.buffers["y"], dtype="int32")})
    with pytest.raises(KnobError, match="features are int32"):
        Learner.behind(wide, Anchors(12, 3, parts=4))
    with pytest.raises(KnobError, match="other arrays"):
        Learner.alone(Anchors(12, 3, parts=4), start=Anchors(12, 4, parts=4).fresh())


def test_bad_streams_are_refused(tmp_path):
    x = np.zeros((3, 1, 1, 9), np.uint8)
    with pytest.raises(DataError, match="3 requests, 2 labels, 3 inputs"):
        Requests(np.zeros(3, np.uint8), [0, 0], x)
    with pytest.raises(DataError, match=r"requests are 0\.\.3"):
        Requests([7, 0, 0], [0, 0, 0], x)
    with pytest.raises(DataError, match="labels are <U3"):
        Requests([0, 0, 0], ["cat", "dog", "owl"], x)
    with pytest.raises(KnobError, match="at least one request"):
        deploy_learner(Learner.alone(CASES["sums"]), tmp_path / "c", Requests([0, 0, 0], [0, 0, 0], x), vectors=0)
    with pytest.raises(DataError, match="shape"):
        replay(Learner.alone(CASES["bits"]), Requests([0, 0, 0], [0, 0, 0], x))
    emit(little_network(), tmp_path / "plain")
    with pytest.raises(DataError, match="has no learner"):
        carry_out(build(tmp_path / "plain", "cortex-m4"), Requests.test_then_learn(*images(2, 2)))


def test_a_learner_too_large_for_its_board_is_refused():
    memory = Anchors(256, 100)
    with pytest.raises(KnobError, match=r"does not fit.*RAM"):
        rehearse_learner(Learner.alone(memory), requests_for(memory, 2), "nucleo-l452re")


def test_learners_in_words():
    assert describe(CASES["bits"]) == "up to 9 classes, 11 features in 4 sub-spaces, 9 codewords, memory of bits (l2)"

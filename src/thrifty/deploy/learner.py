"""Learning on the microcontroller: a learner behind a deployed network, or alone; replayed, written as C, proven.

A learner is `thrifty.associative` (what an example changes and who wins) behind a `Program`, whose output is the
features. `replay` is the meaning, in NumPy; `deploy_learner` writes the C, runs a stream of requests on the emulated
core and on this computer, and compares every answer and every byte of the state.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thrifty.associative import Codes, Feed, Memory, State
from thrifty.deploy.program import Buffer, Program
from thrifty.errors import DataError, KnobError, StoreError
from thrifty.report import Parity

if TYPE_CHECKING:
    from thrifty.deploy.c.build import Image
    from thrifty.deploy.c.learner import LearnerC, Recorded
    from thrifty.deploy.targets import Target

Array = npt.NDArray[Any]

LEARN, CLASSIFY, NEW_CLASS, RESET = range(4)
WHATS = ("learn", "classify", "new class", "reset")


@dataclass(frozen=True, eq=False)
class Learner:
    """A memory that learns the output of a program.

    The output, read flat, has as many elements as the memory has features; `feed` makes levels of them. Raises
    KnobError for anything else, and for features that are not int8, uint8 or int16.
    """

    program: Program
    memory: Memory
    feed: Feed
    start: State | None = None  # what it knows already; None: nothing

    def __post_init__(self) -> None:
        port = self.program.buffers[self.program.output]
        bad = []
        if port.dtype not in ("int8", "uint8", "int16"):
            bad.append(f"its output is {port.dtype}, but a learner takes int8, uint8 or int16: quantise the network")
        if port.size != self.memory.features:
            bad.append(f"its output has {port.size} elements, the learner {self.memory.features} features")
        if self.feed.bits != self.memory.bits:
            bad.append(f"the feed makes levels of {self.feed.bits} bits, the learner takes {self.memory.bits}")
        if self.start is not None and self.start.fields != State(self.memory.fields()).fields:
            bad.append("the state to start from has other arrays than this learner")
        if bad:
            raise KnobError(f"program '{self.program.name}' cannot feed the learner: {'; '.join(bad)}")

    @staticmethod
    def behind(program: Program, memory: Memory, feed: Feed | None = None, start: State | None = None) -> Learner:
        """Return a learner of the output of `program`; feed: None takes the whole range of its type."""
        port = program.buffers[program.output]
        return Learner(program, memory, feed or Feed.of(port.dtype, bits=memory.bits), start)

    @staticmethod
    def alone(memory: Memory, name: str = "learner", start: State | None = None) -> Learner:
        """Return a learner without a network: its input is the levels, uint8 (1, 1, features).

        >>> from thrifty.associative import Anchors
        >>> Learner.alone(Anchors(features=64, classes=10)).program.calls
        ()
        """
        port = Buffer("levels", (1, 1, memory.features), "uint8")
        program = Program(name, {"levels": port}, (), "levels", "levels")
        return Learner(program, memory, Feed(0, bits=memory.bits), start)


@dataclass(frozen=True, eq=False)
class Requests:
    """A stream of requests: what to do, with which class, after which input of the network."""

    what: Array  # (n,) of LEARN, CLASSIFY, NEW_CLASS, RESET
    labels: Array  # (n,) class numbers; of no meaning to classify and reset
    inputs: Array  # (n, H, W, C), the integers of the input buffer

    def __post_init__(self) -> None:
        what, labels, inputs = np.asarray(self.what), np.asarray(self.labels), np.asarray(self.inputs)
        if not len(what) or len({len(what), len(labels), len(inputs)}) > 1:
            raise DataError(f"a stream has {len(what)} requests, {len(labels)} labels, {len(inputs)} inputs")
        if not np.isin(what, range(4)).all():
            raise DataError(f"requests are 0..3 ({', '.join(WHATS)}); the stream has others")
        if labels.dtype.kind not in "iu":
            raise DataError(f"labels are {labels.dtype}; give the number of each class")
        object.__setattr__(self, "what", what.astype(np.uint8))
        object.__setattr__(self, "labels", labels.astype(np.int32))
        object.__setattr__(self, "inputs", inputs)

    @staticmethod
    def test_then_learn(inputs: npt.ArrayLike, labels: npt.ArrayLike) -> Requests:
        """Return a stream that classifies each example and then learns it.

        >>> Requests.test_then_learn(np.zeros((2, 1, 1, 3), np.uint8), [5, 6]).what
        array([1, 0, 1, 0], dtype=uint8)
        """
        x, y = np.repeat(np.asarray(inputs), 2, axis=0), np.repeat(np.asarray(labels, np.int32), 2)
        return Requests(np.tile(np.array([CLASSIFY, LEARN], np.uint8), len(y) // 2), y, x)

    def __len__(self) -> int:
        return len(self.what)


@dataclass(frozen=True, eq=False)
class Replay:
    """What a stream of requests led to."""

    answers: Array  # (n,) int32: classify: the class or -1; the others: whether it was done, 0 or 1
    states: tuple[bytes, ...]  # after each request
    state: State  # the last


def replay(learner: Learner, requests: Requests) -> Replay:
    """Carry out a stream in NumPy: the meaning of the learner, to which C is compared byte for byte."""
    from thrifty.deploy.run import run

    memory = learner.memory
    state = learner.start.copy() if learner.start is not None else memory.fresh()
    features = run(learner.program, requests.inputs).reshape(len(requests), -1)
    levels, outside = learner.feed.levels(features)
    answers, states = np.ones(len(requests), np.int32), []
    for i, what in enumerate(requests.what):
        slot, row = int(requests.labels[i]), slice(i, i + 1)
        known = 0 <= slot < memory.classes
        if what == CLASSIFY:
            answers[i] = memory.vote(state, levels[row]).winners()[0]
        elif what == RESET:
            state.clear()
        elif not known:
            answers[i] = 0
        elif what == NEW_CLASS:
            memory.new_class(state, slot)
        else:
            state["saturated"][0] += np.uint32(outside[i])
            answers[i] = memory.learn(state, levels[row], np.array([slot]))
        states.append(state.tobytes())
    return Replay(answers, tuple(states), state)


@dataclass(frozen=True)
class LearnerDeployment:
    """A C project that learns, and what was measured on it.

    `parity` says how many requests each engine carried out and after how many its answer or any byte of its state
    differed from the replay's. Instructions are those of one request, mean of the stream, without the network.
    """

    learner: Learner
    target: str
    folder: Path | None  # None for a rehearsal
    parity: Parity
    state_bytes: int  # of the state, which lies in RAM for ever
    arena_bytes: int  # of activations and of what a request needs while it runs
    flash_bytes: int | None = None  # measured: code and constants of the linked image; None for the host
    ram_bytes: int | None = None  # measured: arena, state, ballot, other data and stack
    stack_bytes: int | None = None  # measured: high-water mark
    learn_instructions: int | None = None  # measured
    classify_instructions: int | None = None  # measured
    most_instructions: Mapping[str, int] = field(default_factory=dict)  # measured: the dearest request of each kind
    network_instructions: int | None = None  # measured: the run of the network before a request

    @property
    def proven(self) -> bool:
        """Whether every engine gave every answer and every byte of the state."""
        return self.parity.clean


def deploy_learner(
    learner: Learner,
    folder: str | Path,
    requests: Requests,
    target: str | Target = "cortex-m4",
    vectors: int = 8,
    compiler: str = "auto",
) -> LearnerDeployment:
    """Write a C project that learns, build it for the target, carry out the requests there and compare.

    All requests run on the emulated core and on this computer; after each the whole state is compared. The first
    `vectors` become the project's self-test. Raises KnobError when the target is too small, MissingExtra without a
    compiler or emulator, ToolError when one fails, StoreError on a full disk. Nothing is left in `folder` unless
    everything was built.
    """
    from thrifty.deploy.c.emit import emit

    if vectors < 1:
        raise KnobError(f"deploy_learner needs at least one request for the self-test, not {vectors}")
    chosen, folder = _target(target), Path(folder)
    expected = replay(learner, requests)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".thrifty-", dir=folder.parent) as place:
            made = _made(learner, requests, expected, chosen, Path(place) / "c", compiler)
            few = replace(requests, **{k: getattr(requests, k)[:vectors] for k in ("what", "labels", "inputs")})
            emit(learner.program, folder, None, chosen, addition=_addition(learner, _recorded(few, expected)))
    except OSError as err:
        raise StoreError(f"the C project cannot be written to {folder}: {err.strerror or err}") from err
    return replace(made, folder=folder)


def rehearse_learner(
    learner: Learner, requests: Requests, target: str | Target = "cortex-m4", compiler: str = "auto"
) -> LearnerDeployment:
    """Do all that `deploy_learner` does, in a temporary folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="thrifty-") as place:
        return _made(learner, requests, replay(learner, requests), _target(target), Path(place) / "c", compiler)


def _made(
    learner: Learner, requests: Requests, expected: Replay, target: Target, place: Path, compiler: str
) -> LearnerDeployment:
    from thrifty.deploy.c.emit import emit
    from thrifty.deploy.c.manifest import Manifest
    from thrifty.deploy.c.stream_learner import carry_out, on_host

    emit(learner.program, place, None, target, addition=_addition(learner, None))
    manifest = Manifest.read(place)
    state_bytes = expected.state.size_bytes
    samples, differing = {"program": len(requests)}, dict[str, int]()
    bare = LearnerDeployment(learner, target.name, None, Parity(samples, differing), state_bytes, manifest.arena_bytes)
    if shutil.which("cc"):
        samples["host C"] = len(requests)
        differing["host C"] = _differing(*on_host(learner, requests), expected)
    if target.core == "host":
        return bare
    image = _image(place, target, compiler)
    done = carry_out(image, requests)
    engine = f"{target.core} (emulated)"
    samples[engine], differing[engine] = len(requests), _differing(done.answers, done.states, expected)
    made = replace(
        bare,
        flash_bytes=image.flash_bytes,
        ram_bytes=image.data_bytes + done.stack_bytes,
        stack_bytes=done.stack_bytes,
        learn_instructions=done.mean(LEARN),
        classify_instructions=done.mean(CLASSIFY),
        most_instructions=done.most(),
        network_instructions=done.network_instructions,
    )
    _refuse_small(target, made)
    return made


def _image(place: Path, target: Target, compiler: str) -> Image:
    from thrifty.deploy.c.build import build

    return build(place, target, compiler=compiler)


def _target(name: str | Target) -> Target:
    from thrifty.deploy.targets import target

    return target(name)


def _addition(learner: Learner, recorded: Recorded | None) -> LearnerC:
    from thrifty.deploy.c.learner import LearnerC

    dtype = learner.program.buffers[learner.program.output].dtype
    return LearnerC(learner.memory, learner.feed, dtype, learner.start, recorded)


def _recorded(requests: Requests, expected: Replay) -> Recorded | None:
    from thrifty.deploy.c.learner import Recorded

    n = len(requests)
    what, labels = requests.what.astype(np.uint8), requests.labels.astype(np.int32)
    return Recorded(what, labels, requests.inputs, expected.answers[:n], expected.states[n - 1])


def _differing(answers: Array, states: tuple[bytes, ...], expected: Replay) -> int:
    """Return after how many requests the answer or a byte of the state differed."""
    same_state = np.array([a == b for a, b in zip(states, expected.states, strict=True)])
    return int(((answers != expected.answers) | ~same_state).sum())


def _refuse_small(target: Target, made: LearnerDeployment) -> None:
    from thrifty.deploy import refuse_small

    refuse_small(target, made.flash_bytes or 0, made.ram_bytes or 0)


def codebook_bytes(memory: Memory) -> int:
    """Return the bytes of a learner's constants in flash: its codebook."""
    return memory.codebook.size if isinstance(memory, Codes) else 0

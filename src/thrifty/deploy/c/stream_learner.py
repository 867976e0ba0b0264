"""Carry out a stream of learning requests: on an emulated core, and as C on this computer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thrifty.deploy.c.build import Image, run_tool
from thrifty.deploy.c.emit import render
from thrifty.deploy.c.emulate import Core
from thrifty.deploy.c.host import FAST, SANITIZED, compiled
from thrifty.deploy.c.learner import LearnerC
from thrifty.deploy.c.manifest import as_batch
from thrifty.deploy.c.text import Array
from thrifty.deploy.targets import target
from thrifty.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from thrifty.deploy.learner import Learner, Requests

FUNCTIONS = ("learn", "classify", "new_class", "reset")  # by the number of the request


@dataclass(frozen=True, eq=False)
class Carried:
    """What an emulated core did with a stream of requests."""

    what: Array  # (n,) the requests
    answers: Array  # (n,) int32
    states: tuple[bytes, ...]  # after each request
    instructions: Array  # (n,) int64, measured: of the request alone
    network_instructions: int  # measured: mean of the runs of the network
    stack_bytes: int  # measured: high-water mark

    def mean(self, what: int) -> int | None:
        """Return the mean instructions of one kind of request, None when there was none."""
        found = self.instructions[self.what == what]
        return round(float(found.mean())) if found.size else None

    def most(self) -> Mapping[str, int]:
        """Return the instructions of the dearest request of each kind that there was."""
        return {
            name: int(self.instructions[self.what == i].max())
            for i, name in enumerate(FUNCTIONS)
            if (self.what == i).any()
        }


def carry_out(image: Image, requests: Requests) -> Carried:
    """Carry out requests on the emulated core of an image: for each a run of the network, then the request.

    Raises DataError when the image has no learner or the inputs do not fit, ToolError when the core faults.
    """
    manifest, name = image.manifest, image.manifest.name
    if manifest.learner is None:
        raise DataError(f"the image of '{name}' has no learner")
    batch = as_batch(manifest, requests.inputs)
    core = Core(image)
    functions = [f"{name}_{end}" for end in FUNCTIONS]
    counts = core.counter(functions)
    answers, states, spent, network = [], [], [], []
    for what, label, example in zip(requests.what, requests.labels, batch):
        core.run(example)
        network.append(sum(counts.take()))
        answer = core.call(core.symbols[functions[what]], int(label))
        spent.append(sum(counts.take()))
        answers.append(1 if what == FUNCTIONS.index("reset") else answer)
        states.append(core.read(f"{name}_state", manifest.learner.state_bytes))
    return Carried(
        what=np.asarray(requests.what),
        answers=np.array(answers, np.int32),
        states=tuple(states),
        instructions=np.array(spent, np.int64),
        network_instructions=round(float(np.mean(network))),
        stack_bytes=core.stack_bytes(),
    )


def on_host(
    learner: Learner, requests: Requests, compiler: str = "cc", flags: Sequence[str] = FAST, sanitize: bool = False
) -> tuple[Array, tuple[bytes, ...]]:
    """Return the answers and the states after each request of the emitted C on this computer.

    Raises MissingExtra without the compiler, ToolError when it or a sanitizer complains, DataError on bad inputs.
    """
    cc = shutil.which(compiler)
    if cc is None:
        raise MissingExtra(f"the C compiler '{compiler}' is not installed")
    dtype = learner.program.buffers[learner.program.output].dtype
    addition = LearnerC(learner.memory, learner.feed, dtype, learner.start)
    files = render(learner.program, None, target("host"), addition=addition)
    place = compiled(files, cc, tuple(SANITIZED if sanitize else flags), "learner_host.c")
    size = addition.port.state_bytes
    port = learner.program.buffers[learner.program.input]
    batch = np.ascontiguousarray(requests.inputs.astype(port.dtype)).reshape(len(requests), -1)
    rows = np.concatenate(
        [
            np.asarray(requests.what, np.uint8)[:, None],
            np.asarray(requests.labels, "<i4")[:, None].view(np.uint8).reshape(len(requests), 4),
            batch.view(np.uint8).reshape(len(requests), -1),
        ],
        axis=1,
    )
    out = np.frombuffer(run_tool([str(place / "model.bin")], rows.tobytes()), np.uint8).reshape(len(requests), 4 + size)
    answers = np.ascontiguousarray(out[:, :4]).view("<i4")[:, 0]
    return answers, tuple(row.tobytes() for row in out[:, 4:])

"""How to learn new classes on a microcontroller: a network that knows five digits, ten learned behind it on the M4."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from thrifty import Quantize, load_task
from thrifty.associative import Anchors
from thrifty.capture import capture
from thrifty.deploy.learner import CLASSIFY, LEARN, Learner, Requests, deploy_learner, replay
from thrifty.deploy.lower import lower
from thrifty.deploy.run import quantize_input
from thrifty.task import Split, Task
from thrifty.zoo import create

EACH = 40  # examples of each class to learn
TESTS = 35  # pictures classified after each class


def backbone() -> tuple[nn.Module, Task, Task]:
    """Return a network without its last layer, trained on digits 0 to 4, the task of those, and the whole task."""
    torch.manual_seed(0)
    whole = load_task("digits")

    def five(split: Split) -> Split:
        return Split(split.x[split.y < 5], split.y[split.y < 5])

    known = Task(five(whole.train), five(whole.validation), name="digits 0-4", classes=tuple("01234"))
    model = create("lenet", input_shape=(1, 8, 8), classes=5)
    known.fit(model, epochs=25, lr=0.05, batch=32)
    print(f"a network that knows the digits 0 to 4: validation accuracy {known.score(model):.3f}")
    return nn.Sequential(model.features, *model.head[:-1]).eval(), known, whole


def stream(whole: Task, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return requests, labels and pictures: each class is learned in turn, then test pictures of all so far come."""
    what, labels, pictures = [], [], []
    for c in range(10):
        learn = rng.choice(np.flatnonzero(whole.train.y.numpy() == c), EACH, replace=False)
        test = rng.choice(np.flatnonzero(whole.test.y.numpy() <= c), TESTS, replace=False)
        what += [LEARN] * EACH + [CLASSIFY] * TESTS
        labels += [c] * EACH + whole.test.y[test].tolist()
        pictures += [whole.train.x[learn], whole.test.x[test]]
    return np.array(what, np.uint8), np.array(labels, np.int32), torch.cat(pictures).numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    out = parser.parse_args().out or Path(tempfile.mkdtemp())

    model, known, whole = backbone()
    program = lower(capture(Quantize(bits=8).edit(model, known), whole.example), "model")
    features = program.buffers[program.output].size
    memory = Anchors(features, classes=10, parts=8, anchors=4, fraction=4, n_max=256)
    learner = Learner.behind(program, memory)

    what, labels, pictures = stream(whole, np.random.default_rng(0))
    requests = Requests(what, labels, quantize_input(program, pictures))
    made = deploy_learner(learner, out / "c", requests, target="cortex-m4")

    answers, asked = replay(learner, requests).answers, what == CLASSIFY
    print("class learned   accuracy over all classes so far")
    for c in range(10):
        here = asked & (np.arange(len(what)) // (EACH + TESTS) == c)
        print(f"      {c}         {(answers[here] == labels[here]).mean():.2f}")
    print(f"the network: {made.network_instructions} instructions, {program.macs} multiply-accumulates")
    print(
        f"to learn one example: {made.learn_instructions} instructions; to classify one: {made.classify_instructions}"
    )
    print(f"flash {made.flash_bytes} B; RAM {made.ram_bytes} B, of which {made.state_bytes} B are what was learned")
    print(f"{len(what)} requests; after how many an answer or a byte of the state differed: {made.parity.mismatches}")
    print(f"the C project: {out / 'c'}   every byte agreed: {made.proven}")
    return 0 if made.proven else 1


if __name__ == "__main__":
    raise SystemExit(main())

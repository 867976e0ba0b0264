"""Stand-ins that make a search fast: costs are counted instead of measured, outputs come from the interpreter.

Everything else, the editing, the training, the scores, the choices and the state, is real.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import thrifty.deploy
import thrifty.search.bench
from thrifty.cost import Cost
from thrifty.deploy import Deployment
from thrifty.deploy.plan import plan
from thrifty.deploy.run import run
from thrifty.report import Memory, Parity


def counted(program, target="cortex-m4") -> Cost:
    """Cost as a pure function of the program."""
    weights = sum(v.size for c in program.calls for k, v in c.constants.items() if k == "weight")
    return Cost(
        params=weights,
        weight_bytes=program.constant_bytes,
        macs=program.macs,
        flash_bytes=program.constant_bytes + 2000,
        ram_bytes=plan(program).arena_bytes + 200,
        instructions=2 * program.macs + 1000,
    )


def rehearsed(program, target="cortex-m4", samples=None, vectors=8, name="model") -> Deployment:
    """A deployment that built nothing."""
    memory = Memory.from_plan(plan(program), program)
    return Deployment(program, target, None, counted(program), memory, Parity({"program": vectors}))


def install(patch=setattr) -> None:
    """Put the stand-ins in place; `patch` is monkeypatch.setattr in tests."""
    patch(thrifty.deploy, "measure", counted)
    patch(thrifty.deploy, "rehearse", rehearsed)
    patch(thrifty.search.bench, "run_host", lambda program, stored: np.asarray(run(program, stored)))


def lines_of(folder: Path) -> list[str]:
    """The results that a search wrote so far."""
    return (folder / "search.jsonl").read_text().splitlines()[1:]

"""Inner loop: apply a block range of a frozen transformer several times at inference."""

from thrifty.llm.inner_loop.looping import Looped, loop, read_plan
from thrifty.llm.inner_loop.plan import GRANULARITIES, KV_MODES, MODES, Plan
from thrifty.llm.inner_loop.scanning import Cell, Scan, bootstrap, likelihood, ranges, scan
from thrifty.llm.inner_loop.trajectories import Trajectory, plane, trajectory

__all__ = [
    "GRANULARITIES",
    "KV_MODES",
    "MODES",
    "Cell",
    "Looped",
    "Plan",
    "Scan",
    "Trajectory",
    "bootstrap",
    "likelihood",
    "loop",
    "plane",
    "ranges",
    "read_plan",
    "scan",
    "trajectory",
]

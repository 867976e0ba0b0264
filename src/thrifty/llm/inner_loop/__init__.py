"""Inner loop: apply a block range of a frozen transformer several times at inference."""

from thrifty.llm.inner_loop.looping import Looped, loop, read_plan
from thrifty.llm.inner_loop.plan import GRANULARITIES, KV_MODES, MODES, Plan

__all__ = ["GRANULARITIES", "KV_MODES", "MODES", "Looped", "Plan", "loop", "read_plan"]

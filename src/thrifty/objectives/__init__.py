"""What training minimises: one objective, one file. `Task.fit(objective=...)` takes any of them."""

from __future__ import annotations

from thrifty.objectives.cross_entropy import CrossEntropy

__all__ = ["OBJECTIVES", "CrossEntropy"]

OBJECTIVES: dict[str, type] = {
    "cross_entropy": CrossEntropy,
}

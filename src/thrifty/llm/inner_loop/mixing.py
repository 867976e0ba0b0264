"""How the output of a pass is mixed with those of the passes before it; states of one forward call only.

y_q is the output of pass q at one place of the loop, z_r what is passed on. Every mix is a running one: a few states of
the shape of y are kept, however many passes there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thrifty.llm.inner_loop.plan import Plan


class Mixer:
    """The mix at one place; `first` at pass 0, then `next` for each further pass.

    uniform: z_r = mean of y_0..y_r. naive: z_r = y_r. reference: z_r = (1 - c) y_0 + c y_r. alignment: weights are the
    softmax over q <= r of cos(y_0, y_q) / temperature. noise: y_0 plus a random direction as long as the step that
    uniform would make.
    """

    def __init__(self, plan: Plan, place: int) -> None:
        self.plan, self.place = plan, place
        self.passes = 0
        self.reference: Tensor | None = None
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def first(self, y: Tensor) -> Tensor:
        """Take the state y (b, t, d) of pass 0, and return it."""
        self.passes = 1
        self.reference = y if self.plan.mode in ("reference", "alignment", "noise") else None
        self.total, self.weight = None, None
        if self.plan.mode in ("uniform", "noise"):
            self.total = y
        elif self.plan.mode == "alignment":
            self.weight = self._affinity(y)
            self.total = self.weight * y
        return y

    def next(self, y: Tensor) -> Tensor:
        """Take the state of the next pass, and return the mix."""
        self.passes += 1
        mode = self.plan.mode
        if mode == "reference":
            z = self.reference + self.plan.coefficient * (y - self.reference)  # type: ignore[operator]
        elif mode == "uniform":
            self.total = self.total + y  # type: ignore[operator]
            z = self.total / self.passes
        elif mode == "alignment":
            weight = self._affinity(y)
            self.weight = self.weight + weight  # type: ignore[operator]
            self.total = self.total + weight * y  # type: ignore[operator]
            z = self.total / self.weight
        elif mode == "noise":
            self.total = self.total + y  # type: ignore[operator]
            z = self._away(self.total / self.passes)
        else:  # naive
            z = y
        if self.passes == self.plan.passes:
            self.forget()
        return z

    def forget(self) -> None:
        """Let go of the states."""
        self.reference = self.total = self.weight = None

    def _affinity(self, y: Tensor) -> Tensor:
        """Return exp((cos(y_0, y) - 1) / temperature), (b, t, 1), or (b, 1, 1) of the last position."""
        assert self.reference is not None
        a, b = (self.reference, y) if self.plan.scope == "position" else (self.reference[:, -1:], y[:, -1:])
        cosine = torch.cosine_similarity(a.float(), b.float(), dim=-1, eps=1e-8)[..., None]
        weight: Tensor = torch.exp((cosine - 1.0) / self.plan.temperature).to(y.dtype)  # cos(y_0, y_0) = 1 gives 1
        return weight

    def _away(self, mixed: Tensor) -> Tensor:
        assert self.reference is not None
        step = (mixed - self.reference).float().norm(dim=-1, keepdim=True)
        generator = torch.Generator().manual_seed(1_000_003 * self.plan.seed + 1009 * self.place + self.passes)
        drawn = torch.randn(mixed.shape, generator=generator).to(mixed.device)
        direction = drawn / drawn.norm(dim=-1, keepdim=True)
        away: Tensor = self.reference + (step * direction).to(mixed.dtype)
        return away


class Damper:
    """Damped passes: u_r = u_(r-1) + (G(u_(r-1)) - u_(r-1)) / R for the range G, as one Euler step in R parts."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.entry: Tensor | None = None

    def enter(self, u: Tensor) -> None:
        """Take what enters the range in this pass."""
        self.entry = u

    def leave(self, out: Tensor) -> Tensor:
        """Return the damped output of this pass."""
        assert self.entry is not None
        entry, self.entry = self.entry, None
        return out if self.passes == 1 else entry + (out - entry) / self.passes

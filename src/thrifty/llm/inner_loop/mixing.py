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
        self.length: Tensor | None = None  # of the reference
        self.mean: Tensor | None = None  # weighted mean of the outputs so far
        self.weight: Tensor | None = None  # log of the sum of their weights; y_0 has weight 1

    def first(self, y: Tensor) -> Tensor:
        """Take the state y (b, t, d) of pass 0, and return it."""
        self.forget()
        self.passes = 1
        if self.plan.mode in ("reference", "alignment", "noise"):
            self.reference = y
        if self.plan.mode in ("uniform", "alignment", "noise"):
            self.mean = y
        return y

    def next(self, y: Tensor) -> Tensor:
        """Take the state of the next pass, and return the mix."""
        self.passes += 1
        mode = self.plan.mode
        z = y  # naive
        if mode == "reference":
            z = torch.lerp(self.reference, y, self.plan.coefficient)  # type: ignore[arg-type]
        elif mode in ("uniform", "noise"):
            self.mean = torch.lerp(self.mean, y, 1 / self.passes)  # type: ignore[arg-type]
            z = self.mean if mode == "uniform" else self._away(self.mean)
        elif mode == "alignment":
            z = self.mean = torch.lerp(self.mean, y, self._share(y).to(y.dtype))  # type: ignore[arg-type]
        if self.passes == self.plan.passes:
            self.forget()
        return z

    def forget(self) -> None:
        """Let go of the states."""
        self.reference = self.length = self.mean = self.weight = None

    def _share(self, y: Tensor) -> Tensor:
        """Return the weight of y among those so far, (b, t, 1), or (b, 1, 1) by the last position.

        Weights are exp((cos(y_0, y) - 1) / temperature), 1 for y_0; a share of a sum is a sigmoid of logarithms.
        """
        assert self.reference is not None
        a, b = (self.reference, y) if self.plan.scope == "position" else (self.reference[:, -1:], y[:, -1:])
        a, b = a.float(), b.float()
        if self.length is None:
            self.length = a.norm(dim=-1, keepdim=True)
        sizes = (self.length * b.norm(dim=-1, keepdim=True)).clamp_min_(1e-16)
        score = torch.linalg.vecdot(a, b)[..., None].div_(sizes).sub_(1.0).div_(self.plan.temperature)
        share = torch.sigmoid(score if self.weight is None else score - self.weight)
        if self.passes < self.plan.passes:
            self.weight = torch.logaddexp(score.new_zeros(()) if self.weight is None else self.weight, score)
        return share

    def _away(self, mixed: Tensor) -> Tensor:
        assert self.reference is not None
        step = torch.linalg.vector_norm(mixed - self.reference, dim=-1, keepdim=True, dtype=torch.float32)
        generator = torch.Generator().manual_seed(1_000_003 * self.plan.seed + 1009 * self.place + self.passes)
        drawn = torch.randn(mixed.shape, generator=generator).to(mixed.device)
        scale = step / drawn.norm(dim=-1, keepdim=True)
        return torch.addcmul(self.reference, drawn.to(mixed.dtype), scale.to(mixed.dtype))


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

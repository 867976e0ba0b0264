"""Hard-concrete gates on heads, feed-forward units and channels, and the Lagrangian that holds them to a sparsity.

Source: Louizos et al. 2018, Learning Sparse Neural Networks through L0 Regularization (arXiv:1712.01312), with the
constants, initial values and evaluation mask of DPHuBERT (Peng et al. 2023, arXiv:2305.17651).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from thrifty.compress.layer_groups.families import Stack, Unit, count_expected
from thrifty.errors import KnobError

BETA = 2.0 / 3.0  # temperature
STRETCH = (-0.1, 1.1)  # the sigmoid is stretched to this interval, then clamped to 0..1
SHARPNESS = 0.8  # of the soft evaluation mask
OFFSET = BETA * math.log(-STRETCH[1] / STRETCH[0])  # (2/3) log 11 = 1.5986
FAR = 100.0  # no gate is further from where it closes
DROP = {"heads": 0.01, "channels": 0.01, "units": 0.5}  # p of the initial values
Masks = Mapping[str, Tensor]


class Gates(nn.Module):
    """One log_alpha for every member of every unit.

    units: from Stack.units. Initially log_alpha ~ N(log(1 - p) - log p, 0.01), p = 0.01 for heads and channels, 0.5
    for feed-forward units.
    """

    def __init__(self, units: Sequence[Unit], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.units = tuple(units)
        self.log_alpha = nn.ParameterList()
        self.shifts = [0.0] * len(self.units)
        for unit in self.units:
            p = DROP[unit.kind]
            start = torch.randn(unit.count, generator=generator) * 0.01 + math.log(1 - p) - math.log(p)
            self.log_alpha.append(nn.Parameter(start))

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return one random mask for each unit, values 0..1, differentiable in log_alpha."""
        return {u.name: sample(a, generator) for u, a in zip(self.units, self.log_alpha, strict=True)}

    def expected(self) -> dict[str, Tensor]:
        """Return the expected number of members that each unit keeps: the sum of P(gate > 0)."""
        return {u.name: open_probability(a).sum() for u, a in zip(self.units, self.log_alpha, strict=True)}

    def evaluate(self) -> dict[str, Tensor]:
        """Return the mask of evaluation: as many zeros as expected, at least one member left, the rest soft."""
        with torch.no_grad():
            return {
                u.name: evaluation_mask(a, s) for u, a, s in zip(self.units, self.log_alpha, self.shifts, strict=True)
            }

    def settle(self, stack: Stack, sparsity: float, scope: str = "layers", uniform: bool = False) -> None:
        """Shift all gates by one number so that the masks of evaluation hit the sparsity as closely as they can.

        With a short schedule the gates end near the target, not on it; models are only comparable at equal size. The
        shift decides which members stay; the soft values of those that stay are what training saw.
        uniform: also make all units of a kind keep the same number (their mean, rounded).
        """
        shapes = stack.scope(scope, tuple({u.kind for u in self.units}))
        wanted = (1.0 - sparsity) * float(count_expected(shapes, (), {}))
        low, high = -FAR, FAR
        for _ in range(60):
            self.shifts = [(low + high) / 2] * len(self.units)
            if uniform:
                self.make_uniform()
            kept = float(count_expected(shapes, self.units, counts(self.evaluate())))
            middle = (low + high) / 2
            low, high = (low, middle) if kept > wanted else (middle, high)

    def make_uniform(self) -> None:
        """Shift the gates of each unit so that all units of a kind keep the same number: their mean, rounded."""
        found = counts(self.evaluate())
        shifts = list(self.shifts)
        for kind in {u.kind for u in self.units}:
            same = [i for i, u in enumerate(self.units) if u.kind == kind]
            number = max(1, round(sum(found[self.units[i].name] for i in same) / len(same)))
            for i in same:
                shifts[i] = _shift_for(self.log_alpha[i].detach(), min(number, self.units[i].count))
        self.shifts = shifts


def _shift_for(log_alpha: Tensor, number: int) -> float:
    """Return the shift at which `number` members are expected to stay."""
    low, high = -FAR, FAR
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if float(open_probability(log_alpha + middle).sum()) > number else (middle, high)
    return (low + high) / 2


def sample(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return hard-concrete samples: s = sigmoid((logit(u) + log_alpha) / beta), clamped after stretching.

    u ~ U(1e-6, 1 - 1e-6); the result is 0 or 1 with positive probability, and differentiable between.
    """
    u = torch.rand(log_alpha.shape, generator=generator) * (1 - 2e-6) + 1e-6
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0.0, 1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(gate > 0) = sigmoid(log_alpha + (2/3) log 11).

    >>> [round(float(p), 4) for p in open_probability(torch.tensor([-2.0, 0.0, 2.0]))]
    [0.401, 0.8318, 0.9734]
    """
    return torch.sigmoid(log_alpha + OFFSET)


def evaluation_mask(log_alpha: Tensor, shift: float = 0.0) -> Tensor:
    """Return the mask of evaluation: round(n - sum P) smallest are 0, the rest sigmoid(0.8 log_alpha / beta).

    shift: added to log_alpha in P only. At least one member stays, because a layer without heads or units is no
    ordinary layer.
    """
    mask = torch.sigmoid(SHARPNESS * log_alpha / BETA).clamp(min=torch.finfo(log_alpha.dtype).tiny)
    zeros = round(len(log_alpha) - float(open_probability(log_alpha + shift).sum()))
    mask[torch.argsort(log_alpha, stable=True)[: min(zeros, len(log_alpha) - 1)]] = 0.0
    return mask


def counts(masks: Masks) -> dict[str, int]:
    """Return how many members each mask keeps."""
    return {name: int((mask > 0).sum()) for name, mask in masks.items()}


def random_masks(
    stack: Stack, sparsity: float, kinds: tuple[str, ...] = ("heads", "units"), seed: int = 0, scope: str = "layers"
) -> dict[str, Tensor]:
    """Return masks of zeros and ones that keep the same share of every unit, its members drawn at random."""
    units = stack.units(kinds)
    refuse_sparsity(stack, units, sparsity, scope, kinds)
    shapes = stack.scope(scope, kinds)
    wanted = (1.0 - sparsity) * float(count_expected(shapes, (), {}))
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        kept = {u.name: max(1, round(share * u.count)) for u in units}
        low, high = (low, share) if float(count_expected(shapes, units, kept)) > wanted else (share, high)
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for unit in units:
        masks[unit.name] = torch.zeros(unit.count)
        masks[unit.name][torch.randperm(unit.count, generator=generator)[: max(1, round(low * unit.count))]] = 1.0
    return masks


class Lagrangian(nn.Module):
    """lambda1 (s - t) + lambda2 (s - t)^2, minimised by the gates and maximised by the lambdas, which start at 0.

    s is the expected sparsity, t rises in a straight line from 0 to the target over `ramp` steps.
    """

    def __init__(self, target: float, ramp: int) -> None:
        super().__init__()
        self.final, self.ramp = target, ramp
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))

    def target(self, step: int) -> float:
        """Return the sparsity asked for at a step.

        >>> Lagrangian(0.8, ramp=100).target(25)
        0.2
        """
        return self.final * min(1.0, step / self.ramp) if self.ramp else self.final

    def forward(self, sparsity: Tensor, step: int) -> Tensor:
        """Return the term of the loss."""
        away = sparsity - self.target(step)
        return self.lambda1 * away + self.lambda2 * away.square()


def expected_sparsity(gates: Gates, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return 1 - E[parameters left] / parameters, differentiable."""
    left: Tensor = count_expected(shapes, gates.units, gates.expected())
    return 1.0 - left / float(count_expected(shapes, (), {}))


def refuse_sparsity(stack: Stack, units: Sequence[Unit], sparsity: float, scope: str, kinds: tuple[str, ...]) -> None:
    """Raise KnobError when a sparsity is out of range, or cannot be reached by removing these units."""
    if not 0.0 < sparsity < 1.0:
        raise KnobError(f"sparsity is {sparsity}; it must be between 0 and 1")
    if not units:
        raise KnobError(f"{stack.family.name} has no {' or '.join(kinds)} to remove")
    shapes = stack.scope(scope, kinds)
    least = float(count_expected(shapes, tuple(units), {u.name: 1 for u in units}))
    most = 1.0 - least / float(count_expected(shapes, (), {}))
    if sparsity > most:
        raise KnobError(f"sparsity is {sparsity}; removing {', '.join(kinds)} of the {scope} gives {most:.4f} at most")

"""Relational distillation (RKD-D): distances between samples, relative to their mean, follow the teacher's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.objectives.features import (
    OnePass,
    Pass,
    Teacher,
    distances,
    find,
    off_diagonal,
    pairs,
    patterns_of,
    positive,
    refuse,
)


@dataclass(frozen=True)
class RelationalDistillation(OnePass):
    """Mean smooth-L1 distance of the relative distances between samples, averaged over layers; no labels.

    The distances of all pairs of different samples of the batch are divided by their mean, for teacher and student
    separately. Widths may differ.
    Source: Park et al. 2019, Relational Knowledge Distillation, arXiv 1904.05068, the distance-wise loss.
    """

    teacher: nn.Module = field(repr=False)  # kept as a frozen copy
    layers: tuple[str, ...] = ()  # module patterns (see features.find); empty = what enters the last linear layer
    teacher_layers: tuple[str, ...] = ()  # the teacher's; empty = the same patterns
    beta: float = 1.0  # below it the distance of distances is squared, above it linear

    def __post_init__(self) -> None:
        """Freeze the teacher; refuse a value outside its range, and patterns that the teacher does not know."""
        object.__setattr__(self, "teacher", Teacher.of(self.teacher))
        for name in ("layers", "teacher_layers"):
            object.__setattr__(self, name, patterns_of(getattr(self, name)))
        refuse(
            "RelationalDistillation",
            {f"beta is {self.beta}; it must be positive and finite": positive(self.beta)},
        )
        find(self.teacher, self.teacher_layers or self.layers)

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return both models and the layers to compare (see OnePass)."""
        ours, theirs = self._pairs(model)
        return {model: ours, self.teacher: theirs}

    def _pairs(self, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return pairs(model, self.layers, Teacher.of(self.teacher), self.teacher_layers)

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the loss of a batch (see OnePass); y is not used."""
        ours, theirs = self._pairs(seen.model)
        both = zip(seen.features(seen.model, ours), seen.features(self.teacher, theirs))
        return torch.stack([self._layer(s, t) for s, t in both]).mean()

    def _layer(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            goal = relative_distances(teacher)
        apart = F.smooth_l1_loss(relative_distances(student), goal, beta=self.beta, reduction="sum")
        return apart / max(1, len(student) * (len(student) - 1))

    @classmethod
    def example(cls, teacher: nn.Module) -> RelationalDistillation:
        """Return an instance, for the contract tests."""
        return cls(teacher)


def relative_distances(h: Tensor) -> Tensor:
    """Return the distances of the rows of h: (n, d), divided by the mean over pairs of different rows: (n, n).

    All 0 when the rows are equal.

    >>> relative_distances(torch.tensor([[0.0], [1.0], [3.0]]))[0].tolist()
    [0.0, 0.5, 1.5]
    """
    apart = distances(h)
    mean = apart.sum() / off_diagonal(h).sum().clamp_min(1)
    return apart / mean.clamp_min(torch.finfo(h.dtype).tiny)

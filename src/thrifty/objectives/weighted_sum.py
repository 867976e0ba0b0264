"""Sums of objectives with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thrifty.errors import KnobError
from thrifty.objectives.cross_entropy import CrossEntropy
from thrifty.objectives.distillation import Distillation
from thrifty.objectives.features import OnePass, Pass
from thrifty.training import Objective, PlainLoss

Terms = tuple[tuple[Objective, float], ...]


@dataclass(frozen=True)
class WeightedSum(OnePass):
    """The sum of weight * loss of several objectives, which see one and the same pass of the model.

    The objectives of this package share the pass of the model, and that of a teacher if they hold the same `Teacher`.
    Any other objective is called as it is and runs the model once more (batch norms then see the batch twice).

    >>> total = WeightedSum({CrossEntropy(): 1.0, CrossEntropy(0.1): 0.5})
    >>> round(float(total.loss(nn.Identity(), torch.zeros(1, 2), torch.tensor([1]))), 4)
    1.0397
    """

    terms: Mapping[Objective, float] | Terms  # objective -> weight, at least 0; kept as pairs

    def __post_init__(self) -> None:
        """Refuse an empty sum, terms that are no objectives and weights outside their range, all at once."""
        pairs = self.terms.items() if isinstance(self.terms, Mapping) else self.terms
        terms = tuple((objective, weight) for objective, weight in pairs)
        bad = [] if terms else ["it has no term"]
        for objective, weight in terms:
            if isinstance(objective, type) or not callable(getattr(objective, "loss", None)):
                bad.append(f"{objective!r} is no objective: it needs a method loss(model, x, y)")
            if not 0 <= weight < math.inf:
                bad.append(f"the weight of {objective!r} is {weight}; it must be at least 0 and finite")
        if bad:
            raise KnobError("WeightedSum: " + "; ".join(bad))
        object.__setattr__(self, "terms", tuple((objective, float(weight)) for objective, weight in terms))

    @property
    def pairs(self) -> Terms:
        """The objectives and their weights, in order."""
        return tuple(self.terms)  # type: ignore[arg-type]  # pairs since __post_init__

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return all that the terms look at (see OnePass)."""
        found: dict[nn.Module, tuple[str, ...]] = {}
        for objective, _ in self.pairs:
            if isinstance(objective, PlainLoss):
                found.setdefault(model, ())
            if isinstance(objective, OnePass):
                for each, names in objective.places(model).items():
                    found[each] = tuple(dict.fromkeys((*found.get(each, ()), *names)))
        return found

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the weighted sum for a batch (see OnePass)."""
        return torch.stack([weight * _value(objective, seen, y) for objective, weight in self.pairs]).sum()

    @classmethod
    def example(cls, teacher: nn.Module) -> WeightedSum:
        """Return an instance, for the contract tests."""
        return cls({CrossEntropy(): 1.0, Distillation.example(teacher): 0.5})


def _value(objective: Objective, seen: Pass, y: Tensor) -> Tensor:
    if isinstance(objective, OnePass):
        return objective.value(seen, y)
    if isinstance(objective, PlainLoss):  # it reads the output only
        return objective.loss(nn.Identity(), seen.output, y)
    return objective.loss(seen.model, seen.x, y)

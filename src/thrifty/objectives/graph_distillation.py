"""Graph distillation (GKD): the samples of a batch keep the neighbours that they have in the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thrifty.errors import close_to
from thrifty.objectives.features import (
    OnePass,
    Pass,
    Teacher,
    cosines,
    counts,
    find,
    off_diagonal,
    pairs,
    patterns_of,
    positive,
    refuse,
    same_class,
)

EDGES = ("all", "intra", "inter")


@dataclass(frozen=True)
class GraphDistillation(OnePass):
    """Squared difference of the similarity graphs of teacher and student, summed over pairs, averaged over layers.

    A graph has a node for each sample of the batch and, as weights, the cosines of their features, normalised by
    the degrees. Widths may differ. The sum is not divided by the number of pairs: a good weight depends on the
    batch. Labels are used by `edges` only; under mixup, pairs count by how much they share their class.
    Source: Lassance et al. 2019, Deep geometric knowledge distillation with graphs, arXiv 1911.03080.
    """

    teacher: nn.Module = field(repr=False)  # kept as a frozen copy
    layers: tuple[str, ...] = ()  # module patterns (see features.find); empty = what enters the last linear layer
    teacher_layers: tuple[str, ...] = ()  # the teacher's; empty = the same patterns
    last_only: bool = False  # compare the last of these layers only
    k: int | None = None  # keep the edges to the k nearest neighbours in the teacher's graph; None = all
    power: int = 1  # compare powers of the graphs: paths of so many steps
    edges: str = "all"  # "intra": only pairs of one class; "inter": only pairs of different classes
    epsilon: float = 1e-6  # least degree: nodes without neighbours stay finite

    def __post_init__(self) -> None:
        """Freeze the teacher; refuse values outside their range, all at once, and patterns it does not know."""
        object.__setattr__(self, "teacher", Teacher.of(self.teacher))
        for name in ("layers", "teacher_layers"):
            object.__setattr__(self, name, patterns_of(getattr(self, name)))
        rules = {
            f"k is {self.k}; it must be a whole number, at least 1 (None = all)": counts(self.k),
            f"power is {self.power}; it must be a whole number, at least 1": self.power is not None
            and counts(self.power),
            f"edges is '{self.edges}'; {close_to(str(self.edges), EDGES)}": self.edges in EDGES,
            f"epsilon is {self.epsilon}; it must be positive and finite": positive(self.epsilon),
        }
        refuse("GraphDistillation", rules)
        find(self.teacher, self.teacher_layers or self.layers)

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return both models and the layers to compare (see OnePass)."""
        ours, theirs = self._pairs(model)
        return {model: ours, self.teacher: theirs}

    def _pairs(self, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        ours, theirs = pairs(model, self.layers, Teacher.of(self.teacher), self.teacher_layers)
        return (ours[-1:], theirs[-1:]) if self.last_only else (ours, theirs)

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the loss of a batch (see OnePass)."""
        ours, theirs = self._pairs(seen.model)
        share = None if self.edges == "all" else same_class(y, len(seen.x))
        share = 1 - share if share is not None and self.edges == "inter" else share
        both = zip(seen.features(seen.model, ours), seen.features(self.teacher, theirs))
        return torch.stack([self._layer(s, t, share) for s, t in both]).mean()

    def _layer(self, student: Tensor, teacher: Tensor, share: Tensor | None) -> Tensor:
        """Return the loss of one layer; share: how much each pair counts, (n, n), None = fully."""
        with torch.no_grad():
            goal = self._graph(teacher, share)
            mask = None if self.k is None or self.k >= len(goal) else neighbours(goal, self.k)
            goal = self._powers(goal, mask)
        return (self._powers(self._graph(student, share), mask) - goal).square().sum()

    def _graph(self, h: Tensor, share: Tensor | None) -> Tensor:
        graph = similarity_graph(h, self.epsilon)
        return graph if share is None else graph * share.to(graph.dtype)

    def _powers(self, graph: Tensor, mask: Tensor | None) -> Tensor:
        masked = graph if mask is None else graph * mask.to(graph.dtype)
        powers: Tensor = torch.linalg.matrix_power(masked, self.power)
        return powers

    @classmethod
    def example(cls, teacher: nn.Module) -> GraphDistillation:
        """Return an instance, for the contract tests."""
        return cls(teacher, k=3, power=2)


def similarity_graph(h: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return the cosines of the rows of h: (n, d), without the diagonal, normalised by the degrees: (n, n).

    A_ij / sqrt(degree_i * degree_j). Negative cosines count as 0, as no edge, and a degree as epsilon at least: then
    no entry exceeds 1, also for features that are not the outputs of a ReLU, for which a degree could be negative.
    For features of at least 0 this is the graph of arXiv 1911.03080.

    >>> graph = similarity_graph(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    >>> [round(weight, 4) for weight in graph[2].tolist()]
    [0.7071, 0.7071, 0.0]
    """
    weights = cosines(h).relu() * off_diagonal(h)
    scale = weights.sum(1).clamp_min(epsilon).rsqrt()
    return scale[:, None] * weights * scale[None, :]


def neighbours(graph: Tensor, k: int) -> Tensor:
    """Return 1 where j is among the k nearest of i, or i among those of j, else 0; (n, n), k below n.

    graph: (n, n) weights. A node is not its own neighbour; of equally near ones, the first counts.
    """
    loops = torch.eye(len(graph), dtype=torch.bool, device=graph.device)
    order = graph.masked_fill(loops, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    marks = torch.zeros_like(graph).scatter(1, order[:, :k], 1.0)
    return torch.maximum(marks, marks.T)

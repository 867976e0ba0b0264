"""Graph smoothness: outputs of different classes move apart; and the classifiers for a model that trained so."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import DataError, KnobError, close_to
from thrifty.objectives.features import (
    OnePass,
    Pass,
    counts,
    distances,
    find,
    off_diagonal,
    positive,
    refuse,
    same_class,
    unit_rows,
)
from thrifty.objectives.graph_distillation import neighbours

if TYPE_CHECKING:
    from thrifty.task import Task

REDUCTIONS = ("mean", "unordered", "ordered")


@dataclass(frozen=True)
class GraphSmoothness(OnePass):
    """Sum of exp(-alpha * distance) over pairs of different classes; pairs of one class are left alone.

    This is how much the labels vary on the similarity graph of the outputs: trace(Y^T L Y) with its Laplacian L.
    The outputs are no class scores: classify with `nearest_mean` or `k_nearest`. Under mixup a pair counts
    by half the squared distance of its probabilities.
    Source: Bontonou et al. 2019, Introducing graph smoothness loss for training deep learning architectures,
    arXiv 1905.00301; unread details and our choices are in the docs.
    """

    alpha: float = 1.0  # how fast similarity falls with distance
    k: int | None = None  # keep pairs of which one is among the k nearest of the other; None = all
    reduction: str = "mean"  # over pairs of different classes; "unordered": sum, each pair once; "ordered": twice
    unit_norm: bool = False  # scale outputs to length 1 first: then the loss cannot fall by growing the outputs
    squared: bool = False  # exp(-alpha * distance^2) instead
    layer: str = ""  # the one module whose output is compared (see features.find); "" = the model's output

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        rules = {
            f"alpha is {self.alpha}; it must be positive and finite": positive(self.alpha),
            f"k is {self.k}; it must be a whole number, at least 1 (None = all)": counts(self.k),
            f"reduction is '{self.reduction}'; {close_to(str(self.reduction), REDUCTIONS)}": self.reduction
            in REDUCTIONS,
        }
        refuse("GraphSmoothness", rules)

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return the model and the layer to look at (see OnePass)."""
        found = find(model, (self.layer,))
        if len(found) > 1:
            raise KnobError(f"GraphSmoothness.layer is '{self.layer}', which matches {', '.join(found)}; name one")
        return {model: found}

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the loss of a batch (see OnePass). Raises DataError when y are no classes."""
        (h,) = seen.features(seen.model, self.places(seen.model)[seen.model])
        apart = 1 - same_class(y, len(h)).to(h.dtype)
        weights = self.similarities(h)
        if self.k is not None and self.k < len(h):
            weights = weights * neighbours(weights.detach(), self.k)
        ordered = (weights * apart).sum()
        if self.reduction == "ordered":
            return ordered
        return ordered / 2 if self.reduction == "unordered" else ordered / apart.sum().clamp_min(1)

    def similarities(self, h: Tensor) -> Tensor:
        """Return the weights of the graph of all rows of h: (n, d), without the diagonal: (n, n)."""
        apart = distances(unit_rows(h) if self.unit_norm else h)
        return torch.exp(-self.alpha * (apart.square() if self.squared else apart)) * off_diagonal(h)

    @classmethod
    def example(cls, teacher: nn.Module) -> GraphSmoothness:
        """Return an instance, for the contract tests; it needs no teacher."""
        return cls(alpha=0.5, k=4)


# --- classifiers on such outputs


def nearest_mean(model: nn.Module, task: Task, unit_norm: bool = False) -> nn.Sequential:
    """Return a model that scores an input by how near its output is to the mean output of each class.

    It is a copy of `model` with a linear layer behind it, as the m nearest to f has the largest 2 f.m - |m|^2: it
    deploys like any other. The means are those of the training split. unit_norm: as in GraphSmoothness (cosines, then).
    Raises DataError for a task without classes, and for classes without training rows.
    """
    outputs, labels, count = _training_outputs(model, task, unit_norm)
    one_hot = F.one_hot(labels, count).to(outputs.dtype)
    rows = one_hot.sum(0)
    if empty := [c for c, n in zip(task.classes, rows.tolist()) if not n]:
        raise DataError(f"no training rows of class {', '.join(empty)}: it has no mean")
    means = one_hot.T @ outputs / rows[:, None]
    head = nn.Linear(outputs.shape[1], count, bias=not unit_norm)
    with torch.no_grad():
        head.weight.copy_(unit_rows(means) if unit_norm else 2 * means)
        if not unit_norm:
            head.bias.copy_(-means.square().sum(1))
    return nn.Sequential(copy.deepcopy(model), nn.Flatten(), _beside(head, model)).eval()


class KNearest(nn.Module):
    """A model that scores each class by its share among the k training outputs nearest to an input's output.

    For judging a model in torch: it keeps all the training outputs and is not meant to be deployed.
    """

    def __init__(
        self, model: nn.Module, outputs: Tensor, labels: Tensor, classes: int, k: int, unit_norm: bool
    ) -> None:
        super().__init__()
        if not 1 <= k <= len(outputs):
            raise KnobError(f"k is {k}; it must be 1..{len(outputs)}, the number of training rows")
        self.model = model
        self.k, self.unit_norm = k, unit_norm
        self.outputs: Tensor
        self.votes: Tensor
        self.register_buffer("outputs", outputs)
        self.register_buffer("votes", F.one_hot(labels, classes).to(outputs.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shares, (n, classes). x: (n, ...)."""
        out = self.model(x).flatten(1)
        out = unit_rows(out) if self.unit_norm else out
        nearest = torch.cdist(out, self.outputs).topk(self.k, largest=False).indices
        return self.votes[nearest].mean(1)


def k_nearest(model: nn.Module, task: Task, k: int = 10, unit_norm: bool = False) -> nn.Module:
    """Return a copy of `model` that classifies by the k nearest outputs of the training split."""
    outputs, labels, count = _training_outputs(model, task, unit_norm)
    return _beside(KNearest(copy.deepcopy(model), outputs, labels, count, k, unit_norm), model).eval()


def _beside(module: nn.Module, model: nn.Module) -> nn.Module:
    """Return the module, moved to the device of the model."""
    tensor = next(model.parameters(), None)
    return module if tensor is None else module.to(tensor.device)


def _training_outputs(model: nn.Module, task: Task, unit_norm: bool) -> tuple[Tensor, Tensor, int]:
    if not task.classes:
        raise DataError(f"task '{task.name}' has no classes; class means and votes need labels")
    outputs = torch.from_numpy(task.outputs(model, "train")).flatten(1)
    return unit_rows(outputs) if unit_norm else outputs, task.train.y, len(task.classes)

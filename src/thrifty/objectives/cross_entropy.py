"""Cross-entropy, with softened labels if wanted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.objectives.features import OnePass, Pass, refuse


@dataclass(frozen=True)
class CrossEntropy(OnePass):
    """Mean of -log softmax(outputs)[label]; under mixup, labels are probabilities.

    >>> import torch
    >>> float(CrossEntropy().loss(nn.Identity(), torch.zeros(1, 2), torch.tensor([1]))).__round__(4)
    0.6931
    """

    label_smoothing: float = 0.0  # share of the label's probability that is spread over all classes, in [0, 1)

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1)."""
        share = self.label_smoothing
        refuse("CrossEntropy", {f"label_smoothing is {share}; it must be in [0, 1)": 0 <= share < 1})

    def places(self, model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
        """Return the model, which is run; nothing but its output is needed."""
        return {model: ()}

    def value(self, seen: Pass, y: Tensor) -> Tensor:
        """Return the mean loss of a batch (see OnePass)."""
        return F.cross_entropy(seen.output, y, label_smoothing=self.label_smoothing)

    @classmethod
    def example(cls, teacher: nn.Module) -> CrossEntropy:
        """Return an instance, for the contract tests; it needs no teacher."""
        return cls(label_smoothing=0.1)

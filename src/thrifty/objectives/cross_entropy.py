"""Cross-entropy, with softened labels if wanted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from thrifty.errors import KnobError


@dataclass(frozen=True)
class CrossEntropy:
    """Mean of -log softmax(outputs)[label]; under mixup, labels are probabilities.

    >>> import torch
    >>> float(CrossEntropy().loss(nn.Identity(), torch.zeros(1, 2), torch.tensor([1]))).__round__(4)
    0.6931
    """

    smoothing: float = 0.0  # share of the label's probability that is spread over all classes, in [0, 1)

    def __post_init__(self) -> None:
        """Refuse a share outside [0, 1)."""
        if not 0 <= self.smoothing < 1:
            raise KnobError(f"CrossEntropy.smoothing is {self.smoothing}; it must be in [0, 1)")

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss. x: (n, ...); y: (n,) int64 or (n, classes) probabilities."""
        return F.cross_entropy(model(x), y, label_smoothing=self.smoothing)

"""Models for the tests of objectives."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

IDENTITY = nn.Identity()
OUTPUT = ("",)  # the layers of an objective that compares outputs
# Three samples of which another pair is apart: the case that is computed by hand in several tests.
TEACHER = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
STUDENT = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)


def rows(n: int = 8, d: int = 5, seed: int = 0) -> torch.Tensor:
    """Return random features as behind a ReLU, (n, d) float64."""
    return torch.from_numpy(np.abs(np.random.default_rng(seed).normal(size=(n, d))))


def rotation(d: int, seed: int = 0) -> torch.Tensor:
    """Return a random orthogonal matrix, (d, d)."""
    return torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).normal(size=(d, d)))).Q


class Fixed(nn.Module):
    """Shows the same rows for every input."""

    def __init__(self, rows: list[list[float]] | torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", torch.as_tensor(rows, dtype=torch.float64))
        self.body = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.rows)


class Net(nn.Module):
    """Features of any width, with a batch norm and dropout, and a linear head; counts its passes."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.high = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(width, classes)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.head(self.drop(self.high(self.low(x))))


def hooks_of(*models: nn.Module) -> int:
    """Return how many forward hooks there are on all modules of the models."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def state_of(model: nn.Module) -> dict[str, object]:
    """Return copies of all that a teacher must not lose: tensors, gradients, modes, what requires gradients."""
    state: dict[str, object] = {k: v.clone() for k, v in model.state_dict().items()}
    state |= {f"{n} grad": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state |= {f"{n} requires": p.requires_grad for n, p in model.named_parameters()}
    return state | {f"{n} mode": m.training for n, m in model.named_modules()}


def equal_states(a: dict[str, object], b: dict[str, object]) -> bool:
    """Whether two states are the same, bit for bit."""
    same = [torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()]
    return a.keys() == b.keys() and all(same)

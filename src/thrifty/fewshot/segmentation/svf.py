"""Singular value fine-tuning: every weight matrix keeps its directions, only their strengths are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thrifty.errors import Incompatible


class SingularValues(nn.Module):
    """A parametrisation: weight = U diag(s) V^T, trained in s alone; U, V are the singular vectors of the start.

    The weight (out, ...) is taken as a matrix (out, rest), with all its min(out, rest) singular values. Composing the
    weight costs out * rest * values multiply-adds for each batch, where the two frozen layers of the paper's code cost
    that for each pixel.

    Source: Sun et al. 2022, Singular value fine-tuning (arXiv:2206.06122), as used by Bensaid et al. 2025.
    """

    left: Tensor  # (out, r)
    right: Tensor  # (r, ...) as the weight

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        self.register_buffer("left", u)
        self.register_buffer("right", vh.reshape(-1, *weight.shape[1:]))
        self._start: Tensor | None = s

    def forward(self, s: Tensor) -> Tensor:
        """Return the weight of these singular values (r,)."""
        return ((self.left * s) @ self.right.flatten(1)).reshape(-1, *self.right.shape[1:])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the singular values of the weight that this was made from; called once, on registration."""
        if self._start is None:
            raise Incompatible("a weight under singular value fine-tuning cannot be set; undo it first")
        start, self._start = self._start, None
        return start


def singular_layers(module: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Return the layers that SVF changes: every linear layer and every convolution of one group."""
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]


def apply_svf(module: nn.Module, strict: bool = False) -> int:
    """Put SVF on all layers of a module, in place; return the number of singular values.

    Trainable afterwards: the singular values and, unless `strict`, what belongs to no such layer (norms, layer scales,
    position embeddings, class tokens, depthwise convolutions), as in the benchmark's code. Biases are frozen.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(not strict)
    count = 0
    for _, layer in singular_layers(module):
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", SingularValues(layer.weight))
        values: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        values.requires_grad_(True)
        count += values.numel()
    return count


def merge_svf(module: nn.Module) -> int:
    """Replace every SVF weight by the ordinary weight that it stands for, in place; return how many."""
    count = 0
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight") and isinstance(
            layer.parametrizations.weight[0],  # type: ignore[index, union-attr]
            SingularValues,
        ):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            count += 1
    return count

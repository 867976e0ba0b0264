"""Low-rank adaptation: a frozen layer plus a product of two thin ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thrifty.errors import KnobError, NoMatch


class LowRank(nn.Module):
    """y = layer(x) + (alpha / rank) * up(down(dropout(x))); up starts at zero, so y starts as layer(x), exactly.

    `down` is shaped as the layer (same kernel, stride and padding) with `rank` outputs; `up` goes from rank to the
    layer's outputs, one pixel at a time. Source: Hu et al. 2021 (arXiv:2106.09685); r and alpha of Bensaid et al. 2025.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, rank: int = 16, alpha: float = 16.0, dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer = layer
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = copy.deepcopy(layer)
        start = torch.empty((rank, *layer.weight.shape[1:]), dtype=layer.weight.dtype, device=layer.weight.device)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.down.weight, self.down.bias = nn.Parameter(start), None
        out = layer.weight.shape[0]
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            self.down.out_channels = rank
            self.up = nn.Conv2d(rank, out, 1, bias=False).to(start)
        else:
            self.down.out_features = rank
            self.up = nn.Linear(rank, out, bias=False).to(start)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Tensor:
        """The weight of the frozen layer; code that asks a layer for its dtype finds it here."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen layer."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output and the correction."""
        y: Tensor = self.layer(x) + self.scale * self.up(self.down(self.dropout(x)))
        return y

    def merged(self) -> nn.Linear | nn.Conv2d:
        """Return the plain layer with weight W + (alpha / rank) * up @ down: the same outputs, without dropout."""
        made = copy.deepcopy(self.layer)
        change = self.up.weight.detach().flatten(1) @ self.down.weight.detach().flatten(1)
        with torch.no_grad():
            made.weight.add_(self.scale * change.reshape(made.weight.shape))
        return made


def lora_layers(module: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Return the linear layers and convolutions of one group whose dotted names end in one of the targets.

    Raises NoMatch when there is none: a target that matches nothing is a mistake.
    """
    found = [
        (name, layer)
        for name, layer in module.named_modules()
        if any(f".{name}".endswith(f".{t}") for t in targets)
        and (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
    ]
    if not found:
        raise NoMatch(f"no linear layer or convolution has a name that ends in {', '.join(targets) or '(no targets)'}")
    return found


def apply_lora(
    module: nn.Module, targets: Sequence[str], rank: int = 16, alpha: float = 16.0, dropout: float = 0.1,
    generator: torch.Generator | None = None,
) -> int:  # fmt: skip
    """Freeze a module and put LoRA on the layers named by `targets`, in place; return the trainable numbers.

    Raises KnobError for bad knobs, NoMatch when no layer has such a name.
    """
    if rank < 1 or not 0 <= dropout < 1 or not math.isfinite(alpha):
        raise KnobError(f"rank is {rank}, alpha {alpha}, dropout {dropout}; rank >= 1, alpha finite, dropout in [0, 1)")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    count = 0
    for name, layer in lora_layers(module, targets):
        adapter = LowRank(layer, rank, alpha, dropout, generator)
        _replace(module, name, adapter)
        count += adapter.down.weight.numel() + adapter.up.weight.numel()
    return count


def merge_lora(module: nn.Module) -> int:
    """Replace every adapter by the plain layer that it amounts to, in place; return how many."""
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, LowRank)]
    for name, adapter in found:
        _replace(module, name, adapter.merged())
    return len(found)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)

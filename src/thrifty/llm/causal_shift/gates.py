"""How much of the residual stream a block lets pass: alpha per block, fixed or learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from thrifty.errors import KnobError

INITIAL_NONE = 0.9  # DepthGate: share of "no attenuation" at the start
TOKEN_BIAS = 4.0  # TokenGate: alpha = sigmoid(4) = 0.982 at the start


class Gate(nn.Module):
    """Gives alpha of a block: a number, or (b, t, 1) for the stream x (b, t, d). alpha = 1 leaves the block alone."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def alpha(self, block: int, x: Tensor) -> Tensor | float:
        """Return alpha of a block, given the stream that enters it."""
        raise NotImplementedError

    def alphas(self) -> list[float]:
        """Return alpha of every block, as it is now (of TokenGate: for x = 0)."""
        x = torch.zeros(1, 1, 1)
        with torch.no_grad():
            return [float(self.alpha(block, x)) for block in range(self.blocks)]


class FixedGate(Gate):
    """alpha of single blocks, 1 elsewhere; nothing to learn."""

    def __init__(self, blocks: int, alphas: Mapping[int, float]) -> None:
        super().__init__(blocks)
        if not isinstance(alphas, Mapping):
            raise KnobError(f"the gate is {alphas!r}; give {{block: alpha}}, the name of a gate, or a Gate")
        wrong = [f"block {b!r}" for b in alphas if not (isinstance(b, int) and 0 <= b < blocks)]
        wrong += [f"alpha {a!r} of block {b!r}" for b, a in alphas.items() if not _is_alpha(a)]
        if wrong:
            raise KnobError(f"{', '.join(wrong)}: blocks are 0..{blocks - 1}, and alpha is a number of at least 0")
        self.fixed = dict(alphas)

    def alpha(self, block: int, x: Tensor) -> Tensor | float:
        """Return the given number."""
        return self.fixed.get(block, 1.0)


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


class DepthGate(Gate):
    """One unit of attenuation shared over depth: g = softmax(a) over the blocks and "nowhere"; alpha_l = 1 - g_l."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        start = torch.zeros(blocks + 1)
        start[-1] = math.log(INITIAL_NONE / (1 - INITIAL_NONE) * blocks)
        self.logits = nn.Parameter(start)

    def alpha(self, block: int, x: Tensor) -> Tensor | float:
        """Return 1 - g of the block."""
        return 1.0 - torch.softmax(self.logits, dim=0)[block]


class BlockGate(Gate):
    """alpha_l = 2 sigmoid(b_l), 1 at the start, in (0, 2)."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.logits = nn.Parameter(torch.zeros(blocks))

    def alpha(self, block: int, x: Tensor) -> Tensor | float:
        """Return the block's alpha."""
        return 2.0 * torch.sigmoid(self.logits[block])


class TokenGate(Gate):
    """alpha_l[t] = sigmoid(w_l . normalised x_l[t] + b_l), for each token its own; w = 0 and b = 4 at the start."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__(blocks)
        self.weight = nn.Parameter(torch.zeros(blocks, width))
        self.bias = nn.Parameter(torch.full((blocks,), TOKEN_BIAS))

    def alpha(self, block: int, x: Tensor) -> Tensor | float:
        """Return (b, t, 1) for x (b, t, d); x is brought to mean 0 and variance 1 first."""
        if x.shape[-1] != self.weight.shape[1]:  # `alphas`: without a stream
            return torch.sigmoid(self.bias[block])
        normal = nn.functional.layer_norm(x.to(self.weight.dtype), x.shape[-1:])
        return torch.sigmoid(normal @ self.weight[block] + self.bias[block])[..., None].to(x.dtype)


GATES = {"depth": DepthGate, "block": BlockGate, "token": TokenGate}


def make_gate(name: str, blocks: int, width: int) -> Gate:
    """Return a learnable gate by name: "depth", "block" or "token"."""
    if name not in GATES:
        raise KnobError(f"gate is '{name}'; choose one of {', '.join(GATES)}")
    return TokenGate(blocks, width) if name == "token" else GATES[name](blocks)

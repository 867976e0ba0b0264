"""WavLM's attention with fewer heads.

All layers of WavLM share one relative-position bias, made by layer 0 for every original head, so that a layer that has
lost heads must pick its own by their original index; and torch's fused attention insists on heads x size == width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def keep_heads(attention: nn.Module, kept: list[int]) -> None:
    """Turn an attention module of WavLM into one that runs the heads `kept` (original indices), in place."""
    if not hasattr(attention, "original_heads"):
        attention.original_heads = attention.num_heads
        attention.__class__ = _with_forward(type(attention))  # type: ignore[arg-type]
    attention.kept_heads = kept  # type: ignore[assignment]  # a list of numbers, no buffer: it is in the config
    attention.num_heads = len(kept)  # type: ignore[assignment]


@functools.cache
def _with_forward(kind: type) -> type:
    return type(f"Pruned{kind.__name__}", (kind,), {"forward": _forward})


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    index: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, _width = hidden_states.shape
    everyone, kept = self.original_heads, self.kept_heads
    if position_bias is None:
        position_bias = self.compute_bias(steps, steps).repeat(batch, 1, 1)  # (batch * all heads, steps, steps)
    bias = position_bias.view(batch, everyone, steps, steps)[:, kept]
    slices = hidden_states.view(batch, steps, everyone, -1).transpose(1, 2)[:, kept]
    projected = self.gru_rel_pos_linear(slices).view(batch, len(kept), steps, 2, 4).sum(-1)
    first, second = torch.sigmoid(projected).chunk(2, dim=-1)
    gate = first * (second * self.gru_rel_pos_const - 1.0) + 2.0

    def heads(project: nn.Module) -> Tensor:
        out: Tensor = project(hidden_states).view(batch, steps, len(kept), -1).transpose(1, 2)
        return out

    scores = heads(self.q_proj) * self.scaling @ heads(self.k_proj).transpose(2, 3) + gate * bias
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask.ne(1)[:, None, None, :], float("-inf"))
    weights = torch.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    mixed = (weights @ heads(self.v_proj)).transpose(1, 2).reshape(batch, steps, -1)
    return self.out_proj(mixed), weights, position_bias

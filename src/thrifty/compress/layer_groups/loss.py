"""The loss of group distillation: means of groups of layers, projected, compared by L1 and cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from thrifty.compress.layer_groups.families import Stack
from thrifty.compress.layer_groups.plan import Matching, Plan


def group_means(states: Sequence[Tensor], groups: Sequence[Sequence[int]], normalise: bool = False) -> Tensor:
    """Return the mean representation of each group, (batch, K, steps, width)."""
    if normalise:
        states = [functional.layer_norm(s, s.shape[-1:]) for s in states]
    return torch.stack([torch.stack([states[i] for i in g]).mean(dim=0) for g in groups], dim=1)


def group_loss(student: Tensor, teacher: Tensor, frames: Tensor, plan: Plan | None = None) -> Tensor:
    """Return l1 mean|P - Q| + cosine (-mean cos(P, Q)) + l2 mean (P - Q)^2 over the real frames.

    student, teacher: (batch, K, steps, width), projected; frames: (batch, steps) bool. For equal ones the value is
    -cosine, not 0: the floor of the loss.
    """
    plan = plan or Plan()
    p, q = (x.transpose(1, 2)[frames] for x in (student, teacher))  # (frames, K, width)
    loss = p.new_zeros(())
    if plan.l1:
        loss = loss + plan.l1 * (p - q).abs().mean()
    if plan.cosine:
        cos = functional.cosine_similarity(p, q, dim=-1)
        loss = loss - plan.cosine * (cos if plan.cosine_form == "linear" else functional.logsigmoid(cos)).mean()
    if plan.l2:
        loss = loss + plan.l2 * (p - q).square().mean()
    return loss


def make_projections(stack: Stack, matching: Matching) -> nn.ModuleList:
    """Return the linear maps of a matching, each the identity with zero bias."""
    width = int(stack.config.hidden_size if hasattr(stack.config, "hidden_size") else stack.config.d_model)
    maps = nn.ModuleList()
    for _ in range(max(matching.maps) + 1):
        maps.append(nn.Linear(width, width))
        nn.init.eye_(maps[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(maps[-1].bias)  # type: ignore[arg-type]
    return maps


def project(means: Tensor, maps: nn.ModuleList, matching: Matching) -> Tensor:
    """Return the groups, (batch, K, steps, width), each through its map."""
    return torch.stack([maps[m](means[:, k]) for k, m in enumerate(matching.maps)], dim=1)

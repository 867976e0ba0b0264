"""How the residual stream moves from block to block, looped or not: steps, contraction, and what a lens reads of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thrifty.errors import KnobError
from thrifty.llm.families import Parts, parts_of
from thrifty.llm.inner_loop.looping import Looped, loop
from thrifty.llm.inner_loop.plan import Plan
from thrifty.llm.loading import Batch
from thrifty.llm.streams import stream_states

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    """Means over the learned positions of a batch; index v is the state behind v blocks (0: the embedding)."""

    blocks: tuple[int, ...]  # which block made state v + 1
    norm: Array  # (V + 1,) ||x_v||
    step: Array  # (V,) ||x_(v+1) - x_v|| / ||x_v||
    cosine: Array  # (V,) between x_v and x_(v+1)
    entropy: Array  # (V + 1,) of the lens, nats
    divergence: Array  # (V + 1,) KL(final distribution of the model itself || lens), nats
    gold_rank: Array  # (V + 1,) median rank of the true next token, from 1
    agreement: Array  # (V + 1,) share where lens and final prediction of the model itself have the same first token
    contraction: Array  # (passes - 2,) ||h_(r+1) - h_r|| / ||h_r - h_(r-1)|| at the end of the range, NaN where still
    last_states: Array  # (b, V + 1, d) of the last learned position of each sequence

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the states."""
        arrays = {k: v.tolist() for k, v in self.__dict__.items() if isinstance(v, np.ndarray) and k != "last_states"}
        return {"blocks": list(self.blocks), **arrays}


def trajectory(model: nn.Module, batch: Batch, plan: Plan | None = None) -> Trajectory:
    """Follow a batch through a model, looped with `plan` where one is given; the model is as before afterwards.

    The lens is final norm and head on every state. Raises KnobError when the model is looped already.
    """
    if getattr(model, "_thrifty_inner_loop", None) is not None:
        raise KnobError("the model is looped already; call unloop() and give the plan to trajectory")
    parts = parts_of(model)
    _, final = stream_states(parts, batch.inputs())
    if plan is None:
        states, _ = stream_states(parts, batch.inputs())
        return _measured(parts, batch, states, final, tuple(range(len(parts.blocks))), None)
    with loop(model, plan) as looped:
        states, _ = stream_states(parts, batch.inputs())
    return _measured(parts, batch, states, final, tuple(looped.order), looped)


def plane(base: Trajectory, *others: Trajectory) -> list[Array]:
    """Return 2-D coordinates (b, V + 1, 2) of the last states: the two main directions of the base trajectory alone."""
    points = base.last_states.reshape(-1, base.last_states.shape[-1])
    centre = points.mean(axis=0)
    axes = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]  # the sign of an axis is arbitrary
    return [(t.last_states - centre) @ axes.T for t in (base, *others)]


def _measured(
    parts: Parts, batch: Batch, states: list[Tensor], final: Tensor, order: tuple[int, ...], looped: Looped | None
) -> Trajectory:
    goal, mask = batch.ids[:, 1:], batch.learned[:, 1:]
    kept = [x[:, :-1][mask].float() for x in states]
    truth, target = goal[mask], torch.log_softmax(final[:, :-1][mask].float(), dim=-1)
    lens = {"entropy": [], "divergence": [], "gold_rank": [], "agreement": []}  # type: ignore[var-annotated]
    for x in kept:
        with torch.inference_mode():
            read = torch.log_softmax(parts.logits(x.to(states[0].dtype)).float(), dim=-1)
        lens["entropy"].append(-(read.exp() * read).sum(-1).mean().item())
        lens["divergence"].append((target.exp() * (target - read)).sum(-1).mean().item())
        gold = read.gather(1, truth[:, None])
        lens["gold_rank"].append(1 + (read > gold).sum(-1).double().median().item())
        lens["agreement"].append((read.argmax(-1) == target.argmax(-1)).double().mean().item())
    norm = [x.norm(dim=-1) for x in kept]
    moves = [(b - a).norm(dim=-1) for a, b in itertools.pairwise(kept)]
    cosine = [torch.cosine_similarity(a, b, dim=-1) for a, b in itertools.pairwise(kept)]
    last = mask.int() * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    rows = torch.arange(len(mask), device=mask.device)
    ends = torch.stack([x[rows, last.argmax(1)] for x in states], dim=1)
    return Trajectory(
        blocks=order,
        norm=np.array([n.mean().item() for n in norm]),
        step=np.array([(m / n).mean().item() for m, n in zip(moves, norm, strict=False)]),
        cosine=np.array([c.mean().item() for c in cosine]),
        **{k: np.array(v) for k, v in lens.items()},
        contraction=_contraction(kept, looped),
        last_states=ends.double().cpu().numpy(),
    )


def _contraction(kept: list[Tensor], looped: Looped | None) -> Array:
    if looped is None:
        return np.zeros(0)
    plan = looped.plan
    size = plan.end - plan.start
    ends = [kept[plan.start + (r + 1) * size] for r in range(plan.passes)]
    steps = [(b - a).norm(dim=-1) for a, b in itertools.pairwise(ends)]
    found = [(b / a)[a > 0].mean().item() if (a > 0).any() else float("nan") for a, b in itertools.pairwise(steps)]
    return np.array(found)

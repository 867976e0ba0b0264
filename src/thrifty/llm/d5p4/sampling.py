"""The sampling loop: every state is expanded into w children, a selector keeps k, until nothing is masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError
from thrifty.llm.d5p4.denoisers import Denoiser
from thrifty.llm.d5p4.kernels import gram, quality
from thrifty.llm.d5p4.processes import Mdlm, Process, Stage
from thrifty.llm.d5p4.selection import Select, Selector
from thrifty.llm.d5p4.selectors import Choice, greedy_beam

__all__ = ["Alone", "Samples", "StepLog", "sample"]

_CHUNK = 2**24  # log-probabilities that are in float64 at once


@dataclass(frozen=True)
class StepLog:
    """What one step did; without selection `chosen` is empty and the numbers are NaN."""

    step: int
    chosen: tuple[int, ...] = ()  # candidates of the pool
    lineages: tuple[int, ...] = ()  # of the groups after the step: which of the k first groups each descends from
    value: float = float("nan")  # log-determinant
    quality: float = float("nan")  # mean raw quality of the chosen
    similarity: float = float("nan")  # mean cosine of pairs of the chosen
    flagged: bool = False
    masks: int = 0  # left in the whole pool after the step
    passes: int = 0  # forward passes up to here


@dataclass(frozen=True)
class Samples:
    """k w sequences, group after group, and how they came about."""

    ids: Tensor  # (k w, t)
    k: int
    w: int
    log: tuple[StepLog, ...]
    passes: int  # sequences that went through the network, guidance counted: state it when methods are compared
    scores: Tensor  # (k w,) mean log-probability of the generated tokens, each when it was decided
    picked: tuple[int, ...] = ()  # the k that "best_of" chose at the end

    @property
    def groups(self) -> Tensor:
        """(k, w, t): the members of a group differ by what was drawn since the last selection."""
        return self.ids.reshape(self.k, self.w, -1)

    @property
    def representatives(self) -> Tensor:
        """(k, t): the first of each group. With a partition a group is a lineage; measure diversity on these."""
        return self.ids[list(self.picked)] if self.picked else self.groups[:, 0]

    @property
    def lineages(self) -> tuple[int, ...]:
        """Of each group, the first group that it descends from; k different ones with a partition."""
        return self.log[-1].lineages


class Alone:
    """One process has the whole pool; `sharded.Ranks` shares it among several."""

    def own(self, n: int) -> tuple[int, int]:
        """Return the candidates [first, end) of a pool that this process computes."""
        return 0, n

    def gather(self, raw: Tensor) -> Tensor:
        """Return the raw qualities of the whole pool from this process's."""
        return raw

    def cosines(self, hidden: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
        """Return the cosines (n, n) of the whole pool from this process's hidden states (m, t, e)."""
        return gram(hidden, precision)

    def choose(self, choose: Callable[[], Choice]) -> Choice:
        """Return the choice that all processes share."""
        return choose()

    def merge(self, numbers: Tensor) -> Tensor:
        """Return numbers (n, ...) of the whole pool; those of states drawn by other processes are 0 here."""
        return numbers


def sample(
    denoiser: Denoiser, k: int, w: int, steps: int, selector: Selector | None = None, *, start: int | Tensor,
    generator: torch.Generator, process: Process | None = None, window: tuple[int, int | None] = (0, None),
    guided: tuple[int, int | None] = (0, None), quality_of: str = "", device: str | torch.device = "cpu",
    ranks: Alone | None = None, progress: Callable[[int, int], None] | None = None,
) -> Samples:  # fmt: skip
    """Return k groups of w sequences, decoded together.

    start: how many masks, or token ids (t,) with masks where tokens are wanted. selector: `Select()` is D5P4+; None
    decodes k w sequences independently, and `Select("best_of")` chooses k of those at the end. window: selection takes
    place in the steps [first, end), the clean-up step included when end is None; in other steps every state has one
    child. guided: steps with guidance. generator: a CPU generator, the only source of the sequences' noise: two float64
    numbers a position and step, whatever is selected. quality_of: overrides the selector's. progress(done, all) may
    raise to interrupt.
    A step costs k w forward passes (2 k w with guidance). Raises KnobError, DataError.

    Source: D5P4 (2026) and its released code.
    """
    process = process or Mdlm()
    ranks = ranks or Alone()
    begin = _start(denoiser, k, w, steps, start)
    stages = process.stages(begin, denoiser.mask_id, steps)
    n, given = k * w, (begin != denoiser.mask_id).to(device)
    kind = quality_of or (selector.quality if isinstance(selector, Select) else "entropy")
    precision = torch.float64 if isinstance(selector, Select) and selector.precision == "float64" else torch.float32
    final = selector if isinstance(selector, Select) and selector.method == "best_of" else None
    points = bool(getattr(denoiser, "points", False))
    ids, lineages = begin.to(device).expand(n, -1).clone(), list(range(k))
    sums = torch.zeros(n, dtype=torch.float64, device=device)
    own = ranks.own(n)
    log: list[StepLog] = []
    passes = 0
    for step, stage in enumerate(stages):
        guide = _within(step, guided)
        log_p, hidden = denoiser(ids[own[0] : own[1]], given, guide)
        passes += n * denoiser.passes(guide)
        entry = StepLog(step)
        parents = torch.arange(n)
        if selector is not None and final is None and _within(step, window):
            masked = ids[own[0] : own[1]] == denoiser.mask_id
            raw, cosines = _pool(ranks, log_p, hidden, masked, stage, kind, points, precision)
            entry = _select(selector, ranks, raw, cosines, k, step)
            parents = torch.tensor(entry.chosen).repeat_interleave(w)
            lineages = [lineages[c // w] for c in entry.chosen]
        noise = torch.rand(n, len(begin), 2, dtype=torch.float64, generator=generator)
        drawn = _children(process, ids, log_p, noise, parents, own, stage, denoiser.mask_id)
        ids, sums = ranks.merge(drawn[0]), sums[parents.to(device)] + ranks.merge(drawn[1])
        masks = int((ids == denoiser.mask_id).sum())
        log.append(replace(entry, lineages=tuple(lineages), masks=masks, passes=passes))
        if progress is not None:
            progress(step + 1, len(stages))
    scores = (sums / (begin == denoiser.mask_id).sum()).cpu()
    return Samples(
        ids, k, w, tuple(log), passes, scores, greedy_beam(scores, k, final.partition).indices if final else ()
    )


def _within(step: int, window: tuple[int, int | None]) -> bool:
    return window[0] <= step and (window[1] is None or step < window[1])


def _start(denoiser: Denoiser, k: int, w: int, steps: int, start: int | Tensor) -> Tensor:
    """Return the start state (t,) after all knobs are checked."""
    state = torch.full((start,), denoiser.mask_id) if isinstance(start, int) else start.detach().cpu().long()
    size = tuple(state.shape)
    longest = denoiser.longest
    rules = {
        f"k is {k}; it must be at least 1": k >= 1,
        f"w is {w}; it must be at least 1": w >= 1,
        f"steps is {steps}; it must be at least 1": steps >= 1,
        f"start has shape {size}; it must be (t,) with t at least 1": len(size) == 1 and size[0] >= 1,
        f"start has {size[0] if size else 0} positions; the model takes {longest}": longest is None
        or not size
        or size[0] <= longest,
        f"start holds no mask (id {denoiser.mask_id}): nothing to decode": bool((state == denoiser.mask_id).any()),
    }
    if wrong := [sentence for sentence, fine in rules.items() if not fine]:
        raise KnobError("; ".join(wrong))
    return state


def _pool(
    ranks: Alone, log_p: Tensor, hidden: Tensor, masked: Tensor, stage: Stage, kind: str, points: bool,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the raw qualities (n,) and the cosines (n, n) of the whole pool."""
    inside = slice(stage.first, stage.end)
    raw = ranks.gather(quality(log_p[:, inside], kind, masked[:, inside], points, precision))
    return raw, ranks.cosines(hidden[:, inside], precision)


def _select(selector: Selector, ranks: Alone, raw: Tensor, cosines: Tensor, k: int, step: int) -> StepLog:
    """Return the log entry of a selection among the whole pool."""
    choice = ranks.choose(lambda: selector(raw, cosines, k, step))
    if len(set(choice.indices)) != k or not all(0 <= i < len(raw) for i in choice.indices):
        raise DataError(f"the selector chose {choice.indices}; it must choose {k} different ones of {len(raw)}")
    chosen = torch.tensor(choice.indices, device=raw.device)
    alike = cosines[chosen][:, chosen]
    pairs = float("nan") if k == 1 else float((alike.sum() - alike.trace()) / (k * (k - 1)))
    return StepLog(step, choice.indices, (), choice.value, float(raw[chosen].mean()), pairs, choice.flagged)


def _children(
    process: Process, ids: Tensor, log_p: Tensor, noise: Tensor, parents: Tensor, own: tuple[int, int], stage: Stage,
    mask_id: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the next pool (n, t), drawn in pieces, and the log-probabilities (n,) of what each has decided now.

    Both are 0 for children of parents that are another process's.
    """
    following = torch.zeros_like(ids)
    decided = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    mine = ((parents >= own[0]) & (parents < own[1])).nonzero().flatten()
    rows = max(1, _CHUNK // (log_p.shape[1] * log_p.shape[2]))
    for part in torch.split(mine, rows):
        parent = parents[part].to(ids.device)
        held, there = ids[parent], part.to(ids.device)
        drawn = process.draw(held, log_p[parent - own[0]], noise[part].to(ids.device), stage, mask_id)
        row, place = ((held == mask_id) & (drawn != mask_id)).nonzero(as_tuple=True)
        gained = log_p[parent[row] - own[0], place, drawn[row, place]].double()
        following[there] = drawn
        decided.index_add_(0, there[row], gained)
    return following, decided

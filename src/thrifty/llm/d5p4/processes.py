"""Reverse processes: how one step decides masked positions. MDLM's in continuous time, LLaDA's in blocks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError, close_to

__all__ = ["REMASKING", "Blocks", "Mdlm", "Process", "Stage", "tokens_from"]

REMASKING = ("low_confidence", "random", "selection_temperature")
EARLIEST = 1e-5  # the time at which MDLM's steps end; the clean-up step decides the rest


@dataclass(frozen=True)
class Stage:
    """One step of a process: the positions [first, end) that selection looks at, and how much is decided."""

    first: int
    end: int
    now: float = 0.0  # MDLM: P(masked) before the step and after it
    later: float = 0.0
    commit: int = 0  # Blocks: how many tokens of the block are decided


class Process(Protocol):
    """A reverse process."""

    def stages(self, start: Tensor, mask_id: int, steps: int) -> list[Stage]:
        """Return what is done in each step, from a start state (t,)."""

    def draw(self, ids: Tensor, log_p: Tensor, noise: Tensor, stage: Stage, mask_id: int) -> Tensor:
        """Return the next states of states (b, t), from log_p (b, t, v) and uniform noise (b, t, 2) in float64."""


def tokens_from(log_p: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return tokens (m,) drawn by inversion from log_p (m, v) with uniform noise (m,), and their log_p.

    In float64 throughout: neither Gumbel noise nor its cap. temperature 0 takes the most probable token; the
    log-probability returned is that without temperature. Raises DataError where a distribution is not finite.
    """
    exact = log_p.double()
    if not torch.isfinite(exact.amax(-1)).all():
        raise DataError("log-probabilities are not finite; check the model's outputs")
    if temperature == 0:
        tokens = exact.argmax(-1)
    else:
        sums = torch.softmax(exact / temperature, -1).cumsum(-1)
        total = sums[:, -1:]
        at = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(sums, at, right=True)[:, 0]
    return tokens, exact.gather(1, tokens[:, None])[:, 0]


@dataclass(frozen=True)
class Mdlm:
    """MDLM: a masked position is decided with probability (t - s) / t; `steps` equal steps and a clean-up step.

    Source: MDLM (arXiv:2406.07524), log-linear schedule.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a negative temperature."""
        _check_temperature(self.temperature)

    def stages(self, start: Tensor, mask_id: int, steps: int) -> list[Stage]:
        """Return `steps` steps from t = 1 to 1e-5 and the clean-up step, each over all positions."""
        del mask_id
        size = (1.0 - EARLIEST) / steps
        times = [1.0 - i * size for i in range(steps)] + [EARLIEST]
        return [Stage(0, len(start), a, b) for a, b in zip(times, [*times[1:], 0.0], strict=True)]

    def draw(self, ids: Tensor, log_p: Tensor, noise: Tensor, stage: Stage, mask_id: int) -> Tensor:
        """Return the next states: decided tokens are copied."""
        decide = (ids == mask_id) & (noise[..., 1] * stage.now < stage.now - stage.later)
        following = ids.clone()
        following[decide] = tokens_from(log_p[decide], noise[..., 0][decide], self.temperature)[0]
        return following


@dataclass(frozen=True)
class Blocks:
    """LLaDA: blocks from left to right; each step decides the c masked positions of the block it is most sure of.

    steps are shared equally by the blocks, the masks of a block by its steps (the remainder goes to the first).
    remasking "random" decides c random positions; "selection_temperature" draws c of the 2 c surest, without
    replacement, by a softmax of their probabilities over that temperature (0 takes the surest). last: tokens (such as
    the end of text) that are decided only where nothing else is left.

    Source: LLaDA (arXiv:2502.09992) and its released code.
    """

    block: int = 32
    remasking: str = "low_confidence"
    temperature: float = 1.0
    last: tuple[int, ...] = ()
    selection_temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_temperature(self.temperature)
        _check_temperature(self.selection_temperature, "selection_temperature")
        if self.block < 1:
            raise KnobError(f"block is {self.block}; it must be at least 1")
        if self.remasking not in REMASKING:
            raise KnobError(f"remasking is '{self.remasking}'; {close_to(str(self.remasking), REMASKING)}")

    def stages(self, start: Tensor, mask_id: int, steps: int) -> list[Stage]:
        """Return the steps of all blocks; the first block begins at the first mask. Raises KnobError."""
        masked = (start == mask_id).nonzero().flatten().tolist()
        first, end = masked[0], len(start)
        borders = [*range(first, end, self.block), end]
        blocks = [(a, b) for a, b in itertools.pairwise(borders) if any(a <= m < b for m in masked)]
        if steps % len(blocks):
            raise KnobError(f"steps is {steps}; it must be a multiple of {len(blocks)}, the number of blocks")
        each = steps // len(blocks)
        found = []
        for a, b in blocks:
            share, more = divmod(sum(a <= m < b for m in masked), each)
            found += [Stage(a, b, commit=share + (i < more)) for i in range(each)]
        return found

    def draw(self, ids: Tensor, log_p: Tensor, noise: Tensor, stage: Stage, mask_id: int) -> Tensor:
        """Return the next states: c more tokens of the block in each."""
        inside = slice(stage.first, stage.end)
        part, masked = ids[:, inside], ids[:, inside] == mask_id
        found, confidence = tokens_from(log_p[:, inside][masked], noise[:, inside, 0][masked], self.temperature)
        if self.remasking == "random":
            confidence = noise[:, inside, 1][masked].clamp_min(1e-300).log()
        for token in self.last:
            confidence = confidence.masked_fill(found == token, -1e300)
        tokens, sure = part.clone(), torch.full(part.shape, -torch.inf, dtype=torch.float64, device=part.device)
        tokens[masked], sure[masked] = found, confidence
        if self.remasking == "selection_temperature" and self.selection_temperature > 0:
            sure = _perturbed(sure, noise[:, inside, 1], 2 * stage.commit, self.selection_temperature)
        places = sure.topk(stage.commit, dim=1).indices
        decide = torch.zeros_like(masked).scatter(1, places, True) & masked
        following = ids.clone()
        following[:, inside] = torch.where(decide, tokens, part)
        return following


def _perturbed(sure: Tensor, uniform: Tensor, most: int, temperature: float) -> Tensor:
    """Return keys (b, t) whose c largest are a draw of c among the `most` largest log-probabilities (Gumbel's way)."""
    best = sure.topk(min(most, sure.shape[1]), dim=1)
    keys = best.values.exp() / temperature - uniform.gather(1, best.indices).clamp(1e-300, 1 - 1e-16).log().neg().log()
    keys = torch.where(best.values > -1e299, keys, best.values)  # what comes last or is decided stays behind
    return torch.full_like(sure, -torch.inf).scatter(1, best.indices, keys)


def _check_temperature(value: float, name: str = "temperature") -> None:
    if not value >= 0:
        raise KnobError(f"{name} is {value}; it must be at least 0")

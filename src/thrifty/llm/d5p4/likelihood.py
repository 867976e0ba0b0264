"""How likely a diffusion model finds a text: the Monte Carlo bound, and whether greedy decoding would give it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thrifty.errors import KnobError
from thrifty.llm.d5p4.denoisers import Denoiser

__all__ = ["SAMPLES", "Bound", "is_greedy", "log_likelihood_bound"]

SAMPLES = 128


@dataclass(frozen=True)
class Bound:
    """A lower bound of the log-likelihood of an answer, nats, estimated from random masks."""

    value: float
    error: float  # standard error of the estimate; 0 for one token, which needs one sample only
    tokens: int  # of the answer
    passes: int  # forward passes spent


def log_likelihood_bound(
    denoiser: Denoiser, ids: Tensor, answer: Tensor, generator: torch.Generator, samples: int = SAMPLES,
    batch: int = 16, device: str | torch.device = "cpu",
) -> Bound:  # fmt: skip
    """Return the bound of the log-likelihood of some tokens of a text, given the others.

    ids: (t,) without masks; answer: (t,) bool, the L tokens that are scored; both on the cpu. device: the denoiser's.
    Each sample masks l of them, l spread evenly over 1..L, and weighs their cross-entropy by L / l. For a denoiser
    whose conditionals belong to one joint distribution the bound is tight: the mean is the log-likelihood itself.
    Raises KnobError.

    Source: LLaDA (arXiv:2502.09992), its evaluation: 128 samples, one for a single token.
    """
    length = _length(ids, answer)
    if samples < 1 or batch < 1:
        raise KnobError(f"samples is {samples} and batch is {batch}; both must be at least 1")
    samples = 1 if length == 1 else samples
    spread = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(samples)) / samples
    counts = (spread * length).floor().long().clamp(max=length - 1) + 1
    order = torch.rand(samples, length, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    places = answer.nonzero().flatten()
    found, passes = [], 0
    for part in torch.split(torch.arange(samples), batch):
        masked = torch.zeros(len(part), len(ids), dtype=torch.bool)
        masked[:, places] = order[part] < counts[part, None]
        state = ids.expand(len(part), -1).masked_fill(masked, denoiser.mask_id)
        log_p, _ = denoiser(state.to(device), ~answer.to(device))
        passes += len(part) * denoiser.passes()
        own = log_p.cpu().double().gather(2, ids.expand(len(part), -1)[..., None])[..., 0]
        found.append((own * masked).sum(1) * length / counts[part])
    values = torch.cat(found)
    error = float(values.std()) / math.sqrt(samples) if samples > 1 else 0.0
    return Bound(float(values.mean()), error, length, passes)


def is_greedy(denoiser: Denoiser, ids: Tensor, answer: Tensor, device: str | torch.device = "cpu") -> bool:
    """Return whether decoding one token a step, always the surest of the masked ones, gives the answer.

    ids: (t,); answer: (t,) bool. Stops at the first token that differs: at most L forward passes.
    """
    _length(ids, answer)
    state = ids.masked_fill(answer, denoiser.mask_id)
    while bool((left := (state == denoiser.mask_id) & answer).any()):
        log_p, _ = denoiser(state[None].to(device), ~answer.to(device))
        best, token = log_p[0].cpu().double().max(-1)
        place = int(best.masked_fill(~left, -math.inf).argmax())
        if int(token[place]) != int(ids[place]):
            return False
        state[place] = ids[place]
    return True


def _length(ids: Tensor, answer: Tensor) -> int:
    length = int(answer.sum())
    if ids.dim() != 1 or ids.shape != answer.shape or not length:
        raise KnobError(
            f"ids has shape {tuple(ids.shape)}, answer {tuple(answer.shape)} with {length} tokens to score; both must "
            "be (t,), with at least one"
        )
    return length

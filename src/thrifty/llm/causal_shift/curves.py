"""Where hidden states stop decoding to the token that came in and start decoding to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError
from thrifty.llm.families import Parts, parts_of
from thrifty.llm.loading import Batch
from thrifty.llm.streams import stream_states

Array = npt.NDArray[np.float64]
MEASURES = (
    "input_match", "output_match", "self_match", "random_match", "cosine_in", "cosine_out", "cosine_predicted",
    "centred_in", "centred_out", "projection_in", "projection_out", "share_in", "share_out", "norm", "entropy",
    "divergence",
)  # fmt: skip
EXCLUDED = ("last or padding", "not to be predicted", "among the first", "beginning of text", "next token is the same")
_ROWS, _PIECE = 256, 32  # positions whose logits are made at once, and positions that are read at once
PAIRS = {
    "match": ("input_match", "output_match"),
    "cosine": ("cosine_in", "cosine_out"),
    "centred": ("centred_in", "centred_out"),
}


@dataclass(frozen=True)
class Transition:
    """The depth from which the next token is decoded rather than the one that came in."""

    depth: int | None  # the first depth from which on it stays so; 0: the embedding; None: never
    crossing: float | None  # interpolated between depths
    low: float | None  # 95 % bootstrap interval of the crossing over sequences; None where it is never reached
    high: float | None
    never: float  # share of bootstrap draws without a transition


@dataclass(frozen=True)
class Curves:
    """Measures at every depth, 0 (what enters block 0) to K (behind the last block), for each sequence.

    x_t is the token at position t, p_l its decoding at depth l: the argmax of the lens, final norm and head on the
    raw state h_l. input_match: p_l = x_t; output_match: p_l = x_(t+1); self_match: p_l = p_K; random_match: p_l is
    the token of another position. cosine_in, _out, _predicted: of h_l and the embedding of x_t, x_(t+1), p_K;
    centred_*: minus the mean embedding. projection_*: <h_l, e> / |e|; share_*: that by |h_l|. entropy of the lens
    and divergence KL(final || lens) in nats.
    """

    values: dict[str, Array]  # name -> (K + 1, n) means of each sequence
    counts: npt.NDArray[np.int64]  # (n,) positions of each sequence that count
    excluded: dict[str, int]  # why positions do not count -> how many
    unigram: float  # match rate of the predictor that always says the most frequent next token
    tied: bool  # untied: "in" uses the input matrix, "out" and "predicted" the output matrix

    @property
    def depths(self) -> int:
        """K + 1."""
        return len(self.values["norm"])

    def mean(self, name: str) -> Array:
        """Return the mean over positions at each depth, (K + 1,)."""
        found: Array = self.values[name] @ self.counts / self.counts.sum()
        return found

    def interval(self, name: str, seed: int = 0, draws: int = 1000) -> tuple[Array, Array]:
        """Return the ends of the 95 % bootstrap interval over sequences at each depth."""
        found = np.stack([self.values[name] @ w / w.sum() for w in self._resampled(seed, draws)])
        return np.quantile(found, 0.025, axis=0), np.quantile(found, 0.975, axis=0)

    def transition(self, kind: str = "match", seed: int = 0, draws: int = 1000) -> Transition:
        """Return the depth where out passes in for good. kind: "match", "cosine" or "centred"."""
        if kind not in PAIRS:
            raise KnobError(f"kind is '{kind}'; choose one of {', '.join(PAIRS)}")
        inside, outside = (self.values[name] for name in PAIRS[kind])
        gap = outside - inside
        depth, crossing = crossing_of(gap @ self.counts)
        drawn = [crossing_of(gap @ w)[1] for w in self._resampled(seed, draws)]
        known = [c for c in drawn if c is not None]
        low, high = (float(q) for q in np.quantile(known, [0.025, 0.975])) if known else (None, None)
        return Transition(depth, crossing, low, high, never=1 - len(known) / draws)

    def to_json(self) -> dict[str, Any]:
        """Return means, intervals and transitions as plain data."""
        curves = {n: {"mean": self.mean(n).tolist(), "low": lo.tolist(), "high": hi.tolist()}
                  for n in MEASURES for lo, hi in [self.interval(n)]}  # fmt: skip
        transitions = {kind: self.transition(kind).__dict__ for kind in PAIRS}
        return {
            "curves": curves, "transitions": transitions, "positions": int(self.counts.sum()),
            "sequences": len(self.counts), "excluded": self.excluded, "unigram": self.unigram, "tied": self.tied,
        }  # fmt: skip

    def to_csv(self) -> str:
        """Return the means as CSV: a line per depth."""
        means = {n: self.mean(n) for n in MEASURES}
        rows = [",".join([str(d), *(f"{means[n][d]:.6g}" for n in MEASURES)]) for d in range(self.depths)]
        return "\n".join([",".join(["depth", *MEASURES]), *rows]) + "\n"

    def _resampled(self, seed: int, draws: int) -> list[Array]:
        """Return the weight of each sequence in every bootstrap draw; a draw always has positions."""
        rng, n = np.random.default_rng(seed), len(self.counts)
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) * self.counts for _ in range(draws)]
        return [(w if w.sum() else self.counts).astype(np.float64) for w in drawn]


def crossing_of(gap: Array) -> tuple[int | None, float | None]:
    """Return (first depth from which gap stays above zero, where it crosses zero before), or (None, None).

    >>> crossing_of(np.array([-2.0, -1.0, 1.0, 3.0]))
    (2, 1.5)
    """
    below = np.flatnonzero(~(gap > 0))
    first = int(below[-1]) + 1 if below.size else 0
    if first == len(gap):
        return None, None
    if first == 0:
        return 0, 0.0
    before, after = float(gap[first - 1]), float(gap[first])
    return first, first - 1 + before / (before - after)


def curves(model: nn.Module, batches: Sequence[Batch], skip: int = 0, seed: int = 0) -> Curves:
    """Return the lens curves of a causal language model on texts.

    batches: of thrifty.llm.loading. Positions that do not count: the last of a sequence, padding, those whose next
    token is not `learned` (a prompt), the first `skip` (their states are often huge), the beginning-of-text token, and
    those where x_t = x_(t+1). seed: of random_match.

    Raises DataError when no position is left, and says why; UnsupportedModel.

    Source: Residual Connections and the Causal Shift (2026); the averages and the interval are ours
    (docs/causal_shift.md).
    """
    parts = parts_of(model)
    if skip < 0:
        raise KnobError(f"skip is {skip}; it must be at least 0")
    if not batches:
        raise DataError("there are no texts")
    bos = getattr(parts.config, "bos_token_id", None)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Array]] = {name: [] for name in MEASURES}
    counts: list[int] = []
    excluded = dict.fromkeys(EXCLUDED, 0)
    following: list[Tensor] = []
    for batch in batches:
        kept = _kept(batch, skip, bos, excluded)
        counts += kept.sum(1).tolist()
        following.append(batch.ids[:, 1:][kept])
        for name, values in _measured(parts, batch, kept, generator).items():
            found[name].append(values)
    if not sum(counts):
        reasons = ", ".join(f"{why}: {n}" for why, n in excluded.items() if n)
        raise DataError(f"no position is left to measure ({reasons})")
    targets = torch.cat(following)
    unigram = float(torch.bincount(targets).max()) / len(targets)
    joined = {name: np.concatenate(pieces, axis=1) for name, pieces in found.items()}
    return Curves(joined, np.array(counts), excluded, unigram, parts.tied)


def _kept(batch: Batch, skip: int, bos: int | None, excluded: dict[str, int]) -> Tensor:
    """Return which positions (b, t - 1) count, and count the others by reason, each once."""
    here, after = batch.ids[:, :-1], batch.ids[:, 1:]
    real = (batch.attention[:, :-1] * batch.attention[:, 1:]).bool()
    place = batch.attention.cumsum(1)[:, :-1] - 1
    begins = torch.zeros_like(real) if bos is None else here == bos
    reasons = (~real, ~batch.learned[:, 1:], place < skip, begins, here == after)
    kept = torch.ones_like(real)
    for why, wrong in zip(EXCLUDED, reasons, strict=True):
        excluded[why] += int((kept & wrong).sum())
        kept &= ~wrong
    excluded[EXCLUDED[0]] += len(batch.ids)  # the last position of each sequence has no next token
    return kept


def _measured(parts: Parts, batch: Batch, kept: Tensor, generator: torch.Generator) -> dict[str, Array]:
    """Return the measures (K + 1, b): means over the kept positions of each sequence, 0 where there is none."""
    states, logits = stream_states(parts, batch.inputs())
    rows = kept.nonzero()[:, 0]
    here, after = batch.ids[:, :-1][kept], batch.ids[:, 1:][kept]
    final = logits[:, :-1][kept].float()
    predicted, target = final.argmax(-1), torch.softmax(final, dim=-1)
    own = -torch.xlogy(target, target).sum(-1)  # entropy of the final prediction
    other = here[torch.randperm(len(here), generator=generator).to(here.device)]
    inputs, outputs = parts.embedding.weight.detach().float(), parts.head.weight.detach().float()
    means = (inputs.mean(0), outputs.mean(0))
    vectors = {"in": inputs[here], "out": outputs[after], "predicted": outputs[predicted]}
    sizes = kept.sum(1).clamp_min(1)
    found: dict[str, list[Array]] = {name: [] for name in MEASURES}
    for state in states:
        h = state[:, :-1][kept].float()
        with torch.inference_mode():
            decoded, entropy, crossed = _lens(parts, state[:, :-1][kept], target)
        length = h.norm(dim=-1)
        projected = {k: (h * v).sum(-1) / v.norm(dim=-1) for k, v in vectors.items()}
        measures = {
            "input_match": decoded == here, "output_match": decoded == after, "self_match": decoded == predicted,
            "random_match": decoded == other, "norm": length,
            **{f"cosine_{k}": p / length.clamp_min(1e-30) for k, p in projected.items()},
            "centred_in": torch.cosine_similarity(h, vectors["in"] - means[0], dim=-1),
            "centred_out": torch.cosine_similarity(h, vectors["out"] - means[1], dim=-1),
            **{f"projection_{k}": projected[k] for k in ("in", "out")},
            **{f"share_{k}": projected[k] / length.clamp_min(1e-30) for k in ("in", "out")},
            "entropy": entropy, "divergence": crossed - own,
        }  # fmt: skip
        for name, values in measures.items():
            total = torch.zeros(len(batch), dtype=torch.float64, device=h.device)
            total.index_add_(0, rows, values.double())
            found[name].append((total / sizes).cpu().numpy())
    return {name: np.stack(values) for name, values in found.items()}


def _lens(parts: Parts, states: Tensor, target: Tensor) -> list[Tensor]:
    """Return argmax, entropy and cross-entropy to target, (m,) each, of states (m, d); target (m, v): probabilities.

    In pieces that stay in the processor's caches, and with one exponential a logit.
    """
    kinds = (torch.long, torch.float32, torch.float32)
    found = [torch.empty(len(states), dtype=kind, device=states.device) for kind in kinds]
    for first in range(0, len(states), _PIECE):
        if first % _ROWS == 0:
            logits = parts.logits(states[first : first + _ROWS])
        here = slice(first, first + _PIECE)
        z = logits[first % _ROWS :][:_PIECE].float()
        top, found[0][here] = z.max(-1)
        z -= top[:, None]
        size = z.exp()
        total = size.sum(-1)
        found[1][here] = total.log() - torch.linalg.vecdot(size, z) / total
        found[2][here] = total.log() - torch.linalg.vecdot(target[here], z)
    return found

"""Choosing k candidates of a pool, one from each group: no language model needed.

A pool has n = k w candidates; group g holds candidates g w to g w + w - 1. Without a partition any k may be chosen.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError
from thrifty.llm.d5p4 import compiled

FLOOR = 1e-10  # of a conditional variance: beneath it candidates are the same
EXACT_SETS = 1024  # sets that `map_set` tries all
MOST_EXHAUSTIVE = 1_000_000  # sets that `exhaustive` is willing to try


@dataclass(frozen=True)
class Choice:
    """k candidates, ascending."""

    indices: tuple[int, ...]
    value: float  # log det of the kernel on them; -inf where it is singular
    flagged: bool = False  # a conditional variance fell to FLOOR: the rest was taken by group, then by order
    details: dict[str, float] = field(default_factory=dict)


def log_det(kernel: Tensor, indices: tuple[int, ...] | list[int]) -> float:
    """Return the log-determinant of the kernel (n, n) on some candidates; -inf where it is not positive."""
    rows = torch.tensor(list(indices), device=kernel.device)
    sign, value = torch.linalg.slogdet(kernel.double()[rows][:, rows])
    return float(value) if sign > 0 else float("-inf")


def greedy_map(kernel: Tensor, k: int, partition: bool = True, starts: str = "all", polish: bool = False) -> Choice:
    """Return k candidates that maximise log det K_Y greedily, from every start at once ("all"), or from the best one.

    kernel: (n, n) symmetric, n a multiple of k where there is a partition: then one of each group is chosen. The
    incremental Cholesky runs from all starts, O(n^2 k^2) operations; the best end wins, so for k = 2 the answer is
    exact. starts="one" begins with the largest diagonal entry. polish: single candidates are then exchanged while that
    helps. Kernels on the CPU go through compiled code where numba is installed (`pip install 'thrifty[speed]'`): the
    same choices, ties included. Raises DataError, KnobError.

    Source: Chen, Zhang & Zhou 2018 (arXiv:1709.05135), the incremental form; D5P4 (2026), partition and starts.
    """
    checked, w = _pool(kernel, k, partition)
    if starts not in ("all", "one"):
        raise KnobError(f"starts is '{starts}'; it must be 'all' or 'one'")
    n = len(checked)
    begin = np.arange(n) if starts == "all" else np.array([int(checked.diagonal().argmax())])
    if checked.device.type == "cpu" and compiled.available():
        chosen, own = compiled.greedy(checked.numpy(), w, begin, k, FLOOR)
    else:
        found = _greedy(checked, _groups(checked, w), torch.from_numpy(begin).to(checked.device), k)
        chosen, own = found[0].cpu().numpy(), found[1].cpu().numpy()
    ends = np.log(np.maximum(own, FLOOR)).sum(1)
    best = int(ends.argmax())
    indices = tuple(sorted(chosen[best].tolist()))
    flagged = min(own[best].tolist()) <= FLOOR
    if polish and (better := _polished(checked, _groups(checked, w), indices)) != indices:
        return Choice(better, log_det(checked, better), flagged)
    return Choice(indices, log_det(checked, indices) if flagged else float(ends[best]), flagged)


def _greedy(kernel: Tensor, group_of: Tensor, begin: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the candidates (s, k) that each of s starts takes, in order, and their conditional variances (s, k).

    L D L^T rather than Cholesky, so that there are no square roots. On the CPU the operations are those of
    `compiled.greedy`, in its order; accelerators sum by matrix products.
    """
    n, starts = len(kernel), len(begin)
    alike = group_of[:, None] == group_of
    variance = kernel.diagonal().expand(starts, n).clone()
    basis = torch.empty(k, starts, n, dtype=torch.float64, device=kernel.device)
    inverse = torch.empty(k, starts, 1, dtype=torch.float64, device=kernel.device)
    chosen = torch.empty(starts, k, dtype=torch.long, device=kernel.device)
    own = torch.empty(starts, k, dtype=torch.float64, device=kernel.device)
    for step in range(k):
        pick = variance.argmax(1) if step else begin
        value = variance.gather(1, pick[:, None])
        chosen[:, step], own[:, step] = pick, value[:, 0]
        variance.masked_fill_(alike[pick], -torch.inf)
        row = basis[step]
        torch.index_select(kernel, 0, pick, out=row)
        before = basis[:step].gather(2, pick.expand(step, starts)[..., None]) * inverse[:step]
        if kernel.device.type == "cpu":
            for lower, share in zip(basis[:step], before, strict=True):
                row.sub_(lower * share)
        elif step:
            row.sub_(torch.einsum("msi,msn->sn", before, basis[:step]))
        inverse[step] = value.clamp_min_(FLOOR).reciprocal_()
        variance.sub_((row * row).mul_(inverse[step]))
    return chosen, own


def _polished(kernel: Tensor, group_of: Tensor, indices: tuple[int, ...]) -> tuple[int, ...]:
    """Return the set after the best exchanges of single candidates, until none helps."""
    current, value = list(indices), log_det(kernel, indices)
    while True:
        held = set(group_of[current].tolist())
        swaps = [
            [*current[:i], other, *current[i + 1 :]]
            for i, old in enumerate(current)
            for other in range(len(kernel))
            if other not in current and int(group_of[other]) in {int(group_of[old])} | (_all(group_of) - held)
        ]
        if not swaps:
            return tuple(sorted(current))
        sets = torch.tensor(swaps, device=kernel.device)
        sign, values = torch.linalg.slogdet(kernel[sets[:, :, None], sets[:, None, :]])
        values = torch.where(sign > 0, values, -torch.inf)
        if not float(values.max()) > value + 1e-12:
            return tuple(sorted(current))
        value, current = float(values.max()), swaps[int(values.argmax())]


def _all(group_of: Tensor) -> set[int]:
    return set(group_of.tolist())


def exhaustive(
    kernel: Tensor, k: int, partition: bool = True, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Choice:
    """Return the best of all sets, or with a temperature one drawn with P in proportion to det K_Y^(1 / temperature).

    generator: a CPU generator, needed with a temperature. Raises KnobError, also where there are more sets than
    MOST_EXHAUSTIVE; DataError.
    """
    checked, _ = _pool(kernel, k, partition)
    n = len(checked)
    w = n // k
    count = w**k if partition else _binomial(n, k)
    if count > MOST_EXHAUSTIVE:
        raise KnobError(f"{count} sets are too many to try all; use greedy_map")
    if temperature < 0 or (temperature > 0 and generator is None):
        raise KnobError(f"temperature is {temperature}; it must be at least 0, and with a generator where it is not 0")
    if partition:
        sets = torch.cartesian_prod(*(torch.arange(g * w, g * w + w) for g in range(k))).reshape(-1, k)
    else:
        sets = torch.tensor(list(itertools.combinations(range(n), k)))
    parts = []
    for part in torch.split(sets.to(checked.device), 1 << 14):
        sign, value = torch.linalg.slogdet(checked[part[:, :, None], part[:, None, :]])
        parts.append(torch.where(sign > 0, value, -torch.inf))
    values = torch.cat(parts).cpu()
    pick = int(values.argmax())
    if temperature > 0 and bool(torch.isfinite(values[pick])):
        sums = torch.softmax(values / temperature, 0).cumsum(0)
        at = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
        pick = min(int(torch.searchsorted(sums, at, right=True)), count - 1)
    return Choice(tuple(sorted(sets[pick].tolist())), float(values[pick]))


def map_set(kernel: Tensor, k: int, partition: bool = True) -> Choice:
    """Return the best set: exactly where there are at most EXACT_SETS of them, else by `greedy_map` with polish."""
    n = len(kernel)
    count = _width(n, k) ** k if partition else _binomial(n, k)
    if count <= EXACT_SETS:
        return exhaustive(kernel, k, partition)
    return greedy_map(kernel, k, partition, polish=True)


def independent(n: int, k: int, generator: torch.Generator, partition: bool = True) -> Choice:
    """Return a random candidate of each group, or k random ones without a partition."""
    if partition:
        w = _width(n, k)
        drawn = torch.arange(k) * w + torch.randint(w, (k,), generator=generator)
    else:
        _width(n, k, partition=False)
        drawn = torch.randperm(n, generator=generator)[:k]
    return Choice(tuple(sorted(drawn.tolist())), float("nan"))


def greedy_beam(q: Tensor, k: int, partition: bool = True) -> Choice:
    """Return the candidate of the highest quality q (n,) of each group, or the k best without a partition."""
    if partition:
        w = _width(len(q), k)
        best = q.reshape(k, w).argmax(1) + w * torch.arange(k, device=q.device)
    else:
        _width(len(q), k, partition=False)
        best = q.topk(k).indices
    return Choice(tuple(sorted(best.tolist())), float("nan"))


def diverse_beam(q: Tensor, cosines: Tensor, k: int, alpha: float, partition: bool = True) -> Choice:
    """Return k candidates, each with the largest q - alpha * (mean cosine to those chosen), from the best start.

    q: (n,); cosines: (n, n). The value of a start is the sum of what its candidates had when chosen.

    Source: maximal marginal relevance, Carbonell & Goldstein 1998; several starts as in D5P4's code.
    """
    cosines, w = _pool(cosines, k, partition)
    groups = _groups(cosines, w)
    n, score = len(q), q.double()
    every = torch.arange(n, device=cosines.device)
    taken = torch.zeros(n, n, dtype=torch.bool, device=cosines.device)
    total, alike, chosen = torch.zeros_like(score), torch.zeros_like(cosines), []
    for step in range(k):
        gain = score[None, :] - (alpha / max(1, step)) * alike
        pick = every if step == 0 else gain.masked_fill(taken, -torch.inf).argmax(1)
        total = total + gain[every, pick]
        taken |= groups[None, :] == groups[pick][:, None]
        alike = alike + cosines[pick]
        chosen.append(pick)
    best = int(total.argmax())
    return Choice(tuple(sorted(int(c[best]) for c in chosen)), float("nan"))


def k_dpp(kernel: Tensor, k: int, generator: torch.Generator) -> Choice:
    """Return k candidates drawn from the k-DPP of the kernel (n, n): P(Y) in proportion to det K_Y; no partition.

    Raises DataError when the kernel has a rank below k.

    Source: Kulesza & Taskar 2011: eigenvectors by elementary symmetric polynomials, then one candidate at a time.
    """
    checked, _ = _pool(kernel, k, partition=False)
    values, vectors = torch.linalg.eigh(checked.cpu())
    values = values.clamp_min(0.0)
    if int((values > FLOOR * values.max()).sum()) < k:
        raise DataError(f"the kernel has rank below {k}; a k-DPP needs more different candidates, or jitter")
    kept = vectors[:, _eigenvectors(values / values.max(), k, generator)]
    chosen: list[int] = []
    for _ in range(k):
        weights = (kept * kept).sum(1).clamp_min(0.0)
        weights[chosen] = 0.0
        pick = int(torch.multinomial(weights, 1, generator=generator))
        chosen.append(pick)
        if kept.shape[1] > 1:
            lead = int(kept[pick].abs().argmax())
            rest = kept - torch.outer(kept[:, lead], kept[pick] / kept[pick, lead])
            kept = torch.linalg.qr(rest[:, [i for i in range(kept.shape[1]) if i != lead]])[0]
    indices = tuple(sorted(chosen))
    return Choice(indices, log_det(checked, indices))


def _eigenvectors(values: Tensor, k: int, generator: torch.Generator) -> list[int]:
    """Return which k eigenvectors span the sample, drawn with their elementary symmetric polynomials."""
    n = len(values)
    e = torch.zeros(k + 1, n + 1, dtype=torch.float64)
    e[0] = 1.0
    for j in range(1, k + 1):
        for i in range(1, n + 1):
            e[j, i] = e[j, i - 1] + values[i - 1] * e[j - 1, i - 1]
    found, left = [], k
    for i in range(n, 0, -1):
        if left == 0:
            break
        share = 1.0 if i == left else float(values[i - 1] * e[left - 1, i - 1] / e[left, i])
        if float(torch.rand(1, generator=generator, dtype=torch.float64)) < share:
            found.append(i - 1)
            left -= 1
    return found


def _pool(matrix: Tensor, k: int, partition: bool) -> tuple[Tensor, int]:
    """Return the matrix in float64, contiguous, and how many candidates a group has: one without a partition."""
    n = len(matrix)
    if matrix.shape != (n, n) or n == 0:
        raise DataError(f"a kernel is square; this one has shape {tuple(matrix.shape)}")
    checked = matrix.detach().double().contiguous()
    w = _width(n, k, partition)
    if matrix.device.type == "cpu" and compiled.available() and compiled.usable(checked.numpy()):
        return checked, w
    apart = checked - checked.T
    low, high = (float(end) for end in apart.aminmax())  # NaN where an entry is not finite
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"the kernel has {int((~torch.isfinite(checked)).sum())} entries that are not finite")
    if high > 0.0 and high > 1e-6 * float(checked.abs().max()):
        raise DataError(f"the kernel is not symmetric: entries differ by up to {high:.3g}")
    return (checked + checked.T).mul_(0.5) if high > 0.0 else checked, w


def _groups(matrix: Tensor, w: int) -> Tensor:
    """Return the group of each candidate."""
    return torch.arange(len(matrix), device=matrix.device) // w


def _width(n: int, k: int, partition: bool = True) -> int:
    """Return how many candidates a group has: one without a partition."""
    if not 1 <= k <= n:
        raise KnobError(f"k is {k}; it must be in 1..{n}, the number of candidates")
    if partition and n % k:
        raise KnobError(f"{n} candidates are not {k} groups of equal size")
    return n // k if partition else 1


def _binomial(n: int, k: int) -> int:
    return math.comb(n, k)

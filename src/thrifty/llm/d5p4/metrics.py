"""How good and how different a group of texts is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrifty.errors import DataError, KnobError, need
from thrifty.llm.d5p4.kernels import gram

__all__ = [
    "Perplexity", "bleu", "distinct", "expectation_adjusted_distinct", "f1", "mean_cosine", "pass_at_k", "perplexity",
    "self_bleu", "token_entropy", "vendi", "wasserstein",
]  # fmt: skip

Tokens = Sequence[Hashable]
NLL_CAP = 15.0  # nats a token
MOST_PAIRED = 4096  # embeddings of a set that `wasserstein` takes


def distinct(texts: Sequence[Tokens], n: int = 1) -> float:
    """Return distinct-n: different n-grams of all texts over their number; 0 where there is none.

    >>> distinct([["a", "b"], ["a", "c"]])
    0.75
    """
    if n < 1:
        raise KnobError(f"n is {n}; it must be at least 1")
    grams = [g for text in texts for g in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def expectation_adjusted_distinct(texts: Sequence[Tokens], vocabulary: int) -> float:
    """Return EAD: different tokens over how many C uniform draws from the vocabulary would give.

    Source: Liu et al. 2022: distinct / (V (1 - ((V - 1) / V)^C)); it does not fall with length as distinct-1 does.
    """
    if vocabulary < 1:
        raise KnobError(f"vocabulary is {vocabulary}; it must be at least 1")
    tokens = [t for text in texts for t in text]
    if not tokens:
        return 0.0
    return len(set(tokens)) / (vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** len(tokens)))


def bleu(text: Tokens, references: Sequence[Tokens], longest: int = 4) -> float:
    """Return the sentence BLEU of a text, 0 to 100: clipped n-gram precisions, penalty of the closest reference.

    Orders without an n-gram are left out; the j-th order without a match counts as 1 / 2^j matches (what sacrebleu
    calls effective order and exponential smoothing). No match of single tokens gives 0.
    """
    if not text or not references:
        return 0.0
    logs, halving = [], 1.0
    for n in range(1, longest + 1):
        found = Counter(_ngrams(text, n))
        total = sum(found.values())
        if not total:
            break
        allowed: Counter[tuple[Hashable, ...]] = Counter()
        for reference in references:
            allowed |= Counter(_ngrams(reference, n))
        matches = float(sum((found & allowed).values()))
        if not matches:
            if n == 1:
                return 0.0
            halving *= 2
            matches = 1 / halving
        logs.append(math.log(matches / total))
    closest = min((len(r) for r in references), key=lambda size: (abs(size - len(text)), size))
    penalty = min(0.0, 1 - closest / len(text))
    return 100 * math.exp(penalty + sum(logs) / len(logs))


def self_bleu(texts: Sequence[Tokens], longest: int = 4) -> float:
    """Return the mean BLEU of each text against the others, 0 to 100: low where they differ."""
    _several(len(texts))
    return sum(bleu(t, [*texts[:i], *texts[i + 1 :]], longest) for i, t in enumerate(texts)) / len(texts)


def f1(text: Tokens, references: Sequence[Tokens]) -> float:
    """Return the F1 of tokens in common, each counted as often as it occurs, with the reference that it fits best.

    >>> f1(["a", "b"], [["b", "c"], ["x"]])
    0.5
    """
    best = 0.0
    for reference in references:
        common = sum((Counter(text) & Counter(reference)).values())
        best = max(best, 2 * common / (len(text) + len(reference)) if common else 0.0)
    return best


def token_entropy(text: Tokens) -> float:
    """Return the entropy in nats of the tokens within a text: low where it repeats, so the guard of a perplexity.

    >>> token_entropy(["a", "b", "a", "b"]) == math.log(2)
    True
    """
    counts = Counter(text)
    return -sum(c / len(text) * math.log(c / len(text)) for c in counts.values())


def wasserstein(first: Tensor, second: Tensor) -> float:
    """Return the Wasserstein-1 distance of two sets of embeddings (n, d), (m, d): Euclidean, equal weights, exact.

    Sets of different sizes are repeated to their least common multiple, at most 4096. Raises DataError, KnobError.
    """
    n, m = len(first), len(second)
    if not n or not m or first.shape[1:] != second.shape[1:]:
        raise DataError(f"sets of embeddings of shapes {tuple(first.shape)} and {tuple(second.shape)}")
    size = math.lcm(n, m)
    if size > MOST_PAIRED:
        raise KnobError(
            f"{n} and {m} embeddings repeat to {size}; more than {MOST_PAIRED} take too long: use equal sizes"
        )
    distance = torch.cdist(first.double(), second.double())
    whole = distance.repeat_interleave(size // n, 0).repeat_interleave(size // m, 1)
    rows, columns = need("scipy.optimize", extra="data").linear_sum_assignment(whole.cpu().numpy())
    return float(whole[torch.from_numpy(rows), torch.from_numpy(columns)].mean())


def mean_cosine(embeddings: Tensor) -> float:
    """Return the mean cosine of all pairs of embeddings (n, d)."""
    _several(len(embeddings))
    n = len(embeddings)
    return float((gram(embeddings).sum() - n) / (n * (n - 1)))


def vendi(similarity: Tensor) -> float:
    """Return the Vendi score, 1 (all alike) to n, of similarities (n, n) with ones on the diagonal.

    Source: Friedman & Dieng 2023: exp of the entropy of the eigenvalues of similarity / n.
    """
    n = len(similarity)
    if similarity.shape != (n, n) or n == 0:
        raise DataError(f"similarities are square; these have shape {tuple(similarity.shape)}")
    values = torch.linalg.eigvalsh(similarity.double() / n).clamp_min(0.0)
    return float(torch.exp(-torch.special.xlogy(values, values).sum()))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that k of n tries, of which `correct` succeed, hold a success.

    >>> pass_at_k(10, 3, 1)
    0.3
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise KnobError(f"pass@k of n = {n}, correct = {correct}, k = {k}: 0 <= correct <= n and 1 <= k <= n must hold")
    return (math.comb(n, k) - math.comb(n - correct, k)) / math.comb(n, k)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over texts of their mean negative log-likelihood, with a 95 % interval made in nats."""

    value: float
    low: float
    high: float
    texts: int


def perplexity(texts: Sequence[Any], scorer: Callable[[Any], Tensor]) -> Perplexity:
    """Return the perplexity of texts under a scorer: text -> negative log-likelihoods of its tokens, nats.

    A token counts at most 15 nats. The interval is Student's below 30 texts, normal above, infinite for one text.
    Repetition lowers it: always report it beside diversity. Raises DataError for no texts or a text without tokens.
    """
    means = []
    for number, text in enumerate(texts):
        found = scorer(text).double().flatten()
        if not len(found) or not bool(torch.isfinite(found).all()):
            raise DataError(f"text {number}: the scorer gave {len(found)} numbers, not all finite or none")
        means.append(float(found.clamp_max(NLL_CAP).mean()))
    if not means:
        raise DataError("no texts to score")
    n, mean = len(means), sum(means) / len(means)
    if n == 1:
        return Perplexity(math.exp(mean), 0.0, math.inf, 1)
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / (n - 1) / n)
    times = 1.96 if n >= 30 else float(need("scipy.stats", extra="data").t.ppf(0.975, n - 1))
    return Perplexity(math.exp(mean), math.exp(mean - times * spread), math.exp(mean + times * spread), n)


def _ngrams(text: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _several(n: int) -> None:
    if n < 2:
        raise DataError(f"{n} text(s); pairs need at least 2")

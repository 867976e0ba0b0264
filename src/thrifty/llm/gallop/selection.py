"""Choose the scalars to tune: a score for every eligible weight, and exactly the k highest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import DataError, KnobError, close_to
from thrifty.llm.gallop.eligible import eligible_weights
from thrifty.llm.gallop.gradient import Progress, gradients
from thrifty.llm.gallop.radix import Stream, ordered_bits, top_k
from thrifty.llm.gallop.scores import Score, evaluate, score_of
from thrifty.llm.loading import Encoded

__all__ = ["SCOPES", "Select", "Selection", "select"]

SCOPES = ("global", "block", "tensor")
CHUNK = 1 << 20  # scores in memory at once
INT32_LIMIT = 1 << 31  # flat indices of tensors from this size on are int64


@dataclass(frozen=True)
class Select:
    """How the scalars are chosen. Source: GaLLoP, arXiv 2510.19778; choices that it leaves open are marked (ours)."""

    density: float = 0.01  # share of the eligible weights, in (0, 1]
    count: int | None = None  # this many instead
    score: str = "gallop"  # a key of SCORES
    scope: str = "global"  # where the highest are taken: over all tensors, in each block, in each tensor (ours)
    eps: float = 1e-8  # added to |w|
    patterns: tuple[str, ...] = ()  # of parameter names; none: the 2-D weights of the blocks (ours)
    examples: int = 1024  # size of the slice of data for the gradient, at most all (ours)
    share: float = 0.01  # but at least this share of the data (ours)
    batch: int = 8  # examples a backward pass
    sample: int = 0  # > 0: estimate the threshold from so many scores; the density is then approximate
    one_block_at_a_time: bool = False  # a backward pass over the slice for each block: 1/blocks of the memory
    seed: int = 0  # of the slice, of sampling and of the score "random"

    def __post_init__(self) -> None:
        """Refuse values outside their range, all at once."""
        object.__setattr__(self, "patterns", tuple(self.patterns))
        rules = {
            f"density is {self.density}; it must be in (0, 1]": 0 < self.density <= 1,
            f"count is {self.count}; it must be at least 1": self.count is None or self.count >= 1,
            f"scope is '{self.scope}'; {close_to(str(self.scope), SCOPES)}": self.scope in SCOPES,
            f"eps is {self.eps}; it must be at least 0 and finite": 0 <= self.eps < float("inf"),
            f"examples is {self.examples}; it must be at least 1": self.examples >= 1,
            f"share is {self.share}; it must be in [0, 1]": 0 <= self.share <= 1,
            f"batch is {self.batch}; it must be at least 1": self.batch >= 1,
            f"sample is {self.sample}; it must be 0 or more": self.sample >= 0,
            "sample works with scope = 'global' only": not self.sample or self.scope == "global",
            "one_block_at_a_time works without sample only": not (self.sample and self.one_block_at_a_time),
        }
        bad = [text for text, good in rules.items() if not good]
        if bad:
            raise KnobError("Select: " + "; ".join(bad))
        score_of(self.score)


@dataclass(frozen=True)
class Selection:
    """The chosen scalars: ascending flat indices of each tensor as it is stored (row * columns + column).

    indices: by parameter name, int32 (int64 for tensors of 2^31 entries or more); may be empty.
    """

    indices: dict[str, Tensor] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    settings: Select
    examples: int  # used for the gradient

    @property
    def count(self) -> int:
        """How many scalars are chosen."""
        return sum(len(index) for index in self.indices.values())

    @property
    def eligible(self) -> int:
        """How many scalars could have been chosen."""
        return sum(size_of(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """The realised share of the eligible scalars."""
        return self.count / self.eligible

    def counts(self) -> dict[str, int]:
        """Return how many scalars of each tensor are chosen."""
        return {name: len(index) for name, index in self.indices.items()}

    def rows(self, name: str) -> Tensor:
        """Return the rows of a tensor that hold chosen scalars, ascending."""
        rows: Tensor = torch.unique(self.indices[name].to(torch.int64) // _columns(self.shapes[name]))
        return rows

    def mask(self, name: str) -> Tensor:
        """Return a bool tensor of the weight's shape: what is chosen."""
        flat = torch.zeros(size_of(self.shapes[name]), dtype=torch.bool)
        flat[self.indices[name].to(torch.int64)] = True
        return flat.view(self.shapes[name])

    def summary(self) -> dict[str, Any]:
        """Return what a report needs, JSON."""
        rows = {name: len(self.rows(name)) / max(1, shape[0]) for name, shape in self.shapes.items()}
        return {
            "count": self.count,
            "eligible": self.eligible,
            "density": self.density,
            "examples": self.examples,
            "tensors_without": sum(not n for n in self.counts().values()),
            "mean_share_of_rows": sum(rows.values()) / max(1, len(rows)),
            **{f"settings_{k}": v for k, v in asdict(self.settings).items()},
        }


def select(
    model: nn.Module,
    encoded: Sequence[Encoded] = (),
    settings: Select | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Return the scalars with the highest scores; the model is as before afterwards, and so is the random state.

    encoded: the training data, of which a slice gives the gradient (scores of magnitude only need none).
    Raises KnobError, NoMatch, DataError (no data, a score that is no number, with the tensor's name) and
    UnsupportedModel (tied, shared, quantised weights; unknown families).
    """
    settings = settings or Select()
    weights = eligible_weights(model, settings.patterns)
    score = score_of(settings.score)
    data = _slice(encoded, settings, score)
    sizes = {name: p.numel() for name, p in weights.items()}
    budget = _budget(settings, sum(sizes.values()))
    make = _Scores(model, weights, score, settings, data, progress)
    found = _sampled(make, budget / sum(sizes.values())) if settings.sample else _exact(make, budget)
    return Selection(
        indices={name: _stored(found.get(name), size) for name, size in sizes.items()},
        shapes={name: tuple(p.shape) for name, p in weights.items()},
        settings=settings,
        examples=len(data),
    )


def _slice(encoded: Sequence[Encoded], settings: Select, score: Score) -> list[Encoded]:
    """Return the examples that the gradient is taken of, in the order of the data."""
    if score.needs not in ("mean", "square"):
        return []
    if not encoded:
        raise DataError(f"the score '{settings.score}' needs examples for its gradient; give some")
    n = min(len(encoded), max(settings.examples, round(settings.share * len(encoded))))
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(settings.seed))[:n]
    return [encoded[i] for i in sorted(order.tolist())]


def _budget(settings: Select, eligible: int) -> int:
    """Return how many scalars are chosen."""
    k = round(settings.density * eligible) if settings.count is None else settings.count
    if not 1 <= k <= eligible:
        raise KnobError(f"{k} of {eligible} eligible weights cannot be chosen; set density or count to give 1 to all")
    return k


def _stored(indices: Tensor | None, size: int) -> Tensor:
    kind = torch.int32 if size < INT32_LIMIT else torch.int64
    return torch.zeros(0, dtype=kind) if indices is None else indices.to(kind)


@dataclass
class _Scores:
    """Makes streams of scores for groups of tensors."""

    model: nn.Module
    weights: dict[str, nn.Parameter]
    score: Score
    settings: Select
    data: list[Encoded]
    progress: Progress | None

    def groups(self) -> dict[str, list[str]]:
        """Return the tensors that compete with each other: by scope."""
        found: dict[str, list[str]] = {}
        for name in self.weights:
            keys = {"global": "", "tensor": name, "block": block_of(name)}
            found.setdefault(keys[self.settings.scope], []).append(name)
        return found

    def gradients(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return what the score needs besides the weights."""
        some = {name: self.weights[name] for name in names}
        if self.score.needs == "nothing":
            return dict(some)
        if self.score.needs == "random":
            return {
                name: _random(i, p, self.settings.seed)
                for i, (name, p) in enumerate(self.weights.items())
                if name in some
            }
        square = self.score.needs == "square"
        return gradients(self.model, some, self.data, self.settings.batch, square, progress=self.progress)

    def stream(self, gradient: Mapping[str, Tensor]) -> Stream:
        """Return the scores of the tensors in `gradient`, in the order of the model. Refuses NaN and infinity."""

        def run() -> Iterator[tuple[str, int, Tensor]]:
            for name, g in gradient.items():
                weight = self.weights[name].detach().flatten()
                flat = g.detach().flatten()
                for start in range(0, len(weight), CHUNK):
                    part = slice(start, start + CHUNK)
                    there = weight[part].to(flat.device)
                    scores = evaluate(self.score, there, flat[part], self.settings.eps)
                    if not bool(scores.isfinite().all()):
                        raise DataError(_not_finite(name, there, flat[part]))
                    yield name, start, scores

        return run


def _not_finite(name: str, weight: Tensor, gradient: Tensor) -> str:
    what = "its weights" if not bool(weight.isfinite().all()) else "its gradient"
    if bool(weight.isfinite().all()) and bool(gradient.isfinite().all()):
        what = "a score (zero weights need eps > 0)"
    return f"{name}: {what} holds NaN or infinity; no entry can be ranked. Check the checkpoint and the data"


def _random(index: int, p: Tensor, seed: int) -> Tensor:
    """Return uniform numbers for a tensor: they depend on the seed and the tensor's place only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.rand(p.shape, generator=generator)


def _exact(make: _Scores, budget: int) -> dict[str, Tensor]:
    """Return exactly `budget` indices, shared over the groups by their size."""
    groups = make.groups()
    sizes = {key: sum(make.weights[n].numel() for n in names) for key, names in groups.items()}
    budgets = share_out(budget, sizes)
    if make.settings.one_block_at_a_time:
        return _block_by_block(make, groups, budgets)
    gradient = make.gradients(make.weights)
    found: dict[str, Tensor] = {}
    for key, names in groups.items():
        found |= top_k(make.stream({name: gradient[name] for name in names}), budgets[key])
    return found


def _block_by_block(make: _Scores, groups: Mapping[str, list[str]], budgets: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the same with one block's gradients in memory at a time: each block's own best are the candidates."""
    group_of = {name: key for key, names in groups.items() for name in names}
    blocks: dict[str, list[str]] = {}
    for name in make.weights:
        blocks.setdefault(block_of(name), []).append(name)
    kept: dict[str, list[tuple[str, Tensor, Tensor]]] = {key: [] for key in groups}
    for names in blocks.values():
        gradient = make.gradients(names)
        for key in dict.fromkeys(group_of[name] for name in names):
            own = {name: gradient[name] for name in names if group_of[name] == key}
            k = min(budgets[key], sum(g.numel() for g in own.values()))
            best = top_k(make.stream(own), k)
            for name, indices in best.items():
                w, g = make.weights[name].detach().flatten().cpu()[indices], own[name].flatten().cpu()[indices]
                kept[key].append((name, indices, evaluate(make.score, w, g, make.settings.eps)))
    found: dict[str, Tensor] = {}
    for key, candidates in kept.items():
        places = {name: indices for name, indices, _ in candidates}
        stream = [(name, 0, scores) for name, _, scores in candidates]
        best = top_k(lambda stream=stream: stream, budgets[key])  # type: ignore[misc]
        found |= {name: places[name][where] for name, where in best.items()}
    return found


def _sampled(make: _Scores, density: float) -> dict[str, Tensor]:
    """Return what reaches the (1 - density) quantile of a sample of scores, tensors drawn in proportion to their size.

    The realised density has a relative standard error of about sqrt((1 - density) / (density * sample)).
    """
    gradient = make.gradients(make.weights)
    share = make.settings.sample / sum(p.numel() for p in make.weights.values())
    generator = torch.Generator().manual_seed(make.settings.seed)
    stream = make.stream(gradient)
    drawn = []
    for _, _, scores in stream():
        n = max(1, round(share * len(scores)))
        drawn.append(scores[torch.randint(len(scores), (n,), generator=generator).to(scores.device)].cpu())
    bits = ordered_bits(torch.cat(drawn)).sort(descending=True).values
    limit = bits[max(0, min(len(bits), round(density * len(bits))) - 1)]
    found: dict[str, list[Tensor]] = {}
    for name, start, scores in stream():
        chosen = (ordered_bits(scores) >= limit.to(scores.device)).nonzero().flatten().cpu() + start
        if len(chosen):
            found.setdefault(name, []).append(chosen)
    return {name: torch.cat(parts) for name, parts in found.items()}


def share_out(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return whole numbers in proportion to the sizes that add up to the total: largest remainders first.

    >>> share_out(4, {"a": 10, "b": 10, "c": 10})
    {'a': 2, 'b': 1, 'c': 1}
    """
    whole = sum(sizes.values())
    given = {key: total * size // whole for key, size in sizes.items()}
    rest = sorted(sizes, key=lambda key: -(total * sizes[key] % whole))
    for key in rest[: total - sum(given.values())]:
        given[key] += 1
    return given


def block_of(name: str) -> str:
    """Return the block that a parameter belongs to, "model.layers.3"; the whole name where it is in none."""
    words = name.split(".")
    places = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: places[0] + 1]) if places else name


def size_of(shape: Sequence[int]) -> int:
    """Return how many entries a shape has."""
    size = 1
    for n in shape:
        size *= n
    return size


def _columns(shape: Sequence[int]) -> int:
    return max(1, size_of(shape[1:]))
